"""What a run log holds of a run, and how `open_run` gives it back."""

from __future__ import annotations

import copy
import math
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from small_training import (
    OPTIMIZERS,
    backward,
    logged,
    make_model,
    monitor_of,
    poison,
    sgd,
    train,
    weights,
)
from torch import nn

import gradstat
from gradstat.columns import COLUMN_NAMES
from gradstat.diagnosis.finding import Measure
from gradstat.runlog.run import FRAMES
from gradstat.runlog.step import unscaled


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "first.db"


# ---- steps --------------------------------------------------------------------------------------


def test_steps_hold_what_the_monitor_and_the_script_said(path: Path) -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, clip=gradstat.GlobalNorm(0.5), log=path)
    monitor, seen = monitor_of(optimizer), []
    for step in range(12):
        loss = backward(model, step)
        monitor.observe(loss=loss, val_loss=step * 10.0 if step % 4 == 3 else None)
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        if step == 5:
            poison(model)
        optimizer.step()
        decision = (monitor.total_norm, monitor.clip_coef, monitor.clip_threshold)
        seen.append((step + 1, loss.item(), 0.1 / (step + 1), *decision, step == 5))
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        steps = run.steps
        names = ("step", "loss", "lr", "total_norm", "clip_coef", "clip_threshold", "skipped")
        for name, values in zip(names, zip(*seen, strict=True), strict=True):
            np.testing.assert_array_equal(steps[name], values)
        assert (np.diff(steps["time"]) >= 0).all()
        assert steps["step"].dtype == np.int64
        assert steps["skipped"].dtype == np.bool_
        (val_steps, val_losses) = run.scalars["val_loss"]
        assert (val_steps.tolist(), val_losses.tolist()) == ([4, 8, 12], [30.0, 70.0, 110.0])
        assert list(run.scalars) == ["val_loss"]


def test_steps_that_are_not_recorded_have_their_decision(path: Path) -> None:
    model = make_model()
    optimizer = gradstat.attach(
        sgd(model), model, clip=gradstat.GlobalNorm(0.01), every=5, log=path, log_every=1
    )
    for step in range(7):
        backward(model, step)
        if step == 2:
            poison(model)
        optimizer.step()
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        assert run.steps["skipped"].tolist() == [False, False, True] + [False] * 4
        assert np.isfinite(np.delete(run.steps["total_norm"], 2)).all()
        assert (np.delete(run.steps["clip_coef"], 2) < 1).all()
        assert run.table("l2")[0].tolist() == [1, 6]


def test_steps_that_are_not_measured_are_there_without_a_norm(path: Path) -> None:
    logged(path, 6, every=10)
    with gradstat.open_run(path) as run:
        assert run.steps["step"].tolist() == [1, 2, 3, 4, 5, 6]
        # The first four are probed for the diagnosis.
        assert np.isnan(run.steps["total_norm"]).tolist() == [False] * 4 + [True] * 2
        assert np.isnan(run.steps["loss"]).all()


# ---- layers -------------------------------------------------------------------------------------


def test_tables_are_those_of_the_monitor(path: Path) -> None:
    model = make_model()
    optimizer = gradstat.attach(
        OPTIMIZERS["adamw-loop"](model.parameters()), model, updates=True, log=path, log_every=4
    )
    train(model, optimizer, 10)
    monitor = copy.deepcopy(monitor_of(optimizer))
    gradstat.detach(optimizer)
    rows = [0, 4, 8]
    with gradstat.open_run(path) as run:
        assert run.names == monitor.names
        assert run.layers[0] == ("0.weight", (5, 6), "float32", 30)
        for kind, window in (
            ("gradient", monitor.window),
            ("weight", monitor.weight_window),
            ("update", monitor.update_window),
        ):
            for place, column in enumerate(monitor.columns):
                steps, values = run.table(column, kind)  # type: ignore[arg-type]
                assert steps.tolist() == [1, 5, 9]
                np.testing.assert_array_equal(values, window[rows, :, place])
        ratio = run.update_ratio()
        assert ratio is not None
        kept = np.isin(ratio[0], [1, 5, 9])
        np.testing.assert_array_equal(ratio[1][kept], monitor.update_ratio[rows])


def test_derived_columns_are_those_of_a_table(path: Path) -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, log=path)
    backward(model)
    optimizer.step()
    table = monitor_of(optimizer).last
    assert table is not None
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        for column in COLUMN_NAMES:
            np.testing.assert_array_equal(run.table(column)[1][0], table.column(column))


def test_a_layer_without_a_gradient_is_nan(path: Path) -> None:
    model = make_model()
    model[2].requires_grad_(False)
    logged(path, 2, model, log_every=1)
    with gradstat.open_run(path) as run:
        for column in ("l2", "numel", "finite", "rms"):
            missing = np.isnan(run.table(column)[1])
            assert missing.tolist() == [[False, False, True, True]] * 2


def test_the_update_ratio_is_there_unasked_for(path: Path) -> None:
    model = make_model()
    before = weights(model)
    optimizer = gradstat.attach(sgd(model), model, log=path)
    train(model, optimizer, 1)
    after = weights(model)
    train(model, optimizer, 19, 1)
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        ratio = run.update_ratio()
        assert ratio is not None
        assert ratio[0].tolist() == [1, 2, 3, 4, 8, 16]
        by_hand = [
            ((new - old).double().norm() / old.double().norm()).item()
            for new, old in zip(after, before, strict=True)
        ]
        np.testing.assert_allclose(ratio[1][0], by_hand, rtol=1e-6)


def test_histograms_are_of_the_gradients_before_clipping(path: Path) -> None:
    model = make_model()
    optimizer = gradstat.attach(
        sgd(model), model, clip=gradstat.GlobalNorm(1e-3), log=path, log_every=2
    )
    expected = []
    for step in range(41):
        backward(model, step)
        if step % 20 == 0:
            expected.append(gradstat.grad_stats(model, histogram=True)["2.weight"].histogram)
        optimizer.step()
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        steps, counts = run.histograms("2.weight")
        assert steps.tolist() == [1, 21, 41]
        np.testing.assert_array_equal(counts, expected)
        with pytest.raises(gradstat.LayerNotFoundError, match="weight"):
            run.histograms("2.wieght")


@pytest.mark.parametrize(("scale", "moved"), [(2.0**16, -16), (2.0**-3, 3), (1.0, 0)])
def test_histograms_of_scaled_gradients_are_moved_to_true_units(scale: float, moved: int) -> None:
    counts = np.zeros((2, 256), np.int64)
    counts[0, 100], counts[1, 1], counts[1, 254] = 7, 5, 3
    found = unscaled(counts, torch.tensor(scale))
    expected = np.zeros_like(counts)
    expected[0, 100 + moved] = 7
    expected[1, max(0, 1 + moved)] += 5
    expected[1, min(255, 254 + moved)] += 3
    np.testing.assert_array_equal(found, expected)


def test_layers_that_come_later_are_kept_from_then_on(path: Path) -> None:
    model = make_model()
    optimizer = gradstat.attach(
        torch.optim.SGD(model[0].parameters(), lr=0.1), model, log=path, log_every=1
    )
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train(model, optimizer, 2, 2)
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        assert run.names == ("0.weight", "0.bias", "2.weight", "2.bias")
        steps, norms = run.table("l2")
        assert steps.tolist() == [1, 2, 3, 4]
        assert np.isnan(norms[:, 2:]).tolist() == [[True] * 2] * 2 + [[False] * 2] * 2
        assert np.isfinite(norms[:, :2]).all()


# ---- activations, findings, actions --------------------------------------------------------------


def test_activations_are_those_of_the_table(path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3), nn.Sigmoid())
    with torch.no_grad():
        model[0].bias[:2] = -100.0  # type: ignore[index]
    logged(path, 101, model)
    with gradstat.open_run(path) as run:
        found = run.activations
        assert list(found) == ["1/relu#0", "3/sigmoid#0"]
        relu = found["1/relu#0"]
        assert relu["step"].tolist() == [1, 101]
        assert (relu["units"].tolist(), relu["dead_units"].tolist()) == ([5, 5], [2, 2])
        assert relu["kind"].tolist() == ["relu", "relu"]
        assert (relu["zero_fraction"] >= 0.4).all()


def test_findings_are_those_of_the_newest_look(path: Path) -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (nn.Linear(6, 6), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(6, 3))
    optimizer = gradstat.attach(sgd(model), model, log=path, diagnose=30)
    train(model, optimizer, 70)
    expected = monitor_of(optimizer).diagnose()
    gradstat.detach(optimizer)
    assert expected
    with gradstat.open_run(path) as run:
        assert [finding for _, finding in run.findings] == expected
        assert {step for step, _ in run.findings} <= {30, 60, 70}
        assert run.findings[0][0] == 30
        assert set(run.frame("findings")["step"]) == {30, 60, 70}


def test_a_finding_that_is_gone_is_not_told_of(path: Path) -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, log=path, diagnose=False)
    log = monitor_of(optimizer).log
    assert log is not None
    seen = (Measure("norm", math.nan),)
    finding = gradstat.Finding("flat-loss", "warning", math.nan, "it <b>is</b> flat", (), seen)
    log._note_findings([finding])
    train(model, optimizer, 1)
    log.flush()
    with gradstat.open_run(path) as run:
        ((step, found),) = run.findings
        assert (step, found.explanation) == (0, finding.explanation)
        assert math.isnan(found.confidence)
        assert math.isnan(found.evidence[0].value)
        log._note_findings([])
        gradstat.detach(optimizer)
        assert run.findings == []


def test_actions_of_a_guard_are_kept(path: Path) -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, log=path)
    guard = gradstat.Guard(monitor_of(optimizer))
    backward(model)
    poison(model)
    optimizer.step()
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        assert run.actions == guard.actions
        assert run.actions[0].action == "skip"


# ---- the run as a whole --------------------------------------------------------------------------


def test_the_run_says_what_it_is(path: Path) -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model, momentum=0.5), model, clip="auto", log=str(path))
    train(model, optimizer, 2)
    log = monitor_of(optimizer).log
    assert log is not None
    log.flush()
    with gradstat.open_run(path) as run:
        assert run.status == "running"
        assert (run.id, run.path) == (log.run_id, path)
        assert run.meta["model"]["parameters"] == sum(p.numel() for p in model.parameters())
        assert run.meta["optimizer"]["groups"][0]["momentum"] == 0.5
        assert run.meta["config"]["clip"].startswith("AutoClip(")
        assert run.meta["versions"]["torch"] == torch.__version__
        assert "running, 2 steps up to 2" in repr(run)
        gradstat.detach(optimizer)
        assert run.status == "finished"
        assert run.dropped == 0


def test_what_is_left_of_a_finished_run_is_one_file(path: Path) -> None:
    logged(path, 3)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with gradstat.open_run(path) as run:
        assert run.steps["step"].tolist() == [1, 2, 3]


def test_every_frame_can_be_read(path: Path) -> None:
    logged(path, 11, updates=True, clip="auto")
    with gradstat.open_run(path) as run:
        frames = {name: run.frame(name) for name in FRAMES}
        assert len(frames["steps"]) == 11
        assert list(frames["gradients"]["name"]) == list(run.names) * 2
        assert list(frames["gradients"]["step"]) == [1] * 4 + [11] * 4
        with pytest.raises(gradstat.ArgumentValueError, match="name must be one of sessions, "):
            run.frame("step")


def test_any_sqlite_tool_reads_it_while_the_run_goes_on(path: Path) -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, log=path)
    train(model, optimizer, 1)
    log = monitor_of(optimizer).log
    assert log is not None
    log.flush()
    with sqlite3.connect(path) as tool:
        (norm,) = tool.execute("SELECT l2 FROM run_gradients WHERE name = '0.bias'").fetchone()
        count = "SELECT sum(value) FROM run_histograms, json_each(counts) WHERE name = '0.bias'"
        assert tool.execute(count).fetchone() == (5,)
    tool.close()
    last = monitor_of(optimizer).last
    assert last is not None
    assert norm == last["0.bias"].l2
    gradstat.detach(optimizer)


def test_an_empty_run_can_be_read(path: Path) -> None:
    logged(path, 0)
    with gradstat.open_run(path) as run:
        assert (run.names, run.findings, run.actions, run.activations) == ((), [], [], {})
        assert run.steps["step"].shape == (0,)
        assert run.table("rms")[1].shape == (0, 0)
        assert run.update_ratio() is None
        assert run.scalars == {}
        assert run.status == "finished"
        assert "0 steps" in repr(run)


def test_a_run_of_one_step_can_be_read(path: Path) -> None:
    logged(path, 1)
    with gradstat.open_run(path) as run:
        assert run.steps["step"].tolist() == [1]
        assert run.table("l2")[1].shape == (1, 4)
        assert len(run.histograms("0.bias")[0]) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_come_back_as_they_were(path: Path, value: float) -> None:
    model = make_model()
    optimizer = gradstat.attach(
        sgd(model), model, log=path, log_every=1, on_nonfinite="propagate", updates=True
    )
    for step in range(2):
        backward(model, step)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.fill_(value)
        monitor_of(optimizer).observe(loss=value, metric=torch.tensor(value))
        optimizer.step()
    window = monitor_of(optimizer).window
    norms = monitor_of(optimizer).decisions[:, 0]
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        np.testing.assert_array_equal(run.steps["loss"], [value, value])
        np.testing.assert_array_equal(run.scalars["metric"][1], [value, value])
        np.testing.assert_array_equal(run.steps["total_norm"], norms)
        for place, column in enumerate(monitor_of_columns()):
            np.testing.assert_array_equal(run.table(column)[1], window[..., place])


def monitor_of_columns() -> tuple[str, ...]:
    return tuple(column.name for column in gradstat.columns.RAW_COLUMNS)


NAMES = ["größe.重み", "a" * 300, "<script>alert('x')</script>", "it's; DROP TABLE layers--", ""]


def test_names_of_layers_come_back_as_they_were(path: Path) -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in NAMES]
    optimizer = gradstat.attach(
        torch.optim.SGD(parameters, lr=0.1),
        named_parameters=list(zip(NAMES, parameters, strict=True)),
        log=path,
    )
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        assert list(run.names) == NAMES
        for name in NAMES:
            assert run.histograms(name)[1].sum() == 2


def test_five_thousand_layers(path: Path) -> None:
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(5000)]
    optimizer = gradstat.attach(torch.optim.SGD(parameters, lr=0.1), log=path, diagnose=False)
    for place, parameter in enumerate(parameters):
        parameter.grad = torch.full((1,), float(place))
    optimizer.step()
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        assert run.table("l2")[1].tolist() == [list(range(5000))]
