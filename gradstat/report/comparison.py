"""The report of two runs beside each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstat._run_view import RunView
from gradstat.report.figure import (
    Figure,
    Trace,
    layer_axis,
    layer_height,
    line,
    step_axis,
    value_axis,
)
from gradstat.report.over_layers import dots, median_of
from gradstat.report.over_steps import finite_log10, level, loss_lines
from gradstat.report.page import fill
from gradstat.report.reduce import kept_points
from gradstat.report.run_report import NO_STEP, NOTHING_FOUND
from gradstat.report.saved import Report
from gradstat.report.sections import Section
from gradstat.report.summary import Summary, Told, findings_of, flat, summarise
from gradstat.report.text import course, duration, listed, number, percent, plain, plural

_LETTERS = ("A", "B")
_COLOURS = ("--blue", "--orange")


@dataclass(frozen=True)
class _Side:
    """One of the two runs, read once."""

    label: str
    color: str
    summary: Summary
    findings: list[Told]
    steps: dict[str, NDArray[Any]]
    names: list[str]
    rms: NDArray[np.float64]
    """(s, layers)"""

    ratio: tuple[NDArray[np.int64], NDArray[np.float64]] | None
    facts: dict[str, str]

    @property
    def quiet(self) -> str:
        return NOTHING_FOUND if self.summary.steps else NO_STEP


def comparison_of(first: RunView, second: RunView) -> Report:
    """Return the comparison of two runs that are open."""
    a, b = sides = tuple(
        _side(run, letter, color)
        for run, letter, color in zip((first, second), _LETTERS, _COLOURS, strict=True)
    )
    names = list(dict.fromkeys([*a.names, *b.names]))
    made = [_losses(sides), _norms(sides), _flows(sides, names), _updates(sides)]
    numbers = _key_numbers(a.summary, b.summary)
    differences = _differences(a.facts, b.facts)
    build = partial(
        fill,
        "compare.html",
        names,
        [figure for section in made for figure in section.figures],
        sides=sides,
        numbers=numbers,
        differences=differences,
        sections=made,
        links=[
            ("findings", "Findings"),
            ("differences", "Differences"),
            *((section.id, section.link) for section in made),
        ],
    )
    values = {
        "runs": [side.summary.to_dict() for side in sides],
        "differences": {name: list(pair) for name, *pair in differences},
        "findings": [flat(side.findings) for side in sides],
    }
    return Report(build, values, _text(sides, numbers, differences), [first.path, second.path])


def _side(run: RunView, letter: str, color: str) -> _Side:
    steps = run.steps
    summary = summarise(run, steps)
    return _Side(
        f"{letter}: {summary.name}",
        color,
        summary,
        findings_of(run),
        steps,
        [layer.name for layer in run.layers],
        run.tables(("rms",))[1]["rms"],
        run.update_ratio(),
        dict(_flattened("", run.meta)),
    )


def _key_numbers(a: Summary, b: Summary) -> list[tuple[str, str, str]]:
    shown: list[tuple[str, Callable[[Summary], str]]] = [
        ("Status", lambda s: s.status),
        ("Steps", lambda s: f"{s.steps:,}"),
        ("Final loss", lambda s: number(s.final_loss)),
        ("Lowest loss", lambda s: number(s.lowest_loss)),
        ("Total norm at the last step", lambda s: number(s.final_norm)),
        ("Clip rate", lambda s: percent(s.clip_rate)),
        ("Skipped steps", lambda s: f"{s.skipped:,}"),
        ("Steps not kept", lambda s: f"{s.dropped:,}"),
        ("Layers", lambda s: f"{s.layers:,}"),
        ("Elements", lambda s: f"{s.parameters:,}"),
        ("Duration", lambda s: duration(s.seconds)),
    ]
    return [(name, text(a), text(b)) for name, text in shown]


def _flattened(prefix: str, given: dict[str, Any]) -> list[tuple[str, str]]:
    """Return nested facts as dotted names with text."""
    pairs: list[tuple[str, str]] = []
    for key, value in given.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            pairs += _flattened(f"{name}.", value)
        else:
            pairs.append((name, str(value)[:300]))
    return pairs


def _differences(a: dict[str, str], b: dict[str, str]) -> list[tuple[str, str, str]]:
    names = dict.fromkeys([*a, *b])
    return [
        (name, a.get(name, "-"), b.get(name, "-")) for name in names if a.get(name) != b.get(name)
    ]


def _losses(sides: tuple[_Side, ...]) -> Section:
    told = [side for side in sides if np.isfinite(side.steps["loss"]).any()]
    traces: list[Trace] = []
    for side in told:
        traces += loss_lines(plain(side.label), side.steps["step"], side.steps["loss"], side.color)
    layout = {
        "xaxis": step_axis(*(side.steps["step"] for side in sides)),
        "yaxis": value_axis("loss", *(side.steps["loss"] for side in told)),
    }
    figure = Figure("loss", "Loss of both runs over steps", traces, layout)
    reading = tuple(
        f"{side.label}. {course(side.steps['loss'], side.steps['step'])}" for side in told
    )
    about = "A long curve is drawn as its running mean, with the loss of each step pale behind it."
    missing = "" if told else "No finite loss was observed in either run."
    return Section("loss", "Loss", "Loss", about, reading, (figure,) if told else (), missing)


def _norms(sides: tuple[_Side, ...]) -> Section:
    told = [side for side in sides if np.isfinite(side.steps["total_norm"]).any()]
    traces: list[Trace] = []
    for side in told:
        step, norm, threshold = (side.steps[k] for k in ("step", "total_norm", "clip_threshold"))
        keep = kept_points(norm)
        traces.append(line(plain(side.label), step[keep], norm[keep], side.color, width=1.2))
        if np.isfinite(threshold).any():
            keep = kept_points(threshold)
            dashed = {"line": {"color": side.color, "dash": "dash", "shape": "hv", "width": 1.6}}
            name = f"{side.label[:1]}: clip threshold"
            traces.append(line(name, step[keep], threshold[keep], side.color) | dashed)
    layout = {
        "xaxis": step_axis(*(side.steps["step"] for side in sides)),
        "yaxis": value_axis("total norm", *(side.steps["total_norm"] for side in told)),
    }
    figure = Figure("norm", "Total norm of both runs over steps", traces, layout)
    reading = tuple(
        f"{side.label}. Median {number(float(np.nanmedian(_finite(side.steps['total_norm']))))}, "
        f"{percent(side.summary.clip_rate)} clipped, {side.summary.skipped:,} skipped."
        for side in told
    )
    about = "The norm of all gradients together before clipping, and the norm that was allowed."
    missing = "" if told else "No total norm was recorded in either run."
    figures = (figure,) if told else ()
    return Section("norm", "Total norm", "Total norm", about, reading, figures, missing)


def _flows(sides: tuple[_Side, ...], names: list[str]) -> Section:
    place = {name: index for index, name in enumerate(names)}
    traces: list[Trace] = []
    for side, symbol in zip(sides, ("circle", "diamond-open"), strict=True):
        if not side.rms.size:
            continue
        middle = np.full(len(names), np.nan)
        newest = side.rms[-max(len(side.rms) // 5, 1) :]
        middle[[place[name] for name in side.names]] = median_of(newest)
        traces.append(dots(plain(side.label), middle, np.isfinite(middle), side.color, symbol, 7))
    layout = {
        "xaxis": {
            "title": {"text": "rms of the gradient"},
            "type": "log",
            "exponentformat": "power",
        },
        "yaxis": layer_axis(len(names)),
        "hovermode": "closest",
    }
    a, b = sides
    reading = []
    for side, other in ((a, b), (b, a)):
        only = [name for name in side.names if name not in set(other.names)]
        if only and other.names:
            reading.append(
                f"Only {side.label[:1]} has {plural(len(only), 'layer')}: {listed(only)}."
            )
    figure = Figure(
        "flow", "Gradient of each layer in both", traces, layout, layer_height(len(names))
    )
    about = (
        "Median rms of each layer's gradient over the newest fifth of the recorded steps, the "
        "first layer of the model on top."
    )
    missing = "" if traces else "No layer tables were recorded in either run."
    figures = (figure,) if traces else ()
    title = "Gradient flow"
    return Section("flow", title, title, about, tuple(reading), figures, missing)


def _updates(sides: tuple[_Side, ...]) -> Section:
    traces: list[Trace] = []
    seen: list[NDArray[np.int64]] = []
    for side in sides:
        if side.ratio is None:
            continue
        steps, ratio = side.ratio
        logs = finite_log10(ratio)
        known = np.isfinite(logs).any(axis=1)
        if known.any():
            middle = np.nanmedian(logs[known], axis=1)
            keep = kept_points(middle)
            traces.append(
                line(plain(side.label), steps[known][keep], middle[keep], side.color, width=2.0)
            )
            seen.append(steps)
    layout = {
        "xaxis": step_axis(*seen),
        "yaxis": {"title": {"text": "log10 of update / weight"}},
        "shapes": [level(-3, horizontal=True)],
    }
    label = "Update-to-weight ratio of the median layer in both runs"
    figure = Figure("updates", label, traces, layout, 340)
    about = "The median layer; about 1e-3, the dashed line at -3, is usual (Karpathy, cs231n)."
    missing = "" if traces else "Updates were recorded in neither run. A run log holds them:"
    figures = (figure,) if traces else ()
    command = "gradstat.attach(optimizer, model, log=...)"
    title = "Update-to-weight ratio"
    return Section("updates", title, "Updates", about, (), figures, missing, command)


def _finite(values: NDArray[Any]) -> NDArray[np.float64]:
    return np.where(np.isfinite(values), values, np.nan)


def _text(
    sides: tuple[_Side, ...],
    numbers: list[tuple[str, str, str]],
    differences: list[tuple[str, str, str]],
) -> str:
    rows = [("", *(side.label for side in sides)), *numbers]
    rows += [(f"{name} *", a, b) for name, a, b in differences]
    rows = [tuple(cell if len(cell) <= 40 else f"{cell[:37]}..." for cell in row) for row in rows]
    widths = [max(len(row[place]) for row in rows) for place in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    if differences:
        lines.append("* set-up that differs")
    for side in sides:
        lines += ["", f"{side.label}: " + ("findings" if side.findings else side.quiet)]
        lines += [str(told.finding) for root in side.findings for told in (root, *root.symptoms)]
    return "\n".join(lines)
