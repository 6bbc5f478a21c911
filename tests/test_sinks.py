"""The sinks, fed with records and read back."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_training

import gradstat
from gradstat.columns import RAW_COLUMNS
from gradstat.diagnosis import Finding
from gradstat.errors import ArgumentTypeError, MissingPackageError
from gradstat.guard import GuardAction
from gradstat.records import (
    ActionRecord,
    ActivationRecord,
    DiagnosisRecord,
    DroppedRecord,
    HistogramRecord,
    LayersRecord,
    Record,
    RunEnd,
    RunStart,
    SiteRecord,
    StepRecord,
    TableRecord,
    UpdateRatioRecord,
)
from gradstat.sinks import Callback, JsonLines, Sink, TensorBoard
from gradstat.sinks.json_lines import as_plain

INF, NAN = math.inf, math.nan
NAMES = ("encoder.0.weight", "größe <b>&", "x" * 300)
COLUMN = {column.name: index for index, column in enumerate(RAW_COLUMNS)}


def run_start(run_id: str = "abc") -> RunStart:
    return RunStart(run_id, 1.5, {"class": "Net"}, {"lr": INF}, {"clip": None}, {"torch": "2"}, {})


def step(number: int, **changes: Any) -> StepRecord:
    values = {
        "step": number, "time": 100.0 + number, "loss": 1 / number, "lr": 0.1, "total_norm": 2.0,
        "clip_coef": 0.5, "clip_threshold": 1.0, "is_skipped": False,
    }  # fmt: skip
    return StepRecord(**{**values, **changes})


def table(number: int, kind: Any = "gradient", l2: Any = (1.0, 2.0, NAN)) -> TableRecord:
    data = np.zeros((len(NAMES), len(RAW_COLUMNS)))
    data[:, COLUMN["l2"]] = l2
    data[1, COLUMN["nans"]], data[1, COLUMN["infs"]] = 2, 1
    return TableRecord(number, kind, data)


def histogram(number: int) -> HistogramRecord:
    counts = np.zeros((len(NAMES), 256), np.int64)
    counts[0, [125, 127, 128]] = 3, 4, 5
    counts[1, [0, 255]] = 1, 2
    return HistogramRecord(number, counts)


FINDING = Finding("dead-units", "warning", 0.9, "<script>half</script> are dead", ("lower lr",))
ACTION = GuardAction(3, "cut-lr", "diverging-loss", "it rises", {"lr": 0.2}, {"lr": 0.1})
SITES = (SiteRecord("act", "relu", 8, 2, NAN, 0.25, 0.5, 0.1, 0.2),)

ALL_RECORDS: tuple[Record, ...] = (
    run_start(),
    LayersRecord(NAMES, ((2, 3), (3,), ()), ("float32", "float32", "bfloat16")),
    step(1, loss=NAN, clip_threshold=INF, scalars={"val_loss": -INF, "accuracy": 0.5}),
    table(1),
    table(1, "weight", (2.0, 0.0, 4.0)),
    table(1, "update", (0.002, 1.0, NAN)),
    UpdateRatioRecord(1, np.array([0.001, INF, NAN])),
    histogram(1),
    ActivationRecord(1, SITES),
    DiagnosisRecord(1, (FINDING, replace(FINDING, code="fine"))),
    ActionRecord(1, ACTION),
    step(2),
    DroppedRecord(3),
    RunEnd(9.0, 3),
)


def feed(sink: Sink, records: tuple[Record, ...] = ALL_RECORDS) -> None:
    for record in records:
        sink.write(record)
    sink.flush()
    sink.close()


# ---- JSON Lines ---------------------------------------------------------------------------------


def refuse(word: str) -> float:
    raise AssertionError(f"{word} is not strict JSON")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line, parse_constant=refuse) for line in path.read_bytes().splitlines()]


def test_json_lines_hold_every_record(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    feed(JsonLines(path))
    found = lines(path)
    assert [line["record"] for line in found] == [
        "run_start", "layers", "step", "table", "table", "table", "update_ratio", "histogram",
        "activation", "diagnosis", "action", "step", "dropped", "run_end",
    ]  # fmt: skip
    assert found[0]["format"] == 1
    assert found[0]["optimizer"] == {"lr": "Infinity"}
    assert found[1]["names"] == list(NAMES)
    assert found[1]["shapes"] == [[2, 3], [3], []]
    assert found[2]["loss"] == "NaN"
    assert math.isnan(float(found[2]["loss"]))
    assert found[2]["scalars"] == {"val_loss": "-Infinity", "accuracy": 0.5}
    assert found[3]["kind"] == "gradient"
    assert found[3]["data"]["l2"] == [1.0, 2.0, "NaN"]
    assert list(found[3]["data"]) == [column.name for column in RAW_COLUMNS]
    assert found[6]["ratios"] == [0.001, "Infinity", "NaN"]
    assert found[8]["sites"][0]["dead_units"] == 2
    assert [finding["code"] for finding in found[9]["findings"]] == ["dead-units", "fine"]
    assert found[10]["action"]["after"] == {"lr": 0.1}
    assert found[11] == {"record": "step", **vars(step(2))}
    assert found[13] == {"record": "run_end", "time": 9.0, "dropped": 3}


def test_json_histograms_can_be_put_together_again(tmp_path):
    path = tmp_path / "run.jsonl"
    empty = HistogramRecord(2, np.zeros((2, 256), np.int64))
    feed(JsonLines(path), (histogram(1), HistogramRecord(3, histogram(1).counts[:1]), empty))
    whole, part, nothing = lines(path)
    assert np.array_equal(whole["counts"], histogram(1).counts)
    assert part["first_bin"] == 125
    assert part["counts"] == [[3, 0, 4, 5]]
    assert nothing["counts"] == [[], []]


def test_json_lines_are_appended_after_a_torn_line(tmp_path):
    path = tmp_path / "run.jsonl"
    feed(JsonLines(path), (run_start(), step(1)))
    with path.open("ab") as file:
        file.write(b'{"record": "step", "st')
    feed(JsonLines(path), (run_start(), step(2)))
    feed(JsonLines(path), (step(3),))
    texts = path.read_text().splitlines()
    assert texts.pop(2) == '{"record": "step", "st'
    assert [json.loads(text).get("step") for text in texts] == [None, 1, None, 2, 3]


def test_json_lines_are_in_the_file_after_a_flush(tmp_path):
    path = tmp_path / "run.jsonl"
    sink = JsonLines(path)
    sink.write(step(1))
    sink.flush()
    assert len(lines(path)) == 1
    sink.close()


def test_json_lines_say_at_once_that_a_file_cannot_be_opened(tmp_path):
    with pytest.raises(IsADirectoryError):
        JsonLines(tmp_path)


def test_a_name_that_is_no_unicode_is_kept(tmp_path):
    path = tmp_path / "run.jsonl"
    feed(JsonLines(path), (LayersRecord(("\ud800",), ((),), ("float32",)),))
    assert lines(path)[0]["names"] == ["\ud800"]


# ---- all of them, on a run ----------------------------------------------------------------------


def test_a_run_goes_to_all_sinks(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    seen: list[Record] = []

    def careless(record: Record) -> None:
        raise KeyError("nothing here")

    model, saved = small_training.make_model(), {}
    for start in (0, 20):  # 30 steps, and a process that goes on from a checkpoint of step 20
        optimizer = small_training.sgd(model)
        log = [Callback(careless), tmp_path / "run.db", TensorBoard(tmp_path)]
        log += [JsonLines(tmp_path / "run.jsonl"), Callback(seen.append)]
        gradstat.attach(optimizer, model, clip="auto", updates=True, log=log)
        if start:
            optimizer.load_state_dict(saved)
        for number in range(start, 30):
            if number == 20:
                saved = optimizer.state_dict()
            loss = small_training.backward(model, number)
            optimizer.gradstat.observe(loss=loss, val_loss=2.0)
            optimizer.step()
        gradstat.detach(optimizer)
    found = events(tmp_path)
    with gradstat.open_run(tmp_path / "run.db") as run:
        steps = run.steps["step"].tolist()
        assert steps == list(range(1, 31))
        assert [event.step for event in found.Scalars("train/loss")] == steps
        losses = [value for _, value in scalars(found, "train/loss")]
        assert losses == pytest.approx(run.steps["loss"].tolist())
        at, norms = run.table("l2")
        for layer, name in enumerate(run.names):
            expected = list(zip(at.tolist(), norms[:, layer].tolist(), strict=True))
            assert scalars(found, f"grad_norm/{name}") == [
                (n, pytest.approx(v)) for n, v in expected
            ]
        (event, *_) = found.Histograms(f"grad_log2/{run.names[0]}")
        counts = run.histograms(run.names[0])[1][0]
        assert event.histogram_value.num == counts.sum()
        assert sum(event.histogram_value.bucket) == counts.sum()
    assert scalars(found, "val/loss")[0] == (1, 2.0)
    assert {"update_ratio/0.weight", "saturated_low/1/tanh#0"} <= set(found.Tags()["scalars"])
    plain = lines(tmp_path / "run.jsonl")
    assert [line["step"] for line in plain if line["record"] == "step"] == [
        *range(1, 31), *range(21, 31)
    ]  # fmt: skip
    assert [as_plain(record) for record in seen] == plain
    assert [line["record"] for line in plain].count("run_end") == 2
    assert "stops writing to a Callback: KeyError('nothing here')" in caplog.text


# ---- a callback ---------------------------------------------------------------------------------


def test_a_callback_gets_the_records_themselves():
    seen: list[Record] = []
    feed(Callback(seen.append))
    assert all(a is b for a, b in zip(seen, ALL_RECORDS, strict=True))


def test_a_callback_is_a_function():
    with pytest.raises(ArgumentTypeError, match="must be a function of one record, got str"):
        Callback("print")  # type: ignore[arg-type]


# ---- TensorBoard --------------------------------------------------------------------------------


def events(folder: Path) -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder), size_guidance=dict.fromkeys(
        (accumulator.SCALARS, accumulator.HISTOGRAMS, accumulator.TENSORS), 0
    ))  # fmt: skip
    found.Reload()
    return found


def scalars(found: Any, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(tag)]


def text(found: Any, tag: str) -> str:
    (event,) = found.Tensors(f"{tag}/text_summary")
    return str(event.tensor_proto.string_val[0].decode())


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("board")
    feed(TensorBoard(folder))
    return events(folder)


def test_tensorboard_shows_steps(board):
    assert scalars(board, "train/loss") == [(2, 0.5)]  # that of step 1 is not known
    assert scalars(board, "train/lr") == [(1, pytest.approx(0.1)), (2, pytest.approx(0.1))]
    assert scalars(board, "grad_norm/total") == [(1, 2.0), (2, 2.0)]
    assert scalars(board, "clip/coef") == [(1, 0.5), (2, 0.5)]
    assert scalars(board, "clip/threshold") == [(2, 1.0)]  # anything was allowed in step 1
    assert scalars(board, "clip/skipped") == [(1, 0.0), (2, 0.0)]
    assert scalars(board, "val/loss") == [(1, -INF)]
    assert scalars(board, "train/accuracy") == [(1, 0.5)]
    assert board.Scalars("train/loss")[0].wall_time == 102.0


def test_tensorboard_shows_layers(board):
    first, second, third = NAMES
    assert scalars(board, f"grad_norm/{first}") == [(1, 1.0)]
    assert scalars(board, f"grad_norm/{second}") == [(1, 2.0)]
    assert scalars(board, f"weight_norm/{third}") == [(1, 4.0)]
    assert scalars(board, f"update_norm/{first}") == [(1, pytest.approx(0.002))]
    assert scalars(board, f"update_ratio/{first}") == [(1, pytest.approx(0.001))]
    assert scalars(board, f"update_ratio/{second}") == [(1, INF)]
    assert scalars(board, f"grad_nonfinite/{second}") == [(1, 3.0)]
    assert scalars(board, "dead_units/act") == [(1, 0.25)]
    assert scalars(board, "saturated_high/act") == [(1, 0.25)]
    tags = set(board.Tags()["scalars"])
    absent = {f"grad_norm/{third}", f"grad_nonfinite/{first}", "saturated_low/act"}
    assert absent & tags == set()


def test_tensorboard_shows_magnitudes_by_binary_exponent(board):
    first, second = (f"grad_log2/{name}" for name in NAMES[:2])
    assert set(board.Tags()["histograms"]) == {first, second}  # no gradient, no histogram
    (event,) = board.Histograms(first)
    value = event.histogram_value
    assert event.step == 1
    # Bin 125 counts 2^-2 <= |g| < 2^-1.
    assert (value.min, value.max, value.num) == (-2.0, 2.0, 12)
    assert value.bucket_limit == [-1.0, 0.0, 1.0, 2.0]
    assert value.bucket == [3, 0, 4, 5]
    assert value.sum == pytest.approx(3 * -1.5 + 4 * 0.5 + 5 * 1.5)
    assert value.sum_squares == pytest.approx(3 * 1.5**2 + 4 * 0.5**2 + 5 * 1.5**2)
    ends = board.Histograms(second)[0].histogram_value
    assert (ends.min, ends.max, sum(ends.bucket)) == (-127.0, 129.0, 3)


def test_tensorboard_shows_texts_as_they_are(board):
    assert "    dead-units (warning, confidence 0.90)" in text(board, "findings")
    assert "<script>half</script>" in text(board, "findings")
    assert "    fine (warning" in text(board, "findings")
    assert all(line.startswith("    ") for line in text(board, "run").splitlines())
    assert json.loads(text(board, "run"))["run_id"] == "abc"
    assert "cut-lr after step 3" in text(board, "actions/cut-lr")


def test_a_resumed_run_hides_what_it_does_again(tmp_path):
    pytest.importorskip("tensorboard")
    first, second = (tuple(step(n, loss=loss) for n in range(1, 7)) for loss in (1.0, 2.0))
    feed(TensorBoard(tmp_path), (run_start(), *first[:5]))
    feed(TensorBoard(tmp_path), (run_start(), *second[3:]))
    assert scalars(events(tmp_path), "train/loss") == [
        (1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)
    ]  # fmt: skip


def test_a_run_that_goes_back_hides_what_it_does_again(tmp_path):
    pytest.importorskip("tensorboard")
    steps = [step(n) for n in (1, 2, 3, 2)]
    feed(TensorBoard(tmp_path), (run_start(), *steps[:3], run_start(), *steps[3:]))
    found = events(tmp_path)
    assert scalars(found, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert [event.step for event in found.Tensors("run/text_summary")] == [1, 2]


def test_a_writer_that_is_given_stays_open(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        feed(TensorBoard(writer), (run_start(), step(5), run_start(), step(4)))
        writer.add_scalar("mine", 1.0, 7)
    found = events(tmp_path)
    assert scalars(found, "clip/coef") == [(5, 0.5), (4, 0.5)]
    assert scalars(found, "mine") == [(7, 1.0)]


def test_a_writer_that_is_not_torchs_is_called_by_its_methods():
    calls: list[tuple[Any, ...]] = []

    class Writer:
        def __getattr__(self, method: str) -> Any:
            return lambda *args, **more: calls.append((method, *args, *more.values()))

    feed(TensorBoard(Writer()))
    assert ("add_scalar", "grad_norm/total", 2.0, 1, 101.0) in calls
    assert ("add_scalar", f"grad_norm/{NAMES[0]}", 1.0, 1, None) in calls
    assert {call[0] for call in calls} == {
        "add_scalar", "add_histogram_raw", "add_text", "flush"
    }  # fmt: skip


def test_tensorboard_needs_a_place(monkeypatch, tmp_path):
    with pytest.raises(ArgumentTypeError, match="a directory or a SummaryWriter, got int"):
        TensorBoard(3)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'gradstat\[tensorboard\]'"):
        TensorBoard(tmp_path)
    assert list(tmp_path.iterdir()) == []
