"""What a NaN or Inf in a gradient does in each of the four modes, to the last bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
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

VALUES = [math.nan, math.inf, -math.inf]


def prepared(make: Any, **options: Any) -> tuple[torch.nn.Sequential, torch.optim.Optimizer]:
    model = make_model()
    optimizer = gradstat.attach(make(model.parameters()), model, **options)
    train(model, optimizer, 3)
    return model, optimizer


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_skip_leaves_parameters_and_state_bit_identical(make: Any, value: float) -> None:
    model, optimizer = prepared(make, clip=gradstat.GlobalNorm(1.0))
    backward(model, 3)
    poison(model, value)
    expected = grads(model), weights(model), optimizer_tensors(optimizer)
    optimizer.step()
    assert same_bits(grads(model), expected[0])
    assert same_bits(weights(model), expected[1])
    assert same_bits(optimizer_tensors(optimizer), expected[2])
    monitor = monitor_of(optimizer)
    assert (monitor.step, monitor.skipped_steps, monitor.skipped_in_a_row) == (4, 1, 1)
    assert monitor.decisions[-1, 3] == 1
    assert monitor.last is not None
    assert monitor.last["0.weight"].nonfinite == 1
    train(model, optimizer, 1, 4)
    assert monitor.skipped_in_a_row == 0


def test_parameters_that_are_not_measured_are_skipped_too() -> None:
    model, optimizer = prepared(
        OPTIMIZERS["sgd-loop"], clip="auto", filter=lambda name, _: name == "0.weight"
    )
    backward(model, 3)
    poison(model)
    expected = grads(model), weights(model), optimizer_tensors(optimizer)
    optimizer.step()
    assert same_bits(grads(model), expected[0])
    assert same_bits(weights(model), expected[1])
    assert same_bits(optimizer_tensors(optimizer), expected[2])


def test_what_an_optimizer_counts_in_its_groups_is_no_part_of_a_skipped_step() -> None:
    model = make_model()
    optimizer = CountingInGroups(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: optimizer.param_groups[0].update(lr=0.2))
    gradstat.attach(optimizer, model, clip="auto")
    group = optimizer.param_groups[0]
    backward(model)
    poison(model)
    optimizer.step()
    assert (group["count"], group["lr"]) == (0, 0.2)
    train(model, optimizer, 2)
    assert group["count"] == 2


class CountingInGroups(torch.optim.SGD):
    """Counts its steps in its groups, as schedule-free optimizers and optimi do."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr)
        self.param_groups[0]["count"] = 0

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["count"] += 1
        return super().step(closure)


def test_a_run_with_skips_equals_the_run_without_those_steps() -> None:
    model, plain_model = make_model(), make_model()
    optimizer = gradstat.attach(torch.optim.AdamW(model.parameters()), model, on_nonfinite="skip")
    plain = torch.optim.AdamW(plain_model.parameters())
    for step in range(40):
        backward(model, step)
        if step % 7 == 3:
            poison(model)
        else:
            train(plain_model, plain, 1, step)
        optimizer.step()
    assert same_bits(weights(model), weights(plain_model))
    assert same_bits(optimizer_tensors(optimizer), optimizer_tensors(plain))


def test_skip_from_the_first_step_makes_no_state() -> None:
    model = make_model()
    optimizer = gradstat.attach(torch.optim.AdamW(model.parameters()), model, clip="auto")
    backward(model)
    poison(model)
    optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_raise_changes_nothing(make: Any, value: float) -> None:
    model, optimizer = prepared(make, on_nonfinite="raise", clip=gradstat.GlobalNorm(1e-3))
    backward(model, 3)
    poison(model, value)
    expected = grads(model), weights(model), optimizer_tensors(optimizer)
    text = rf'on_nonfinite="raise", got a total norm of {abs(value)} at step 4, .* in 0\.weight;'
    with pytest.raises(gradstat.NonFiniteNormError, match=text):
        optimizer.step()
    assert same_bits(grads(model), expected[0])
    assert same_bits(weights(model), expected[1])
    assert same_bits(optimizer_tensors(optimizer), expected[2])
    monitor = monitor_of(optimizer)
    assert monitor.step == 3
    assert monitor.last is not None  # shows what was wrong
    assert monitor.last["0.weight"].nonfinite == 1
    train(model, optimizer, 1, 3)
    assert list(monitor.recorded_steps) == [1, 2, 3, 4]
    assert bool((monitor.window[..., 2:4] == 0).all())


def test_raise_names_at_most_five_layers() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(8)]
    for parameter in parameters:
        parameter.grad = torch.tensor([math.nan, 1.0])
    optimizer = gradstat.attach(torch.optim.SGD(parameters, lr=0.1), on_nonfinite="raise")
    with pytest.raises(gradstat.NonFiniteNormError, match=r"group0\.param4 and 3 more; nothing"):
        optimizer.step()


@pytest.mark.parametrize("value", VALUES, ids=str)
@pytest.mark.parametrize("clip", [None, gradstat.GlobalNorm(0.1)], ids=["watch", "clip"])
def test_zero_drops_the_bad_elements_alone(value: float, clip: Any) -> None:
    model, twin = make_model(), make_model()
    optimizer = gradstat.attach(
        torch.optim.SGD(model.parameters(), lr=0.1), model, on_nonfinite="zero", clip=clip
    )
    other = gradstat.attach(torch.optim.SGD(twin.parameters(), lr=0.1), twin, clip=clip)
    backward(model)
    backward(twin)
    poison(model, value)
    poison(twin, 0.0)
    optimizer.step()
    other.step()
    assert same_bits(grads(model), grads(twin))
    assert same_bits(weights(model), weights(twin))
    monitor = monitor_of(optimizer)
    assert not math.isfinite(monitor.total_norm)
    assert monitor.skipped_steps == 0
    assert monitor.clip_coef == pytest.approx(monitor_of(other).clip_coef)


def test_zero_reaches_sparse_and_complex_gradients() -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    wave = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    wave.grad = torch.tensor([complex(math.nan, 1.0), complex(2.0, 3.0)])
    optimizer = gradstat.attach(torch.optim.SGD([table.weight, wave], lr=1.0), on_nonfinite="zero")
    (table(torch.tensor([1, 1, 2])).sum() * math.inf).backward()
    before = table.weight.detach().clone()
    optimizer.step()
    assert torch.equal(table.weight, before)
    assert wave.tolist() == [-1j, -2 - 3j]


@pytest.mark.parametrize("clip", [None, gradstat.GlobalNorm(0.1)], ids=["watch", "clip"])
def test_propagate_passes_them_on(clip: Any) -> None:
    model, optimizer = prepared(OPTIMIZERS["sgd-loop"], on_nonfinite="propagate", clip=clip)
    backward(model, 3)
    poison(model)
    expected = grads(model)
    optimizer.step()
    assert same_bits(grads(model), expected)  # the finite ones unscaled too
    assert int(model[0].weight.isnan().sum()) == 1
    assert monitor_of(optimizer).skipped_steps == 0


def test_what_none_means() -> None:
    for clip, skipped in ((None, 0), ("auto", 1)):
        model, optimizer = prepared(OPTIMIZERS["sgd-loop"], clip=clip)
        backward(model, 3)
        poison(model)
        optimizer.step()
        assert monitor_of(optimizer).skipped_steps == skipped


def test_a_spike_is_skipped_without_touching_anything() -> None:
    model, optimizer = prepared(
        OPTIMIZERS["adamw-loop"], clip=gradstat.SkipOnSpike(sigma=6, window=64, min_history=20)
    )
    train(model, optimizer, 30, 3)
    assert monitor_of(optimizer).skipped_steps == 0
    expected = weights(model), optimizer_tensors(optimizer)
    train(model, optimizer, 1, 33, scale=1000.0)
    assert monitor_of(optimizer).skipped_steps == 1
    assert same_bits(weights(model), expected[0])
    assert same_bits(optimizer_tensors(optimizer), expected[1])
