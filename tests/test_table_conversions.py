"""What a table is turned into: other containers, files and copies."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import sys
import threading
import types

import numpy as np
import pytest
import torch
from tables import (
    COUNTS,
    NAMES,
    arrays_of,
    assert_same_table,
    histogram_of,
    raw_table,
    variants,
)

from gradstat import columns, render
from gradstat.columns import COLUMN_NAMES
from gradstat.errors import (
    ArgumentValueError,
    CudaError,
    MissingPackageError,
)
from gradstat.table import StatTable


@pytest.fixture
def arrays():
    return arrays_of(0)


@pytest.fixture
def table(arrays):
    return StatTable(NAMES, raw_table(arrays), histogram_of(arrays))


# ---- conversions ---------------------------------------------------------------------------------


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


# ---- files and copies ----------------------------------------------------------------------------


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


# ---- threads and devices -------------------------------------------------------------------------


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
