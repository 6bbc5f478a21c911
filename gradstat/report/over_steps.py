"""Charts of a run's course: loss, learning rate, total norm with clipping."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstat.report.figure import Figure, Trace, line, step_axis, value_axis
from gradstat.report.reduce import kept_points, kept_steps, packed, smoothed
from gradstat.report.text import plain, short

_RAW_POINTS = 200
"""Steps from which on a loss is drawn smoothed over its raw values."""

COLOURS = ("--blue", "--orange", "--green", "--purple", "--brown", "--pink", "--grey")


def loss_figure(steps: dict[str, NDArray[Any]], scalars: dict[str, Any]) -> Figure | None:
    """Return training and other losses over steps, with the learning rate where it changes."""
    step, loss = steps["step"], steps["loss"]
    curves = {name: curve for name, curve in scalars.items() if "loss" in name and name != "loss"}
    traces: list[Trace] = []
    if np.isfinite(loss).any():
        traces += loss_lines("loss", step, loss, "--blue")
    for place, (name, (at, values)) in enumerate(curves.items(), 1):
        keep = kept_points(values)
        color = COLOURS[place % len(COLOURS)]
        marked = {"mode": "lines+markers"}
        traces.append(line(plain(name), at[keep], values[keep], color) | marked)
    if not traces:
        return None
    layout: dict[str, Any] = {
        "xaxis": step_axis(step),
        "yaxis": value_axis("loss", loss, *(values for _, values in curves.values())),
    }
    height = 360
    lr = steps["lr"]
    finite = lr[np.isfinite(lr)]
    if finite.size and finite.min() != finite.max():
        keep = kept_points(lr)
        traces.append(line("learning rate", step[keep], lr[keep], "--grey") | {"yaxis": "y2"})
        layout["yaxis"] |= {"domain": [0.32, 1.0]}
        layout["yaxis2"] = {
            "domain": [0.0, 0.2],
            "title": {"text": "lr"},
            "rangemode": "tozero",
            "nticks": 3,
            "exponentformat": "e",
        }
        layout["xaxis"]["anchor"] = "y2"
        height = 440
    return Figure("loss", "Loss over steps", traces, layout, height)


def loss_lines(name: str, step: NDArray[Any], loss: NDArray[Any], color: str) -> list[Trace]:
    """Return a loss as a line; a long one as its running mean before the raw values."""
    keep = kept_points(loss)
    if len(loss) < _RAW_POINTS:
        return [line(name, step[keep], loss[keep], color)]
    mean = smoothed(loss)
    fewer = np.unique(np.linspace(0, len(loss) - 1, 600).astype(int))
    hidden = {"showlegend": False, "opacity": 0.5, "legendgroup": name}
    return [
        line(f"{name}, each step", step[keep], loss[keep], color, width=1.0) | hidden,
        line(name, step[fewer], mean[fewer], color, width=2.2) | {"legendgroup": name},
    ]


def norm_figure(steps: dict[str, NDArray[Any]]) -> Figure | None:
    """Return the total norm with what clipping allowed, and where it clipped and skipped."""
    step, norm = steps["step"], steps["total_norm"]
    threshold, skipped = steps["clip_threshold"], steps["skipped"].astype(bool)
    if not (np.isfinite(norm).any() or skipped.any()):
        return None
    keep = kept_points(norm)
    traces = [line("total norm", step[keep], norm[keep], "--blue", width=1.2)]
    if np.isfinite(threshold).any():
        at = kept_points(threshold)
        dashed = {"line": {"color": "--orange", "width": 1.8, "dash": "dash", "shape": "hv"}}
        traces.append(line("clip threshold", step[at], threshold[at], "--orange") | dashed)
    clipped = is_clipped(steps)
    if clipped.any():
        traces.append(_marks("clipped", kept_steps(step[clipped]), 1, "--orange"))
    if skipped.any():
        traces.append(_marks("skipped", kept_steps(step[skipped]), 0, "--red"))
    layout = {
        "xaxis": step_axis(step, anchor="y2"),
        "yaxis": value_axis("total norm", norm, threshold) | {"domain": [0.2, 1.0]},
        "yaxis2": {
            "domain": [0.0, 0.12],
            "range": [-0.6, 1.6],
            "tickvals": [0, 1],
            "ticktext": ["skipped", "clipped"],
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        },
    }
    return Figure("norm", "Total norm of the gradients over steps", traces, layout, 420)


def is_clipped(steps: dict[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Return which steps were clipped, and not skipped."""
    clipped: NDArray[np.bool_] = (steps["clip_coef"] < 1.0) & ~steps["skipped"].astype(bool)
    return clipped


def activation_figures(sites: dict[str, Any], shown: int = 7) -> list[Figure]:
    """Return the shares of dead and of saturated units over steps, of the sites with the most."""
    figures = []
    for key, title in (("dead", "dead units"), ("saturated", "saturated outputs")):
        shares = {name: site_share(site, key) for name, site in sites.items()}
        worst = sorted(shares, key=lambda name: float(np.nan_to_num(shares[name][-1:]).sum()))
        chosen = worst[::-1][:shown]
        traces = []
        for place, name in enumerate(name for name in shares if name in chosen):
            values, at = shares[name], sites[name]["step"]
            keep = kept_points(values, 300)
            traces.append(
                line(plain(short(name)), at[keep], values[keep], COLOURS[place % len(COLOURS)])
                | {"hovertemplate": "%{y:.1%}", "showlegend": True}
            )
        axis = {"title": {"text": title}, "tickformat": ".0%", "rangemode": "tozero"}
        label = f"Share of {title} over steps"
        figures.append(
            Figure(
                key,
                label,
                traces,
                {"xaxis": step_axis(*(site["step"] for site in sites.values())), "yaxis": axis},
                340,
            )
        )
    return figures


def site_share(site: dict[str, Any], key: str) -> NDArray[np.float64]:
    """Return the share of dead units or of saturated outputs of a site over its steps."""
    if key == "saturated":
        return np.asarray(site["saturated_low"] + site["saturated_high"], np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(site["dead_units"] / np.asarray(site["units"], np.float64))


def update_course(steps: NDArray[Any], ratio: NDArray[np.float64]) -> Figure:
    """Return the spread over layers of log10 of the update ratio, with the line at -3."""
    logs = finite_log10(ratio)
    some = np.isfinite(logs).any(axis=1)
    steps, logs = steps[some], logs[some]
    low, middle, high = np.nanquantile(logs, [0.1, 0.5, 0.9], axis=1)
    keep = kept_points(middle)
    invisible = {"line": {"width": 0, "color": "--blue"}, "mode": "lines", "showlegend": False}
    fill = {"fill": "tonexty", "fillcolor": "--band", "name": "middle 80 % of the layers"}
    traces = [
        line("10 % of the layers below", steps[keep], low[keep], "--blue") | invisible,
        line("90 % of the layers below", steps[keep], high[keep], "--blue")
        | invisible
        | fill
        | {"showlegend": True},
        line("median layer", steps[keep], middle[keep], "--blue", width=2.2),
    ]
    layout = {
        "xaxis": step_axis(steps),
        "yaxis": {"title": {"text": "log10 of update / weight"}},
        "shapes": [level(-3, horizontal=True)],
    }
    label = "Update-to-weight ratio over steps: the median layer and the middle 80 %"
    return Figure("updates", label, traces, layout, 340)


def level(value: float, *, horizontal: bool) -> dict[str, Any]:
    """Return a dashed line across a chart."""
    across, along = ("x", "y") if horizontal else ("y", "x")
    return {
        "type": "line",
        f"{across}ref": "paper",
        f"{across}0": 0,
        f"{across}1": 1,
        f"{along}0": value,
        f"{along}1": value,
        "line": {"color": "--green", "width": 1.5, "dash": "dash"},
    }


def finite_log10(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log10, NaN where it is not finite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(values)
    return np.where(np.isfinite(logs), logs, np.nan)


def _marks(name: str, steps: NDArray[Any], row: int, color: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": packed(steps, "int32"),
        "y": packed(np.full(len(steps), row), "uint8"),
        "yaxis": "y2",
        "marker": {"symbol": "line-ns-open", "size": 9, "color": color},
        "hovertemplate": name,
        "showlegend": False,
    }
