"""``gradstat show`` and ``gradstat watch``: what they say of runs, good and bad."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import run_logs

from gradstat import cli, open_run
from gradstat.errors import RunLogError
from gradstat.runlog import DatabaseSink
from gradstat.show import watch
from gradstat.show.layers import LayerState, layer_states, worst
from gradstat.show.state import read_state

COLUMNS = 80


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setenv("LINES", "24")
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def shown(capsys, *argv) -> str:
    assert cli.main([str(word) for word in argv]) == 0
    return capsys.readouterr().out


# ---- show ---------------------------------------------------------------------------------------


def test_a_run_in_the_terminal(capsys, tmp_path):
    text = shown(capsys, "show", run_logs.write(tmp_path / "run.db"))
    assert text.startswith("run.db  finished, step 60")
    assert "saturated-activation (0.93, since step 60)" in text
    assert "1. divide the inputs by 255" in text
    assert "explains vanishing-gradient" in text
    assert "8 of 12 layers, the worst off first" in text
    assert "cut-lr after step 7 because of diverging-loss" in text
    assert max(map(len, text.splitlines())) <= COLUMNS


def test_json_is_strict_and_holds_the_same(capsys, tmp_path):
    path = run_logs.write(tmp_path / "run.db", value=math.nan)
    found = json.loads(shown(capsys, "show", path, "--json"), parse_constant=pytest.fail)
    assert found["status"] == "finished"
    assert found["final_loss"] is None
    assert [f["code"] for f in found["findings"]] == [f.code for f in run_logs.FINDINGS]
    assert len(found["worst_layers"]) == 8
    assert {layer["remark"] for layer in found["worst_layers"]} == {"NaN or Inf"}


@pytest.mark.parametrize(
    ("limit", "findings", "code"),
    [
        ("error", run_logs.FINDINGS, 3),
        ("error", run_logs.FINDINGS[1:], 0),
        ("warning", run_logs.FINDINGS[1:], 3),
        ("warning", run_logs.FINDINGS[2:], 0),
        ("warning", (), 0),
    ],
)
def test_exit_code_of_fail_on(tmp_path, limit, findings, code):
    path = run_logs.write(tmp_path / "run.db", findings=findings)
    assert cli.main(["show", str(path), "--fail-on", limit]) == code


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("value", [None, math.nan, math.inf, 0.0])
def test_short_and_broken_runs(capsys, tmp_path, steps, value):
    text = shown(capsys, "show", run_logs.write(tmp_path / "run.db", steps, value=value))
    assert ("no step yet" in text) == (steps == 0)
    if steps and value == 0.0:
        assert "all zero" in text
    if steps and value is not None and math.isnan(value):
        assert "NaN or Inf" in text


def test_hostile_names_reach_the_terminal_as_text(capsys, tmp_path):
    path = run_logs.write(tmp_path / "run.db", names=run_logs.HOSTILE)
    text = shown(capsys, "show", path)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "слой.重み" in text
    assert max(map(len, text.splitlines())) <= COLUMNS


def test_five_thousand_layers(capsys, tmp_path):
    names = tuple(f"layers.{n}.weight" for n in range(5000))
    path = run_logs.write(tmp_path / "run.db", 3, names, extras=False)
    assert "8 of 5,000 layers" in shown(capsys, "show", path)
    assert len(shown(capsys, "show", path, "--layers", 30).splitlines()) > 30


@pytest.mark.parametrize("command", ["show", "watch"])
def test_what_is_no_run_is_one_line_on_stderr(capsys, tmp_path, monkeypatch, command):
    monkeypatch.setattr(watch, "_PATIENCE", 1)
    path = tmp_path / "notes.txt"
    path.write_text("no run\n" * 100)
    arguments = [] if command == "show" else ["--interval", "0.01"]
    assert cli.main([command, str(path), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert f"{path} must be a run log" in captured.err


def test_a_plain_terminal_gets_plain_characters(tmp_path):
    path = run_logs.write(tmp_path / "run.db")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"}
    command = [sys.executable, "-m", "gradstat", "show", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"total norm" in done.stdout
    done.stdout.decode("ascii")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_a_terminal_cannot_write_do_not_end_the_command(tmp_path, encoding):
    path = run_logs.write(tmp_path / "run.db", names=run_logs.HOSTILE)
    environment = os.environ | {"PYTHONIOENCODING": encoding, "COLUMNS": "40"}
    command = [sys.executable, "-m", "gradstat", "show", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert "??" in done.stdout.decode(encoding)
    assert max(map(len, done.stdout.decode(encoding).splitlines())) <= 40


# ---- layers -------------------------------------------------------------------------------------


def test_states_are_medians_of_the_newest_tables(tmp_path):
    with open_run(run_logs.write(tmp_path / "run.db", 60)) as run:
        layers = layer_states(run, 60)
        _, rms = run.table("rms")
        _, norms = run.table("l2")
        np.testing.assert_allclose([layer.rms for layer in layers], np.median(rms[-20:], axis=0))
        middle = np.median([layer.rms for layer in layers])
        assert layers[3].times_middle == pytest.approx(layers[3].rms / middle)
        shares = np.median(norms[-20:], axis=0) ** 2
        assert layers[-1].share == pytest.approx(shares[-1] / shares.sum())


def state(name: str, **values: float) -> LayerState:
    usual = {"rms": 1e-3, "times_middle": 1.0, "share": 0.1, "zeros": 0.0, "dead_rows": 0.0}
    rest = {"nonfinite": 0, "update_ratio": 1e-3}
    return LayerState(name, **(usual | rest | values))


@pytest.mark.parametrize(
    ("values", "remark"),
    [
        ({}, ""),
        ({"nonfinite": 1}, "NaN or Inf"),
        ({"rms": math.nan}, "no gradient"),
        ({"rms": 0.0, "times_middle": 0.0}, "all zero"),
        ({"times_middle": 1e-4}, "far below"),
        ({"times_middle": 1e4, "dead_rows": 0.6}, "far above, dead rows"),
        ({"zeros": 0.9}, "sparse"),
    ],
)
def test_remarks(values, remark):
    assert state("layer", **values).remark == remark


def test_the_worst_layers_come_first():
    layers = [state("well"), state("far", times_middle=1e-5), state("broken", nonfinite=2)]
    assert [layer.name for layer in worst(layers, 2)] == ["broken", "far"]


# ---- watch --------------------------------------------------------------------------------------


def test_a_run_is_followed_from_before_its_file_to_its_end(tmp_path):
    path = tmp_path / "later.db"
    found = watch.states(path, 0.01)
    assert next(found) is None
    optimizer = run_logs.train(path, 5)
    optimizer.gradstat.log.flush()
    running = next(state for state in found if state is not None)
    assert (running.summary.status, running.summary.steps) == ("running", 5)
    optimizer.gradstat.log.close()
    *_, last = found
    assert last.summary.status == "finished"


def test_a_file_that_stays_no_run_ends_the_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_PATIENCE", 3)
    path = tmp_path / "run.db"
    path.write_bytes(b"")
    looks = watch.states(path, 0.001)
    assert [next(looks) for _ in range(3)] == [None] * 3
    with pytest.raises(RunLogError):
        next(looks)


def test_watch_as_lines_of_json(capsys, tmp_path):
    path = tmp_path / "run.db"
    writer = threading.Timer(0.2, run_logs.write, [path])
    writer.start()
    text = shown(capsys, "watch", path, "--json", "--interval", 0.05)
    writer.join()
    last = json.loads(text.splitlines()[-1])
    assert (last["status"], last["steps"]) == ("finished", 60)


BREAKS_OFF = """
import os, signal, sys
import run_logs
optimizer = run_logs.train(sys.argv[1], 3)
optimizer.gradstat.log.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_watch_of_a_run_that_broke_off(capsys, tmp_path):
    path = tmp_path / "run.db"
    command = [sys.executable, "-c", BREAKS_OFF, str(path)]
    folder = os.path.dirname(run_logs.__file__)
    subprocess.run(command, env=os.environ | {"PYTHONPATH": folder}, timeout=120, check=False)
    assert cli.main(["watch", str(path), "--interval", "0.05"]) == 3
    assert "run.db  interrupted, step 3" in capsys.readouterr().out


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_live_view_fits_its_terminal(tmp_path, columns):
    rich_console = pytest.importorskip("rich.console")
    from gradstat.show.view import fixed_lines, view

    names = tuple(f"encoder.layers.{n}.attention.weight" for n in range(300))
    with open_run(run_logs.write(tmp_path / "run.db", 8, names)) as run:
        found = read_state(run)
    console = rich_console.Console(width=columns, height=50, force_terminal=True)
    n_layers = console.height - fixed_lines(found, console)
    lines = console.render_lines(view(found, console, n_layers=n_layers, live=True), pad=False)
    assert 20 < len(lines) <= 50
    assert all(sum(segment.cell_length for segment in line) <= columns for line in lines)


def test_watch_draws_in_a_real_terminal(tmp_path):
    """What stands on an 80-column screen at the end, by a terminal of the operating system."""
    pty = pytest.importorskip("pty")
    path = run_logs.write(tmp_path / "run.db")
    child, screen = pty.fork()
    if not child:
        os.environ |= {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        os.execv(sys.executable, [sys.executable, "-m", "gradstat", "watch", str(path)])
    text = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            piece = os.read(screen, 65536)
        except OSError:  # the terminal is closed
            break
        if not piece:
            break
        text += piece
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert b"finished" in text
    assert b"total norm" in text


def test_a_sink_can_be_written_while_it_is_shown(tmp_path):
    path = run_logs.write(tmp_path / "run.db", 5)
    with open_run(path) as run:
        assert read_state(run).summary.steps == 5
        sink = DatabaseSink(path)  # a resumed run
        assert read_state(run).summary.steps == 5
        sink.close()
