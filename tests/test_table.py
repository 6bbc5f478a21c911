"""The table against hand-made raw rows and definitions written out in numpy."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
import math
import pickle
import re
import sys
import threading
import types
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from gradstat import columns, errors, render
from gradstat.columns import COLUMN_NAMES, DERIVED_COLUMNS, RAW_COLUMNS, StatRow
from gradstat.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CudaError,
    GradstatError,
    LayerNotFoundError,
    MissingPackageError,
)
from gradstat.table import StatTable

COUNTS = (
    "numel", "zeros", "nans", "infs", "rows", "dead_rows", "finite", "nonfinite"
)  # fmt: skip
NAMES = ["embed.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight", "head.weight"]


def raw_row(values):
    """The twelve raw columns of an array, summed exactly; None is a tensor that is missing."""
    if values is None:
        return [math.nan] * 12
    flat = np.asarray(values, np.float64).ravel()
    finite = flat[np.isfinite(flat)].tolist()
    sizes = [abs(x) for x in finite]
    rows = values.reshape(values.shape[0], -1)
    return [
        flat.size, int((flat == 0).sum()), int(np.isnan(flat).sum()), int(np.isinf(flat).sum()),
        math.fsum(finite), math.fsum(sizes), math.fsum(x * x for x in finite),
        max(sizes, default=0.0), min((x for x in sizes if x), default=0.0),
        rows.shape[0], sum(not row.any() for row in rows), math.hypot(*finite),
    ]  # fmt: skip


def raw_table(arrays):
    present = [a for a in arrays if a is not None]
    total = raw_row(np.concatenate([a.ravel() for a in present])) if present else [0.0] * 12
    total[9] = sum(a.shape[0] for a in present)
    total[10] = sum(raw_row(a)[10] for a in present)
    return torch.tensor([*map(raw_row, arrays), total], dtype=torch.float64)


def arrays_of(seed):
    rng = np.random.default_rng(seed)
    embed = rng.normal(size=(20, 6))
    embed[4:17] = 0.0
    broken = rng.normal(size=(4, 5))
    broken[0, 1], broken[2, 2], broken[3, 0] = np.nan, np.inf, -np.inf
    return [embed, rng.normal(3.0, 0.1, size=(7, 9)), None, broken, 1e-30 * rng.normal(size=(2, 3))]


def histogram_of(arrays):
    """Bin by bin from the edges, as the contract words it."""
    table = np.zeros((len(arrays) + 1, 256), np.int64)
    for row, values in zip(table, arrays, strict=False):
        if values is not None:
            sizes = np.abs(values[np.isfinite(values) & (values != 0)])
            row[:] = np.histogram(sizes, [0.0, *(2.0**e for e in range(-126, 129)), np.inf])[0]
    table[-1] = table.sum(0)
    return torch.from_numpy(table)


@pytest.fixture
def arrays():
    return arrays_of(0)


@pytest.fixture
def table(arrays):
    return StatTable(NAMES, raw_table(arrays), histogram_of(arrays))


def without_broken(seed):
    arrays = arrays_of(seed)
    return [np.nan_to_num(a, posinf=1.0, neginf=-1.0) if a is not None else None for a in arrays]


def assert_same_table(left, right):
    assert (left.names, left.kind, left.averaged) == (right.names, right.kind, right.averaged)
    # Bytes, so that NaN equals NaN and -0.0 differs from 0.0.
    assert left.data.cpu().numpy().tobytes() == right.data.cpu().numpy().tobytes()
    if left.histogram is None or right.histogram is None:
        assert left.histogram is right.histogram is None
    else:
        assert left.histogram.dtype == right.histogram.dtype
        assert (left.histogram_data.cpu() == right.histogram_data.cpu()).all()


# ---- columns ------------------------------------------------------------------------------------


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


# ---- access -------------------------------------------------------------------------------------


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


# ---- conversions --------------------------------------------------------------------------------


def test_to_dict(table):
    result = table.to_dict()
    assert list(result) == NAMES
    assert list(result["embed.weight"]) == ["has_grad", *COLUMN_NAMES]
    for name, values in result.items():
        row = table[name]
        for key, value in values.items():
            assert type(value) in (int, float, bool)
            assert value == pytest.approx(getattr(row, key), rel=0, nan_ok=True)
    json.dumps(result)


def test_to_numpy(table):
    array = table.to_numpy()
    assert array.dtype.names == ("name", "has_grad", *COLUMN_NAMES)
    assert array["name"].tolist() == NAMES
    assert array["has_grad"].tolist() == [True, True, False, True, True]
    for name in COLUMN_NAMES:
        assert array[name].dtype == (np.int64 if name in COUNTS else np.float64)
        np.testing.assert_array_equal(array[name], table.column(name))


def test_to_pandas(table):
    pytest.importorskip("pandas")
    frame = table.to_pandas()
    assert frame.index.name == "name"
    assert frame.index.tolist() == NAMES
    assert frame.columns.tolist() == ["has_grad", *COLUMN_NAMES]
    assert frame.loc["embed.weight", "dead_rows"] == 13
    frame.loc["embed.weight", "l2"] = 7.0  # a frame of the user's own
    assert table["embed.weight"].l2 != 7.0


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("pandas", lambda table, _: table.to_pandas()),
        ("safetensors.numpy", lambda table, path: table.save(path / "t.safetensors")),
        ("safetensors", lambda _, path: StatTable.load(path / "t.safetensors")),
        ("rich.console", lambda table, _: table.render(plain=False)),
        ("rich.text", lambda table, _: render.rich_text(table)),
    ],
)
def test_optional_package_that_is_missing(table, tmp_path, monkeypatch, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"run: pip install {package.split('.')[0]}$"):
        call(table, tmp_path)
    assert issubclass(MissingPackageError, ImportError)


# ---- files and copies ---------------------------------------------------------------------------


def variants():
    arrays = arrays_of(0)
    data = raw_table(arrays)
    odd = ["", "a\0", "ünï.weight", "x" * 300, "\ud800"]
    return {
        "plain": StatTable(NAMES, data),
        "histogram": StatTable(NAMES, data, histogram_of(arrays), kind="weight"),
        "odd names": StatTable(odd, data),
        "average": StatTable(NAMES, data, histogram_of(arrays)) / 3,
        "no rows": StatTable([], torch.zeros(1, 12, dtype=torch.float64)),
    }


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".NPZ"])
@pytest.mark.parametrize("variant", variants())
def test_files_round_trip(tmp_path, variant, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    table = variants()[variant]
    path = tmp_path / f"table{suffix}"
    table.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert_same_table(StatTable.load(str(path)), table)


def test_other_suffix(table, tmp_path):
    for call in (table.save, StatTable.load):
        with pytest.raises(
            ArgumentValueError, match=r"must end in \.npz or \.safetensors, got '.*t\.pt'"
        ):
            call(tmp_path / "t.pt")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_no_such_file(tmp_path, suffix):
    with pytest.raises(FileNotFoundError):
        StatTable.load(tmp_path / f"none{suffix}")


def other_npz(path):
    np.savez(path, weights=np.ones(3))


def pickled_npz(path):
    np.savez(path, header=np.array([{"a": 1}], dtype=object))


def later_format(path):
    header = json.dumps({"format": 99}).encode()
    np.savez(path, header=np.frombuffer(header, np.uint8), data=np.ones((1, 12)))


def wrong_shape(path):
    header = {"format": 1, "kind": "gradient", "averaged": False, "names": ["a", "b"]}
    encoded = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(path, header=encoded, data=np.ones((2, 12)))


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: path.write_bytes(b"no table at all"), "pickle"),
        (lambda path: path.write_bytes(b""), "EOFError"),
        (other_npz, "header"),
        (pickled_npz, "allow_pickle"),
        (later_format, "it has format 99, this version reads 1"),
        (wrong_shape, "got 2 names for 1 tensors"),
    ],
    ids=["text", "empty", "other npz", "pickle", "later format", "wrong shape"],
)
def test_foreign_npz(tmp_path, write, reason):
    path = tmp_path / "t.npz"
    write(path)
    message = rf"t\.npz must be a file that StatTable\.save wrote; .*{reason}"
    with pytest.raises(ArgumentValueError, match=message):
        StatTable.load(path)


def test_foreign_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "t.safetensors"
    path.write_bytes(b"short")
    with pytest.raises(ArgumentValueError, match=r"must be a file that StatTable\.save wrote"):
        StatTable.load(path)
    path.write_bytes(safetensors.save({"weight": np.ones(3)}))
    with pytest.raises(ArgumentValueError, match=r"must be a file that StatTable\.save wrote"):
        StatTable.load(path)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))]
)
@pytest.mark.parametrize("variant", variants())
def test_copies(variant, duplicate):
    table = variants()[variant]
    assert_same_table(duplicate(table), table)


def test_deep_copy_owns_its_data():
    data = raw_table([np.array([[3.0, 4.0]])])
    table = copy.deepcopy(StatTable(lambda: ["w"], data))
    data.zero_()
    assert table["w"].l2 == 5.0


def test_loaded_tables_add_up(table, tmp_path):
    table.save(tmp_path / "t.npz")
    loaded = StatTable.load(tmp_path / "t.npz")
    assert (table + loaded)["embed.weight"].numel == 2 * table["embed.weight"].numel


# ---- arithmetic ---------------------------------------------------------------------------------


def window_of(count):
    stacks = [without_broken(seed) for seed in range(count)]
    return stacks, [StatTable(NAMES, raw_table(s), histogram_of(s)) for s in stacks]


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


# ---- errors -------------------------------------------------------------------------------------


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
    assert len(tree) == 9
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
    }
    for error, base in builtin.items():
        assert issubclass(error, base)


# ---- text ---------------------------------------------------------------------------------------


def test_plain_text(table):
    assert table.render(width=120, plain=True).splitlines() == [
        "  layer            numel        l2       rms       mean       std       max  zeros"
        "  dead rows  nan  inf",
        "-" * 103,
        "  embed.weight       120  5.78e+00  5.27e-01  -2.16e-02  5.27e-01  2.33e+00  65.0%"
        "      13/20    0    0",
        "  layers.0.weight     63  2.37e+01  2.99e+00   2.98e+00  9.31e-02  3.18e+00     0%"
        "        0/7    0    0",
        "  layers.0.bias    no gradient",
        "! layers.1.weight     20  4.48e+00  1.09e+00  -1.34e-01  1.08e+00  2.37e+00     0%"
        "        0/4    1    2",
        "  head.weight          6  1.82e-30  7.45e-31  -9.03e-32  7.39e-31  1.29e-30     0%"
        "        0/2    0    0",
        "-" * 103,
        "  total              209  2.48e+01  1.73e+00   8.89e-01  1.48e+00  3.18e+00  37.3%"
        "      13/33    1    2",
        "total norm nan (finite part 24.8) over 5 layers, 1 without gradient",
        "! NaN or Inf in 1 layer: layers.1.weight",
    ]  # fmt: skip


def deep_table(count=40):
    rng = np.random.default_rng(1)
    names = [
        f"transformer.encoder.layers.{i}.self_attention.out_projection.weight" for i in range(count)
    ]
    arrays = [rng.normal(size=(3, 5)) * 10.0**-i for i in range(count)]
    arrays[7] = None
    arrays[20][0, 0] = math.nan
    return StatTable(names, raw_table(arrays))


@pytest.mark.parametrize("width", [24, 40, 60, 80, 100, 120, 200])
def test_lines_fit(table, width):
    for shown in (table, deep_table(), variants()["average"], variants()["odd names"]):
        lines = shown.render(width=width, plain=True).splitlines()
        assert max(map(len, lines)) <= width
        assert all(line.isprintable() for line in lines)


def test_eighty_columns_keep_what_matters():
    text = deep_table().render(width=80, plain=True)
    header, rule, *lines = text.splitlines()
    assert header.split() == ["layer", "l2", "max", "zeros", "dead", "rows", "nan", "inf"]
    assert set(rule) == {"-"}
    names = [line[2:].split()[0] for line in lines[:40]]
    assert len(set(names)) == 40  # cut where they differ
    assert names[0] == "...0.self_atten...ction.weight"
    assert lines[7].split()[1:] == ["no", "gradient"]
    assert [line for line in lines[:40] if line.startswith("!")] == [lines[20]]
    assert lines[-1].startswith("! NaN or Inf in 1 layer: transformer.encode")
    healthy = StatTable(["w"], raw_table([np.ones((2, 2))])).render(width=80, plain=True)
    assert "std" in healthy
    assert "nan" not in healthy.splitlines()[0]
    assert healthy.splitlines()[-1] == "total norm 2 over 1 layer, no NaN or Inf"


def test_max_rows():
    table = deep_table()
    lines = table.render(width=80, max_rows=6, plain=True).splitlines()
    assert [line.split()[0][:5] for line in lines[2:5]] == ["...0.", "...1.", "...2."]
    assert lines[5] == "... 34 more layers, 1 with NaN or Inf"
    assert [line.split()[0][:5] for line in lines[6:9]] == ["...37", "...38", "...39"]
    assert table.render(width=80, max_rows=40, plain=True) == table.render(width=80, plain=True)
    assert table.render(max_rows=1, plain=True).count("\n") == 7
    with pytest.raises(ArgumentValueError, match="max_rows must be at least 1, got 0"):
        table.render(max_rows=0)


def test_numbers():
    counts = (0, 7, 99999, 0.5, 123456, 999_499, 1_234_567, 2.5e9, 7e12)
    assert [render._count(x) for x in counts] == [
        "0", "7", "99999", "0.5", "123k", "999k", "1.23M", "2.5G", "7T",
    ]  # fmt: skip
    assert [render._percent(x) for x in (0.0, 1e-9, 0.123, 0.99999, 1.0, math.nan)] == [
        "0%", "0.1%", "12.3%", "99.9%", "100%", "-",
    ]  # fmt: skip
    assert [render._number(x) for x in (0.0, -1.5, 1e-300, math.inf, math.nan)] == [
        "0", "-1.50e+00", "1.00e-300", "inf", "-",
    ]  # fmt: skip


def test_names_cannot_write_to_the_terminal():
    table = StatTable(["a\x1b[2Jb\nc"], raw_table([np.ones((1, 1))]))
    assert "a?[2Jb?c" in table.render(plain=True)


def test_other_kinds():
    table = StatTable(["w"], raw_table([None]), kind="weight")
    assert "no weight" in table.render(plain=True)
    assert "1 without weight" in table.render(plain=True)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_print_is_plain_unless_stdout_is_a_terminal(table, monkeypatch):
    assert str(table) == table.render(plain=True)
    pytest.importorskip("rich")
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = str(table)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == table.render(plain=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[" not in str(table)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b[" not in str(table)
    monkeypatch.setattr(sys, "stdout", None)
    assert "\x1b[" not in str(table)


def test_rich_prints_the_table(table):
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=80)
    console.print(table)
    printed = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert printed == table.render(width=80, plain=True).splitlines()


def test_rendering_needs_no_third_party_at_import():
    source = inspect.getsource(render)
    assert re.findall(r"^(?:import|from) (?!__future__|gradstat)(\w+)", source, re.MULTILINE) == [
        "importlib", "math", "os", "shutil", "sys", "textwrap", "collections", "dataclasses",
        "typing",
    ]  # fmt: skip


# ---- threads and devices ------------------------------------------------------------------------


def test_threads_read_the_same_table():
    data = raw_table([np.ones((2, 3))]).repeat(100, 1)
    table = StatTable(lambda: [f"w{i}" for i in range(199)], data)
    results = []
    threads = [threading.Thread(target=lambda: results.append(table.to_dict())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [results[0]] * 8


def cuda_table(arrays):
    return StatTable(NAMES, raw_table(arrays).cuda(), histogram_of(arrays).cuda())


@pytest.mark.needs_cuda
def test_arithmetic_on_cuda_does_not_synchronise():
    first, second = cuda_table(arrays_of(0)), cuda_table(arrays_of(1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        average = StatTable.mean([first, second])
        doubled = 2 * first + second
        unread = repr(average)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert average.device.type == doubled.device.type == "cuda"
    assert "not read yet" in unread
    host = StatTable.mean([t.cpu() for t in (first, second)])
    np.testing.assert_allclose(average.cpu().data, host.data, rtol=1e-15, equal_nan=True)


@pytest.mark.needs_cuda
def test_reading_from_cuda_waits_once(monkeypatch):
    table = cuda_table(arrays_of(0))
    waits = []
    wait = torch.cuda.Stream.synchronize
    monkeypatch.setattr(torch.cuda.Stream, "synchronize", lambda s: (waits.append(s), wait(s)))
    assert_same_table(
        table.cpu(), StatTable(NAMES, raw_table(arrays_of(0)), histogram_of(arrays_of(0)))
    )
    assert table.to_dict()
    assert len(waits) == 1


@pytest.mark.needs_cuda
def test_copies_from_cuda():
    table = cuda_table(arrays_of(0))
    assert copy.deepcopy(table).device.type == "cuda"
    assert pickle.loads(pickle.dumps(table)).device.type == "cpu"
    assert (table + table.cpu()).device.type == "cpu"


def test_reading_while_a_graph_is_captured_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    stand_in = types.SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(CudaError, match="read it after the graph was replayed"):
        columns._to_host([stand_in])
