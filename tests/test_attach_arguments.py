"""The arguments of `attach`: what they do, and what is said of bad ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_training import (
    backward,
    grads,
    hook_counts,
    make_model,
    monitor_of,
    norm_of,
    same_bits,
    sgd,
    train,
    weights,
)
from torch import nn

import gradstat
from gradstat import _kernels

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


def test_a_watcher_reads_gradients_on_recorded_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model, every=3)
    reads: list[int] = []
    gather, make = _kernels.gather, _kernels.measurer

    def gathered(*args: Any, **options: Any) -> Any:
        if options.get("take_grad"):
            reads.append(monitor_of(optimizer).step + 1)
        return gather(*args, **options)

    def made(*args: Any) -> Any:
        measure = make(*args)
        assert measure is not None

        def measured(*args: Any) -> bool:
            reads.append(monitor_of(optimizer).step + 1)
            return measure(*args)

        return measured

    monkeypatch.setattr(_kernels, "gather", gathered)
    monkeypatch.setattr(_kernels, "measurer", made)
    train(model, optimizer, 18)
    recorded = {1, 4, 7, 10, 13, 16}
    probed = {1, 2, 3, 4, 8, 16}
    assert reads == sorted(recorded | probed)


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


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, "compile", "inside", "both"], ids=str)
def test_names_are_those_of_the_model_inside(wrap: Any) -> None:
    model = make_model()
    outer: nn.Module = model
    if wrap == "inside":
        model[0] = torch.compile(model[0], backend="eager")  # type: ignore[call-overload]
    elif wrap == "compile":
        outer = torch.compile(model, backend="eager")  # type: ignore[assignment]
    elif wrap == "both":
        outer = torch.compile(torch.nn.DataParallel(model), backend="eager")  # type: ignore[assignment]
    else:
        outer = wrap(model)
    optimizer = gradstat.attach(sgd(model), outer)
    train(model, optimizer, 1)
    assert monitor_of(optimizer).names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert gradstat.grad_stats(outer).names == monitor_of(optimizer).names
    assert gradstat.tensor_stats(outer).names == monitor_of(optimizer).names


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
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer .*got Linear"):
        gradstat.attach(nn.Linear(1, 1))  # type: ignore[type-var]

    class Outer(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner

    with pytest.raises(TypeError, match=r"got Outer; if it wraps .* attach to the one inside"):
        gradstat.attach(Outer(sgd(make_model())))


def test_an_optimizer_without_some_of_its_hooks_is_refused_untouched() -> None:
    optimizer = sgd(make_model())
    del optimizer._optimizer_load_state_dict_post_hooks
    with pytest.raises(TypeError, match=r"with its hooks, got SGD; if it wraps"):
        gradstat.attach(optimizer)
    assert not optimizer._optimizer_step_pre_hooks


def test_attaching_twice_and_detaching_twice_are_errors() -> None:
    optimizer = gradstat.attach(sgd(make_model()))
    with pytest.raises(ValueError, match=r"already; call gradstat.detach\(optimizer\) first"):
        gradstat.attach(optimizer)
    gradstat.detach(optimizer)
    with pytest.raises(ValueError, match=r"must have gradstat attached.*gradstat.attach\("):
        gradstat.detach(optimizer)
