"""What the measured functions must return, computed in float64 without them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from gradstat import StatTable, clip_grad_norm_
from gradstat._units import ActiveRule, UnitCounts, UnitRule

RELATIVE_ERROR = 1e-6
RAW_COLUMNS = (
    "numel", "zeros", "nans", "infs", "sum", "abs_sum",
    "sq_sum", "abs_max", "abs_min", "rows", "dead_rows", "l2",
)  # fmt: skip


def expected_row(tensor: Tensor) -> Tensor:
    """Return the columns of a table for one tensor without NaN and Inf."""
    values = tensor.detach()
    magnitudes = values.abs()
    is_zero = values == 0
    l2 = _norm(values, 2)
    columns = [
        values.numel(),
        is_zero.sum(),
        0,
        0,
        values.sum(dtype=torch.float64),
        _norm(values, 1),
        l2 * l2,
        magnitudes.max(),
        magnitudes.masked_fill_(is_zero, torch.inf).min(),
        values.shape[0],
        is_zero.view(values.shape[0], -1).all(1).sum(),
        l2,
    ]
    return torch.tensor([float(column) for column in columns], dtype=torch.float64)


def _norm(values: Tensor, order: int) -> Tensor:
    return torch.linalg.vector_norm(values, order, dtype=torch.float64)


def check_table(table: StatTable, tensors: Sequence[Tensor]) -> None:
    """Assert that a table describes these tensors and their totals."""
    rows = torch.stack([expected_row(tensor) for tensor in tensors])
    totals = rows.sum(0)
    totals[RAW_COLUMNS.index("abs_max")] = rows[:, RAW_COLUMNS.index("abs_max")].max()
    totals[RAW_COLUMNS.index("abs_min")] = rows[:, RAW_COLUMNS.index("abs_min")].min()
    totals[RAW_COLUMNS.index("l2")] = totals[RAW_COLUMNS.index("sq_sum")].sqrt()
    expected = torch.cat([rows, totals[None]])
    actual = table.data.cpu()
    assert table.columns[: len(RAW_COLUMNS)] == RAW_COLUMNS
    assert actual.shape == expected.shape
    # Values of both signs cancel in a sum: its error is bounded by the sum of the magnitudes.
    scale = expected.abs()
    scale[:, RAW_COLUMNS.index("sum")] = expected[:, RAW_COLUMNS.index("abs_sum")]
    wrong = (actual - expected).abs() > RELATIVE_ERROR * scale
    where = [(int(row), RAW_COLUMNS[int(column)]) for row, column in wrong.nonzero()[:5]]
    assert not wrong.any(), f"wrong entries (row, column): {where}"


def check_units(window: UnitCounts, tensor: Tensor, rule: UnitRule) -> None:
    """Assert that a window describes this activation without NaN and Inf, units in dimension 1."""
    units_first = tensor.movedim(1, 0).flatten(1).double()  # or torch rounds the bounds
    low = (units_first >= rule.low_from) & (units_first <= rule.low_to)
    active = units_first > 0 if rule.active is ActiveRule.POSITIVE else ~low
    expected = torch.stack([met.sum(1) for met in (active, low, units_first >= rule.high_from)])
    assert torch.equal(window.counts, expected)
    row = expected_row(units_first)
    row[RAW_COLUMNS.index("dead_rows")] = 0
    assert bool(((window.row.cpu() - row).abs() <= RELATIVE_ERROR * row.abs()).all())


def check_histogram(table: StatTable) -> None:
    """Assert that the histogram of each row holds every non-zero element once."""
    assert table.histogram_data is not None
    column = {name: table.data.cpu()[:, i] for i, name in enumerate(RAW_COLUMNS)}
    counted = table.histogram_data.cpu().sum(1).double()
    assert torch.equal(counted, column["numel"] - column["zeros"])


def expected_norm(tensors: Sequence[Tensor]) -> float:
    """Return the total norm."""
    return math.hypot(*[_norm(tensor.detach(), 2).item() for tensor in tensors])


def check_norm(actual: Tensor, expected: float) -> None:
    """Assert that a total norm is right."""
    assert abs(actual.item() - expected) <= RELATIVE_ERROR * expected


def check_not_clipping(params: Sequence[Parameter]) -> float:
    """Assert that `clip_grad_norm_` leaves gradients below the limit alone, and return the norm."""
    grads = [param.grad for param in params if param.grad is not None]
    before = [grad.clone() for grad in grads[::9]]
    norm = expected_norm(grads)
    check_norm(clip_grad_norm_(params, 2 * norm), norm)
    assert all(torch.equal(*pair) for pair in zip(grads[::9], before, strict=True))
    return norm


def check_clipping(params: Sequence[Parameter]) -> float:
    """Assert that `clip_grad_norm_` halves gradients of twice the limit, and return the limit."""
    grads = [param.grad for param in params if param.grad is not None]
    before = [grad.clone() for grad in grads[::9]]
    norm = expected_norm(grads)
    check_norm(clip_grad_norm_(params, norm / 2), norm)
    coefficient = norm / 2 / (norm + 1e-6)
    # The product is rounded once, the coefficient before it perhaps to fp32.
    tolerance = torch.finfo(grads[0].dtype).eps
    for after, old in zip(grads[::9], before, strict=True):
        expected = old.double() * coefficient
        assert bool(((after.double() - expected).abs() <= tolerance * expected.abs()).all())
    return norm / 2
