"""The command line: exit codes, what goes to which stream, and the demo from end to end."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest
import torch

import gradstat
from gradstat import cli, demo
from gradstat.errors import ArgumentValueError, MissingPackageError


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gradstat {gradstat.__version__}\n"


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert re.search(rf"^ +{command.name} +{command.summary}$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: command"),
        (["nope"], "invalid choice: 'nope'"),
        (["config", "--yaml"], "unrecognized arguments: --yaml"),
        (["demo", "--epochs", "0"], "must be a whole number of at least 1, got '0'"),
        (["demo", "--every", "often"], "must be a whole number of at least 1, got 'often'"),
    ],
)
def test_usage_errors(capsys, argv, message):
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


def test_config(capsys):
    assert cli.main(["config"]) == 0
    assert str(gradstat.get_config()) in capsys.readouterr().out


def test_config_json(capsys):
    assert cli.main(["config", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == gradstat.get_config().to_dict()


def fail_with(monkeypatch, error):
    def run(_):
        raise error

    command = cli.Command("fail", "fail", lambda _: None, run)
    monkeypatch.setattr(cli, "COMMANDS", (command,))
    return cli.main(["fail"])


@pytest.mark.parametrize(
    "error", [ArgumentValueError("max_norm must be\n  positive"), OSError("disk full")]
)
def test_failures_are_one_line(monkeypatch, capsys, error):
    assert fail_with(monkeypatch, error) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"gradstat fail: error: {' '.join(str(error).split())}\n"


def test_interrupt(monkeypatch):
    assert fail_with(monkeypatch, KeyboardInterrupt()) == 130


def test_bug_keeps_its_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        fail_with(monkeypatch, ZeroDivisionError())


def test_module_runs_and_survives_a_closed_pipe():
    command = [sys.executable, "-m", "gradstat"]
    result = subprocess.run([*command, "nope"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    with subprocess.Popen(
        [*command, "config"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


# ---- the demo -----------------------------------------------------------------------------------


@pytest.fixture
def one_thread():
    """Two threads that wait for each other take minutes where the processor is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_demo_learns(capsys):
    pytest.importorskip("sklearn")
    generator = torch.get_rng_state()
    assert cli.main(["demo", "--epochs", "6", "--every", "50", "--plain"]) == 0
    assert (torch.get_rng_state() == generator).all()
    text = capsys.readouterr().out
    names = [name for name, _ in demo.make_model().named_parameters()]
    headlines = re.findall(r"^step (\d+), epoch (\d) of 6: loss ([\d.]+),", text, re.MULTILINE)
    assert [int(step) for step, _, _ in headlines] == [1, 51, 101, 132]
    assert float(headlines[-1][2]) < float(headlines[0][2])
    for name in names:
        assert len(re.findall(rf"^{name} +\d", text, re.MULTILINE)) == len(headlines)
    assert float(re.search(r"^test accuracy ([\d.]+)%", text, re.MULTILINE)[1]) > 80
    assert "\x1b" not in text


@pytest.mark.usefixtures("one_thread")
def test_demo_reports_what_it_measured(capsys):
    pytest.importorskip("sklearn")
    result = demo.run_demo(epochs=1, every=10, plain=True)
    assert result.steps == 22
    assert 0 < result.clip_rate < 1
    assert 0 < result.gradstat_seconds < result.seconds
    assert capsys.readouterr().out.endswith(f"{result}\n")


@pytest.mark.usefixtures("one_thread")
def test_demo_is_reproducible(capsys):
    pytest.importorskip("sklearn")
    headlines = []
    for _ in range(2):
        demo.run_demo(epochs=1, seed=3, plain=True)
        headlines.append(re.findall("^step .*", capsys.readouterr().out, re.MULTILINE))
    assert len(headlines[0]) == 2
    assert headlines[0] == headlines[1]


@pytest.mark.usefixtures("one_thread")
def test_demo_redraws_in_a_terminal(monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    demo.run_demo(epochs=1, every=10)
    text = terminal.getvalue()
    assert "\x1b[2K" in text  # erases the line it stands on
    assert "conv1.weight" in text
    assert "test accuracy" in text.rstrip().splitlines()[-2]


def test_demo_without_scikit_learn(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["demo"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(
        r"gradstat demo: error: the demo needs the package sklearn, .*; "
        r"run: pip install 'gradstat\[demo\]'\n",
        captured.err,
    )
    with pytest.raises(MissingPackageError):
        demo.load_digits(0)
