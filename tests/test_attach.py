"""`attach` leaves a training script as it was: schedulers, groups, accumulation, copies."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable
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
    monitor_of,
    parameter_with,
    poison,
    same_bits,
    sgd,
    train,
    weights,
)
from torch import nn
from torch.optim import lr_scheduler

import gradstat

# ---- what attach returns -------------------------------------------------------------------------


def test_attach_returns_the_same_object() -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    attached = gradstat.attach(optimizer, model, clip="auto")
    assert attached is optimizer
    assert type(attached) is torch.optim.AdamW
    assert hook_counts(optimizer) == [1, 1, 0, 1, 1, 1]


def test_total_norm_and_clip_coefficient_match_the_oracle() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, clip=gradstat.GlobalNorm(0.1))
    backward(model)
    norm = grad_norm(model)
    optimizer.step()
    monitor = monitor_of(optimizer)
    assert monitor.total_norm == pytest.approx(norm, rel=1e-9)
    assert monitor.clip_coef == pytest.approx(0.1 / (norm + 1e-6), rel=1e-9)
    assert monitor.clip_threshold == 0.1
    assert monitor.clip_rate == 1.0
    assert grad_norm(model) == pytest.approx(0.1, rel=1e-4)
    assert monitor.last is not None
    assert monitor.last["0.weight"].numel == 30
    assert monitor.last.total_norm == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_clipping_gives_the_weights_of_clip_grad_norm(make: Any) -> None:
    ours, theirs = make_model(), make_model()
    optimizer, plain = make(ours.parameters()), make(theirs.parameters())
    gradstat.attach(optimizer, ours, clip=gradstat.GlobalNorm(0.5))
    for step in range(30):
        backward(ours, step)
        backward(theirs, step)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        plain.step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert 0 < monitor_of(optimizer).clip_rate <= 1


# ---- schedulers ----------------------------------------------------------------------------------


def step_lr(optimizer: Any) -> Any:
    return lr_scheduler.StepLR(optimizer, 3, 0.5)


def one_cycle(optimizer: Any) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)


def plateau(optimizer: Any) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)


@pytest.mark.parametrize("schedule", [step_lr, one_cycle, plateau])
@pytest.mark.parametrize("order", ["scheduler-first", "attach-first"])
def test_schedulers_before_and_after_attach(schedule: Callable[[Any], Any], order: str) -> None:
    model, plain_model = make_model(), make_model()
    optimizer, plain = sgd(model, momentum=0.9), sgd(plain_model, momentum=0.9)
    plain_scheduler = schedule(plain)
    if order == "attach-first":
        gradstat.attach(optimizer, model)
    scheduler = schedule(optimizer)
    if order == "scheduler-first":
        gradstat.attach(optimizer, model)
    for step in range(12):  # warnings are errors: "scheduler before optimizer" would fail here
        train(model, optimizer, 1, step)
        train(plain_model, plain, 1, step)
        arguments = (1.0,) if schedule is plateau else ()
        scheduler.step(*arguments)
        plain_scheduler.step(*arguments)
        assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert same_bits(weights(model), weights(plain_model))
    assert monitor_of(optimizer).step == 12


def test_a_skipped_step_does_not_upset_a_scheduler() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, clip="auto")
    scheduler = step_lr(optimizer)
    backward(model)
    poison(model)
    optimizer.step()
    scheduler.step()
    assert monitor_of(optimizer).skipped_steps == 1


# ---- zero_grad and accumulation ------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, clip=gradstat.GlobalNorm(1.0))
    for step in range(4):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(model, step).backward()
        norm = grad_norm(model)
        optimizer.step()
        assert monitor_of(optimizer).total_norm == pytest.approx(norm, rel=1e-9)


def test_an_all_zero_step_is_measured() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, clip="auto")
    train(model, optimizer, 2)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    monitor = monitor_of(optimizer)
    assert (monitor.step, monitor.total_norm, monitor.clip_coef) == (3, 0.0, 1.0)


def test_gradient_accumulation_counts_one_step() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(4):
            loss_of(model, 4 * step + part).backward()
        norm = grad_norm(model)
        optimizer.step()
        assert monitor_of(optimizer).total_norm == pytest.approx(norm, rel=1e-9)
    assert monitor_of(optimizer).step == 3
    assert list(monitor_of(optimizer).recorded_steps) == [1, 2, 3]


# ---- AveragedModel, groups, two optimizers -------------------------------------------------------


def test_averaged_model() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, clip="auto")
    average = torch.optim.swa_utils.AveragedModel(model)
    for step in range(5):
        train(model, optimizer, 1, step)
        average.update_parameters(model)
    assert hook_counts(optimizer) == [1, 1, 0, 1, 1, 1]
    assert monitor_of(optimizer).step == 5
    assert all(p.grad is None for p in copy.deepcopy(average).parameters())


def test_param_groups_keep_their_order_and_names() -> None:
    model = make_model()
    groups = [
        {"params": [model[2].weight, model[2].bias], "lr": 0.5},
        {"params": [model[0].weight, model[0].bias]},
    ]
    optimizer = gradstat.attach(torch.optim.SGD(groups, lr=0.1), model)
    train(model, optimizer, 1)
    assert monitor_of(optimizer).names == ("2.weight", "2.bias", "0.weight", "0.bias")
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_add_param_group_starts_a_new_window_and_keeps_the_policy() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.01)
    gradstat.attach(optimizer, model, clip=gradstat.AutoClip(window=50))
    train(model, optimizer, 5)
    history = monitor_of(optimizer).state_dict()["clipper"]["state"]
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.02})
    train(model, optimizer, 1, 5)
    monitor = monitor_of(optimizer)
    assert monitor.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert list(monitor.recorded_steps) == [6]
    assert monitor.total_norm == pytest.approx(grad_norm(model) / monitor.clip_coef, rel=1e-4)
    later = monitor.state_dict()["clipper"]["state"]
    assert later[0] == history[0] + 1  # steps measured
    assert later[4] == history[4] + 1  # norms in the policy's window


def test_a_group_that_grows_in_place_is_followed() -> None:
    model = make_model()
    optimizer = gradstat.attach(torch.optim.SGD([model[0].weight], lr=0.1), model)
    train(model, optimizer, 1)
    optimizer.param_groups[0]["params"].append(model[0].bias)
    train(model, optimizer, 1)
    assert monitor_of(optimizer).names == ("0.weight", "0.bias")


def test_a_parameter_that_stands_twice_counts_once() -> None:
    model = make_model()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.SGD([*model.parameters(), model[0].weight], lr=0.1)
    gradstat.attach(optimizer, model, clip=gradstat.GlobalNorm(0.1))
    backward(model)
    norm = grad_norm(model)
    optimizer.step()
    assert monitor_of(optimizer).total_norm == pytest.approx(norm)
    assert grad_norm(model) == pytest.approx(0.1, rel=1e-4)


def test_a_parameter_that_is_exchanged_in_its_place_keeps_its_name() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model)
    train(model, optimizer, 1)
    new = parameter_with(torch.full((5,), 3.0))
    optimizer.param_groups[0]["params"][1] = new
    backward(model)
    optimizer.step()
    last = monitor_of(optimizer).last
    assert last is not None
    assert last["0.bias"].l2 == pytest.approx(3 * math.sqrt(5))


def test_a_parameter_that_left_is_let_go() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model)
    train(model, optimizer, 1)
    storage = weakref.ref(model[2].weight.untyped_storage())
    model[2] = nn.Linear(5, 3)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer, 1)
    assert storage() is None
    assert monitor_of(optimizer).names == ("0.weight", "0.bias", "2.weight", "2.bias")


def test_two_optimizers_over_one_model() -> None:
    model = make_model()
    first = gradstat.attach(torch.optim.SGD(model[0].parameters(), lr=0.1), model, clip="auto")
    second = gradstat.attach(
        torch.optim.AdamW(model[2].parameters()), model, clip=gradstat.GlobalNorm(0.01)
    )
    both = gradstat.attach(torch.optim.SGD(model.parameters(), lr=0.0), model)
    for step in range(3):
        backward(model, step)
        norm = grad_norm(model)
        both.step()
        first.step()
        second.step()
    assert monitor_of(first).names == ("0.weight", "0.bias")
    assert monitor_of(second).names == ("2.weight", "2.bias")
    assert monitor_of(both).total_norm == pytest.approx(norm)
    joint = math.hypot(monitor_of(first).total_norm, monitor_of(second).total_norm)
    assert joint == pytest.approx(norm, rel=1e-6)
    assert [monitor_of(o).step for o in (first, second, both)] == [3, 3, 3]
