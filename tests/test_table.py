"""The table of statistics: its columns, its rows, and what it refuses."""

from __future__ import annotations

import inspect
import math
import pickle
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from tables import (
    COUNTS,
    NAMES,
    arrays_of,
    histogram_of,
    raw_row,
    raw_table,
)

from gradstat import columns, errors
from gradstat.columns import COLUMN_NAMES, DERIVED_COLUMNS, RAW_COLUMNS, StatRow
from gradstat.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    GradstatError,
    LayerNotFoundError,
)
from gradstat.table import StatTable


@pytest.fixture
def arrays():
    return arrays_of(0)


@pytest.fixture
def table(arrays):
    return StatTable(NAMES, raw_table(arrays), histogram_of(arrays))


# ---- columns -------------------------------------------------------------------------------------


def test_columns_follow_the_kernels_order():
    source = Path(__file__).parents[1] / "csrc" / "kernels.h"
    body = re.search(r"enum Column[^{]*\{(.*?)\}", source.read_text(), re.DOTALL)[1]
    enum = [word.lower() for word in re.findall(r"k(\w+)", body)][:-1]  # the last is the count
    assert [column.name.replace("_", "") for column in RAW_COLUMNS] == enum
    assert [column.name for column in (RAW_COLUMNS[columns.NUMEL], RAW_COLUMNS[columns.L2])] == [
        "numel",
        "l2",
    ]
    assert (RAW_COLUMNS[columns.NANS].name, RAW_COLUMNS[columns.INFS].name) == ("nans", "infs")


def test_row_has_one_attribute_per_column():
    names = [field.name for field in fields(StatRow)]
    assert names == ["name", "has_grad", *COLUMN_NAMES, "histogram"]
    assert len(set(COLUMN_NAMES)) == len(COLUMN_NAMES) == 12 + len(DERIVED_COLUMNS)


def test_columns_document_themselves():
    for column in columns.COLUMNS:
        assert column.unit in ("elements", "rows", "g", "g^2", "1")
        assert column.formula
        assert column.meaning
        assert column.is_count == (column.name in COUNTS)


def test_documentation_describes_every_column():
    text = (Path(__file__).parents[1] / "docs" / "statistics.md").read_text()
    described = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert described == list(COLUMN_NAMES)


@pytest.mark.parametrize("name", ["embed.weight", "layers.0.weight", "layers.1.weight"])
def test_derived_columns_match_their_definitions(table, arrays, name):
    values = arrays[NAMES.index(name)]
    finite = values[np.isfinite(values)]
    row = table[name]
    assert row.name == name
    assert row.has_grad is True
    expected = {
        "finite": finite.size,
        "nonfinite": values.size - finite.size,
        "l1": np.abs(finite).sum(),
        "l2": np.sqrt((finite**2).sum()),
        "rms": np.sqrt((finite**2).mean()),
        "mean": finite.mean(),
        "std": finite.std(),
        "max": np.abs(finite).max(),
        "zero_fraction": (values == 0).mean(),
        "dynamic_range": np.abs(finite).max() / np.abs(finite[finite != 0]).min(),
        "dead_row_fraction": (values == 0).all(axis=1).mean(),
        "live_row_fraction": (values != 0).any(axis=1).mean(),
    }
    for column, value in expected.items():
        assert getattr(row, column) == pytest.approx(value, rel=1e-12), column


def test_raw_columns_pass_through(table, arrays):
    for name, values in zip(NAMES, arrays, strict=True):
        if values is not None:
            row = table[name]
            assert [getattr(row, column.name) for column in RAW_COLUMNS] == raw_row(values)


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e-30, 1e25, 1e200, 1e307])
def test_range_of_float64(scale):
    values = np.array([[1.0, 2.0, -3.0, 4.0]]) * scale
    data = torch.zeros(2, 12, dtype=torch.float64)
    sq_sum = 30.0 * scale * scale if scale < 1e150 else math.inf
    data[:] = torch.tensor(
        [4, 0, 0, 0, values.sum(), abs(values).sum(), sq_sum, 4 * scale, scale, 1, 0,
         math.sqrt(30.0) * scale],
        dtype=torch.float64,
    )  # fmt: skip
    row = StatTable(["w"], data)["w"]
    tolerance = 1e-12 if scale > 1e-300 else 1e-2  # a subnormal holds few digits
    assert row.rms == pytest.approx(math.sqrt(7.5) * scale, rel=tolerance)
    assert row.mean == pytest.approx(scale, rel=tolerance)
    assert row.std == pytest.approx(math.sqrt(6.5) * scale, rel=tolerance)
    assert row.dynamic_range == pytest.approx(4.0, rel=tolerance)


def row_of(values):
    return StatTable(["w"], raw_table([np.array(values, np.float64)]))["w"]


def test_all_zero():
    row = row_of([[0.0, 0.0], [0.0, -0.0]])
    assert (row.l2, row.rms, row.mean, row.std, row.max) == (0, 0, 0, 0, 0)
    assert (row.zero_fraction, row.dead_row_fraction) == (1, 1)
    assert math.isnan(row.dynamic_range)


def test_all_nan():
    row = row_of([[math.nan, math.nan]])
    assert (row.numel, row.nans, row.finite, row.nonfinite) == (2, 2, 0, 2)
    assert (row.l1, row.l2, row.max, row.zero_fraction) == (0, 0, 0, 0)
    assert all(map(math.isnan, (row.rms, row.mean, row.std, row.dynamic_range)))


def test_empty_tensor():
    row = StatTable(["w"], torch.zeros(2, 12, dtype=torch.float64))["w"]
    assert row.has_grad
    assert (row.numel, row.l2) == (0, 0)
    assert all(map(math.isnan, (row.rms, row.mean, row.zero_fraction, row.dead_row_fraction)))


def test_one_value_everywhere_has_no_spread():
    row = row_of([[0.1] * 7] * 3)
    assert row.std <= 1e-7 * row.rms


def test_sum_that_overflowed_has_no_std():
    data = torch.tensor([[2, 0, 0, 0, math.inf, math.inf, math.inf, 1.7e308, 1.7e308, 1, 0,
                          math.inf]] * 2, dtype=torch.float64)  # fmt: skip
    assert math.isnan(StatTable(["w"], data)["w"].std)


def test_bin_edges(table):
    edges = table.bin_edges
    assert edges.shape == (257,)
    assert (edges[0], edges[1], edges[127], edges[255], edges[256]) == (
        0.0, 2.0**-126, 1.0, 2.0**128, math.inf,
    )  # fmt: skip
    assert (np.diff(edges) > 0).all()


# ---- access --------------------------------------------------------------------------------------


def test_sequence_protocol(table):
    assert len(table) == 5
    assert [row.name for row in table] == list(table.names) == NAMES
    assert table[0].name == table[-5].name == table[np.int64(0)].name == "embed.weight"
    assert table[-1].name == "head.weight"
    assert "layers.0.bias" in table
    assert "total" not in table
    assert 0 not in table
    assert table.columns == COLUMN_NAMES
    assert (table.kind, table.averaged, table.device.type) == ("gradient", False, "cpu")


def test_rows_are_plain_python_numbers(table):
    for row in [*table, table.total]:
        for name in COLUMN_NAMES:
            assert type(getattr(row, name)) is (int if name in COUNTS else float), name


def test_missing_row(table):
    row = table["layers.0.bias"]
    assert row.has_grad is False
    assert table.missing == ("layers.0.bias",)
    for name in COLUMN_NAMES:
        value = getattr(row, name)
        assert value == 0 if name in COUNTS else math.isnan(value), name
    assert row.histogram.sum() == 0


def test_totals(table, arrays):
    values = np.concatenate([a.ravel() for a in arrays if a is not None])
    finite = values[np.isfinite(values)]
    total = table.total
    assert (total.name, total.has_grad) == ("total", True)
    assert (total.numel, total.nans, total.infs) == (values.size, 1, 2)
    assert total.l2 == table.finite_norm == pytest.approx(np.linalg.norm(finite), rel=1e-14)
    assert total.std == pytest.approx(finite.std(), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "norm"),
    [
        ([3.0, 4.0], 5.0),
        ([3.0, 4.0, math.inf], math.inf),
        ([3.0, 4.0, -math.inf], math.inf),
        ([3.0, 4.0, math.inf, math.nan], math.nan),
        ([0.0], 0.0),
    ],
)
def test_total_norm_has_torchs_meaning(values, norm):
    table = StatTable(["w"], raw_table([np.array([values])]))
    assert table.total_norm == pytest.approx(norm, nan_ok=True)
    torchs = torch.linalg.vector_norm(torch.tensor(values, dtype=torch.float64)).item()
    assert table.total_norm == pytest.approx(torchs, nan_ok=True)
    assert table.finite_norm == pytest.approx(0.0 if values == [0.0] else 5.0)
    assert type(table.total_norm) is type(table.finite_norm) is float


def test_nothing_has_a_gradient():
    table = StatTable(["a", "b"], raw_table([None, None]))
    assert table.missing == ("a", "b")
    assert (table.total_norm, table.finite_norm) == (0.0, 0.0)
    assert table.total.has_grad is False
    assert "no gradient" in table.render(plain=True)


def test_no_rows():
    table = StatTable([], torch.zeros(1, 12, dtype=torch.float64))
    assert (len(table), list(table), table.to_dict(), table.missing) == (0, [], {}, ())
    assert table.to_numpy().shape == (0,)
    assert "0 layers" in table.render(plain=True)
    assert "StatTable(0 rows" in repr(table)
    with pytest.raises(LayerNotFoundError, match="the table is empty"):
        table["w"]


def test_column(table, arrays):
    zeros = table.column("zeros")
    assert zeros.dtype == np.int64
    assert zeros.tolist() == [0 if a is None else int((a == 0).sum()) for a in arrays]
    l2 = table.column("l2")
    assert l2.shape == (5,)
    assert np.isnan(l2[2])
    with pytest.raises(ValueError, match="read-only"):
        l2[0] = 1.0


def test_histogram(table, arrays):
    expected = histogram_of(arrays).numpy()
    assert table.histogram.dtype == np.int64
    assert (table.histogram == expected[:-1]).all()
    assert (table["embed.weight"].histogram == expected[0]).all()
    assert (table.total.histogram == expected[-1]).all()
    plain = StatTable(NAMES, raw_table(arrays))
    assert plain.histogram is plain[0].histogram is plain.total.histogram is None


def test_the_first_read_is_a_snapshot():
    data = raw_table([np.array([[3.0, 4.0]])])
    table = StatTable(["w"], data)
    assert table.total_norm == 5.0
    data.zero_()
    assert table.total_norm == table["w"].l2 == 5.0


def test_names_cost_nothing_until_asked():
    calls = []

    def names():
        calls.append(1)
        return NAMES

    data = raw_table(arrays_of(0))
    table = StatTable(names, data)
    window = StatTable.mean([table, StatTable(names, data)])
    assert (table.total_norm, table.finite_norm, len(window)) == (
        pytest.approx(math.nan, nan_ok=True), table.column("l2").size and table.total.l2, 5,
    )  # fmt: skip
    assert calls == []
    assert table.names == tuple(NAMES)
    assert table.names == tuple(row.name for row in table)
    assert calls == [1]


def test_repr_is_short_and_shows_headlines(table):
    assert repr(table) == (
        "StatTable(5 rows of kind 'gradient', cpu, 1 missing, total_norm=nan)"
    )  # fmt: skip
    assert repr(table["layers.0.bias"]) == "StatRow('layers.0.bias', missing)"
    assert repr(table["layers.1.weight"]).endswith("nans=1, infs=2)")
    assert "inf" not in repr(table["embed.weight"])


def test_repr_does_not_read_another_device():
    data = torch.empty(3, 12, dtype=torch.float64, device="meta")
    assert repr(StatTable(["a", "b"], data)) == (
        "StatTable(2 rows of kind 'gradient', meta, not read yet)"
    )


# ---- errors --------------------------------------------------------------------------------------


def good_data(rows=2):
    return torch.zeros(rows, 12, dtype=torch.float64)


def good_counts(rows, bins):
    return torch.zeros(rows, bins, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["a"], np.zeros((2, 12))), ArgumentTypeError, "of torch.float64, got ndarray"),
        ((["a"], torch.zeros(2, 12)), ArgumentTypeError, "got torch.float32"),
        ((["a"], good_data()[:, :5]), ArgumentValueError, r"data must have shape \(n \+ 1, 12\)"),
        ((["a"], good_data()[:0]), ArgumentValueError, r"got \(0, 12\)"),
        ((["a", "b"], good_data()), ArgumentValueError, "got 2 names for 1 tensors"),
        ((lambda: ["a", "b"], good_data()), ArgumentValueError, "got 2 names for 1 tensors"),
        (("ab", good_data(3)), ArgumentTypeError, r"got the str 'ab'; use \['ab'\]"),
        (([1], good_data()), ArgumentTypeError, r"names\[0\] must be a str, got int"),
        ((["a", "b", "a"], good_data(4)), ArgumentValueError, "got 'a' twice"),
        ((["a"], good_data(), torch.zeros(2, 256)), ArgumentTypeError, "histogram must be a"),
        ((["a"], good_data(), good_counts(2, 9)), ArgumentValueError, r"\(n \+ 1, 256\)"),
        ((["a"], good_data(), good_counts(3, 256)), ArgumentValueError, "3 rows on cpu for 2"),
    ],
)  # fmt: skip
def test_construction_errors(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        StatTable(*arguments).names  # noqa: B018 (names are looked at when they are first needed)
    assert isinstance(caught.value, GradstatError)


def test_unknown_layer(table):
    with pytest.raises(LayerNotFoundError) as caught:
        table["layers.0.wieght"]
    assert isinstance(caught.value, KeyError)
    assert str(caught.value) == (
        "the table has no row named 'layers.0.wieght'; did you mean 'layers.0.weight' or "
        "'layers.1.weight' or 'layers.0.bias'?"
    )
    with pytest.raises(
        LayerNotFoundError, match=r"did you mean 'embed\.weight' or 'layers\.0\.weight'"
    ):
        table["zzz"]
    for index in (5, -6):
        with pytest.raises(LayerNotFoundError, match=f"within the table's 5 rows, got {index}"):
            table[index]
    with pytest.raises(ArgumentTypeError, match="by name or index, got slice"):
        table[1:2]


def test_unknown_column(table):
    with pytest.raises(ArgumentValueError, match=r"column must be one of numel, zeros.*got 'l3'"):
        table.column("l3")


def test_error_tree():
    tree = [
        e for _, e in inspect.getmembers(errors, inspect.isclass) if e.__module__ == errors.__name__
    ]
    assert len(tree) == 11
    for error in tree:
        assert issubclass(error, GradstatError)
        assert inspect.getdoc(error)
        message = 'max_norm must be positive; it\'s "bad"'
        assert str(error(message)) == message
        assert str(pickle.loads(pickle.dumps(error(message)))) == message
    builtin = {
        errors.ArgumentValueError: ValueError,
        errors.ArgumentTypeError: TypeError,
        errors.UnsupportedTensorError: TypeError,
        errors.NonFiniteNormError: RuntimeError,
        errors.NativeModuleError: ImportError,
        errors.MissingPackageError: ImportError,
        errors.CudaError: RuntimeError,
        errors.LayerNotFoundError: KeyError,
        errors.RunNotFoundError: FileNotFoundError,
    }
    for error, base in builtin.items():
        assert issubclass(error, base)
