"""Series and tables made small enough for a page, without losing their spikes."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 2000
"""Points of a line; a screen has about as many columns."""

MAX_CELLS = 500_000
"""Cells of a heat map, a byte each."""

MAX_COLUMNS = 1000

MISSING, NONFINITE = 0, 255
"""Codes of a heat map's cells that hold no magnitude; the others count levels from 1."""

_LEVELS = 254


def packed(values: Any, dtype: str = "float32") -> dict[str, Any]:
    """Return an array in plotly's base64 form; values beyond the dtype's range become NaN."""
    array = np.asarray(values, dtype=np.float64)
    if dtype == "float32":
        array = np.where(np.abs(array) < np.finfo(np.float32).max, array, np.nan)
    codes = {"float32": "f4", "float64": "f8", "int32": "i4", "uint16": "u2", "uint8": "u1"}
    data = np.ascontiguousarray(array.astype(dtype)).tobytes()
    return {"dtype": codes[dtype], "bdata": base64.b64encode(data).decode()}


def kept_points(values: NDArray[Any], limit: int = MAX_POINTS) -> NDArray[np.int64]:
    """Return the places of a series to draw: smallest and largest of each of ``limit / 3`` parts.

    Of a part that holds NaN or Inf, the first of them is kept too, so that the line has its gap.
    """
    count = len(values)
    if count <= limit:
        return np.arange(count)
    length = -(-count // (limit // 3))
    padded = np.full(-(-count // length) * length, np.nan)
    padded[:count] = values
    parts = padded.reshape(-1, length)
    finite = np.isfinite(parts)
    starts = np.arange(len(parts)) * length
    places = [
        [0, count - 1],
        starts + np.where(finite, parts, np.inf).argmin(axis=1),
        starts + np.where(finite, parts, -np.inf).argmax(axis=1),
        (starts + (~finite).argmax(axis=1))[~finite.all(axis=1)],
    ]
    found = np.unique(np.concatenate(places))
    return found[found < count]


def kept_steps(steps: NDArray[np.int64], limit: int = MAX_POINTS) -> NDArray[np.int64]:
    """Return the first of the steps in each of at most ``limit`` equal ranges."""
    if len(steps) <= limit:
        return steps
    ranges = (steps - steps[0]) * limit // (steps[-1] - steps[0] + 1)
    return steps[np.unique(ranges, return_index=True)[1]]


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of the finite values in a window of a fiftieth of the series."""
    half = max(len(values) // 100, 2)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        means: NDArray[np.float64] = (sums[high] - sums[low]) / (counts[high] - counts[low])
    return np.where(finite, means, np.nan)


@dataclass(frozen=True)
class HeatMap:
    """Magnitudes of layers over steps, as one byte a cell: log10 in 254 levels."""

    first_step: int
    step_width: int
    """Steps that a column stands for; it shows the largest magnitude among them."""

    codes: NDArray[np.uint8]
    """(layers, columns)"""

    low: float
    """log10 of the magnitude of level 1, which zeros share."""

    high: float
    """log10 of the magnitude of the highest level."""

    @property
    def nonfinite(self) -> int:
        """Cells with a NaN or Inf."""
        return int((self.codes == NONFINITE).sum())


def heat_map(
    steps: NDArray[np.int64], values: NDArray[np.float64], nonfinite: NDArray[np.bool_]
) -> HeatMap:
    """Return magnitudes as a heat map of at most `MAX_CELLS` cells.

    Args:
        steps: (s,), ascending, at least one.
        values: (s, layers), at least 0; NaN where a layer had none.
        nonfinite: (s, layers), where a tensor held NaN or Inf.
    """
    layers = values.shape[1]
    columns = int(np.clip(MAX_CELLS // layers, 10, MAX_COLUMNS))
    spacing = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
    span = int(steps[-1] - steps[0]) + 1
    width = max(spacing, -(-span // columns))
    place = (steps - steps[0]) // width
    starts = np.unique(place, return_index=True)[1]
    count = int(place[-1]) + 1
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(np.fmax.reduceat(values, starts, axis=0))
    bad = np.logical_or.reduceat(nonfinite, starts, axis=0)
    finite = logs[np.isfinite(logs)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    high = max(high, low + 1e-3)
    with np.errstate(invalid="ignore"):
        scaled = np.clip((logs - low) / (high - low), 0.0, 1.0)
        levels = 1 + np.round(np.nan_to_num(scaled) * (_LEVELS - 1))
    levels[np.isnan(logs)] = MISSING
    levels[bad | np.isposinf(logs)] = NONFINITE
    codes = np.full((layers, count), MISSING, np.uint8)
    codes[:, place[starts]] = levels.T.astype(np.uint8)
    return HeatMap(int(steps[0]), width, codes, low, high)
