"""What a guard does upon findings, in what bounds and with what record; it does nothing else."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest
import torch
from small_training import (
    OPTIMIZERS,
    backward,
    loss_of,
    make_model,
    monitor_of,
    optimizer_tensors,
    poison,
    same_bits,
    sgd,
    train,
    weights,
)
from torch import nn

import gradstat
from gradstat import CutLR, Guard, RollBack, SkipNonfinite, StopEarly, TightenClip
from gradstat.diagnosis.finding import Finding
from gradstat.guard.losses import LossWatch

ALL = [SkipNonfinite(), RollBack(), CutLR(), TightenClip(), StopEarly()]


def finding(code: str, confidence: float = 0.9, severity: Any = "error") -> Finding:
    return Finding(code, severity, confidence, f"this is {code}", ("do something",))


def told(monitor: gradstat.Monitor, monkeypatch: pytest.MonkeyPatch, *codes: str) -> None:
    """Have the monitor find these from now on."""
    monkeypatch.setattr(monitor, "diagnose", lambda: [finding(code) for code in codes])


def guarded(rules: Any, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer, Guard]:
    model = make_model()
    optimizer = gradstat.attach(sgd(model, momentum=0.9), model, diagnose=False)
    return model, optimizer, Guard(monitor_of(optimizer), rules, **options)


def run(
    model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float], start: int = 0
) -> None:
    """Train on batches by number, telling these losses."""
    for step, loss in enumerate(losses, start):
        backward(model, step)
        monitor_of(optimizer).observe(loss=loss)
        optimizer.step()


def actions(guard: Guard) -> list[str]:
    return [action.action for action in guard.actions]


# ---- nothing to do ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [OPTIMIZERS["adamw-fused"], OPTIMIZERS["sgd-loop"]])
@pytest.mark.parametrize("clip", [None, "auto"])
def test_an_idle_guard_changes_no_bit(make, clip, tmp_path):
    results = []
    for with_guard in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(make_model(), nn.Dropout(0.2))
        optimizer = gradstat.attach(make(model.parameters()), model, clip=clip)
        if with_guard:
            guard = Guard(
                monitor_of(optimizer), ALL, snapshot_every=3, diagnose_every=7, directory=tmp_path
            )
        for step in range(40):
            loss = backward(model, step % 2)
            monitor_of(optimizer).observe(loss=loss)
            optimizer.step()
        results.append(weights(model) + optimizer_tensors(optimizer) + [torch.rand(3)])
    assert guard.actions == []
    assert len(list(tmp_path.iterdir())) == 2
    assert same_bits(*results)


def test_by_default_only_nonfinite_steps_are_acted_upon(monkeypatch):
    model, optimizer, guard = guarded([SkipNonfinite()], diagnose_every=1)
    told(monitor_of(optimizer), monkeypatch, "diverging-loss", "lr-too-high", "overfitting")
    run(model, optimizer, [1.0] * 20 + [1e6] * 20)
    assert guard.actions == []
    assert guard.snapshot_bytes == 0
    before = weights(model)
    backward(model)
    poison(model)
    optimizer.step()
    assert same_bits(before, weights(model))
    [action] = guard.actions
    assert (action.step, action.action, action.cause) == (41, "skip", "nonfinite-gradient")
    assert (action.before, action.after) == ({"skipped_steps": 0}, {"skipped_steps": 1})


@pytest.mark.parametrize("chosen", ["zero", "raise"])
def test_what_attach_was_asked_for_stays(chosen):
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, on_nonfinite=chosen)
    guard = Guard(monitor_of(optimizer))
    backward(model)
    poison(model)
    if chosen == "raise":
        with pytest.raises(gradstat.NonFiniteNormError):
            optimizer.step()
    else:
        optimizer.step()
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert guard.actions == []


def test_what_was_skipped_before_is_not_the_guards():
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, clip="auto")
    backward(model)
    poison(model)
    optimizer.step()
    guard = Guard(monitor_of(optimizer))
    train(model, optimizer, 3)
    assert monitor_of(optimizer).skipped_steps == 1
    assert guard.actions == []


def test_without_the_rule_nothing_is_skipped():
    model, optimizer, guard = guarded([])
    backward(model)
    poison(model)
    optimizer.step()
    assert not all(parameter.isfinite().all() for parameter in model.parameters())
    assert guard.actions == []


def test_a_spike_that_the_policy_skips_is_not_the_guards():
    model = make_model()
    spikes = gradstat.SkipOnSpike(window=16, min_history=5)
    optimizer = gradstat.attach(sgd(model, lr=1e-4), model, clip=spikes)
    guard = Guard(monitor_of(optimizer))
    train(model, optimizer, 15)
    backward(model, scale=1e4)
    optimizer.step()
    assert monitor_of(optimizer).skipped_steps == 1
    assert guard.actions == []


# ---- the actions --------------------------------------------------------------------------------


def test_a_cut_reaches_all_groups(monkeypatch):
    model = make_model()
    groups = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(model.parameters())]
    optimizer = gradstat.attach(torch.optim.SGD(groups), model)
    guard = Guard(monitor_of(optimizer), [CutLR(factor=0.5)], diagnose_every=5)
    told(monitor_of(optimizer), monkeypatch, "lr-too-high")
    train(model, optimizer, 5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1, 0.1 * 3 / 2, 0.2]
    [action] = guard.actions
    assert action.before == {"lr": [0.1, 0.2, 0.1 * 3, 0.4]}
    assert action.after == {"lr": [0.05, 0.1, 0.1 * 3 / 2, 0.2]}
    assert guard.lr_factor == 0.5


def test_a_ceiling_holds_without_a_policy(monkeypatch):
    model, optimizer, guard = guarded([TightenClip(factor=0.5)], diagnose_every=10)
    monitor = monitor_of(optimizer)
    told(monitor, monkeypatch, "exploding-gradient")
    train(model, optimizer, 10)
    usual = sorted(monitor.decisions[:, 0])[4:6]
    [action] = guard.actions
    assert action.before == {"max_norm": None}
    assert action.after["max_norm"] == pytest.approx(0.5 * sum(usual) / 2)
    backward(model, scale=100.0)
    optimizer.step()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters()))
    assert norm == pytest.approx(action.after["max_norm"], rel=1e-5)


@pytest.mark.parametrize(
    "clip",
    [gradstat.GlobalNorm(0.5), gradstat.AdaGC(warmup_steps=2), gradstat.PerLayer(0.2), "auto"],
    ids=repr,
)
def test_a_ceiling_stands_on_top_of_any_policy(clip, monkeypatch):
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, clip=clip)
    monitor = monitor_of(optimizer)
    guard = Guard(monitor, [TightenClip(factor=0.5, rest=0)], diagnose_every=10)
    told(monitor, monkeypatch, "exploding-gradient")
    train(model, optimizer, 20)
    first, second = [action.after["max_norm"] for action in guard.actions]
    assert second == first / 2
    state = optimizer.state_dict()["gradstat"]["clipper"]
    backward(model, scale=100.0)
    optimizer.step()
    assert monitor.total_norm * monitor.clip_coef == pytest.approx(second, rel=1e-5)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["gradstat"]["clipper"]["policy"] == state["policy"]


def test_a_stop_is_a_flag(monkeypatch):
    model, optimizer, guard = guarded([StopEarly()], diagnose_every=3)
    told(monitor_of(optimizer), monkeypatch, "overfitting")
    train(model, optimizer, 2)
    assert not guard.should_stop
    train(model, optimizer, 10)
    assert guard.should_stop
    [action] = guard.actions
    assert (action.step, action.cause, action.because) == (3, "overfitting", "this is overfitting")


def test_a_roll_back_goes_to_the_last_good_snapshot(caplog):
    model, optimizer, guard = guarded([RollBack()], snapshot_every=10)
    run(model, optimizer, [1.0] * 21)
    good = weights(model)
    run(model, optimizer, [1.0, 1.0], 21)
    with caplog.at_level(logging.WARNING, "gradstat"):
        run(model, optimizer, [math.nan] * 3, 23)
    assert same_bits(good, weights(model))
    [action] = guard.actions
    assert (action.step, action.action, action.cause) == (26, "roll-back", "nonfinite-loss")
    assert (action.before["step"], action.after["step"]) == (26, 21)
    assert monitor_of(optimizer).step == 21
    assert [seen.step for seen in monitor_of(optimizer).observed("loss")] == list(range(21))
    [line] = [r.getMessage() for r in caplog.records if r.getMessage().startswith("guard")]
    assert "roll-back after step 26 because of nonfinite-loss: the last 3 losses" in line
    assert "step 26" in line
    assert "-> step 21" in line
    assert guard.snapshot_bytes > 4 * sum(p.numel() for p in model.parameters()) * 2


def test_a_rising_loss_is_rolled_back():
    model, optimizer, guard = guarded([RollBack()], snapshot_every=10)
    run(model, optimizer, [1.0 + 0.1 * (i % 3) for i in range(40)])
    run(model, optimizer, [50.0, 1.0, 1.0, 50.0, 1.0], 40)  # single bad batches
    assert guard.actions == []
    run(model, optimizer, [5.0] * 6, 45)
    assert [(action.action, action.cause) for action in guard.actions] == [
        ("roll-back", "diverging-loss")
    ]


QUIET = {
    "noise near zero": [2.0] * 3 + [0.001, 0.003, 0.3, 0.2, 0.35, 0.3, 0.3, 0.4] * 8,
    "a negative loss that falls": [-0.1 * i for i in range(60)],
    "a loss that rises by half": [1.0, 1.1, 0.9] * 10 + [1.5, 1.6, 1.4] * 10,
    "a wide spread": [1.0, 5.0, 2.0, 0.5, 6.0, 1.5, 4.0] * 5 + [5.0, 6.0, 4.5, 6.0, 5.5, 7.0],
    "heavy tails": ([0.1, 0.11, 0.09, 0.1, 0.8] * 12) + [0.1, 0.7, 0.8, 0.1, 0.75],
    "an early jump": [0.1] * 8 + [5.0] * 8,
    "no loss": [],
}
LOUD = {
    "a loss that has tripled": [1.0, 1.1, 0.9] * 10 + [3.0] * 5,
    "a negative loss that rises above zero": [-1.0, -1.1, -0.9] * 10 + [0.5] * 5,
    "Inf three times": [1.0, math.inf, math.inf, math.inf],
    "accidents before it": [1.0, 1.1, 0.9] * 10 + [99.0, 1.0] * 5 + [1.0] * 9 + [3.0] * 5,
    "NaN from the start": [math.nan] * 3,
}


@pytest.mark.parametrize("losses", QUIET.values(), ids=QUIET)
def test_losses_that_are_no_divergence(losses):
    watch = LossWatch()
    for place, loss in enumerate(losses):
        watch.add([loss])
        assert watch.findings() == [], place


@pytest.mark.parametrize("losses", LOUD.values(), ids=LOUD)
def test_losses_that_are_a_divergence(losses):
    watch = LossWatch()
    watch.add(losses)
    [found] = watch.findings()
    assert found.code in ("diverging-loss", "nonfinite-loss")
    assert not watch.is_calm
    watch.go_back()
    assert watch.findings() == []


def test_a_level_that_lasts_is_the_new_one():
    watch = LossWatch()
    watch.add([1.0] * 70 + [1.9, 2.1, 2.5] * 3)
    assert watch.findings() != []
    watch.add([1.9, 2.1, 2.5] * 16)
    assert watch.findings() == []
    assert watch.is_calm


def test_lasting_skips_are_rolled_back():
    model, optimizer, guard = guarded([SkipNonfinite(), RollBack()], snapshot_every=4)
    train(model, optimizer, 8)
    for step in range(5):
        backward(model, step)
        poison(model)
        optimizer.step()
    assert actions(guard) == ["skip"] * 5 + ["roll-back"]
    assert monitor_of(optimizer).skipped_steps == 0  # those of the snapshot


def test_a_second_roll_back_goes_further_back():
    model, optimizer, guard = guarded([RollBack(rest=0)], snapshot_every=10, keep=2)
    run(model, optimizer, [1.0] * 25)
    for _ in range(3):
        run(model, optimizer, [math.nan] * 3, 25)
    assert [action.after["step"] for action in guard.actions] == [21, 11, 11]


def test_no_snapshot_is_taken_while_the_run_is_being_lost(monkeypatch):
    model, optimizer, guard = guarded(
        [RollBack(on=())], snapshot_every=1, keep=99, diagnose_every=40
    )
    told(monitor_of(optimizer), monkeypatch, "diverging-loss")

    def taken(*losses: float) -> int:
        """Return how many snapshots a run with these losses adds."""
        before = len(guard._ring or ())
        run(model, optimizer, list(losses))
        return len(guard._ring or ()) - before

    assert taken(*[1.0] * 25) == 25
    assert taken(math.nan, 9.0) == 0
    assert taken(1.0) == 1
    bias = next(parameter for name, parameter in model.named_parameters() if "bias" in name)
    with torch.no_grad():
        bias[0] = math.inf
    backward(model)
    assert taken(1.0) == 0
    with torch.no_grad():
        bias[0] = 0.0
    optimizer.state.clear()
    assert taken(*[1.0] * 10) == 10
    assert taken(*[1.0] * 3) == 0  # the fortieth step finds a divergence


def test_without_a_snapshot_there_is_nowhere_to_go(caplog):
    model, optimizer, guard = guarded([RollBack(rest=0)])
    with caplog.at_level(logging.ERROR, "gradstat"):
        run(model, optimizer, [math.nan] * 9)
    assert guard.actions == []
    assert sum("no snapshot" in record.getMessage() for record in caplog.records) == 3


# ---- bounds and record --------------------------------------------------------------------------


def test_actions_are_bounded(monkeypatch, caplog):
    rule = CutLR(at_most=2, within=100, rest=5)
    model, optimizer, guard = guarded([rule, StopEarly(on=())], diagnose_every=1)
    told(monitor_of(optimizer), monkeypatch, "lr-too-high")
    with caplog.at_level(logging.ERROR, "gradstat"):
        train(model, optimizer, 50)
    assert [action.step for action in guard.actions] == [1, 6, 7]
    assert actions(guard) == ["cut-lr", "cut-lr", "stop"]
    assert "2 times in 100 steps" in guard.actions[-1].because
    assert guard.should_stop
    assert len(caplog.records) == 1
    train(model, optimizer, 60)
    assert actions(guard) == ["cut-lr", "cut-lr", "stop", "cut-lr", "cut-lr"]
    assert guard.lr_factor == 0.5**4


def test_the_bound_does_not_turn_back_with_the_run():
    model, optimizer, guard = guarded([RollBack(rest=0, at_most=2, within=30)], snapshot_every=5)
    run(model, optimizer, [1.0] * 10)
    for _ in range(5):
        run(model, optimizer, [math.nan] * 3, 10)
    assert actions(guard) == ["roll-back"] * 2


def test_skips_beyond_the_bound_are_still_skipped():
    model, optimizer, guard = guarded([SkipNonfinite(at_most=3), StopEarly(on=())])
    before = weights(model)
    for step in range(6):
        backward(model, step)
        poison(model)
        optimizer.step()
    assert same_bits(before, weights(model))
    assert actions(guard) == ["skip"] * 3 + ["stop"]


def test_unsure_findings_and_information_are_no_cause(monkeypatch):
    model, optimizer, guard = guarded([CutLR()], diagnose_every=1)
    weak = [finding("lr-too-high", 0.5), finding("lr-too-high", 0.99, "info"), finding("plateau")]
    monkeypatch.setattr(monitor_of(optimizer), "diagnose", lambda: weak)
    train(model, optimizer, 3)
    assert guard.actions == []


def test_the_record_is_plain(monkeypatch):
    model, optimizer, guard = guarded(ALL, diagnose_every=20)
    told(monitor_of(optimizer), monkeypatch, "diverging-loss", "overfitting")
    run(model, optimizer, [1.0] * 19 + [math.nan])
    assert actions(guard) == ["roll-back", "cut-lr", "tighten-clip", "stop"]
    assert json.loads(json.dumps(guard.to_list(), allow_nan=False)) == guard.to_list()
    assert guard.to_list()[0]["before"]["loss"] is None
    assert {entry["cause"] for entry in guard.to_list()} == {"diverging-loss", "overfitting"}


def test_a_cut_outlives_the_roll_back_to_before_it():
    model, optimizer, guard = guarded([RollBack(rest=0), CutLR(rest=0)], snapshot_every=100)
    run(model, optimizer, [1.0] * 10)
    for _ in range(2):
        run(model, optimizer, [math.nan] * 3, 10)
    assert actions(guard) == ["roll-back", "cut-lr"] * 2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.25)


def test_release_takes_everything_back(monkeypatch):
    model, optimizer, guard = guarded([CutLR(), TightenClip()], diagnose_every=5)
    told(monitor_of(optimizer), monkeypatch, "diverging-loss")
    train(model, optimizer, 5)
    for _ in range(2):
        guard.release()
    assert actions(guard) == ["cut-lr", "tighten-clip", "release"]
    assert optimizer.param_groups[0]["lr"] == 0.1
    train(model, optimizer, 100)
    assert monitor_of(optimizer).clip_coef == 1
    assert len(guard.actions) == 3


def test_an_error_of_its_own_ends_the_guard_and_not_the_run(monkeypatch, caplog):
    model, optimizer, guard = guarded(ALL, diagnose_every=5)

    def fail() -> list[Finding]:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(monitor_of(optimizer), "diagnose", fail)
    with caplog.at_level(logging.ERROR, "gradstat"):
        train(model, optimizer, 20)
    assert [record.getMessage() for record in caplog.records] == [
        "the guard failed and will not act again; the run goes on"
    ]
    assert guard.actions == []


def test_looks_may_be_rare():
    model, optimizer, guard = guarded([RollBack()], every=4, snapshot_every=8)
    run(model, optimizer, [1.0] * 12)
    run(model, optimizer, [math.nan] * 3, 12)
    assert guard.actions == []
    run(model, optimizer, [math.nan], 15)
    [action] = guard.actions
    assert (action.before["step"], action.after["step"]) == (16, 12)


def test_a_real_run_that_overfits_is_stopped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    x, y = torch.randn(32, 20), torch.randint(0, 2, (32,))
    unseen, labels = torch.randn(64, 20), torch.randint(0, 2, (64,))
    optimizer = gradstat.attach(torch.optim.Adam(model.parameters(), lr=0.02), model)
    guard = Guard(monitor_of(optimizer), [StopEarly()], diagnose_every=50)
    for step in range(400):
        if guard.should_stop:
            break
        optimizer.zero_grad()
        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs, y)
        monitor_of(optimizer).observe(inputs=x, outputs=outputs, targets=y, loss=loss)
        loss.backward()
        optimizer.step()
        if step % 10 == 9:
            with torch.no_grad():
                monitor_of(optimizer).observe(
                    val_loss=nn.functional.cross_entropy(model(unseen), labels)
                )
    assert guard.should_stop
    assert step < 400 - 1
    assert guard.actions[-1].cause == "overfitting"


def test_a_step_that_a_scaler_drops_is_seen_by_look():
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["sgd-loop"](model.parameters()), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    guard = Guard(monitor_of(optimizer), [RollBack()], scaler=scaler, snapshot_every=5)
    for step in range(13):
        model.zero_grad()
        loss = loss_of(model, step) * (math.nan if step >= 10 else 1.0)
        monitor_of(optimizer).observe(loss=loss)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        guard.look()
    [action] = guard.actions
    assert (action.cause, action.before["step"], action.after["step"]) == ("nonfinite-loss", 10, 6)
    assert scaler.get_scale() == 8.0
