"""What a run log survives, what it refuses, and that the training goes on in any case."""

from __future__ import annotations

import logging
import resource
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import make_model, monitor_of, same_bits, sgd, train, weights

import gradstat
from gradstat.records import Record, Sink, StepRecord
from gradstat.runlog import DatabaseSink, pump, schema

HERE = Path(__file__).parent


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


def attached(log: Any, **options: Any) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = make_model()
    return model, gradstat.attach(sgd(model), model, log=log, **options)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ---- processes that end --------------------------------------------------------------------------


def test_fifty_kills_lose_nothing_that_was_committed(path: Path) -> None:
    subprocess.run(
        [sys.executable, str(HERE / "killed_training.py"), str(path), "50"], check=True, timeout=900
    )


EXITS = """
import sys
import torch
import gradstat

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, row):
        assert not torch.utils.data.get_worker_info() is None
        optimizer.gradstat.observe(loss=1.0)
        optimizer.gradstat.log.flush()
        optimizer.gradstat.log.close()
        return torch.full((3,), float(row))

torch.set_num_threads(1)
model = torch.nn.Linear(3, 1)
optimizer = gradstat.attach(torch.optim.SGD(model.parameters(), lr=0.01), model, log=sys.argv[1])
loader = torch.utils.data.DataLoader(
    Rows(), batch_size=4, num_workers=2, multiprocessing_context="fork"
)
for rows in loader:
    optimizer.zero_grad()
    model(rows).mean().backward()
    optimizer.step()
"""


def test_the_end_of_the_script_ends_the_run_and_its_workers_do_not(path: Path) -> None:
    subprocess.run([sys.executable, "-c", EXITS, str(path)], check=True, timeout=120)
    with gradstat.open_run(path) as run:
        assert run.status == "finished"
        assert run.steps["step"].tolist() == list(range(1, 11))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("last_line", "status"),
    [("raise RuntimeError", "interrupted"), ("raise SystemExit(3)", "finished")],
)
def test_a_script_that_ends_by_an_exception(path: Path, last_line: str, status: str) -> None:
    script = f"{EXITS}\n{last_line}"
    done = subprocess.run([sys.executable, "-c", script, str(path)], timeout=120, check=False)
    assert done.returncode != 0
    with gradstat.open_run(path) as run:
        assert run.status == status
        assert len(run.steps["step"]) == 10


# ---- disks ---------------------------------------------------------------------------------------


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file of this process grows beyond some 100 KB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_training_goes_on_when_the_disk_is_full(
    path: Path, full_disk: None, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = attached(path, log_every=1)
    log = monitor_of(optimizer).log
    assert log is not None
    for start in range(0, 200, 10):
        train(model, optimizer, 10, start)
        log.flush()
    kept = model.state_dict()
    gradstat.detach(optimizer)
    (warning,) = warnings_of(caplog)
    assert warning.startswith("the run log stops writing to a DatabaseSink: ")
    assert warning.endswith("What was committed stays readable. The training goes on")
    other = make_model()
    train(other, sgd(other), 200)
    assert same_bits(list(kept.values()), weights(other))
    with gradstat.open_run(path) as run:
        assert run.status == "interrupted"
        assert 10 <= len(run.steps["step"]) < 200
        assert run._rows("PRAGMA integrity_check") == [("ok",)]


def test_the_log_goes_on_when_the_disk_has_room_again(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pump, "RETRY", 0.0)
    monkeypatch.setattr(pump, "RETRIES", 10**6)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model, optimizer = attached(path, log_every=1)
    log = monitor_of(optimizer).log
    assert log is not None
    train(model, optimizer, 5)
    log.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        for start in range(5, 105, 10):
            train(model, optimizer, 10, start)
            log.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    train(model, optimizer, 10, 105)
    gradstat.detach(optimizer)
    assert len(warnings_of(caplog)) == 1
    with gradstat.open_run(path) as run:
        assert run.status == "finished"
        assert len(run.sessions) > 1
        steps = run.steps["step"].tolist()
        assert steps[:5] + steps[-10:] == [*range(1, 6), *range(106, 116)]
        assert run.dropped == 115 - len(steps) > 0
        assert set(run.table("l2")[0]) <= set(steps)
        assert {session.hidden_from for session in run.sessions[:-1]} <= set(steps)
        assert run.id == log.run_id


def test_a_disk_that_stays_full_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump, "RETRY", 0.0)
    calls: list[float] = []

    def fail(sink: DatabaseSink, *_: object) -> None:
        calls.append(0.0)
        raise gradstat.RunLogError("no room")

    monkeypatch.setattr(DatabaseSink, "flush", fail)
    model, optimizer = attached(path)
    log = monitor_of(optimizer).log
    assert log is not None
    for start in range(20):
        train(model, optimizer, 1, start)
        log.flush()
    assert len(calls) == 1 + pump.RETRIES


def test_names_that_no_file_holds_are_escaped(path: Path) -> None:
    pytest.importorskip("tensorboard")
    model = torch.nn.Sequential()
    model.add_module("a\ud800", torch.nn.Linear(2, 2))
    model.add_module("b\udfff", torch.nn.ReLU())
    logs = [path, gradstat.sinks.TensorBoard(path.with_suffix(".events"))]
    optimizer = gradstat.attach(sgd(model), model, log=logs, log_every=1)
    model(torch.ones(1, 2)).sum().backward()
    monitor_of(optimizer).observe(**{"c\udc00": 1.0})
    optimizer.step()
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        assert run.status == "finished"
        assert run.names == (r"a\ud800.weight", r"a\ud800.bias")
        assert list(run.scalars) == [r"c\udc00"]
        assert list(run.activations) == [r"b\udfff/relu#0"]


UNWRITABLE = ["/proc/run.db", "/dev/null/run.db"]


@pytest.mark.parametrize("place", UNWRITABLE)
def test_a_path_that_cannot_be_written_is_refused(place: str) -> None:
    model = make_model()
    optimizer = sgd(model)
    message = f"^{place} must be a file that can be written, got: .*; choose another path"
    with pytest.raises(gradstat.RunLogError, match=message):
        gradstat.attach(optimizer, model, log=place)
    assert not hasattr(optimizer, "gradstat")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(gradstat.RunLogError, match="must be a file that can be written"):
        attached(tmp_path)
    with pytest.raises(gradstat.RunNotFoundError, match="where there is no file"):
        gradstat.open_run(tmp_path)


# ---- files that are no run -----------------------------------------------------------------------


def test_a_file_that_is_not_there(path: Path) -> None:
    missing = r"run\.db, where there is no file"
    with pytest.raises(gradstat.RunNotFoundError, match=missing) as error:
        gradstat.open_run(path)
    assert isinstance(error.value, FileNotFoundError | gradstat.RunLogError)
    assert not path.exists()


def text_file(path: Path) -> None:
    path.write_text("step,loss\n1,0.5\n" * 100)


def other_database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE steps (step)")
    connection.close()


def of_version(version: int) -> Any:
    def make(path: Path) -> None:
        DatabaseSink(path).close()
        with sqlite3.connect(path) as connection:
            connection.execute(f"PRAGMA user_version = {version}")
        connection.close()

    return make


NO_RUNS: dict[str, tuple[Any, str]] = {
    "text": (text_file, "a file that cannot be read as one .file is not a database"),
    "database": (other_database, "got another SQLite database; give the path of a file that"),
    "newer": (
        of_version(schema.VERSION + 1),
        f"of version 1, got a newer one of version {schema.VERSION + 1}; update gradstat",
    ),
    "older": (of_version(0), "got an older one of version 0; read it with the gradstat that"),
}


@pytest.mark.parametrize("kind", NO_RUNS)
def test_what_is_no_run_of_this_version_is_neither_read_nor_written(path: Path, kind: str) -> None:
    make, message = NO_RUNS[kind]
    make(path)
    before = path.read_bytes()
    with pytest.raises(gradstat.RunLogError, match=message):
        gradstat.open_run(path)
    with pytest.raises(gradstat.RunLogError, match=message):
        attached(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_empty_is_no_run_yet(path: Path) -> None:
    path.touch()
    with pytest.raises(gradstat.RunLogError, match="is empty; if its run has just been started"):
        gradstat.open_run(path)
    gradstat.detach(attached(path)[1])
    with gradstat.open_run(path) as run:
        assert run.status == "finished"


def test_a_damaged_run_is_told_of(path: Path) -> None:
    model, optimizer = attached(path, log_every=1)
    train(model, optimizer, 50)
    gradstat.detach(optimizer)
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * 65536)
    with pytest.raises(gradstat.RunLogError), gradstat.open_run(path) as run:
        print(run.steps, run.table("l2"), run.meta)


# ---- sinks that fail or are slow -----------------------------------------------------------------


class Failing(Sink):
    def __init__(self, error: Exception) -> None:
        self.error = error
        self.closed = 0

    def write(self, record: Record) -> None:
        if isinstance(record, StepRecord):
            raise self.error

    def close(self) -> None:
        self.closed += 1
        raise self.error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyError("surprise")])
def test_a_sink_that_fails_is_left_out_and_the_others_go_on(
    path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Failing(error)
    model, optimizer = attached([sink, path])
    train(model, optimizer, 5)
    gradstat.detach(optimizer)
    assert sink.closed == 1
    assert len(warnings_of(caplog)) == 1
    with gradstat.open_run(path) as run:
        assert len(run.steps["step"]) == 5


class Stuck(Sink):
    """Waits with its first step until it is let go."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.steps: list[int] = []

    def write(self, record: Record) -> None:
        if isinstance(record, StepRecord):
            self.let_go.wait(60)
            self.steps.append(record.step)


def test_a_full_queue_drops_steps_and_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pump, "MAX_STEPS", 20)
    sink = Stuck()
    model, optimizer = attached([sink, path], diagnose=False)
    log = monitor_of(optimizer).log
    assert log is not None
    train(model, optimizer, 100)
    assert log.dropped >= 50
    sink.let_go.set()
    log.flush()
    train(model, optimizer, 1, 100)
    gradstat.detach(optimizer)
    assert len(sink.steps) == 101 - log.dropped
    assert sink.steps == sorted(set(sink.steps))
    assert sink.steps[-1] == 101
    (warning,) = warnings_of(caplog)
    assert f"has dropped {log.dropped} steps" in warning
    with gradstat.open_run(path) as run:
        assert run.dropped == log.dropped
        assert run.steps["step"].tolist() == sink.steps


def test_large_tables_fill_the_queue_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump, "MAX_BYTES", 10_000)
    sink = Stuck()
    model, optimizer = attached(sink, log_every=1, diagnose=False, activations=False)
    log = monitor_of(optimizer).log
    assert log is not None
    train(model, optimizer, 60)  # of 384 bytes each, and more
    sink.let_go.set()
    gradstat.detach(optimizer)
    assert 30 <= log.dropped < 60


def test_an_error_of_the_log_ends_it_and_not_the_training(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = attached(path)
    train(model, optimizer, 3)
    log = monitor_of(optimizer).log
    assert log is not None
    monkeypatch.setattr(log, "_copy_tables", lambda *_: 1 / 0)
    train(model, optimizer, 3, 3)
    gradstat.detach(optimizer)
    assert warnings_of(caplog) == ["the run log failed and ends; the training goes on"]
    with gradstat.open_run(path) as run:
        assert run.steps["step"].tolist() == [1, 2, 3]


# ---- a system without the locks of POSIX ---------------------------------------------------------

WITHOUT_LOCKS = """
import sys
sys.modules["fcntl"] = None
import torch
import gradstat
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
try:
    gradstat.attach(optimizer, model, log="new.db")
except gradstat.RunLogError as error:
    print(error)
gradstat.attach(optimizer, model, log=gradstat.sinks.JsonLines("new.jsonl"))
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
gradstat.detach(optimizer)
print(gradstat.open_run("old.db").status)
"""


def test_without_locks_all_but_writing_a_run_log_works(tmp_path: Path) -> None:
    DatabaseSink(tmp_path / "old.db").close()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LOCKS],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    said, status = done.stdout.splitlines()
    assert "a run log must be written where fcntl can lock files" in said
    assert "JsonLines" in said
    assert status == "interrupted"
    assert not (tmp_path / "new.db").exists()
    assert '"record":"step"' in (tmp_path / "new.jsonl").read_text().replace(" ", "")
