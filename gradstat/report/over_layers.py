"""Charts with a row for each layer: gradient flow, heat map, last updates, histograms."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradstat.report.figure import Figure, Trace, layer_axis, layer_height, value_axis
from gradstat.report.over_steps import finite_log10, level
from gradstat.report.reduce import HeatMap, packed

Floats = NDArray[np.float64]

_MAX_SPREADS = 600
"""Layers up to which each shows its spread over time."""


def flow_figure(rms: Floats, largest: Floats, matrices: NDArray[np.bool_]) -> Figure:
    """Return typical and largest gradient of each layer, over the newest recorded steps.

    Args:
        rms: (s, layers), root mean square of each layer's gradient at the steps taken.
        largest: As ``rms``, its largest magnitude.
        matrices: (layers,), whether a layer has two dimensions or more.
    """
    count = rms.shape[1]
    middle = median_of(rms)
    traces: list[Trace] = [
        dots("largest element", median_of(largest), np.full(count, True), "--grey", "diamond", 4)
    ]
    if count <= _MAX_SPREADS:
        low, high = _extent(rms)
        traces.append(_spreads(low, high))
    if not matrices.all():
        traces.append(dots("biases, norms (rms)", middle, ~matrices, "--orange", "circle-open", 6))
    traces.append(dots("weights (rms)", middle, matrices, "--blue", "circle", 7))
    layout = {
        "xaxis": value_axis("gradient", rms, largest) | {"type": "log"},
        "yaxis": layer_axis(count),
        "hovermode": "closest",
    }
    label = "Typical and largest gradient of each layer, in the order of the model"
    return Figure("flow", label, traces, layout, layer_height(count))


def heat_figure(heat: HeatMap) -> Figure:
    """Return the heat map of log10 norms, layers by steps."""
    count = len(heat.codes)
    spread = heat.codes[(heat.codes > 1) & (heat.codes < 255)]
    low, high = np.percentile(spread, [1, 99.8]) if spread.size else (1, 254)
    scale = (heat.high - heat.low) / 253
    layout = {
        "xaxis": {"title": {"text": "step"}, "tickformat": ",d", "showgrid": False},
        "yaxis": layer_axis(count),
        "hovermode": "closest",
    }
    extra = {
        "heat": {
            "codes": base64.b64encode(heat.codes.tobytes()).decode(),
            "columns": heat.codes.shape[1],
            "first": heat.first_step,
            "width": heat.step_width,
            "low": heat.low,
            "scale": scale,
            "zmin": heat.low + (float(low) - 1) * scale,
            "zmax": heat.low + (max(float(high), float(low) + 1) - 1) * scale,
        }
    }
    label = "Gradient norm of each layer over steps, as colour"
    return Figure("heat", label, [], layout, layer_height(count), extra)


def layer_updates(ratio: Floats) -> Figure:
    """Return log10 of each layer's update ratio over the steps taken, with the line at -3."""
    logs = finite_log10(ratio)
    count = logs.shape[1]
    traces = [dots("median", median_of(logs), np.full(count, True), "--blue", "circle", 7)]
    if count <= _MAX_SPREADS:
        traces.insert(0, _spreads(*_extent(logs)))
    layout = {
        "xaxis": {"title": {"text": "log10 of update / weight"}},
        "yaxis": layer_axis(count),
        "shapes": [level(-3, horizontal=False)],
        "hovermode": "closest",
        "showlegend": False,
    }
    label = "Update-to-weight ratio of each layer, in the order of the model"
    return Figure("layer-updates", label, traces, layout, layer_height(count))


def histogram_figure(names: Sequence[str], first: Floats, last: Floats) -> Figure:
    """Return the magnitudes of one layer's gradient, to be chosen on the page.

    Args:
        names: Layers to choose from.
        first: (layers, 256), counts by binary exponent when they were first recorded.
        last: As ``first``, the newest.
    """
    shares = [
        counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0) for counts in (first, last)
    ]
    used = np.flatnonzero((shares[0] + shares[1]).sum(axis=0))
    low, high = (int(used[0]), int(used[-1]) + 1) if used.size else (126, 128)
    both = np.stack(shares, axis=1)[..., low:high]
    layout = {
        "xaxis": {"title": {"text": "log2 of magnitude"}, "showgrid": False},
        "yaxis": {
            "title": {"text": "share of elements"},
            "tickformat": ".0%",
            "rangemode": "tozero",
        },
        "bargap": 0.05,
    }
    extra = {
        "histograms": {
            "names": list(names),
            "shares": packed(both * 65535, "uint16"),
            "bins": high - low,
            "first": low - 127,
        }
    }
    return Figure("histogram", "Magnitudes of a layer's gradient", [], layout, 320, extra)


def dots(
    name: str, values: Floats, chosen: NDArray[np.bool_], color: str, symbol: str, size: int
) -> Trace:
    """Return a dot for each of the chosen layers; page.js adds their names."""
    places = np.flatnonzero(chosen)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": packed(values[places], "float64"),
        "y": packed(places, "int32"),
        "marker": {
            "color": color,
            "symbol": symbol,
            "size": size,
            "line": {"width": 1.5, "color": color},
        },
        "named": True,
    }


def _spreads(low: Floats, high: Floats) -> Trace:
    """Return a thin bar for each layer, as one line with gaps."""
    x = np.stack([low, high, np.full(len(low), np.nan)], axis=1).ravel()
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "range",
        "x": packed(x, "float64"),
        "y": packed(np.repeat(np.arange(len(low)), 3), "int32"),
        "line": {"color": "--band", "width": 5},
        "hoverinfo": "skip",
    }


def median_of(values: Floats) -> Floats:
    """Return the median over steps of each layer's finite values, (layers,); NaN where none is."""
    known = np.isfinite(values).any(axis=0)
    result = np.full(values.shape[1], np.nan)
    result[known] = np.nanmedian(np.where(np.isfinite(values), values, np.nan)[:, known], axis=0)
    return result


def _extent(values: Floats) -> tuple[Floats, Floats]:
    finite = np.isfinite(values)
    low = np.where(finite, values, np.inf).min(axis=0, initial=np.inf)
    high = np.where(finite, values, -np.inf).max(axis=0, initial=-np.inf)
    known = finite.any(axis=0)
    return np.where(known, low, np.nan), np.where(known, high, np.nan)
