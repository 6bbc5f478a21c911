"""Figures for papers: what is drawn, into which axes, and what they refuse."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from run_logs import HOSTILE, NAMES, train, write

import gradstat
from gradstat import ArgumentValueError, MissingPackageError, cli, plots

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def without_display():
    from matplotlib import pyplot

    matplotlib.use("agg")
    yield
    pyplot.close("all")


@pytest.fixture
def ax():
    from matplotlib.figure import Figure

    return Figure().subplots()


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")  # of names that the font cannot write
@pytest.mark.parametrize("name", plots.PLOTS)
@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), 0.0])
def test_every_plot_is_drawn(name, value, tmp_path):
    run = write(tmp_path / "run.db", 12, [*HOSTILE, *NAMES], value=value)
    drawn = plots.PLOTS[name](run)
    drawn.figure.savefig(tmp_path / "a.svg")
    assert getattr(gradstat, f"plot_{name}") is plots.PLOTS[name]


@pytest.mark.parametrize("name", plots.PLOTS)
def test_of_a_monitor_and_of_an_open_run(name, tmp_path, ax):
    optimizer = train(tmp_path / "run.db")
    assert plots.PLOTS[name](optimizer.gradstat, ax) is ax
    with gradstat.open_run(tmp_path / "run.db") as run:
        assert plots.PLOTS[name](run).figure is not ax.figure
    gradstat.detach(optimizer)


def test_values(tmp_path, ax):
    run = write(tmp_path / "run.db", 20)
    with gradstat.open_run(run) as log:
        steps, rms = log.table("rms")
        norms = log.steps["total_norm"]
    bars = gradstat.plot_grad_flow(run, ax).containers
    assert [bar.get_height() for bar in bars[1]] == pytest.approx(np.median(rms[-4:], axis=0))
    line = gradstat.plot_clip(run).lines[0]
    assert (line.get_xdata() == steps).all()
    assert line.get_ydata() == pytest.approx(norms)
    mesh = gradstat.plot_heatmap(run, column="rms").collections[0]
    np.testing.assert_allclose(mesh.get_array(), np.log10(rms).T)
    assert -3 in gradstat.plot_update_ratio(run).lines[-1].get_ydata()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("grad_flow", "gradients of layers"),
        ("heatmap", "gradients of layers"),
        ("update_ratio", "updates"),
        ("clip", "steps"),
    ],
)
def test_nothing_to_draw(name, what, tmp_path):
    with pytest.raises(ArgumentValueError, match=f"the run must hold {what} to be drawn, got none"):
        plots.PLOTS[name](write(tmp_path / "run.db", 0))


def test_without_matplotlib(tmp_path, monkeypatch):
    run = write(tmp_path / "run.db", 2)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'gradstat\[plots\]'"):
        gradstat.plot_clip(run)


def test_command(tmp_path, capsys):
    run = write(tmp_path / "run.db", 5)
    assert cli.main(["plot", "clip", str(run)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'run-clip.png'}\n"
    assert (tmp_path / "run-clip.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["plot", "heatmap", str(run), "-o", str(tmp_path / "a.pdf")]) == 0
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert cli.main(["plot", "clip", str(run), "-o", str(tmp_path / "a.xyz")]) == 1
    assert cli.main(["plot", "pie", str(run)]) == 2


def test_many_layers_are_drawn_without_a_warning(tmp_path):
    names = tuple(f"layers.{n}.weight" for n in range(5000))
    path = write(tmp_path / "run.db", 3, names, extras=False)
    axes = gradstat.plot_grad_flow(path)
    axes.figure.savefig(tmp_path / "flow.png", dpi=50)
