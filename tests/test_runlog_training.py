"""A run log beside a training: it changes nothing, and ends when it should."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
from small_training import (
    OPTIMIZERS,
    logged,
    make_model,
    monitor_of,
    optimizer_tensors,
    same_bits,
    sgd,
    train,
    weights,
)

import gradstat
from gradstat.records import HistogramRecord, Record, Sink, StepRecord


class Kept(Sink):
    """Keeps the records themselves."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.calls: list[str] = []

    def write(self, record: Record) -> None:
        self.records.append(record)

    def flush(self) -> None:
        self.calls.append("flush")

    def close(self) -> None:
        self.calls.append("close")

    def of(self, kind: type[Any]) -> list[Any]:
        return [record for record in self.records if isinstance(record, kind)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "first.db"


@pytest.mark.parametrize("make", [OPTIMIZERS["adamw-fused"], OPTIMIZERS["sgd-loop"]])
def test_a_log_changes_no_bit_of_the_training(path: Path, make: Any) -> None:
    results = []
    for log in (None, path):
        model = make_model()
        optimizer = gradstat.attach(
            make(model.parameters()), model, clip="auto", log=log, log_every=2
        )
        train(model, optimizer, 42)  # with histograms at 1, 21 and 41
        results.append(weights(model) + optimizer_tensors(optimizer))
        gradstat.detach(optimizer)
    assert same_bits(*results)


def test_copies_of_the_optimizer_and_the_monitor_write_nothing(path: Path) -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, log=path)
    train(model, optimizer, 2)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not hasattr(twin, "gradstat")
        twin.step()
    monitor = pickle.loads(pickle.dumps(monitor_of(optimizer)))
    assert monitor.log is None
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        assert len(run.steps["step"]) == 2


def test_a_wrapper_passes_the_log_on_and_its_copies_have_none(path: Path) -> None:
    model = make_model()
    optimizer = gradstat.GradStatOptimizer(sgd(model), model=model, log=path)
    train(model, optimizer, 2)
    assert copy.deepcopy(optimizer).gradstat.log is None
    gradstat.detach(optimizer.inner)
    with gradstat.open_run(path) as run:
        assert len(run.steps["step"]) == 2


def test_the_log_ends_with_its_optimizer(path: Path) -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, log=path)
    train(model, optimizer, 3)
    del optimizer
    with gradstat.open_run(path) as run:
        assert run.status == "finished"
        assert len(run.steps["step"]) == 3


def test_several_sinks_get_the_same_records_in_order(path: Path) -> None:
    first, second = Kept(), Kept()
    logged([first, path, second], 11)
    assert [type(r) for r in first.records] == [type(r) for r in second.records]
    assert [record.step for record in first.of(StepRecord)] == list(range(1, 12))
    assert [record.step for record in first.of(HistogramRecord)] == [1]
    assert first.calls[-1] == "close"
    with gradstat.open_run(path) as run:
        assert run.id == first.records[0].run_id  # type: ignore[union-attr]


def test_what_cannot_be_a_log_is_refused_and_leaves_nothing_behind(path: Path) -> None:
    model = make_model()
    optimizer = sgd(model)
    wrong: Any = [path, 3]
    with pytest.raises(gradstat.ArgumentTypeError, match="log must be a path, a sink or a list"):
        gradstat.attach(optimizer, model, log=wrong)
    with pytest.raises(gradstat.ArgumentValueError, match="log_every must be a whole number"):
        gradstat.attach(optimizer, model, log=path, log_every=0)
    assert not hasattr(optimizer, "gradstat")
    assert len(optimizer._optimizer_step_post_hooks) == 0
    logged(path, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("l3",), "column must be one of"), (("l2", "grad"), "kind must be")],
)
def test_unknown_columns_and_kinds_are_refused(
    path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    logged(path, 1)
    with gradstat.open_run(path) as run, pytest.raises(gradstat.ArgumentValueError, match=message):
        run.table(*arguments)
