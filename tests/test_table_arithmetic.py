"""Sums, means and weights of tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tables import (
    NAMES,
    arrays_of,
    assert_same_table,
    histogram_of,
    raw_table,
    window_of,
)

from gradstat.errors import (
    ArgumentTypeError,
    ArgumentValueError,
)
from gradstat.table import StatTable


@pytest.fixture
def arrays():
    return arrays_of(0)


@pytest.fixture
def table(arrays):
    return StatTable(NAMES, raw_table(arrays), histogram_of(arrays))


def test_mean_pools_the_window():
    stacks, tables = window_of(4)
    average = StatTable.mean(tables)
    assert average.averaged
    for position, name in enumerate(NAMES):
        if name == "layers.0.bias":
            continue
        values = np.stack([stack[position] for stack in stacks])
        row = average[name]
        assert row.numel == values[0].size
        assert row.l2 == pytest.approx(np.sqrt((values**2).sum() / 4), rel=1e-12)
        assert row.l2**2 == pytest.approx(row.sq_sum, rel=1e-12)
        assert row.rms == pytest.approx(np.sqrt((values**2).mean()), rel=1e-12)
        assert row.mean == pytest.approx(values.mean(), rel=1e-10)
        assert row.std == pytest.approx(values.std(), rel=1e-10)
        assert row.zero_fraction == pytest.approx((values == 0).mean(), rel=1e-12)
        assert row.abs_max == pytest.approx(np.abs(values).max(axis=(1, 2)).mean(), rel=1e-12)
        assert row.abs_sum == row.l1 == pytest.approx(np.abs(values).sum() / 4, rel=1e-12)
    norms = [table.total_norm for table in tables]
    assert average.total_norm == pytest.approx(math.sqrt(np.mean(np.square(norms))), rel=1e-12)
    expected = np.mean([histogram_of(stack).numpy()[:-1] for stack in stacks], axis=0)
    assert average.histogram.dtype == np.float64
    np.testing.assert_allclose(average.histogram, expected, rtol=1e-14)


def test_sum_and_division_are_the_mean():
    _, tables = window_of(3)
    assert_same_table(sum(tables) / 3, StatTable.mean(iter(tables)))
    assert_same_table(sum(tables[1:], start=tables[0]), sum(tables))


def test_sums_stay_whole():
    _, tables = window_of(2)
    total = tables[0] + tables[1]
    assert not total.averaged
    assert type(total["embed.weight"].numel) is int
    assert total["embed.weight"].numel == 240
    assert total.histogram.dtype == np.int64
    assert_same_table(2 * tables[0], tables[0] * 2)
    np.testing.assert_allclose((tables[0] * 2).data, (tables[0] + tables[0]).data, rtol=1e-15)
    assert (tables[0] * 2).histogram.dtype == np.int64
    assert not (tables[0] * 2).averaged


def test_average_counts_are_float():
    _, tables = window_of(2)
    average = tables[0] * 0.5
    assert average.averaged
    assert type(average["embed.weight"].numel) is float
    assert average.column("zeros").dtype == np.float64
    assert average.histogram.dtype == np.float64
    np.testing.assert_allclose(average.data, (tables[0] / 2).data, rtol=1e-15)


def test_missing_on_one_side_counts_as_zero():
    values = np.array([[3.0, 4.0]])
    here, gone = (StatTable(["w"], raw_table([a])) for a in (values, None))
    for total in (here + gone, gone + here):
        assert total["w"].has_grad
        assert (total["w"].numel, total["w"].l2) == (2, 5.0)
        assert total.missing == ()
    average = StatTable.mean([here, gone])
    assert average["w"].numel == 1.0
    assert average["w"].sq_sum == 12.5
    assert average["w"].rms == pytest.approx(math.sqrt(12.5))  # of the elements that were there
    assert StatTable.mean([gone, gone]).missing == ("w",)


def test_all_nan_window_has_no_moments():
    tables = [StatTable(["w"], raw_table([np.full((1, 10), math.nan)]))] * 3
    row = StatTable.mean([*tables, StatTable(["w"], raw_table([np.full((1, 10), math.inf)]))])["w"]
    assert row.finite == 0.0
    assert math.isnan(row.mean)


def test_l2_beyond_the_square_root_of_the_range():
    data = torch.tensor([[1, 0, 0, 0, 3e200, 3e200, math.inf, 3e200, 3e200, 1, 0, 3e200]] * 2,
                        dtype=torch.float64)  # fmt: skip
    table = StatTable(["w"], data)
    assert (table + table)["w"].l2 == pytest.approx(math.sqrt(2) * 3e200)
    assert StatTable.mean([table] * 5)["w"].l2 == pytest.approx(3e200)


def test_arithmetic_leaves_its_operands_alone():
    _, (first, second) = window_of(2)
    before = first.data.clone(), second.data.clone()
    first + second, first / 2, first * 3, StatTable.mean([first, second])
    for table, data in zip((first, second), before, strict=True):
        assert table.data.numpy().tobytes() == data.numpy().tobytes()


def test_no_autograd_graph():
    data = raw_table([np.array([[3.0, 4.0]])]).requires_grad_()
    table = StatTable(["w"], data)
    for result in (table, table + table, table / 2):
        assert not result.data.requires_grad
    assert table.total_norm == 5.0


def test_tables_made_in_inference_mode():
    with torch.inference_mode():
        table = StatTable(["w"], raw_table([np.array([[3.0, 4.0]])]))
    assert (table + table)["w"].sq_sum == 50.0
    assert StatTable.mean([table, table]).total_norm == pytest.approx(5.0)


def test_arithmetic_errors(table, arrays):
    data = raw_table(arrays)
    cases = [
        (StatTable([*NAMES[:4], "tail"], data), "row 4 is 'head.weight' in one and 'tail' in the"),
        (StatTable(NAMES[:2], data[:3]), "got 5 and 2 rows"),
        (StatTable(NAMES, data, kind="weight"), "got 'gradient' and 'weight'"),
    ]
    plain = StatTable(NAMES, data)
    for other, message in cases:
        with pytest.raises(ArgumentValueError, match=message):
            plain + other
    with pytest.raises(ArgumentValueError, match="measure both with histogram=True"):
        plain + table
    with pytest.raises(ArgumentValueError, match="at least one table, got none"):
        StatTable.mean([])
    with pytest.raises(ArgumentTypeError, match=r"tables\[1\] must be a StatTable, got int"):
        StatTable.mean([plain, 3])
    for factor in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ArgumentValueError, match="positive finite number, got"):
            plain / factor
        with pytest.raises(ArgumentValueError, match="positive finite number, got"):
            factor * plain
    with pytest.raises(ArgumentTypeError, match="with a number, got str"):
        plain * "2"
    with pytest.raises(TypeError):
        plain + 1
    with pytest.raises(TypeError):
        1 + plain
