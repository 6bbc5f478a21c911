"""What is said about a run, and said once: skips without end, gradients that come clipped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_training import OPTIMIZERS, backward, make_model, monitor_of, poison, sgd, train

import gradstat
from gradstat._alarms import LateCopy, are_clipped, constant_norm


def prepared(make: Any, **options: Any) -> tuple[torch.nn.Sequential, torch.optim.Optimizer]:
    model = make_model()
    optimizer = gradstat.attach(make(model.parameters()), model, **options)
    train(model, optimizer, 3)
    return model, optimizer


@pytest.mark.parametrize("make", [OPTIMIZERS["adamw-fused"], OPTIMIZERS["adamw-loop"]])
def test_twenty_skips_in_a_row_are_said_loudly_and_once(make: Any) -> None:
    model, optimizer = prepared(make, clip="auto")
    with pytest.warns(RuntimeWarning, match="20 steps in a row were skipped by step 23") as words:
        for step in range(50):
            backward(model, step)
            poison(model)
            optimizer.step()
            if step < 19:
                assert not words
    assert len(words) == 1
    assert words[0].filename == __file__
    assert "skipping is no cure" in str(words[0].message)
    assert monitor_of(optimizer).skipped_in_a_row == 50


def test_skips_that_are_not_in_a_row_are_not_said() -> None:
    model, optimizer = prepared(OPTIMIZERS["sgd-loop"], clip="auto")
    for step in range(45):
        backward(model, step)
        if step % 15:
            poison(model)
        optimizer.step()
    assert monitor_of(optimizer).skipped_steps == 42


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


def test_already_clipped_is_noticed_in_a_window_that_began_anew() -> None:
    model = make_model()
    optimizer = gradstat.attach(sgd(model, lr=0.01), model)
    train(model, optimizer, 300)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
    with pytest.warns(RuntimeWarning, match="seem to be already clipped"):
        for step in range(160):
            backward(model, step)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()


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


def test_a_late_copy_of_a_cpu_tensor_is_there_at_once() -> None:
    copy, source = LateCopy(), torch.arange(3.0)
    assert copy.is_idle
    assert copy.take() is None
    copy.start(source)
    assert not copy.is_idle
    source.zero_()
    found = copy.take()
    assert found is not None
    assert found.tolist() == [0.0, 1.0, 2.0]
    assert copy.is_idle


def noisy(level: float, count: int, spread: float) -> np.ndarray[Any, Any]:
    return level * (1 + spread * np.random.default_rng(0).standard_normal(count))


NORMS: dict[str, tuple[np.ndarray[Any, Any], bool]] = {
    "clipped": (noisy(1.0, 100, 1e-7), True),
    "mostly clipped": (np.concatenate([noisy(1.0, 60, 1e-7), np.linspace(0.1, 0.9, 40)]), True),
    "learnt by heart": (noisy(6e-8, 100, 1e-7), False),
    "seldom clipped": (np.concatenate([noisy(1.0, 40, 1e-7), np.linspace(0.1, 0.9, 60)]), False),
    "too few": (noisy(1.0, 40, 1e-7), False),
    "noise": (noisy(1.0, 100, 1e-2), False),
    "constant": (np.ones(100), False),
    "creeping": (np.linspace(1.0, 1.00005, 100), False),
    "zero": (np.zeros(100), False),
    "not finite": (np.full(100, np.nan), False),
    "none": (np.zeros(0), False),
}


@pytest.mark.parametrize(("norms", "expected"), NORMS.values(), ids=NORMS)
def test_are_clipped(norms: np.ndarray[Any, Any], expected: bool) -> None:
    assert are_clipped(norms) is expected
    if expected:
        assert constant_norm(norms) == pytest.approx(1.0, rel=1e-5)
