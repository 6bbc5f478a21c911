"""Whatever raises, or comes apart: gradients, attributes and hooks are where they were."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from small_training import (
    OPTIMIZERS,
    Failing,
    backward,
    grads,
    hook_counts,
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

# ---- detach --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_detach_restores_everything(make: Any) -> None:
    model = make_model()
    optimizer = make(model.parameters())
    attributes, hooks = set(optimizer.__dict__), hook_counts(optimizer)
    keys = set(optimizer.state_dict())
    gradstat.attach(optimizer, model, clip="auto")
    train(model, optimizer, 3)
    backward(model)
    poison(model)
    optimizer.step()
    assert gradstat.detach(optimizer) is optimizer
    assert set(optimizer.__dict__) == attributes
    assert hook_counts(optimizer) == hooks
    assert set(optimizer.state_dict()) == keys
    gradstat.attach(optimizer, model)
    assert monitor_of(optimizer).step == 0


def test_detach_leaves_the_hooks_of_others() -> None:
    model = make_model()
    optimizer = sgd(model)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    gradstat.attach(optimizer, model)
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    train(model, optimizer, 1)
    gradstat.detach(optimizer)
    train(model, optimizer, 1)
    assert calls == ["before", "after"] * 2


def test_detach_gives_back_what_a_kept_exception_holds() -> None:
    model = make_model()
    optimizer = gradstat.attach(Failing(model.parameters(), lr=0.1), model, clip="auto")
    backward(model)
    poison(model)
    expected = grads(model)
    optimizer.fails = True
    with pytest.raises(RuntimeError) as kept:
        optimizer.step()
    assert model[0].weight.grad is None
    gradstat.detach(optimizer)
    assert same_bits(grads(model), expected)
    del kept


def test_detach_inside_a_step_is_refused() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, clip="auto")
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    monitor_of(optimizer).on_step(lambda _: gradstat.detach(optimizer) and None)
    backward(model)
    with pytest.raises(ValueError, match=r"must not be inside its step .* detach after"):
        optimizer.step()
    gradstat.detach(optimizer)
    optimizer.step()
    assert calls == [1]


def test_a_model_is_freed_with_its_optimizer() -> None:
    def free(attach: Any) -> bool:
        model = Freed(6, 3)
        optimizer = attach(sgd(model), model)
        train(model, optimizer, 2)
        reference = weakref.ref(model)
        del model, optimizer
        return reference() is None

    gc.disable()
    try:
        free(lambda optimizer, model: optimizer)  # torch imports a lot at the first step
        gc.collect()
        assert free(lambda optimizer, model: gradstat.attach(optimizer, model, clip="auto"))
        assert free(lambda optimizer, model: gradstat.GradStatOptimizer(optimizer, model=model))
    finally:
        gc.enable()


class Freed(nn.Linear):
    """A class of its own, with no cache of torch that knows it."""


# ---- exceptions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "skipped"])
def test_an_exception_in_the_step_leaves_gradients_in_place(bad: bool) -> None:
    model = make_model()
    optimizer = Failing(model.parameters(), lr=0.1)
    gradstat.attach(optimizer, model, clip="auto")
    backward(model)
    if bad:
        poison(model)
    expected, before = grads(model), weights(model)
    optimizer.fails = True
    with contextlib.suppress(RuntimeError):
        optimizer.step()
    assert same_bits(grads(model), expected)
    assert same_bits(weights(model), before)
    assert "found_inf" not in optimizer.__dict__
    assert monitor_of(optimizer).step == 0
    optimizer.fails = False
    optimizer.step()
    monitor = monitor_of(optimizer)
    assert (monitor.step, list(monitor.recorded_steps)) == (1, [1])
    assert same_bits(grads(model), expected)


def test_a_kept_exception_does_not_bring_old_gradients_back() -> None:
    model = make_model()
    optimizer = Failing(model.parameters(), lr=0.1)
    gradstat.attach(optimizer, model, clip="auto")
    backward(model)
    poison(model)
    optimizer.fails = True
    kept = None
    try:
        optimizer.step()
    except RuntimeError as error:
        kept = error
    optimizer.fails = False
    optimizer.zero_grad()
    model[2](torch.ones(1, 5)).sum().backward()
    optimizer.step()
    assert model[0].weight.grad is None
    del kept
    assert model[0].weight.grad is None
    assert monitor_of(optimizer).last["2.bias"].l2 > 0  # type: ignore[index]


def test_a_kept_exception_does_not_overwrite_new_gradients() -> None:
    model = make_model()
    optimizer = Failing(model.parameters(), lr=0.1)
    gradstat.attach(optimizer, model, clip="auto")
    backward(model)
    poison(model)
    optimizer.fails = True
    kept = None
    try:
        optimizer.step()
    except RuntimeError as error:
        kept = error
    backward(model, 1)
    fresh = grads(model)
    del kept
    assert same_bits(grads(model), fresh)


def test_an_exception_that_goes_during_a_later_step_gives_nothing_back() -> None:
    model = make_model()
    optimizer = Failing(model.parameters(), lr=0.1)
    gradstat.attach(optimizer, model, clip="auto")
    kept: list[RuntimeError] = []
    optimizer.register_step_pre_hook(lambda *_: kept.clear())
    backward(model)
    poison(model)
    optimizer.fails = True
    try:
        optimizer.step()
    except RuntimeError as error:
        kept.append(error)
    optimizer.fails = False
    before = weights(model)
    backward(model)
    poison(model)
    optimizer.step()
    assert not kept
    assert same_bits(weights(model), before)


def test_an_exception_in_another_hook_gives_gradients_back() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, clip="auto")

    def refuse(*_: Any) -> None:
        raise ValueError("not now")

    handle = optimizer.register_step_pre_hook(refuse)
    backward(model)
    poison(model)
    with contextlib.suppress(ValueError):
        optimizer.step()
    assert None not in grads(model)
    handle.remove()
    optimizer.step()
    assert monitor_of(optimizer).skipped_steps == 2


def test_a_later_hook_that_changes_the_arguments_does_not_undo_a_skip() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model, momentum=0.9), model, clip="auto")
    optimizer.register_step_pre_hook(lambda _, args, kwargs: ((args[0], None), kwargs))
    backward(model)
    poison(model)
    before = grads(model), weights(model)
    optimizer.step()
    assert same_bits(grads(model), before[0])
    assert same_bits(weights(model), before[1])
    assert not optimizer.state


def test_hooks_of_others_find_the_gradients_of_a_skipped_step() -> None:
    model = make_model()
    optimizer = sgd(model)
    seen: list[Any] = []
    optimizer.register_step_post_hook(lambda *_: seen.append(grads(model)))
    gradstat.attach(optimizer, model, clip="auto")
    backward(model)
    poison(model)
    optimizer.step()
    assert same_bits(seen[0], grads(model))
    assert None not in seen[0]


def test_an_exception_in_a_callback_comes_after_everything_is_put_back() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, clip="auto")
    calls: list[int] = []

    @monitor_of(optimizer).on_step
    def stop(monitor: gradstat.Monitor) -> None:
        calls.append(monitor.step)
        assert None not in grads(model)
        raise KeyboardInterrupt

    backward(model)
    poison(model)
    expected = grads(model)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert calls == [1]
    assert same_bits(grads(model), expected)
    assert monitor_of(optimizer).step == 1


@pytest.mark.parametrize("bad", [False, True], ids=["finite", "skipped"])
def test_a_class_that_calls_super_step_is_measured_once(bad: bool) -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # from now on torch hooks SGD.step too
    model = make_model()
    optimizer = Failing(model.parameters(), lr=0.1, momentum=0.9)
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    gradstat.attach(optimizer, model, clip=gradstat.GlobalNorm(0.1))
    train(model, optimizer, 2)
    backward(model, 2)
    if bad:
        poison(model)
    before = weights(model), optimizer_tensors(optimizer)
    optimizer.step()
    assert len(calls) == 6
    monitor = monitor_of(optimizer)
    assert (monitor.step, monitor.skipped_steps) == (3, int(bad))
    assert monitor.state_dict()["clipper"]["state"][0] == 3
    if bad:
        assert same_bits(weights(model), before[0])
        assert same_bits(optimizer_tensors(optimizer), before[1])
