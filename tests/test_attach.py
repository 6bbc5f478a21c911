"""`attach` leaves a training script as it was: schedulers, groups, copies, exceptions."""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_training import (
    OPTIMIZERS,
    backward,
    grad_norm,
    grads,
    hook_counts,
    loss_of,
    make_model,
    monitor_of,
    norm_of,
    optimizer_tensors,
    poison,
    same_bits,
    train,
    weights,
)
from torch import nn
from torch.optim import lr_scheduler

import gradstat


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


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


# ---- 1: schedulers -------------------------------------------------------------------------------


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


# ---- 4, 7: zero_grad and accumulation ------------------------------------------------------------


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


# ---- 8, 9: hostile gradients ---------------------------------------------------------------------


def parameter_with(grad: torch.Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros_like(grad))
    parameter.grad = grad
    return parameter


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
    with pytest.raises(gradstat.UnsupportedTensorError, match="group0.param0"):
        optimizer.step()


# ---- 10: watching changes nothing ----------------------------------------------------------------


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


# ---- 11: the user clips first --------------------------------------------------------------------


def test_already_clipped_is_noticed_once() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model, lr=0.01), model)
    with pytest.warns(RuntimeWarning, match="seem to be already clipped .* norms are 0.05") as w:
        for step in range(120):
            backward(model, step)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
    assert len(w) == 1
    assert w[0].filename == __file__
    assert monitor_of(optimizer).already_clipped


@pytest.mark.parametrize("case", ["varying", "constant", "drifting", "rarely clipped"])
def test_other_norms_are_not_taken_for_clipped(case: str) -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model, lr=1e-6), model)
    for step in range(120):
        if case == "constant":
            optimizer.zero_grad()
            sum(p.sum() for p in model.parameters()).backward()
        else:
            backward(model, 0 if case == "drifting" else step)
            if case == "rarely clipped":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.5)
        optimizer.step()
    norms = monitor_of(optimizer).decisions[:, 0]
    assert (norms.max() - norms.min() < 1e-4 * norms.max()) == (case in ("constant", "drifting"))
    assert not monitor_of(optimizer).already_clipped


# ---- 12: torch.compile ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("clip", [None, gradstat.GlobalNorm(0.05)], ids=["watch", "clip"])
@pytest.mark.parametrize("form", ["bound", "function"])
def test_a_compiled_step_measures_and_clips(backend: str, clip: Any, form: str) -> None:
    torch._dynamo.reset()
    model, plain_model = make_model(), make_model()
    optimizer, plain = sgd(model, momentum=0.9), sgd(plain_model, momentum=0.9)
    gradstat.attach(optimizer, model, clip=clip)
    gradstat.attach(plain, plain_model, clip=clip)
    with warnings.catch_warnings(record=True) as words:
        warnings.simplefilter("always")
        compiled: Any = optimizer.step
        if form == "function":

            def compiled() -> None:
                optimizer.step()

        compiled = torch.compile(compiled, backend=backend)
        for step in range(4):
            backward(model, step)
            backward(plain_model, step)
            norm = grad_norm(model)
            if step == 2 and clip is not None:
                poison(model)
                poison(plain_model)
                norm = math.nan
            compiled()
            plain.step()
            assert monitor_of(optimizer).total_norm == pytest.approx(norm, nan_ok=True)
    assert not [w for w in words if "gradstat" in str(w.message) or "pybind" in str(w.message)]
    for a, b in zip(weights(model), weights(plain_model), strict=True):
        torch.testing.assert_close(a, b)
    monitor = monitor_of(optimizer)
    assert monitor.step == 4
    assert monitor.skipped_steps == (clip is not None)
    assert None not in grads(model)
    torch._dynamo.reset()


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


# ---- 13: detach ----------------------------------------------------------------------------------


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


# ---- exceptions ----------------------------------------------------------------------------------


class Failing(torch.optim.SGD):
    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise RuntimeError("out of luck")
        return super().step(closure)


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
    with contextlib.suppress(RuntimeError):  # of the optimizer, if it comes to its step
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


# ---- every, filter, names ------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [gradstat.GlobalNorm(0.2), "auto", gradstat.PerLayer(0.1)])
def test_every_records_now_and_then_and_clips_always(clip: Any) -> None:
    models = [make_model(), make_model()]
    optimizers = [
        gradstat.attach(sgd(model), model, clip=clip, every=every)
        for model, every in zip(models, (1, 4), strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 30)
    assert same_bits(weights(models[0]), weights(models[1]))
    often, seldom = (monitor_of(optimizer) for optimizer in optimizers)
    assert list(seldom.recorded_steps) == [1, 5, 9, 13, 17, 21, 25, 29]
    assert (often.window[::4] == seldom.window).all()
    assert often.clip_rate == seldom.clip_rate


def test_filter_limits_measuring_and_clipping() -> None:
    model = make_model()
    optimizer = gradstat.attach(
        sgd(model),
        model,
        clip=gradstat.GlobalNorm(1e-3),
        filter=lambda name, parameter: "weight" in name and parameter.dim() == 2,
    )
    backward(model)
    before = grads(model)
    norm = norm_of([model[0].weight.grad, model[2].weight.grad])
    optimizer.step()
    monitor = monitor_of(optimizer)
    assert monitor.names == ("0.weight", "2.weight")
    assert monitor.total_norm == pytest.approx(norm)
    after = grads(model)
    assert same_bits([before[1], before[3]], [after[1], after[3]])
    assert norm_of([after[0], after[2]]) == pytest.approx(1e-3, rel=1e-2)


def test_names_without_a_model() -> None:
    model = make_model()
    groups = [{"params": list(model[0].parameters())}, {"params": [model[2].weight]}]
    optimizer = gradstat.attach(torch.optim.SGD(groups, lr=0.1))
    train(model, optimizer, 1)
    assert monitor_of(optimizer).names == ("group0.param0", "group0.param1", "group1.param0")


def test_names_from_the_optimizer_and_from_pairs() -> None:
    model = make_model()
    named = gradstat.attach(torch.optim.SGD(model.named_parameters(), lr=0.1))
    pairs = gradstat.attach(
        sgd(model), named_parameters=((f"net.{n}", p) for n, p in model.named_parameters())
    )
    backward(model)
    named.step()
    pairs.step()
    assert monitor_of(named).names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert monitor_of(pairs).names[0] == "net.0.weight"


# ---- arguments -----------------------------------------------------------------------------------

BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "on_nonfinite": (
        {"on_nonfinite": "ignore"},
        ValueError,
        r'on_nonfinite must be "skip", "raise", "zero" or "propagate", got \'ignore\'; leave it',
    ),
    "every zero": (
        {"every": 0},
        ValueError,
        "every must be a whole number of at least 1, got 0; use every=1 or more",
    ),
    "every bool": ({"every": True}, ValueError, "every must be a whole number"),
    "window": ({"window": 2.5}, ValueError, "window must be a whole number of at least 1, got 2.5"),
    "clip type": ({"clip": 1.0}, TypeError, "clip must be a policy.* got float; use for example"),
    "clip text": ({"clip": "zclip"}, ValueError, "clip must be a policy or \"auto\", got 'zclip'"),
    "model type": (
        {"model": [1]},
        TypeError,
        r"model must be a torch.nn.Module, got list; pass \(name, parameter\) pairs",
    ),
    "model and names": (
        {"model": nn.Linear(1, 1), "named_parameters": []},
        ValueError,
        "model and named_parameters must not both be given; leave one out",
    ),
    "names type": (
        {"named_parameters": [torch.zeros(1)]},
        TypeError,
        r"named_parameters must hold \(name, parameter\) pairs, got Tensor; pass model.named",
    ),
    "names twice": (
        {"named_parameters": [("a", torch.zeros(1)), ("a", torch.ones(1))]},
        ValueError,
        "named_parameters must not hold a name twice, got 'a'",
    ),
    "filter": ({"filter": "bias"}, TypeError, "filter must be a function, got str; pass"),
    "scaler": ({"scaler": 2.0}, TypeError, "scaler must be a torch.amp.GradScaler, got float"),
}


@pytest.mark.parametrize(
    ("options", "error", "text"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys()
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    optimizer = sgd(make_model())
    with pytest.raises(error, match=text) as info:
        gradstat.attach(optimizer, **options)
    assert isinstance(info.value, gradstat.GradstatError)
    assert hook_counts(optimizer) == [0] * 6
    assert not hasattr(optimizer, "gradstat")


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer .*got Linear"):
        gradstat.attach(nn.Linear(1, 1))  # type: ignore[type-var]

    class Outer(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner

    with pytest.raises(TypeError, match="got Outer; if it wraps .* attach to the one inside"):
        gradstat.attach(Outer(sgd(make_model())))


def test_attaching_twice_and_detaching_twice_are_errors() -> None:
    optimizer = gradstat.attach(sgd(make_model()))
    with pytest.raises(ValueError, match=r"already; call gradstat.detach\(optimizer\) first"):
        gradstat.attach(optimizer)
    gradstat.detach(optimizer)
    with pytest.raises(ValueError, match=r"must have gradstat attached.*gradstat.attach\("):
        gradstat.detach(optimizer)
