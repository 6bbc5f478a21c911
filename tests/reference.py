"""The float64 oracle: each statistic from its definition, in numpy and plain torch.

Nothing here imports the package. Sums are taken of values scaled by an exact power of two, so that
they hold over the whole range of fp64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

COLUMNS = (
    "numel", "zeros", "nans", "infs", "sum", "abs_sum", "sq_sum", "abs_max", "abs_min",
    "rows", "dead_rows", "l2",
)  # fmt: skip
HISTOGRAM_BINS = 256

Array = NDArray[np.float64]


def values_of(tensor: Tensor) -> Array:
    """Return the elements exactly, in logical order and shape; magnitudes of complex ones."""
    tensor = tensor.detach()
    if tensor.is_complex():
        wide = tensor.to(torch.complex128).resolve_conj()
        return np.hypot(values_of(wide.real), values_of(wide.imag))
    return tensor.resolve_neg().double().contiguous().numpy()


def moments(tensors: Sequence[Tensor | None]) -> Array:
    """Return the table of shape (n + 1, 12), its last row speaking of all elements together."""
    arrays = [None if tensor is None else values_of(tensor) for tensor in tensors]
    table = np.full((len(tensors) + 1, len(COLUMNS)), math.nan)
    for index, array in enumerate(arrays):
        if array is not None:
            table[index] = row(array)
    flat = [array.ravel() for array in arrays if array is not None]
    table[-1] = row(np.concatenate([*flat, np.empty(0)]))
    for column in ("rows", "dead_rows"):
        table[-1, COLUMNS.index(column)] = np.nansum(table[:-1, COLUMNS.index(column)])
    return table


def row(array: Array) -> list[float]:
    """Return the columns of one tensor."""
    finite = array[np.isfinite(array)]
    magnitude = np.abs(finite)
    exponent = int(np.frexp(magnitude.max(initial=0.0))[1])
    rows = array.shape[0] if array.ndim > 0 else 1
    dead_rows = (array.reshape(rows, -1) == 0).all(axis=1).sum() if array.size > 0 else 0
    # A sum may leave the range of fp64; what underflows is lost beside the largest magnitude.
    with np.errstate(over="ignore", under="ignore"):
        scaled = np.ldexp(finite, -exponent)
        sq_sum = np.sum(scaled * scaled)
        return [
            array.size,
            np.sum(array == 0),
            np.sum(np.isnan(array)),
            np.sum(np.isinf(array)),
            np.ldexp(np.sum(scaled), exponent),
            np.ldexp(np.sum(np.abs(scaled)), exponent),
            np.ldexp(sq_sum, 2 * exponent),
            magnitude.max(initial=0.0),
            magnitude[magnitude > 0].min() if magnitude.any() else 0.0,
            rows,
            dead_rows,
            np.ldexp(np.sqrt(sq_sum), exponent),
        ]


def histogram(tensors: Sequence[Tensor | None]) -> NDArray[np.int64]:
    """Return the counts by binary exponent, shape (n + 1, 256), the last row for all tensors.

    Bin 0 counts 0 < |x| < 2^-126, bin b in 1..254 counts 2^(b-127) <= |x| < 2^(b-126), bin 255
    finite |x| >= 2^128.
    """
    counts = np.zeros((len(tensors) + 1, HISTOGRAM_BINS), dtype=np.int64)
    lower_bounds = np.ldexp(1.0, np.arange(-126, 129))
    for index, tensor in enumerate(tensors):
        if tensor is None:
            continue
        magnitude = np.abs(values_of(tensor).ravel())
        magnitude = magnitude[(magnitude > 0) & np.isfinite(magnitude)]
        bins = np.searchsorted(lower_bounds, magnitude, side="right")
        counts[index] = np.bincount(bins, minlength=HISTOGRAM_BINS)
    counts[-1] = counts.sum(axis=0)
    return counts


def norm(tensors: Sequence[Tensor | None], order: float) -> float:
    """Return the norm of order 1, 2 or inf over all elements: NaN if one is, else Inf if one is."""
    total = dict(zip(COLUMNS, moments(tensors)[-1], strict=True))
    if total["nans"]:
        return math.nan
    if total["infs"]:
        return math.inf
    return float(total[{1.0: "abs_sum", 2.0: "l2", math.inf: "abs_max"}[order]])


def clip_coefficient(total_norm: float, max_norm: float) -> float:
    """Return the factor of clipping: 0 for a norm of Inf, 1 where nothing can or need be done."""
    if math.isnan(total_norm) or math.isinf(max_norm):
        return 1.0
    return min(1.0, max_norm / (total_norm + 1e-6))


def rounded(array: Array, dtype: torch.dtype) -> Tensor:
    """Return the values in a dtype, rounded to fp32 and from there to a dtype of 16 bits."""
    if dtype == torch.float64:
        return torch.from_numpy(array)
    with np.errstate(over="ignore", under="ignore"):
        return torch.from_numpy(np.asarray(array.astype(np.float32))).to(dtype)


def scale(tensor: Tensor, coefficient: float) -> Tensor:
    """Return the tensor times a coefficient: itself for 1 and NaN, zeros for 0."""
    if coefficient == 1 or math.isnan(coefficient):
        return tensor.clone()
    if coefficient == 0:
        return torch.zeros_like(tensor)
    with np.errstate(over="ignore", under="ignore"):
        return rounded(values_of(tensor) * coefficient, tensor.dtype)


def clamp(tensor: Tensor, limit: float) -> Tensor:
    """Return the tensor clamped to [-limit, limit], with the limit rounded to its dtype first."""
    bound = rounded(np.array(limit), tensor.dtype).double().numpy()
    return rounded(np.clip(values_of(tensor), -bound, bound), tensor.dtype)


ACTIVE_RULES = {
    "positive": lambda array, low: array > 0,
    "nonzero": lambda array, low: array != 0,
    "not-low": lambda array, low: ~low,
}


def unit_counts(
    tensor: Tensor, unit_dim: int, active: str, low: tuple[float, float], high_from: float
) -> NDArray[np.int64]:
    """Return how many elements of each unit are active, low and high; shape (3, units).

    NaN is none of the three, and neither is anything beside a bound that is NaN.
    """
    array = np.moveaxis(np.atleast_1d(values_of(tensor)), unit_dim, 0)
    is_low = (array >= low[0]) & (array <= low[1])
    is_active = ACTIVE_RULES[active](array, is_low) & ~np.isnan(array)
    conditions = np.stack([is_active, is_low, array >= high_from])
    return np.asarray(conditions.reshape(3, len(array), -1).sum(axis=2), dtype=np.int64)


def unit_row(tensor: Tensor, n_units: int) -> list[float]:
    """Return the moments of an activation: its rows are the units, of which none is called dead."""
    return [*row(values_of(tensor))[:9], n_units, 0, row(values_of(tensor))[11]]
