"""What a CUDA device does, done by the CPU: no decision is read, the fused step skips."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scaled_training import BOTH, FUSED, SCALE, scaled_step, scaler_of, unscale_first
from small_training import (
    OPTIMIZERS,
    backward,
    grads,
    make_model,
    monitor_of,
    optimizer_tensors,
    poison,
    same_bits,
    train,
    weights,
)

import gradstat


@pytest.fixture(autouse=True)
def late_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device counts as the host's."""
    monkeypatch.setattr(gradstat._seam, "_is_host", lambda device: False)


@pytest.mark.parametrize("make", FUSED)
@pytest.mark.parametrize("own", [None, 0.0, 1.0, 2.0])
def test_a_fused_step_skips_on_the_device(make: Any, own: float | None) -> None:
    model = make_model()
    optimizer = gradstat.attach(make(model.parameters()), model, clip="auto")
    train(model, optimizer, 3)
    flag = None
    if own is not None:
        flag = optimizer.found_inf = torch.tensor(own)  # type: ignore[attr-defined]
    for bad in (False, True):
        backward(model, 3)
        if bad:
            poison(model)
        before = grads(model), weights(model), optimizer_tensors(optimizer)
        optimizer.step()
        assert same_bits(grads(model), before[0])
        skips = bad or bool(own)
        assert same_bits(weights(model), before[1]) is skips
        assert same_bits(optimizer_tensors(optimizer), before[2]) is skips
        assert getattr(optimizer, "found_inf", None) is flag
    assert flag is None or flag.item() == own
    assert monitor_of(optimizer).skipped_steps == 1
    assert ("found_inf" in optimizer.__dict__) is (own is not None)


@pytest.mark.parametrize("make", FUSED)
def test_a_skipped_first_step_leaves_no_garbage(make: Any) -> None:
    model, plain_model = make_model(), make_model()
    optimizer = gradstat.attach(
        make(model.parameters()), model, clip=gradstat.GlobalNorm(1e9), on_nonfinite="skip"
    )
    plain = make(plain_model.parameters())
    backward(model)
    poison(model)
    optimizer.step()
    assert all(bool((value == 0).all()) for value in optimizer_tensors(optimizer))
    train(model, optimizer, 3)
    train(plain_model, plain, 3)
    assert same_bits(weights(model), weights(plain_model))


def test_skips_in_a_row_are_noticed_late() -> None:
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["adamw-fused"](model.parameters()), model, clip="auto")
    with pytest.warns(RuntimeWarning, match="2. steps in a row were skipped") as words:
        for step in range(60):
            backward(model, step)
            poison(model)
            optimizer.step()
    assert len(words) == 1


@pytest.mark.parametrize("make", BOTH, ids=["fused", "loop"])
@pytest.mark.parametrize("mode", ["skip", "zero", "raise", "propagate"])
def test_every_mode_with_late_decisions(make: Any, mode: Any) -> None:
    model = make_model()
    clip = gradstat.SkipOnSpike() | gradstat.GlobalNorm(1.0)
    optimizer = gradstat.attach(make(model.parameters()), model, clip=clip, on_nonfinite=mode)
    train(model, optimizer, 2)
    backward(model, 2)
    poison(model)
    before = weights(model)
    if mode == "raise":
        with pytest.raises(gradstat.NonFiniteNormError):
            optimizer.step()
    else:
        optimizer.step()
    assert same_bits(weights(model), before) is (mode in ("skip", "raise"))
    assert bool(model[0].weight.isfinite().all()) is (mode != "propagate")
    assert not {"found_inf", "grad_scale"} & set(optimizer.__dict__)
    assert None not in grads(model)


@unscale_first
def test_a_scaler_with_late_decisions(unscale: bool) -> None:
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["adamw-fused"](model.parameters()), model, clip="auto")
    scaler = scaler_of()
    for step in range(8):
        expected = weights(model), optimizer_tensors(optimizer)
        bad = math.inf if step in (3, 4) else None
        scaled_step(model, optimizer, scaler, step, unscale=unscale, bad=bad)
        assert same_bits(weights(model), expected[0]) is (bad is not None)
        assert same_bits(optimizer_tensors(optimizer), expected[1]) is (bad is not None)
        assert not {"found_inf", "grad_scale"} & set(optimizer.__dict__)
    assert monitor_of(optimizer).skipped_steps == 2
    assert monitor_of(optimizer).scaler_overflows == 2
    assert scaler.get_scale() == SCALE / 4


def test_an_optimizer_that_is_fused_in_part_does_not_look_at_found_inf() -> None:
    model = make_model()
    groups = [
        {"params": list(model[0].parameters())},
        {"params": list(model[2].parameters()), "fused": False},
    ]
    optimizer = gradstat.attach(torch.optim.AdamW(groups, fused=True), model, clip="auto")
    train(model, optimizer, 1)
    backward(model, 1)
    poison(model)
    before = weights(model), optimizer_tensors(optimizer)
    optimizer.step()
    assert same_bits(weights(model), before[0])
    assert same_bits(optimizer_tensors(optimizer), before[1])
