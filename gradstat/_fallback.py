"""The kernels' results from plain torch operations, for devices that have no kernel of ours.

Also the few steps that join results of several devices. Same columns, same rules for NaN and Inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from gradstat._units import ActiveRule, UnitCounts, UnitRule

(NUMEL, ZEROS, NANS, INFS, SUM, ABS_SUM, SQ_SUM, ABS_MAX, ABS_MIN, ROWS, DEAD_ROWS, L2) = range(12)
_BINS = 256
_EPSILON = 1e-6
"""Guard of the clip coefficient's division, as in torch.nn.utils.clip_grad_norm_."""


def moments(tensors: Sequence[Tensor | None], histogram: bool) -> tuple[Tensor, Tensor | None]:
    """Return table and histograms as `gradstat._kernels.moments` does, on the CPU. Synchronises."""
    table = torch.full((len(tensors) + 1, 12), math.nan, dtype=torch.float64, device="cpu")
    bins = None
    if histogram:
        bins = torch.zeros((len(tensors) + 1, _BINS), dtype=torch.int64, device="cpu")
    for index, tensor in enumerate(tensors):
        if tensor is None:
            continue
        # fp64 where the device has it; Apple's does not, and shares its memory with the CPU anyway.
        tensor = tensor.cpu() if tensor.device.type == "mps" else tensor  # noqa: PLW2901
        wide = tensor.detach().double()
        table[index] = _row(wide)
        if bins is not None:
            bins[index] = _histogram(wide)
    table[-1] = merge_totals(table[:-1])
    if bins is not None:
        bins[-1] = bins[:-1].sum(0)
    return table, bins


def _row(wide: Tensor) -> Tensor:
    magnitude = wide.abs()
    finite = magnitude < math.inf
    kept = torch.where(finite, wide, 0.0)
    magnitude = kept.abs()
    non_zero = magnitude > 0
    zero = wide == 0
    rows = wide.shape[0] if wide.dim() > 0 else 1
    dead = zero.reshape(rows, -1).all(1).sum() if wide.numel() > 0 else zero.sum()
    largest = magnitude.max() if wide.numel() > 0 else magnitude.sum()
    smallest = torch.where(non_zero, magnitude, math.inf).min() if wide.numel() > 0 else largest
    count = partial(torch.tensor, dtype=torch.float64, device="cpu")
    row = [
        count(wide.numel()), zero.sum(), wide.isnan().sum(), wide.isinf().sum(),
        kept.sum(), magnitude.sum(), kept.square().sum(), largest,
        torch.where(smallest < math.inf, smallest, 0.0), count(rows), dead,
        _scaled_l2(magnitude, largest),
    ]  # fmt: skip
    return torch.stack([value.double().cpu() for value in row])


def _scaled_l2(magnitude: Tensor, largest: Tensor) -> Tensor:
    scale = torch.where(largest > 0, largest, 1.0)
    return (magnitude / scale).square().sum().sqrt() * scale


def _histogram(wide: Tensor) -> Tensor:
    magnitude = wide[(wide.abs() < math.inf) & (wide != 0)].abs()
    exponent = torch.frexp(magnitude)[1] - 1
    return torch.bincount((exponent + 127).clamp(0, 255).flatten().cpu(), minlength=_BINS)


def units(tensor: Tensor, rule: UnitRule, into: UnitCounts) -> None:
    """Add the counts and the row of one activation to a window, both on the CPU. Synchronises.

    Args:
        tensor: Shape (units, ...).
        rule: What counts as active, low and high.
        into: Counts and row of the window.
    """
    wide = (tensor.cpu() if tensor.device.type == "mps" else tensor).detach().double()
    low = (wide >= rule.low_from) & (wide <= rule.low_to)
    active = {
        ActiveRule.POSITIVE: wide > 0,
        ActiveRule.NONZERO: (wide != 0) & ~wide.isnan(),
        ActiveRule.NOT_LOW: ~(low | wide.isnan()),
    }[rule.active]
    n_units = into.counts.shape[1]
    per_unit = [met.reshape(n_units, -1).sum(1) for met in (active, low, wide >= rule.high_from)]
    into.counts.add_(torch.stack(per_unit).cpu())
    into.row.copy_(merge_totals(torch.stack([into.row, _row(wide)])))
    into.row[ROWS], into.row[DEAD_ROWS] = n_units, 0


def merge(results: Sequence[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Return one table on the CPU from tables that each hold some rows. Synchronises."""
    table = results[0][0].cpu()
    bins = results[0][1]
    bins = bins.cpu() if bins is not None else None
    for more, more_bins in results[1:]:
        host = more.cpu()
        table = torch.where(host.isnan(), table, host)
        if bins is not None and more_bins is not None:
            bins = bins + more_bins.cpu()
    table[-1] = merge_totals(table[:-1])
    return table, bins


def merge_totals(rows: Tensor) -> Tensor:
    """Return the row of totals over these rows; missing ones (NaN) count as nothing."""
    present = rows[~rows[:, NUMEL].isnan()]
    total = present.sum(0)
    smallest = present[:, ABS_MIN]
    smallest = smallest[smallest > 0]
    total[ABS_MAX] = present[:, ABS_MAX].max() if len(present) else 0.0
    total[ABS_MIN] = smallest.min() if len(smallest) else 0.0
    total[L2] = _scaled_l2(present[:, L2], total[ABS_MAX])
    return total


def combined_norm(totals: Sequence[Tensor], kind: int) -> Tensor:
    """Return the norm over several rows of totals that lie on one device."""
    table = torch.stack(list(totals))
    if kind == 2:
        norm = _scaled_l2(table[:, L2], table[:, L2].max())
    else:
        norm = table[:, ABS_SUM].sum() if kind == 1 else table[:, ABS_MAX].max()
    norm = torch.where(table[:, INFS].sum() > 0, math.inf, norm)
    return torch.where(table[:, NANS].sum() > 0, math.nan, norm)


def power_norms(tensors: Sequence[Tensor | None], table: Tensor, order: float) -> Tensor:
    """Return the norm of this order of each tensor that is there, fp64.

    Scaled by the largest magnitude (from ``table``) so that powers neither overflow nor vanish.
    """
    norms = []
    for index, tensor in enumerate(tensors):
        if tensor is None or tensor.numel() == 0:  # torch has no negative order of nothing
            continue
        if tensor.device.type == "mps":
            tensor = tensor.cpu()  # noqa: PLW2901
        largest = table[index, ABS_MAX].to(tensor.device)
        scale = torch.where(largest > 0, largest, 1.0) if order != 0 else torch.ones_like(largest)
        wide = tensor.detach().double() / scale
        norms.append(torch.linalg.vector_norm(wide, order) * (scale if order != 0 else 1.0))
    device = norms[0].device if norms else torch.device("cpu")
    return torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64, device=device)


def norm_of_norms(norms: Tensor, order: float) -> Tensor:
    """Return the norm over all tensors from the norm of each, as torch.nn.utils does."""
    if len(norms) == 0:
        return torch.zeros((), dtype=torch.float64, device=norms.device)
    largest = norms.max()
    usable = (largest > 0) & (largest < math.inf) & (order != 0)
    scale = torch.where(usable, largest, 1.0)
    norm: Tensor = torch.linalg.vector_norm(norms / scale, order) * scale
    return norm


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Return the coefficient of shape (1,), with the rules of ``csrc/kernels.h``."""
    if max_norm == math.inf:
        return torch.ones(1, dtype=torch.float64, device=norm.device)
    coefficient = (max_norm / (norm + _EPSILON)).clamp(max=1.0)
    return torch.where(norm.isnan(), 1.0, coefficient).reshape(1)


def scale_(tensor: Tensor, coefficient: Tensor) -> None:
    """Multiply in place; 1 and NaN change nothing, 0 writes zeros over NaN and Inf too."""
    if tensor.layout is not torch.strided:
        values = tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
        return scale_(values, coefficient)
    # As in the kernels the product is taken in fp64; on Apple's device, which has none, in fp32.
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    factor = torch.where(coefficient.isnan(), 1.0, coefficient).to(wide).to(tensor.device)
    # Conjugation leaves the products of the parts as they are, and its view is not a real one.
    plain = tensor.conj() if tensor.is_conj() else tensor
    real = torch.view_as_real(plain) if plain.is_complex() else plain
    real.copy_(torch.where(factor == 0, 0.0, real.to(wide) * factor))
    return None


def clamp_(tensor: Tensor, limit: float) -> None:
    """Clamp in place to [-limit, limit]; NaN stays."""
    if tensor.layout is torch.sparse_coo and not tensor.is_coalesced():
        tensor.copy_(tensor.coalesce())  # an element is the sum of its entries
    if tensor.layout is not torch.strided:
        values = tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
        return clamp_(values, limit)
    tensor.clamp_(-limit, limit)
    return None
