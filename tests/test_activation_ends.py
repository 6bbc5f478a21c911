"""How the watching of a call ends: exceptions, interrupts, removal, trouble of its own."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from watched_models import batch, hook_state, make_model, mode_stack, samples

import gradstat
from gradstat.activations import watch


@pytest.fixture(autouse=True)
def _no_mode_is_left():
    yield
    assert mode_stack() == 0


class Fails(nn.Module):
    error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(x)
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()], ids=repr)
def test_an_exception_in_the_middle_of_a_forward(error):
    model = nn.Sequential(nn.Tanh(), Fails(), nn.Sigmoid())
    before = hook_state(model)
    monitor = gradstat.ActivationMonitor(model, every=1)
    model[1].error = error
    with pytest.raises(type(error)):
        model(batch(0))
    if isinstance(error, Exception):
        assert mode_stack() == 0
    torch.relu(torch.ones(3))  # seen by nobody
    model[1].error = None
    model(batch(1))
    assert mode_stack() == 0
    assert samples(monitor) == {"0/tanh#0": 20, "1/relu#0": 20, "2/sigmoid#0": 10}
    monitor.remove()
    assert hook_state(model) == before


def test_removal_after_an_interrupt():
    model = nn.Sequential(Fails())
    monitor = gradstat.ActivationMonitor(model, every=1)
    model[0].error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(batch(0))
    assert mode_stack() == 1
    monitor.remove()
    assert mode_stack() == 0


def test_a_model_given_up_after_an_interrupt_is_not_kept():
    model = nn.Sequential(Fails())
    gradstat.ActivationMonitor(model, every=1)
    model[0].error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(batch(0))
    assert mode_stack() == 1
    kept = weakref.ref(model)
    del model
    again = nn.Sequential(nn.Tanh())
    monitor = gradstat.ActivationMonitor(again, every=1)
    again(batch(0))
    assert samples(monitor) == {"0/tanh#0": 10}
    assert mode_stack() == 0
    gc.collect()
    assert kept() is None


def test_steps_go_on_after_an_interrupt():
    model = nn.Sequential(Fails())
    monitor = gradstat.ActivationMonitor(model, every=3)
    monitor.count_steps()
    model[0].error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(batch(0))
    monitor.step()
    assert mode_stack() == 0
    model[0].error = None
    for _ in range(3):
        model(batch(0))
        monitor.step()
    assert samples(monitor) == {"0/relu#0": 20}


def test_removal_in_the_middle_of_a_forward():
    monitors: list[gradstat.ActivationMonitor] = []

    class Removes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for monitor in monitors:
                monitor.remove()
            return functional.relu(x)

    model = nn.Sequential(nn.Tanh(), Removes())
    before = hook_state(model)
    monitors.append(gradstat.ActivationMonitor(model, every=1))
    model(batch(0))
    assert mode_stack() == 0
    assert hook_state(model) == before


def test_an_exception_after_a_removal_is_the_one_that_comes_out():
    model = nn.Sequential(Fails())
    before = hook_state(model)
    monitor = gradstat.ActivationMonitor(model, every=1)
    later = model.register_forward_hook(lambda *_: None)
    inner = model[0].register_forward_pre_hook(lambda *_: monitor.remove())
    model[0].error = ValueError("bad")
    with pytest.raises(ValueError, match="bad"):
        model(batch(0))
    assert mode_stack() == 0
    model[0].error = None
    model(batch(0))
    later.remove()
    inner.remove()
    assert hook_state(model) == before
    assert samples(monitor) == {"0/relu#0": 10}


def test_removal_by_another_thread_in_the_middle_of_a_forward():
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for job in jobs:
                thread = threading.Thread(target=job)
                thread.start()
                thread.join()
            return functional.relu(x)

    model = nn.Sequential(nn.Tanh(), Waits())
    before = hook_state(model)
    monitor = gradstat.ActivationMonitor(model, every=1)
    calls = [lambda: jobs.clear() or model(batch(1))]  # its end comes before that of this one
    jobs = [monitor.remove, *calls]
    model(batch(0))
    assert mode_stack() == 0
    assert hook_state(model) == before
    counted = samples(monitor)
    model(batch(0))
    assert samples(monitor) == counted == {"0/tanh#0": 10, "1/relu#0": 10}


def test_trouble_in_watching_ends_in_one_warning(monkeypatch):
    def broken(*_args: Any) -> Any:
        raise RuntimeError("out of memory")

    model = make_model()
    right = model.eval()(batch(0))
    before = hook_state(model)
    monitor = gradstat.ActivationMonitor(model, every=1)
    monkeypatch.setattr(watch, "bounds_of", broken)
    with pytest.warns(RuntimeWarning, match="stops watching activations: out of memory") as words:
        assert torch.equal(model(batch(0)), right)
    assert words[0].filename == __file__
    assert len(words) == 1
    assert hook_state(model) == before
    model(batch(0))
    assert samples(monitor) == {}
