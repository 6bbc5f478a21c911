"""Loss scaling: real `GradScaler`s, true units, overflows, and attributes that are put back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scaled_training import FUSED, SCALE, on_both, scaled_step, scaler_of, unscale_first
from small_training import (
    OPTIMIZERS,
    Failing,
    backward,
    grad_norm,
    grads,
    loss_of,
    make_model,
    monitor_of,
    norm_of,
    optimizer_tensors,
    poison,
    same_bits,
    weights,
)
from torch.amp import GradScaler

import gradstat


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@unscale_first
def test_statistics_are_in_true_units(make: Any, unscale: bool) -> None:
    model, plain_model = make_model(), make_model()
    optimizer, plain = make(model.parameters()), make(plain_model.parameters())
    gradstat.attach(optimizer, model, weights=True)
    scalers = scaler_of(), scaler_of()
    for step in range(6):
        backward(model, step)
        true = gradstat.grad_stats(model)
        scaled_step(model, optimizer, scalers[0], step, unscale=unscale)
        scaled_step(plain_model, plain, scalers[1], step, unscale=unscale)
        monitor = monitor_of(optimizer)
        assert monitor.total_norm == pytest.approx(true.total_norm, rel=1e-6)
        last = monitor.last
        assert last is not None
        for column in ("l2", "abs_max", "sq_sum", "abs_sum", "rms", "abs_min", "std"):
            assert last.column(column) == pytest.approx(true.column(column), rel=1e-5)
        assert (last.column("numel") == true.column("numel")).all()
        assert not {"found_inf", "grad_scale"} & set(optimizer.__dict__)
    assert same_bits(weights(model), weights(plain_model))
    assert same_bits(grads(model), grads(plain_model))
    assert same_bits(optimizer_tensors(optimizer), optimizer_tensors(plain))


CLIPS = {
    "global": gradstat.GlobalNorm(0.1),
    "value": gradstat.Value(0.02),
    "agc": gradstat.AGC(0.01),
    "layer": gradstat.PerLayer(0.05),
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("make", FUSED)
@unscale_first
def test_clipping_is_in_true_units(make: Any, clip: Any, unscale: bool) -> None:
    model, plain_model = make_model(), make_model()
    optimizer = gradstat.attach(make(model.parameters()), model, clip=clip)
    plain = gradstat.attach(make(plain_model.parameters()), plain_model, clip=clip)
    scaler = scaler_of()
    for step in range(5):
        scaled_step(model, optimizer, scaler, step, unscale=unscale)
        backward(plain_model, step)
        plain.step()
        assert monitor_of(optimizer).clip_coef == pytest.approx(monitor_of(plain).clip_coef, 1e-5)
    for a, b in zip(weights(model), weights(plain_model), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)


def test_a_policy_of_ones_own_sees_true_units() -> None:
    class Look(gradstat.Policy):
        def coefficient(self, table: torch.Tensor) -> torch.Tensor:
            seen.append(float(table[-1, -1]))
            return torch.tensor(0.5)

    seen: list[float] = []
    model = make_model()
    optimizer = OPTIMIZERS["adamw-fused"](model.parameters())
    gradstat.attach(optimizer, model, clip=Look(), every=2)
    for step in range(4):
        backward(model, step)
        norm = grad_norm(model)
        scaled_step(model, optimizer, scaler_of(), step, unscale=False)
        assert seen[-1] == pytest.approx(norm, rel=1e-6)
        assert grad_norm(model) == pytest.approx(0.5 * norm, rel=1e-5)


@on_both
@unscale_first
@pytest.mark.parametrize("clip", [None, "auto"], ids=["watch", "auto"])
def test_overflow_steps_are_recorded(make: Any, unscale: bool, clip: Any) -> None:
    model = make_model()
    optimizer = make(model.parameters())
    scaler = scaler_of(growth_interval=3)
    gradstat.attach(optimizer, model, clip=clip, scaler=scaler)
    fused = bool(optimizer.param_groups[0]["fused"])
    overflows = 0
    for step in range(20):
        bad = math.inf if step in (0, 1, 5, 9, 10, 11, 19) else None
        expected = weights(model), optimizer_tensors(optimizer)
        scaled_step(model, optimizer, scaler, step, unscale=unscale, bad=bad)
        overflows += bad is not None
        if bad is not None:
            assert same_bits(weights(model), expected[0])
            # A fused optimizer makes its first state even in a step that it drops.
            assert not expected[1] or same_bits(optimizer_tensors(optimizer), expected[1])
        monitor = monitor_of(optimizer)
        assert monitor.scaler_overflows == overflows
        if fused and bad is not None:
            assert monitor.last is not None
            assert monitor.last["0.weight"].nonfinite == 1
        assert not {"found_inf", "grad_scale"} & set(optimizer.__dict__)
    monitor = monitor_of(optimizer)
    assert monitor.step == (20 if fused else 13)
    assert monitor.skipped_steps == (7 if fused and clip else 0)


def test_overflows_of_a_fused_optimizer_need_no_scaler() -> None:
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["sgd-fused"](model.parameters()), model)
    scaler = scaler_of()
    for step in range(6):
        scaled_step(
            model, optimizer, scaler, step, unscale=False, bad=math.nan if step % 3 == 1 else None
        )
    assert monitor_of(optimizer).scaler_overflows == 2


@on_both
def test_an_overflow_does_not_raise(make: Any) -> None:
    model = make_model()
    optimizer = gradstat.attach(make(model.parameters()), model, on_nonfinite="raise")
    before = weights(model)
    scaled_step(model, optimizer, scaler_of(), 0, unscale=False, bad=math.inf)
    assert same_bits(weights(model), before)
    backward(model)
    poison(model)
    with pytest.raises(gradstat.NonFiniteNormError):
        optimizer.step()


@on_both
@pytest.mark.parametrize("mode", ["skip", "zero", "propagate"])
def test_the_scaler_drops_an_overflow_in_every_mode(make: Any, mode: Any) -> None:
    model = make_model()
    optimizer = gradstat.attach(make(model.parameters()), model, on_nonfinite=mode)
    scaler = scaler_of()
    scaled_step(model, optimizer, scaler, 0, unscale=False)
    expected = weights(model), optimizer_tensors(optimizer)
    scaled_step(model, optimizer, scaler, 1, unscale=False, bad=math.inf)
    assert same_bits(weights(model), expected[0])
    assert same_bits(optimizer_tensors(optimizer), expected[1])
    assert scaler.get_scale() == SCALE / 2


@on_both
def test_after_an_overflow_a_spike_is_still_clipped(make: Any) -> None:
    model = make_model()
    optimizer = gradstat.attach(make(model.parameters()), model, clip="auto")
    scaler = scaler_of()
    for step in range(30):
        bad = math.inf if step in (12, 20) else None
        scaled_step(model, optimizer, scaler, step, unscale=False, bad=bad)
    scaled_step(model, optimizer, scaler, 30, unscale=False, scale=100.0)
    assert monitor_of(optimizer).clip_coef < 0.1
    assert monitor_of(optimizer).total_norm < 1000  # not scaled


@pytest.mark.parametrize("make", FUSED)
@pytest.mark.parametrize("bad", [False, True], ids=["finite", "nan"])
def test_attributes_of_the_user_survive(make: Any, bad: bool) -> None:
    model, plain_model = make_model(), make_model()
    optimizer, plain = make(model.parameters()), make(plain_model.parameters())
    gradstat.attach(optimizer, model, clip=gradstat.GlobalNorm(1e9))
    scale, found = torch.tensor(8.0), torch.tensor(0.0)
    for this in (optimizer, plain):
        this.grad_scale, this.found_inf = scale, found
    backward(model, 0, scale=8.0)
    backward(plain_model, 0, scale=8.0)
    norm = grad_norm(model) / 8
    before = weights(model)
    if bad:
        poison(model)
    optimizer.step()
    plain.step()
    assert optimizer.grad_scale is scale
    assert optimizer.found_inf is found
    assert (scale.item(), found.item()) == (8.0, 0.0)
    if bad:
        assert same_bits(weights(model), before)
    else:
        assert monitor_of(optimizer).total_norm == pytest.approx(norm)
        assert same_bits(weights(model), weights(plain_model))


@pytest.mark.parametrize("make", FUSED)
def test_a_found_inf_of_the_user_skips(make: Any) -> None:
    model = make_model()
    optimizer = gradstat.attach(make(model.parameters()), model, clip="auto")
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    backward(model)
    before = weights(model)
    optimizer.step()
    assert same_bits(weights(model), before)
    assert optimizer.found_inf.item() == 1.0  # type: ignore[attr-defined]


def test_a_scale_that_the_user_set_multiplies_the_scalers() -> None:
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["adamw-fused"](model.parameters()), model)
    optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
    backward(model, 0)
    norm = grad_norm(model)
    scaled_step(model, optimizer, scaler_of(), 0, unscale=False, scale=4.0)
    assert monitor_of(optimizer).total_norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("late", [False, True], ids=["host", "device"])
def test_a_step_that_raised_does_not_take_the_scalers_flag(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if late:  # as a CUDA device, which lends the step a flag
        monkeypatch.setattr(gradstat._seam, "_is_host", lambda device: False)

    model = make_model()
    optimizer = Failing(model.parameters(), lr=0.1, fused=True)
    gradstat.attach(optimizer, model, clip="auto")
    backward(model)
    poison(model)
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="out of luck") as kept:
        optimizer.step()
    optimizer.fails = False
    scaled_step(model, optimizer, scaler_of(), 1, unscale=False)
    del kept
    assert not {"found_inf", "grad_scale"} & set(optimizer.__dict__)
    assert monitor_of(optimizer).step == 1


def test_overflows_are_counted_from_where_the_scaler_stood() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw-loop"](model.parameters())
    scaler = scaler_of(growth_interval=3)
    for step in range(2):
        scaled_step(model, optimizer, scaler, step, unscale=False)
    gradstat.attach(optimizer, model, scaler=scaler)
    scaled_step(model, optimizer, scaler, 2, unscale=False, bad=math.inf)
    assert monitor_of(optimizer).scaler_overflows == 1
    scaled_step(model, optimizer, scaler, 3, unscale=False)
    assert monitor_of(optimizer).scaler_overflows == 1


def test_a_scaler_that_is_off() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["adamw-loop"](model.parameters())
    scaler = GradScaler("cpu", enabled=False)
    gradstat.attach(optimizer, model, scaler=scaler)
    scaled_step(model, optimizer, scaler, 0, unscale=True)
    assert monitor_of(optimizer).scaler_overflows == 0
    assert monitor_of(optimizer).step == 1


def test_the_norm_before_a_step_is_that_of_unscaled_gradients() -> None:
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["sgd-loop"](model.parameters()), model)
    scaler = scaler_of()
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    norm = norm_of(p.grad for p in model.parameters())
    scaler.step(optimizer)
    assert monitor_of(optimizer).total_norm == pytest.approx(norm)
