"""Hostile gradients, watching that changes nothing, and gradients that come clipped."""

from __future__ import annotations

import copy
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
    norm_of,
    optimizer_tensors,
    parameter_with,
    poison,
    same_bits,
    sgd,
    train,
    weights,
)
from torch import nn

import gradstat
from gradstat import _kernels

# ---- hostile gradients ---------------------------------------------------------------------------


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    parameters = [parameter_with(torch.full((3, 4), 2.0, dtype=dtype))]
    optimizer = gradstat.attach(
        torch.optim.SGD(parameters, lr=1.0), clip=gradstat.GlobalNorm(math.sqrt(12.0))
    )
    optimizer.step()
    assert monitor_of(optimizer).total_norm == pytest.approx(math.sqrt(48.0))
    torch.testing.assert_close(
        parameters[0].detach(), torch.full((3, 4), -1.0, dtype=dtype), rtol=1e-2, atol=0
    )


def test_mixed_dtypes_in_one_optimizer() -> None:
    parameters = [parameter_with(torch.ones(5, dtype=dtype)) for dtype in DTYPES]
    optimizer = gradstat.attach(torch.optim.SGD(parameters, lr=1.0), clip=gradstat.GlobalNorm(2.5))
    optimizer.step()
    assert monitor_of(optimizer).total_norm == pytest.approx(5.0)
    for parameter in parameters:
        expected = torch.full((5,), -0.5, dtype=parameter.dtype)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-2, atol=0)


def test_fp16_norm_does_not_overflow() -> None:
    parameter = parameter_with(torch.full((1000,), 60000.0, dtype=torch.float16))
    optimizer = gradstat.attach(torch.optim.SGD([parameter], lr=1.0), clip=gradstat.GlobalNorm(1.0))
    optimizer.step()
    assert monitor_of(optimizer).total_norm == pytest.approx(60000.0 * math.sqrt(1000), rel=1e-3)
    assert monitor_of(optimizer).skipped_steps == 0
    assert norm_of([parameter]) == pytest.approx(1.0, rel=1e-2)


def test_huge_fp32_norm_does_not_overflow() -> None:
    parameter = parameter_with(torch.full((4,), 1e20))
    optimizer = gradstat.attach(torch.optim.SGD([parameter], lr=1.0), clip=gradstat.GlobalNorm(1.0))
    optimizer.step()
    assert monitor_of(optimizer).total_norm == pytest.approx(2e20)
    assert norm_of([parameter]) == pytest.approx(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_or_inf_then_a_spike_is_still_clipped(value: float) -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model, lr=1e-3), model, clip="auto")
    train(model, optimizer, 30)
    backward(model, 30)
    poison(model, value)
    optimizer.step()
    monitor = monitor_of(optimizer)
    assert monitor.skipped_steps == 1
    assert not math.isfinite(monitor.total_norm)
    train(model, optimizer, 1, 31, scale=100.0)
    assert monitor.clip_coef < 0.1
    assert math.isfinite(monitor.clip_threshold)
    assert all(bool(w.isfinite().all()) for w in weights(model))


def test_sparse_uncoalesced_gradients() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = gradstat.attach(
        torch.optim.SparseAdam(embedding.parameters(), lr=0.1),
        embedding,
        clip=gradstat.GlobalNorm(0.5),
    )
    for _ in range(3):
        optimizer.zero_grad()
        embedding(torch.tensor([1, 1, 2, 7])).sum().backward()
        gradient = embedding.weight.grad
        assert gradient is not None
        assert not gradient.is_coalesced()
        norm = norm_of([gradient.to_dense()])
        optimizer.step()
        assert monitor_of(optimizer).total_norm == pytest.approx(norm)
        assert norm_of([gradient.to_dense()]) == pytest.approx(0.5, rel=1e-4)
    last = monitor_of(optimizer).last
    assert last is not None
    assert (last["weight"].rows, last["weight"].dead_rows) == (10, 7)


def test_a_sparse_step_is_skipped() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = gradstat.attach(
        torch.optim.SparseAdam(embedding.parameters(), lr=0.1), embedding, clip="auto"
    )
    embedding(torch.tensor([1, 1, 2])).sum().mul(math.inf).backward()
    before = weights(embedding)
    optimizer.step()
    assert same_bits(weights(embedding), before)
    assert embedding.weight.grad is not None
    assert not optimizer.state


def test_empty_frozen_and_tied_parameters() -> None:
    shared = nn.Linear(4, 4, bias=False)
    model = nn.Module()
    model.first, model.second = shared, shared
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = gradstat.attach(sgd(model), model, clip=gradstat.GlobalNorm(1.0))
    x = torch.ones(2, 4)
    (model.second(model.first(x)).sum() + model.empty.sum()).backward()
    norm = norm_of([shared.weight.grad])
    optimizer.step()
    monitor = monitor_of(optimizer)
    assert set(monitor.names) == {"first.weight", "empty", "frozen"}
    assert monitor.total_norm == pytest.approx(norm)
    assert monitor.last is not None
    assert monitor.last.missing == ("frozen",)
    assert monitor.last["empty"].numel == 0


def test_no_gradients_at_all_is_said_once() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, clip="auto")
    with pytest.warns(RuntimeWarning, match="no parameter had a gradient at optimizer.step()") as w:
        optimizer.step()
    assert w[0].filename == __file__
    optimizer.step()
    monitor = monitor_of(optimizer)
    assert (monitor.step, monitor.last, len(monitor.window)) == (2, None, 0)
    assert math.isnan(monitor.total_norm)
    train(model, optimizer, 1)
    assert monitor.total_norm > 0


def test_measuring_in_one_call_leaves_what_measuring_in_several_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def watched() -> gradstat.Monitor:
        model = make_model()
        optimizer = gradstat.attach(sgd(model), model, weights=True)
        train(model, optimizer, 6)
        optimizer.zero_grad()
        with pytest.warns(RuntimeWarning, match="no parameter had a gradient"):
            optimizer.step()
        train(model, optimizer, 1)
        return copy.deepcopy(monitor_of(optimizer))

    at_once = watched()
    monkeypatch.setattr(_kernels, "measurer", lambda *_: None)
    in_several = watched()
    assert list(at_once.recorded_steps) == [1, 2, 3, 4, 5, 6, 8]
    for name in ("recorded_steps", "window", "weight_window", "decisions"):
        assert (getattr(at_once, name) == getattr(in_several, name)).all()
    probes = (monitor.evidence().probes.gradients for monitor in (at_once, in_several))
    assert (next(probes) == next(probes)).all()


def test_another_list_of_the_same_parameters_is_measured_in_one_call_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = _kernels.measurer
    answers: list[bool] = []

    def counted(*args: Any) -> Any:
        measure = made(*args)
        assert measure is not None

        def told(*args: Any) -> bool:
            answers.append(measure(*args))
            return answers[-1]

        return told

    monkeypatch.setattr(_kernels, "measurer", counted)
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model)
    train(model, optimizer, 3)
    for group in optimizer.param_groups:
        group["params"] = list(group["params"])
    train(model, optimizer, 3)
    assert answers == [True] * 4  # not in the first step with each list
    assert list(monitor_of(optimizer).recorded_steps) == [1, 2, 3, 4, 5, 6]


def test_a_gradient_that_cannot_be_measured_stops_a_watcher_only() -> None:
    class Idle(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            pass

    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float8_e4m3fn))
    parameter.grad = torch.zeros(3, dtype=torch.float8_e4m3fn)
    optimizer = gradstat.attach(Idle([parameter], {}))
    with pytest.warns(RuntimeWarning, match=r"stops watching .*float8.* for 'group0\.param0'"):
        optimizer.step()
    optimizer.step()
    assert monitor_of(optimizer).step == 2
    gradstat.detach(optimizer)
    gradstat.attach(optimizer, clip="auto")
    with pytest.raises(gradstat.UnsupportedTensorError, match=r"group0\.param0"):
        optimizer.step()


# ---- watching changes nothing --------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_watching_leaves_gradients_and_weights_bit_identical(make: Any) -> None:
    watched, plain = make_model(), make_model()
    optimizer, other = make(watched.parameters()), make(plain.parameters())
    gradstat.attach(optimizer, watched, weights=True, updates=True, every=3)
    for step in range(200):
        backward(watched, step)
        backward(plain, step)
        if step == 100:
            poison(watched, 1e30)
            poison(plain, 1e30)
        optimizer.step()
        other.step()
        assert same_bits(grads(watched), grads(plain))
    assert same_bits(weights(watched), weights(plain))
    assert same_bits(optimizer_tensors(optimizer), optimizer_tensors(other))
    assert monitor_of(optimizer).step == 200


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_watching_passes_nan_and_inf_on(value: float) -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model)
    backward(model)
    poison(model, value)
    optimizer.step()
    assert not bool(model[0].weight.isfinite().all())
    last = monitor_of(optimizer).last
    assert last is not None
    assert last["0.weight"].nonfinite == 1
    assert monitor_of(optimizer).skipped_steps == 0
