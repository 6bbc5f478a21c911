"""`GradStatOptimizer` is a real optimizer: schedulers, scalers, hooks, copies, checkpoints."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from small_training import (
    OPTIMIZERS,
    backward,
    grad_norm,
    hook_counts,
    loss_of,
    make_model,
    optimizer_tensors,
    poison,
    same_bits,
    train,
    weights,
)
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import lr_scheduler

import gradstat


def wrapped(
    make: Any = OPTIMIZERS["sgd-loop"], **options: Any
) -> tuple[torch.nn.Sequential, gradstat.GradStatOptimizer]:
    model = make_model()
    return model, gradstat.GradStatOptimizer(make(model.parameters()), model=model, **options)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_wrapper_trains_like_attach(make: Any) -> None:
    model, optimizer = wrapped(make, clip="auto")
    plain_model = make_model()
    plain = gradstat.attach(make(plain_model.parameters()), plain_model, clip="auto")
    assert isinstance(optimizer, torch.optim.Optimizer)
    for step in range(20):
        backward(model, step)
        backward(plain_model, step)
        if step == 15:
            poison(model)
            poison(plain_model)
        optimizer.step()
        plain.step()
    assert same_bits(weights(model), weights(plain_model))
    assert same_bits(optimizer_tensors(optimizer), optimizer_tensors(plain))
    assert optimizer.gradstat.step == 20
    assert optimizer.gradstat.skipped_steps == 1
    assert optimizer.gradstat.names == ("0.weight", "0.bias", "2.weight", "2.bias")


SCHEDULES = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 3, 0.5),
    "one-cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("on", ["wrapper", "inner"])
def test_schedulers(name: str, on: str) -> None:
    model, optimizer = wrapped()
    plain_model = make_model()
    plain = OPTIMIZERS["sgd-loop"](plain_model.parameters())
    scheduler = SCHEDULES[name](optimizer if on == "wrapper" else optimizer.inner)
    plain_scheduler = SCHEDULES[name](plain)
    for step in range(10):
        train(model, optimizer, 1, step)
        train(plain_model, plain, 1, step)
        arguments = (1.0,) if name == "plateau" else ()
        scheduler.step(*arguments)
        plain_scheduler.step(*arguments)
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert same_bits(weights(model), weights(plain_model))


@pytest.mark.parametrize("make", [OPTIMIZERS["adamw-fused"], OPTIMIZERS["adamw-loop"]])
@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale-step"])
def test_grad_scaler(make: Any, unscale: bool) -> None:
    model, optimizer = wrapped(make)
    plain_model = make_model()
    plain = make(plain_model.parameters())
    runs = [
        (model, optimizer, GradScaler("cpu", 1024.0)),
        (plain_model, plain, GradScaler("cpu", 1024.0)),
    ]
    for step in range(8):
        backward(model, step)
        norm = grad_norm(model)
        for this, stepper, scaler in runs:
            this.zero_grad()
            scaler.scale(loss_of(this, step)).backward()
            if step in (0, 4):
                poison(this, math.inf)
            if unscale:
                scaler.unscale_(stepper)
            scaler.step(stepper)
            scaler.update()
        if step not in (0, 4):
            assert optimizer.gradstat.total_norm == pytest.approx(norm, rel=1e-6)
    assert same_bits(weights(model), weights(plain_model))  # a double unscale would show
    assert runs[0][2].get_scale() == runs[1][2].get_scale() == 256.0
    for attribute in ("found_inf", "grad_scale"):
        assert not hasattr(optimizer, attribute)
        assert attribute not in optimizer.__dict__


def test_unscaling_twice_is_still_an_error() -> None:
    model, optimizer = wrapped()
    scaler = GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)


def test_attributes_that_a_fused_step_reads_are_the_inner_ones() -> None:
    _, optimizer = wrapped(OPTIMIZERS["sgd-fused"])
    flag = torch.tensor(1.0)
    optimizer.found_inf = flag
    assert optimizer.inner.found_inf is flag  # type: ignore[attr-defined]
    assert optimizer.found_inf is flag
    del optimizer.found_inf
    assert not hasattr(optimizer.inner, "found_inf")
    assert optimizer._step_supports_amp_scaling is True
    _, plain = wrapped()
    assert getattr(plain, "_step_supports_amp_scaling", False) is False


def test_hooks_fire_once() -> None:
    model, optimizer = wrapped()
    calls: list[Any] = []
    optimizer.register_step_pre_hook(lambda this, *_: calls.append(("before", this)))
    optimizer.register_step_post_hook(lambda this, *_: calls.append(("after", this)))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [("before", optimizer), ("after", optimizer), "saved", "loaded"]


def test_the_profiler_sees_both_steps_once() -> None:
    model, optimizer = wrapped()
    backward(model)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    names = [event.name for event in profile.events() if event.name.startswith("Optimizer.step#")]
    assert sorted(names) == ["Optimizer.step#GradStatOptimizer.step", "Optimizer.step#SGD.step"]


def test_closures_pass_through() -> None:
    model, optimizer = wrapped(lambda p: torch.optim.LBFGS(p, max_iter=4))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure=closure) < first
    assert optimizer.gradstat.step == 2


def test_groups_state_and_defaults_are_the_inner_ones() -> None:
    model, optimizer = wrapped()
    assert optimizer.param_groups is optimizer.inner.param_groups
    assert optimizer.state is optimizer.inner.state
    assert optimizer.defaults is optimizer.inner.defaults
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.5})
    assert len(optimizer.inner.param_groups) == 2
    train(model, optimizer, 1)
    optimizer.zero_grad()
    assert model[0].weight.grad is None
    assert "lr: 0.5" in repr(optimizer)
    assert repr(optimizer).startswith("GradStatOptimizer(SGD (")


class TwoModes(torch.optim.SGD):
    """Has methods of its own, as schedule-free optimizers do."""

    mode = "eval"

    def train(self) -> None:
        self.mode = "train"


def test_further_methods_are_the_inner_ones() -> None:
    _, optimizer = wrapped(lambda p: TwoModes(p, lr=0.1))
    optimizer.train()
    assert optimizer.inner.mode == optimizer.mode == "train"
    with pytest.raises(AttributeError, match="'TwoModes' object has no attribute 'eval'"):
        optimizer.eval()
    assert not hasattr(optimizer, "_gradstat_seam")


def test_checkpoints_fit_attach_and_plain_optimizers() -> None:
    model, optimizer = wrapped(OPTIMIZERS["adamw-loop"], clip="auto")
    train(model, optimizer, 3)
    state = optimizer.state_dict()
    plain = OPTIMIZERS["adamw-loop"](make_model().parameters())
    plain.load_state_dict(state)
    assert same_bits(optimizer_tensors(plain), optimizer_tensors(optimizer))
    _, other = wrapped(OPTIMIZERS["adamw-loop"], clip="auto")
    other.load_state_dict(state)
    assert other.gradstat.step == 3
    other.load_state_dict(plain.state_dict())
    assert same_bits(optimizer_tensors(other), optimizer_tensors(optimizer))


def test_distributed_checkpointing() -> None:
    model, optimizer = wrapped(OPTIMIZERS["adamw-loop"], clip="auto")
    state = get_optimizer_state_dict(model, optimizer)
    assert set(state) == {"state", "param_groups"}
    assert optimizer.gradstat.step == 0
    assert optimizer.gradstat.last is None


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_watch_their_own_parameters(copied: Any) -> None:
    model, optimizer = wrapped(OPTIMIZERS["adamw-loop"], clip=gradstat.GlobalNorm(0.1), every=2)
    train(model, optimizer, 3)
    twin_model, twin = copied((model, optimizer))
    assert type(twin) is gradstat.GradStatOptimizer
    assert hook_counts(twin.inner) == hook_counts(optimizer.inner) == [1, 1, 0, 1, 1, 1]
    assert same_bits(optimizer_tensors(twin), optimizer_tensors(optimizer))
    train(twin_model, twin, 3, 3)
    assert optimizer.gradstat.step == 3
    assert twin.gradstat.step == 3
    assert list(twin.gradstat.recorded_steps) == [1, 3]
    assert twin.gradstat.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    train(model, optimizer, 3, 3)
    assert same_bits(weights(model), weights(twin_model))


def test_a_copy_looks_at_the_run_as_often() -> None:
    _, optimizer = wrapped(diagnose=3)
    assert [copy.deepcopy(optimizer).gradstat._rounds.is_due(n) for n in (2, 3)] == [False, True]


def test_a_copy_can_be_scheduled_and_hooked() -> None:
    model, optimizer = wrapped()
    twin_model, twin = copy.deepcopy((model, optimizer))
    scheduler = lr_scheduler.StepLR(twin, 1, 0.5)
    train(twin_model, twin, 1)
    scheduler.step()
    assert twin.param_groups[0]["lr"] == 0.025
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_wrapper_whose_optimizer_is_detached_prints() -> None:
    _, optimizer = wrapped()
    assert "Monitor(step=0" in repr(optimizer)
    gradstat.detach(optimizer.inner)
    assert "detached" in repr(optimizer)


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer"):
        gradstat.GradStatOptimizer(make_model())  # type: ignore[arg-type]
    _, optimizer = wrapped()
    with pytest.raises(ValueError, match="must not have gradstat attached already"):
        gradstat.GradStatOptimizer(optimizer.inner)
    with pytest.raises(ValueError, match="must not have gradstat attached already"):
        gradstat.attach(optimizer)
    with pytest.raises(ValueError, match=r"got a GradStatOptimizer .*detach\(optimizer.inner\)"):
        gradstat.detach(optimizer)
    assert type(gradstat.detach(optimizer.inner)) is torch.optim.SGD
