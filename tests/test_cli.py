"""The command line: exit codes, what goes to which stream, and the demo from end to end."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest
import run_logs
import torch

import gradstat
from gradstat import cli, demo
from gradstat.cli.command import strict_json
from gradstat.errors import ArgumentValueError, GradstatError, MissingPackageError


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
        (["bench", "--seconds", "nan"], "must be a number of seconds above 0, got 'nan'"),
        (["watch", "run.db", "--interval", "0"], "must be a number of seconds above 0, got '0'"),
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


PRINTING = {
    "config": [],
    "show": ["run.db"],
    "watch": ["run.db"],
    "report": ["run.db"],
    "compare": ["run.db", "run.db"],
    "plot": ["clip", "run.db"],
    "demo": [],
    "bench": ["--model", "mlp"],
}


def test_every_command_has_its_json():
    assert {command.name for command in cli.COMMANDS} == set(PRINTING)
    parser = cli._parser()
    for name, words in PRINTING.items():
        flag = ["--json", "-"] if name == "bench" else ["--json"]
        assert parser.parse_args([name, *words, *flag]).json


def test_plot_as_json(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    run = run_logs.write(tmp_path / "run.db", 5)
    assert cli.main(["plot", "clip", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"figure": "clip", "file": str(tmp_path / "run-clip.png")}
    assert (tmp_path / "run-clip.png").stat().st_size > 1000


def test_json_in_text_is_strict():
    told = json.loads(strict_json({"a": [float("nan")], "b": (1.5, float("-inf"))}))
    assert told == {"a": [None], "b": [1.5, None]}


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


@pytest.fixture
def packages():
    for package in ("sklearn", "plotly", "jinja2"):
        pytest.importorskip(package)


@pytest.mark.usefixtures("one_thread", "packages")
def test_the_tour(capsys, tmp_path):
    generator = torch.get_rng_state()
    folder = tmp_path / "tour"
    assert cli.main(["demo", "--folder", str(folder), "--plain"]) == 0
    assert (torch.get_rng_state() == generator).all()
    text, errors = capsys.readouterr()
    assert errors == ""
    assert "\x1b" not in text
    assert len(re.findall(r"^epoch \d+ of 20: loss ", text, re.MULTILINE)) == 40
    before, after = map(float, re.findall(r"^test accuracy ([\d.]+)%", text, re.MULTILINE))
    assert before < 30
    assert after > 90
    diagnosis = text[text.index("2. What") :]
    assert re.search(r"^vanishing-gradient \(error", diagnosis, re.MULTILINE)
    for name in ("hidden1.weight", "hidden2.weight"):
        assert name in diagnosis
    # Each epoch ends with a whole batch: its loss and norm compare with those of the others.
    losses = re.findall(r"^epoch (?:1\d|20) of 20: loss ([\d.]+)", text, re.MULTILINE)
    assert max(map(float, losses[11:])) < 1.0
    left = {path.name for path in folder.iterdir()}
    assert left == {"before.db", "after.db", "before.html", "after.html", "comparison.html"}
    for name in left:
        assert str(folder / name) in text
    with gradstat.open_run(folder / "before.db") as run:
        assert run.findings[0][1].code == "vanishing-gradient"
        assert run.steps["step"][-1] == 420


@pytest.mark.usefixtures("packages")
def test_the_tour_takes_one_thread_and_ends_as_json(monkeypatch, capsys, tmp_path):
    threads = []

    def train(model, digits, log, epochs, plain, *, real=demo._train):
        threads.append(torch.get_num_threads())
        return real(model, digits, log, epochs, plain)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(demo, "_train", train)
    try:
        assert cli.main(["demo", "--folder", str(tmp_path), "--epochs", "14", "--json"]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [1, 1]
    text, tour = capsys.readouterr()
    told = json.loads(text, parse_constant=pytest.fail)
    assert told["before"]["findings"][0]["code"] == "vanishing-gradient"
    assert told["after"]["accuracy"] > told["before"]["accuracy"]
    assert sorted(map(str, tmp_path.glob("*.html"))) == sorted(told["pages"])
    assert "2. What gradstat says of it" in tour


@pytest.mark.usefixtures("one_thread", "packages")
def test_a_second_tour_replaces_the_first(capsys, tmp_path):
    losses = []
    for _ in range(2):
        demo.run_demo(tmp_path, epochs=14, seed=3, plain=True)
        losses.append(re.findall("^epoch .*", capsys.readouterr().out, re.MULTILINE))
        with gradstat.open_run(tmp_path / "after.db") as run:
            assert len(run.sessions) == 1
    assert losses[0] == losses[1]


@pytest.mark.usefixtures("one_thread", "packages")
def test_a_tour_that_cannot_go_on_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "REMEDIES", {})
    with pytest.raises(GradstatError, match="must advise what the tour can change, got "):
        demo.run_demo(tmp_path, epochs=2, plain=True)
    monkeypatch.setattr(gradstat.Monitor, "diagnose", lambda _: [])
    with pytest.raises(GradstatError, match="must find what is wrong, got nothing"):
        demo.run_demo(tmp_path, epochs=2, plain=True)


@pytest.mark.usefixtures("one_thread", "packages")
def test_the_tour_in_a_terminal(monkeypatch, tmp_path):
    pytest.importorskip("rich")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    demo.run_demo(tmp_path, epochs=14)
    text = terminal.getvalue()
    assert "\x1b[2K" in text  # erases the line it stands on
    assert "epoch 14 of 14" in text


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
