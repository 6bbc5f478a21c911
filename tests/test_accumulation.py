"""Gradients added to those of the step before: what is counted, and what it keeps alive."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from small_training import loss_of, make_model, monitor_of, sgd
from torch import nn
from torch.utils.weak import TensorWeakRef

import gradstat


def accumulated(
    *, zeroes: bool, set_to_none: bool = True, parts: int = 1, clips: bool = False
) -> int:
    """Return how many of the four looks in eight steps find old gradients."""
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model)
    for step in range(8):
        if zeroes:
            optimizer.zero_grad(set_to_none=set_to_none)
        for part in range(parts):
            loss_of(model, parts * step + part).backward()
            gc.collect()
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return monitor_of(optimizer).evidence().accumulated_steps


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("clips", [False, True])
def test_a_missing_zero_grad_is_counted(parts: int, clips: bool) -> None:
    assert accumulated(zeroes=False, parts=parts, clips=clips) == 4


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("clips", [False, True])
def test_gradients_that_are_zeroed_are_not(set_to_none: bool, parts: int, clips: bool) -> None:
    assert accumulated(zeroes=True, set_to_none=set_to_none, parts=parts, clips=clips) == 0


@pytest.mark.parametrize("zeroes", [True, False])
def test_a_critic_that_the_generators_pass_adds_to(zeroes: bool) -> None:
    """It is zeroed before its own pass, or never; one pass for another model comes in between."""
    generator, critic = nn.Linear(3, 4), nn.Linear(4, 1)
    optimizer = gradstat.attach(sgd(critic), critic)
    for _ in range(8):
        critic(generator(torch.randn(5, 3))).mean().backward()
        if zeroes:
            optimizer.zero_grad(set_to_none=False)
        critic(torch.randn(5, 4)).mean().backward()
        optimizer.step()
    assert monitor_of(optimizer).evidence().accumulated_steps == (0 if zeroes else 4)


@pytest.mark.parametrize("period", [2, 3, 4, 5, 8, 16])
def test_gradients_zeroed_now_and_then_are_found_in_about_their_share(period: int) -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model)
    for step in range(160):
        if step % period == 0:
            optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    evidence = monitor_of(optimizer).evidence()
    share = evidence.accumulated_steps / evidence.accumulation_looks
    assert share == pytest.approx(1 - 1 / period, abs=0.12)


def test_nothing_is_left_on_a_parameter_that_is_watched_no_more() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model)
    loss_of(model, 0).backward()
    optimizer.step()
    assert any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    gradstat.detach(optimizer)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_zero_grad_frees_the_gradients() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, clip="auto", weights=True, updates=True)
    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        loss_of(model, step).backward()
        gradients = [TensorWeakRef(p.grad) for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert [gradient() for gradient in gradients] == [None] * 4


def test_gradients_of_inference_mode_count_no_versions() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model)
    with torch.inference_mode():
        gradients = [torch.ones_like(p) for p in model.parameters()]
    for _ in range(3):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert monitor_of(optimizer).step == 3
    assert monitor_of(optimizer).evidence().accumulated_steps == 0


def test_a_copy_keeps_the_count() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model)
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
    assert copy.deepcopy(monitor_of(optimizer)).evidence().accumulated_steps == 2
