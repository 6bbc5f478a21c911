"""Runs that go on: after a resume, after a roll-back, and by whom they may be written."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import backward, make_model, monitor_of, sgd, train

import gradstat
from gradstat.runlog.lock import is_written


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


def attached(path: Path, **options: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = make_model()
    return model, gradstat.attach(sgd(model), model, log=path, log_every=1, **options)


def test_a_resumed_run_goes_on_under_its_id(path: Path) -> None:
    model, optimizer = attached(path)
    train(model, optimizer, 6)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 4, 6)
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        before, run_id = run.table("l2")[1], run.id

    model, optimizer = attached(path)
    optimizer.load_state_dict(state)
    for step in range(6, 9):
        monitor_of(optimizer).observe(loss=float(step))
        train(model, optimizer, 1, step)
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        assert run.id == run_id
        assert run.steps["step"].tolist() == list(range(1, 10))
        np.testing.assert_array_equal(run.steps["loss"], [math.nan] * 6 + [6.0, 7.0, 8.0])
        steps, norms = run.table("l2")
        assert steps.tolist() == list(range(1, 10))
        np.testing.assert_array_equal(norms[:6], before[:6])
        first, second = run.sessions
        assert (first.first_step, first.hidden_from) == (1, 7)
        assert (second.first_step, second.hidden_from) == (7, None)
        assert len(run.frame("gradients")) == 9 * 4
        # Nothing was deleted.
        rows = run._rows("SELECT count(*) FROM steps WHERE session = 1")
        assert rows == [(10,)]


def test_sessions_that_go_further_back_hide_all_before_them(path: Path) -> None:
    for start, steps in ((0, 10), (6, 3), (3, 2)):
        model, optimizer = attached(path)
        monitor_of(optimizer)._recorder.step = start
        monitor_of(optimizer).observe(session=start)
        train(model, optimizer, steps, start)
        gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        assert run.steps["step"].tolist() == [1, 2, 3, 4, 5]
        assert [session.hidden_from for session in run.sessions] == [4, 4, None]
        steps, values = run.scalars["session"]
        assert (steps.tolist(), values.tolist()) == ([1, 4], [0.0, 3.0])


def test_a_resume_without_a_step_hides_nothing(path: Path) -> None:
    model, optimizer = attached(path)
    train(model, optimizer, 3)
    gradstat.detach(optimizer)
    gradstat.detach(attached(path)[1])
    with gradstat.open_run(path) as run:
        assert run.steps["step"].tolist() == [1, 2, 3]
        assert len(run.names) == 4
        assert [session.first_step for session in run.sessions] == [1, None]


def test_findings_of_before_a_resume_end_with_its_first_look(path: Path) -> None:
    finding = gradstat.Finding("flat-loss", "warning", 0.9, "the loss is flat", ("wait",))
    model, optimizer = attached(path, diagnose=False)
    train(model, optimizer, 2)
    monitor_of(optimizer).log._note_findings([finding])  # type: ignore[union-attr]
    gradstat.detach(optimizer)
    model, optimizer = attached(path, diagnose=False)
    monitor_of(optimizer)._recorder.step = 2
    train(model, optimizer, 1, 2)
    log = monitor_of(optimizer).log
    assert log is not None
    log.flush()
    with gradstat.open_run(path) as run:
        assert run.findings == [(2, finding)]
        log._note_findings([])
        gradstat.detach(optimizer)
        assert run.findings == []


def test_a_roll_back_of_a_guard_begins_a_session(path: Path) -> None:
    model, optimizer = attached(path, on_nonfinite="propagate")
    guard = gradstat.Guard(
        monitor_of(optimizer), [gradstat.RollBack()], snapshot_every=5, diagnose_every=1000
    )
    step = 0
    while not guard.actions:
        loss = backward(model, step)
        monitor_of(optimizer).observe(loss=math.nan if step >= 30 else loss)
        optimizer.step()
        step += 1
        assert step < 60
    went_back_to = monitor_of(optimizer).step
    train(model, optimizer, 3, step)
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        assert went_back_to < step
        assert run.steps["step"].tolist() == list(range(1, went_back_to + 4))
        assert repr(run.actions) == repr(guard.actions)  # it went back from a NaN
        assert [session.first_step for session in run.sessions] == [1, went_back_to + 1]
        assert run.sessions[0].ended is not None


# ---- one writer ----------------------------------------------------------------------------------

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("4711")
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_is_told_of(path: Path) -> None:
    command = [sys.executable, "-c", HOLD, f"{path}-lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(gradstat.RunLogError, match="while process 4711 writes it; give each"):
            attached(path)
        assert is_written(path)
        assert other.stdin is not None
        other.stdin.close()
    assert not is_written(path)
    gradstat.detach(attached(path)[1])


def test_a_second_log_on_the_same_file_is_refused(path: Path) -> None:
    model, optimizer = attached(path)
    with pytest.raises(gradstat.RunLogError, match="one run at a time"):
        attached(path)
    train(model, optimizer, 2)
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        assert run.steps["step"].tolist() == [1, 2]


def test_readers_do_not_keep_a_writer_from_the_file(path: Path) -> None:
    gradstat.detach(attached(path)[1])
    with gradstat.open_run(path) as run:
        model, optimizer = attached(path)
        assert run.status == "running"
        train(model, optimizer, 2)
        gradstat.detach(optimizer)
        assert run.status == "finished"
        assert run.steps["step"].tolist() == [1, 2]
