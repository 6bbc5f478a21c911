"""What the `units` kernel counts for each unit of an activation, and where the counts go."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from gradstat.errors import ArgumentValueError, UnsupportedTensorError

MAX_DENSE = 2**22
"""Elements of a sparse tensor that is looked at: it is made dense for it."""


class ActiveRule(IntEnum):
    """When an element y is active; the numbers are those of ``csrc/kernels.h``. NaN never is."""

    POSITIVE = 0
    """y > 0."""

    NONZERO = 1
    """y != 0."""

    NOT_LOW = 2
    """y is outside of the low band."""


class UnitRule(NamedTuple):
    """The three conditions on an element y; its bounds are compared as real numbers, unrounded."""

    active: ActiveRule
    low_from: float = math.inf
    """Low is low_from <= y <= low_to: by default no y at all."""

    low_to: float = -math.inf
    high_from: float = math.nan
    """High is y >= high_from: by default, with NaN, no y at all."""


class UnitCounts(NamedTuple):
    """Counts and moments of one activation, or of all in a window."""

    counts: Tensor
    """int64 (3, units): elements of each unit that are active, low and high."""

    row: Tensor
    """fp64 (12,), the columns of ``csrc/kernels.h``; its rows are the units, its dead rows 0."""


def units_first(tensor: Tensor, unit_dim: int, name: str) -> Tensor:
    """Return a view of a tensor whose dimension 0 are the units; a copy of one that is sparse.

    Raises:
        ArgumentValueError: It has no such dimension.
        UnsupportedTensorError: It is complex, and no activation's rule is on complex numbers; or it
            is sparse and too large to be made dense.
    """
    if tensor.is_complex():
        raise UnsupportedTensorError(
            f"an activation must hold real numbers, got dtype {tensor.dtype} for {name}; pass "
            "x.abs() for its magnitudes, or torch.view_as_real(x)"
        )
    n_dims = max(tensor.dim(), 1)
    if not -n_dims <= unit_dim < n_dims:
        raise ArgumentValueError(
            f"unit_dim must be a dimension of {name}, which has shape {tuple(tensor.shape)}, got "
            f"{unit_dim}; use -1 for the last one"
        )
    if tensor.is_nested:
        return tensor  # has no such view, and is refused for what it is
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        if tensor.numel() > MAX_DENSE:
            raise UnsupportedTensorError(
                f"a sparse activation must have at most {MAX_DENSE} elements, got "
                f"{tensor.numel()} for {name}; pass x.values()"
            )
        tensor = tensor.to_dense()
    return tensor.movedim(unit_dim, 0) if tensor.dim() > 0 else tensor.reshape(1)


def check_window(into: UnitCounts, n_units: int, name: str) -> None:
    """Check that a window is of an activation with this many units.

    Raises:
        ArgumentValueError: It is of another one.
    """
    if into.counts.shape != (3, n_units):
        raise ArgumentValueError(
            f"{name} must have as many units as the window that it is added to, "
            f"{into.counts.shape[-1]}, got {n_units}; begin a new window for it"
        )
