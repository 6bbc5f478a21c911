"""Checkpoints, copies and pickles: the monitor's state travels, and plain optimizers stay plain."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import (
    OPTIMIZERS,
    backward,
    grad_norm,
    hook_counts,
    make_model,
    monitor_of,
    optimizer_tensors,
    poison,
    same_bits,
    train,
    weights,
)
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import gradstat

ATTACHED_HOOKS = [1, 1, 0, 1, 1, 1]
POLICIES = {
    "auto": "auto",
    "zclip": gradstat.ZClip(warmup_steps=5),
    "adagc": gradstat.AdaGC(warmup_steps=5),
    "spike": gradstat.SkipOnSpike(window=16, min_history=5),
    "chain": gradstat.SkipOnSpike(window=16, min_history=5) | gradstat.AutoClip(window=20),
}


def saved_and_loaded(state: Any) -> Any:
    """The way through a file, with torch's safe loading."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("clip", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("make", [OPTIMIZERS["adamw-fused"], OPTIMIZERS["sgd-loop"]])
def test_a_resumed_run_equals_the_uninterrupted_one(make: Any, clip: Any) -> None:
    model = make_model()
    optimizer = gradstat.attach(make(model.parameters()), model, clip=clip)
    train(model, optimizer, 20)
    backward(model, 20)
    poison(model)
    optimizer.step()
    state = saved_and_loaded(optimizer.state_dict())
    twin = copy.deepcopy(model)
    other = gradstat.attach(make(twin.parameters()), twin, clip=clip)
    other.load_state_dict(state)
    first, second = monitor_of(optimizer), monitor_of(other)
    assert second.step == 21
    assert (second.skipped_steps, second.skipped_in_a_row) == (first.skipped_steps, 1)
    for this, that in ((model, optimizer), (twin, other)):
        train(this, that, 15, 21)
        train(this, that, 5, 36, scale=30.0)
    assert same_bits(weights(model), weights(twin))
    assert first.clip_rate == second.clip_rate
    assert list(first.recorded_steps) == list(second.recorded_steps)
    assert (first.window == second.window).all()
    assert same_bits([torch.from_numpy(first.decisions)], [torch.from_numpy(second.decisions)])


def test_loading_mid_run_replaces_the_history() -> None:
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["sgd-loop"](model.parameters()), model, clip="auto")
    train(model, optimizer, 4)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 6, 4)
    optimizer.load_state_dict(state)
    monitor = monitor_of(optimizer)
    assert (monitor.step, list(monitor.recorded_steps)) == (4, [1, 2, 3, 4])
    train(model, optimizer, 1)
    assert list(monitor.recorded_steps) == [1, 2, 3, 4, 5]


def test_groups_are_followed_after_loading() -> None:
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["adamw-loop"](model.parameters()), model, clip="auto")
    train(model, optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    backward(model, 2)
    norm = grad_norm(model)
    optimizer.step()
    assert monitor_of(optimizer).total_norm == pytest.approx(norm)


def test_an_old_checkpoint_loads() -> None:
    model, plain_model = make_model(), make_model()
    plain = OPTIMIZERS["adamw-loop"](plain_model.parameters())
    train(plain_model, plain, 3)
    optimizer = gradstat.attach(OPTIMIZERS["adamw-loop"](model.parameters()), model, clip="auto")
    optimizer.load_state_dict(saved_and_loaded(plain.state_dict()))
    assert same_bits(optimizer_tensors(optimizer), optimizer_tensors(plain))
    train(model, optimizer, 2)
    assert monitor_of(optimizer).step == 2


def test_a_checkpoint_loads_into_a_plain_optimizer() -> None:
    model, plain_model = make_model(), make_model()
    optimizer = gradstat.attach(OPTIMIZERS["adamw-loop"](model.parameters()), model, clip="auto")
    train(model, optimizer, 3)
    plain = OPTIMIZERS["adamw-loop"](plain_model.parameters())
    plain.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert same_bits(optimizer_tensors(optimizer), optimizer_tensors(plain))
    train(plain_model, plain, 1)
    assert set(plain.state_dict()) == {"state", "param_groups"}


def test_loading_does_not_change_the_checkpoint() -> None:
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["sgd-loop"](model.parameters()), model, clip="auto")
    train(model, optimizer, 3)
    state = optimizer.state_dict()
    history = state["gradstat"]["clipper"]["state"].clone()
    optimizer.load_state_dict(state)
    train(model, optimizer, 3)
    assert "gradstat" in state
    assert torch.equal(state["gradstat"]["clipper"]["state"], history)


@pytest.mark.parametrize("clip", [gradstat.AutoClip(), gradstat.ZClip(alpha=0.9)], ids=repr)
def test_another_policy_starts_afresh_and_says_so(clip: gradstat.Policy) -> None:
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["sgd-loop"](model.parameters()), model, clip=clip)
    train(model, optimizer, 3)
    state = optimizer.state_dict()
    gradstat.detach(optimizer)
    gradstat.attach(optimizer, model, clip=gradstat.ZClip())
    with pytest.warns(UserWarning, match=r"clip=[AZ].*clip=ZClip\(.*starts afresh") as words:
        optimizer.load_state_dict(state)
    assert words[0].filename == __file__
    assert monitor_of(optimizer).step == 3
    train(model, optimizer, 1)
    assert monitor_of(optimizer).state_dict()["clipper"]["state"][0] == 1


def test_a_policy_after_watching_only_needs_no_word() -> None:
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["sgd-loop"](model.parameters()), model)
    train(model, optimizer, 3)
    state = optimizer.state_dict()
    gradstat.detach(optimizer)
    gradstat.attach(optimizer, model, clip="auto")
    optimizer.load_state_dict(state)
    assert monitor_of(optimizer).step == 3
    assert list(monitor_of(optimizer).recorded_steps) == [1, 2, 3]


def test_a_checkpoint_from_before_the_first_step() -> None:
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["sgd-loop"](model.parameters()), model, clip="auto")
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    train(model, optimizer, 2)
    assert monitor_of(optimizer).step == 2


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another version": (
        lambda saved: saved | {"version": 99},
        r"it is of version 99 and this gradstat reads version 1",
    ),
    "no dict": (lambda _: 7, "TypeError"),
    "nothing": (lambda _: {}, "KeyError: 'version'"),
    "without step": (lambda saved: saved.pop("step") and saved, "KeyError: 'step'"),
    "step": (lambda saved: saved | {"step": "many"}, "invalid literal for int"),
    "tables": (lambda saved: saved | {"tables": torch.ones(3)}, r"is one of \(3,\)"),
    "too few tables": (lambda saved: saved | {"tables": saved["tables"][:1]}, r"is one of \(1, "),
    "no tables": (lambda saved: saved | {"tables": None}, "cannot be read"),
    "decisions": (lambda saved: saved | {"decisions": {}}, "cannot be read"),
    "names": (lambda saved: saved | {"names": None}, "TypeError"),
    "clipper": (lambda saved: saved | {"clipper": None}, "TypeError"),
    "policy": (lambda saved: saved | {"clipper": {"state": None}}, "KeyError: 'policy'"),
    "policy's state": (
        lambda saved: saved | {"clipper": saved["clipper"] | {"state": torch.ones(2, 2)}},
        r"is one of \(2, 2\)",
    ),
}


@pytest.mark.parametrize(("spoil", "reason"), MALFORMED.values(), ids=MALFORMED)
def test_a_state_that_cannot_be_read_is_left_out(spoil: Any, reason: str) -> None:
    model, other = make_model(), make_model()
    optimizer = gradstat.attach(OPTIMIZERS["adamw-loop"](model.parameters()), model, clip="auto")
    train(model, optimizer, 3)
    state = optimizer.state_dict()
    state["gradstat"] = spoil(state["gradstat"])
    fresh = gradstat.attach(OPTIMIZERS["adamw-loop"](other.parameters()), other, clip="auto")
    with pytest.warns(UserWarning, match="cannot be read.*take nothing from it") as words:
        fresh.load_state_dict(state)
    assert len(words) == 1
    assert re.search(reason, str(words[0].message))
    assert same_bits(optimizer_tensors(fresh), optimizer_tensors(optimizer))
    assert monitor_of(fresh).step == 0
    assert monitor_of(fresh).skipped_steps == 0
    train(other, fresh, 2)
    assert list(monitor_of(fresh).recorded_steps) == [1, 2]


def test_a_policy_of_ones_own_is_recognised() -> None:
    model = make_model()
    optimizer = OPTIMIZERS["sgd-loop"](model.parameters())
    gradstat.attach(optimizer, model, clip=Half())
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    gradstat.detach(optimizer)
    gradstat.attach(optimizer, model, clip=Half())
    optimizer.load_state_dict(state)  # a warning would be an error
    assert monitor_of(optimizer).step == 2


class Half(gradstat.Policy):
    def coefficient(self, table: torch.Tensor) -> torch.Tensor:
        return torch.tensor(0.5)


def test_adagc_follows_names_over_a_change_of_parameters() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    gradstat.attach(optimizer, model, clip=gradstat.AdaGC(warmup_steps=2))
    train(model, optimizer, 6)
    state = optimizer.state_dict()
    gammas = state["gradstat"]["clipper"]["state"][-2:]
    grown = gradstat.attach(
        torch.optim.SGD([{"params": model[2].parameters()}], lr=0.1),
        model,
        clip=gradstat.AdaGC(warmup_steps=2),
    )
    grown.load_state_dict(state)
    grown.add_param_group({"params": [model[0].weight]})
    assert torch.equal(monitor_of(grown).state_dict()["clipper"]["state"][-2:], gammas)
    train(model, grown, 1)
    assert monitor_of(grown).names == ("2.weight", "2.bias", "0.weight")
    later = monitor_of(grown).state_dict()["clipper"]["state"][-3:]
    assert later[:2] == pytest.approx(gammas, rel=0.05)
    assert math.isfinite(later[2])


# ---- 2: copies -----------------------------------------------------------------------------------


def deep(value: Any) -> Any:
    return copy.deepcopy(value)


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [deep, pickled])
def test_copies_of_an_optimizer_are_plain(copied: Any) -> None:
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["adamw-loop"](model.parameters()), model, clip="auto")
    train(model, optimizer, 2)
    twin = copied(optimizer)
    assert not hasattr(twin, "gradstat")
    assert hook_counts(twin) == [0] * 6
    assert hook_counts(optimizer) == ATTACHED_HOOKS
    assert same_bits(optimizer_tensors(twin), optimizer_tensors(optimizer))


@pytest.mark.parametrize("copied", [deep, pickled])
def test_copies_of_model_and_optimizer_can_be_attached_anew(copied: Any) -> None:
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["adamw-loop"](model.parameters()), model, clip="auto")
    train(model, optimizer, 2)
    twin_model, twin = copied((model, optimizer))
    gradstat.attach(twin, twin_model, clip="auto")
    assert hook_counts(twin) == hook_counts(optimizer) == ATTACHED_HOOKS
    train(twin_model, twin, 3)
    assert monitor_of(twin).step == 3
    assert monitor_of(optimizer).step == 2
    assert monitor_of(twin).names == monitor_of(optimizer).names


def test_a_pickle_of_a_file_of_ones_own(tmp_path: Path) -> None:
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["adamw-loop"](model.parameters()), model, clip="auto")
    train(model, optimizer, 2)
    torch.save(optimizer, tmp_path / "optimizer.pt")
    twin = torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert same_bits(optimizer_tensors(twin), optimizer_tensors(optimizer))


# ---- distributed checkpointing -------------------------------------------------------------------


@pytest.mark.parametrize("make", [OPTIMIZERS["adamw-loop"], OPTIMIZERS["sgd-fused"]])
@pytest.mark.parametrize("clip", [None, "auto"])
def test_the_phantom_step_of_distributed_checkpointing_is_ignored(make: Any, clip: Any) -> None:
    model, plain_model = make_model(), make_model()
    optimizer = gradstat.attach(make(model.parameters()), model, clip=clip)
    plain = make(plain_model.parameters())
    calls: list[int] = []
    monitor_of(optimizer).on_step(lambda monitor: calls.append(monitor.step))
    state = get_optimizer_state_dict(model, optimizer)
    assert state.keys() == get_optimizer_state_dict(plain_model, plain).keys()
    monitor = monitor_of(optimizer)
    assert (monitor.step, monitor.last, calls) == (0, None, [])
    train(model, optimizer, 3)
    train(plain_model, plain, 3)
    assert (monitor.step, calls) == (3, [1, 2, 3])
    state = get_optimizer_state_dict(model, optimizer)
    set_optimizer_state_dict(model, optimizer, state)
    assert monitor.step == 3
    if clip is None:
        assert same_bits(weights(model), weights(plain_model))


def test_a_warm_up_from_lr_zero_is_no_phantom() -> None:
    model = make_model()
    optimizer = gradstat.attach(torch.optim.SGD(model.parameters(), lr=0.0), model)
    backward(model)
    optimizer.step(closure=None)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert monitor_of(optimizer).step == 2
