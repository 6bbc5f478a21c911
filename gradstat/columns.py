"""The columns of a table, as data, and the arithmetic that respects them.

Kernels write the twelve raw columns; the others follow from them. Everything that lists columns
(the table, its rows, the documentation's test) reads them here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat.errors import ArgumentValueError, CudaError


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str
    """Attribute of a row and argument of ``StatTable.column``."""

    unit: str
    """``elements``, ``rows``, ``g`` (whatever unit the tensor has), ``g^2``, or ``1``."""

    formula: str
    """Formula over the elements ``g`` of the tensor; sums run over its finite elements."""

    meaning: str
    """What it tells, in one line."""

    @property
    def is_count(self) -> bool:
        """True where values are whole numbers, and 0 for a tensor that is missing."""
        return self.unit in ("elements", "rows")


# The order is the kernels' (csrc/kernels.h, enum Column).
RAW_COLUMNS: tuple[Column, ...] = (
    Column("numel", "elements", "count g", "elements of the tensor"),
    Column("zeros", "elements", "count g == 0", "elements that are exactly zero"),
    Column("nans", "elements", "count isnan(g)", "elements that are NaN"),
    Column("infs", "elements", "count isinf(g)", "elements that are +Inf or -Inf"),
    Column("sum", "g", "sum g", "sum with signs"),
    Column("abs_sum", "g", "sum |g|", "sum of magnitudes, the L1 norm"),
    Column(
        "sq_sum", "g^2", "sum g^2", "sum of squares; fp64 beyond 1e154 overflows here, not in l2"
    ),
    Column("abs_max", "g", "max |g|", "largest finite magnitude, 0 where there is none"),
    Column("abs_min", "g", "min |g|, g != 0", "smallest non-zero magnitude, 0 where there is none"),
    Column(
        "rows", "rows", "shape[0]", "slices along dimension 0: units of a layer, words, filters"
    ),
    Column("dead_rows", "rows", "count all(row == 0)", "rows whose elements are all exactly zero"),
    Column("l2", "g", "sqrt(sum g^2)", "L2 norm"),
)

DERIVED_COLUMNS: tuple[Column, ...] = (
    Column("finite", "elements", "numel - nans - infs", "elements that the moments are taken over"),
    Column("nonfinite", "elements", "nans + infs", "elements that are NaN or Inf"),
    Column("l1", "g", "abs_sum", "L1 norm"),
    Column("rms", "g", "l2 / sqrt(finite)", "typical magnitude of an element"),
    Column("mean", "g", "sum / finite", "average with signs"),
    Column("std", "g", "sqrt(rms^2 - mean^2)", "population standard deviation"),
    Column("max", "g", "abs_max", "largest finite magnitude"),
    Column("zero_fraction", "1", "zeros / numel", "share of elements that are exactly zero"),
    Column("dynamic_range", "1", "abs_max / abs_min", "largest over smallest non-zero magnitude"),
    Column("dead_row_fraction", "1", "dead_rows / rows", "share of rows that are all zero"),
    Column(
        "live_row_fraction",
        "1",
        "(rows - dead_rows) / rows",
        "share of rows that are not: of a sparse embedding, the share of its words that were hit",
    ),
)

COLUMNS = RAW_COLUMNS + DERIVED_COLUMNS
COLUMN_NAMES = tuple(column.name for column in COLUMNS)
NUM_RAW_COLUMNS = len(RAW_COLUMNS)

NUMEL, NANS, INFS, DEAD_ROWS, L2 = 0, 2, 3, 10, 11

HISTOGRAM_BINS = 256


@dataclass(frozen=True, slots=True, repr=False)
class StatRow:
    """The statistics of one tensor, on the host, as plain Python numbers.

    Counts are int (float in a table that was divided), the others float. In a row that is missing
    (a parameter without a gradient) ``has_grad`` is False, counts are 0 and the others NaN.
    Formulas and when to worry: docs/statistics.md.
    """

    name: str
    has_grad: bool
    numel: float
    zeros: float
    nans: float
    infs: float
    sum: float
    abs_sum: float
    sq_sum: float
    abs_max: float
    abs_min: float
    rows: float
    dead_rows: float
    l2: float
    finite: float
    nonfinite: float
    l1: float
    rms: float
    mean: float
    std: float
    max: float
    zero_fraction: float
    dynamic_range: float
    dead_row_fraction: float
    live_row_fraction: float
    histogram: NDArray[Any] | None = field(default=None, compare=False, kw_only=True)
    """Shape (256,), int64 (float64 after division); None where it was not asked for."""

    def __repr__(self) -> str:
        if not self.has_grad:
            return f"StatRow({self.name!r}, missing)"
        parts = [f"numel={self.numel}", f"l2={self.l2:.4g}", f"max={self.max:.4g}"]
        parts += [f"{key}={getattr(self, key)}" for key in ("nans", "infs") if getattr(self, key)]
        return f"StatRow({self.name!r}, {', '.join(parts)})"


def derive(raw: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Return all columns by name, each of shape (n,), from raw rows.

    0/0 is NaN, and a missing row (all NaN) is NaN in every column but ``finite``, which is 0.
    No floating-point warning is raised.

    Args:
        raw: Shape (n, 12), the raw columns in their order.
    """
    columns = {column.name: raw[:, index] for index, column in enumerate(RAW_COLUMNS)}
    numel, l2, abs_max, abs_min = (columns[name] for name in ("numel", "l2", "abs_max", "abs_min"))
    with np.errstate(all="ignore"):
        nonfinite = columns["nans"] + columns["infs"]
        # In an average the counts are fractions, and where all elements are NaN or Inf their
        # rounding must not pass for a sliver of a finite element.
        finite = numel - nonfinite
        finite = np.where(finite > 1e-12 * numel, finite, 0.0)
        mean = columns["sum"] / finite
        rms = l2 / np.sqrt(finite)
        # |mean| / rms stays in range where rms^2 would not: fp64 beyond 1e154, or below 1e-154.
        ratio = np.abs(mean) / rms
        std = rms * np.sqrt(np.maximum((1.0 - ratio) * (1.0 + ratio), 0.0))
        std = np.where(rms == 0.0, 0.0, np.where(np.isfinite(mean), std, np.nan))
        columns |= {
            "finite": finite,
            "nonfinite": nonfinite,
            "l1": columns["abs_sum"],
            "rms": rms,
            "mean": mean,
            "std": std,
            "max": abs_max,
            "zero_fraction": columns["zeros"] / numel,
            "dynamic_range": np.where(abs_min > 0.0, abs_max / abs_min, np.nan),
            "dead_row_fraction": columns["dead_rows"] / columns["rows"],
            "live_row_fraction": (columns["rows"] - columns["dead_rows"]) / columns["rows"],
        }
    return columns


class HostCopy:
    """A table on the host, after one wait for the device. Every array ends with the totals.

    Args:
        data: Shape (n + 1, 12), float64, totals last.
        histogram: Shape (n + 1, 256), on the same device.
        averaged: Leave counts float, as they may be fractions.
    """

    def __init__(self, data: Tensor, histogram: Tensor | None, averaged: bool) -> None:
        arrays = [_read_only(array) for array in _to_host([data, histogram])]
        self.raw: NDArray[np.float64] = arrays[0]
        self.histogram: NDArray[Any] | None = arrays[1] if len(arrays) > 1 else None
        self._averaged = averaged

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """Whether each row has data; the totals have where any row has."""
        present = ~np.isnan(self.raw[:, NUMEL])
        present[-1] = present[:-1].any()
        return _read_only(present)

    @cached_property
    def columns(self) -> dict[str, NDArray[Any]]:
        """All columns by name, counts as int64 (float64 in an average)."""
        columns: dict[str, NDArray[Any]] = dict(derive(self.raw))
        missing = np.isnan(self.raw[:, NUMEL])
        for column in COLUMNS:
            if column.is_count:
                counts = np.where(missing, 0.0, columns[column.name])
                columns[column.name] = counts if self._averaged else counts.astype(np.int64)
        return {name: _read_only(values) for name, values in columns.items()}


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


def _to_host(given: list[Tensor | None]) -> list[NDArray[Any]]:
    """Return copies on the host of those that there are, after one wait for all of them."""
    tensors = [tensor for tensor in given if tensor is not None]
    device = tensors[0].device
    if device.type == "cuda":
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise CudaError(
                    "a table cannot be read while a CUDA graph is captured, because reading waits "
                    "for the device; read it after the graph was replayed"
                )
            pinned = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
            for target, tensor in zip(pinned, tensors, strict=True):
                target.copy_(tensor, non_blocking=True)
            torch.cuda.current_stream().synchronize()
        tensors = pinned
    # The copy is of our own: it neither changes with the tensor nor keeps pinned memory.
    return [tensor.cpu().numpy().copy() for tensor in tensors]


def histogram_edges() -> NDArray[np.float64]:
    """Return the 257 edges of the histogram's bins: bin b counts edges[b] <= |g| < edges[b + 1].

    The first edge is 0 (zero itself is in no bin) and the last is Inf (and neither is Inf).
    """
    edges = np.exp2(np.arange(HISTOGRAM_BINS + 1, dtype=np.float64) - 127.0)
    edges[0], edges[-1] = 0.0, np.inf
    return edges


def add_raw(first: Tensor, second: Tensor) -> Tensor:
    """Return the raw rows of two measurements taken together, on their device, without a sync.

    Columns add, and ``l2`` adds in squares. A row that is missing on one side counts as zero there.

    Args:
        first: Shape (n, 12), float64.
        second: As ``first``, on the same device.
    """
    total = first + second
    total[:, L2] = torch.hypot(first[:, L2], second[:, L2])
    total = torch.where(second[:, NUMEL : NUMEL + 1].isnan(), first, total)
    return torch.where(first[:, NUMEL : NUMEL + 1].isnan(), second, total)


def scale_raw(data: Tensor, factor: float, *, divide: bool) -> Tensor:
    """Return the raw rows times (or divided by) a positive number, without a sync.

    ``l2`` takes the factor's root, so that its square stays equal to ``sq_sum``.

    Args:
        data: Shape (n, 12), float64.
        factor: Positive and finite.
        divide: Divide, so that counts which are multiples of ``factor`` stay whole.
    """
    root = math.sqrt(factor)
    scaled = data / factor if divide else data * factor
    scaled[:, L2] = data[:, L2] / root if divide else data[:, L2] * root
    return scaled


def unknown_column(name: object) -> ArgumentValueError:
    """Return the error for a column name that does not exist."""
    return ArgumentValueError(
        f"column must be one of {', '.join(COLUMN_NAMES)}; got {name!r}; "
        "docs/statistics.md describes each"
    )
