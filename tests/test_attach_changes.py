"""What a watched optimizer may do in its step, and hold in its groups, without being disturbed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from small_training import loss_of, make_model, monitor_of, same_bits, train, weights
from torch import Tensor, nn

import gradstat
from gradstat import _seam


class Resizes(torch.optim.SGD):
    """Puts a larger weight in place of the first parameter, in its third step."""

    steps = 0

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.steps += 1
        if self.steps == 3:
            weight = self.param_groups[0]["params"][0]
            weight.grad = None
            weight.data = torch.ones(weight.shape[0], weight.shape[1] + 1)


class Drops(torch.optim.SGD):
    """Drops a parameter in each step, but for the first one."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        if len(self.param_groups[0]["params"]) > 1:
            self.param_groups[0]["params"].pop()


class Grows(torch.optim.SGD):
    """Adds a group in each step."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        self.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


@pytest.mark.parametrize("make", [Resizes, Drops, Grows], ids=lambda cls: cls.__name__.lower())
@pytest.mark.parametrize("clip", [None, "auto"])
def test_parameters_that_change_within_a_step(make: Any, clip: Any) -> None:
    layer = nn.Linear(4, 3)
    optimizer = gradstat.attach(make(layer.parameters(), lr=0.1), layer, clip=clip, updates=True)
    for _ in range(12):
        optimizer.zero_grad()
        layer(torch.randn(5, layer.weight.shape[1])).square().mean().backward()
        optimizer.step()
    monitor = monitor_of(optimizer)
    assert monitor.step == 12
    assert list(monitor.recorded_steps)[-1] == 12
    assert isinstance(monitor.diagnose(), list)


def test_the_update_of_a_step_that_resizes_is_not_known() -> None:
    layer = nn.Linear(4, 3)
    optimizer = gradstat.attach(Resizes(layer.parameters(), lr=0.1), layer, updates=True, window=2)
    for _ in range(3):
        layer(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    known = np.isfinite(monitor_of(optimizer).update_window[..., 0])
    assert known.tolist() == [[True, True], [False, False]]


class OwnOptions(torch.optim.Optimizer):
    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=0.1)


OPTIONS: dict[str, dict[str, Any]] = {
    "words": {"lr": "auto", "weight_decay": "none", "betas": 0.9},
    "none": {"lr": None, "weight_decay": None, "betas": None, "momentum": None},
    "lists": {"lr": [0.1, 0.2], "weight_decay": {}, "betas": [], "momentum": [1]},
    "tensors": {"lr": torch.ones(2), "weight_decay": torch.ones(2), "betas": (torch.ones(2), 0)},
    "nothing": {},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_that_are_no_numbers(options: dict[str, Any]) -> None:
    model = make_model()
    optimizer = gradstat.attach(OwnOptions(model.parameters(), **options), model, diagnose=4)
    train(model, optimizer, 8)
    evidence = monitor_of(optimizer).evidence()
    assert evidence.step == 8
    assert evidence.optimizer.momentum == evidence.optimizer.weight_decay == 0.0
    assert np.isnan(evidence.probes.lrs).all()
    assert isinstance(monitor_of(optimizer).diagnose(), list)


def test_an_optimizer_that_gets_its_parameters_later_is_probed() -> None:
    model = make_model()
    optimizer = gradstat.attach(torch.optim.SGD([{"params": []}], lr=0.1), model, diagnose=False)
    with pytest.warns(RuntimeWarning, match="no parameter had a gradient"):
        optimizer.step()
    optimizer.add_param_group({"params": list(model.parameters())})
    train(model, optimizer, 3)
    assert list(monitor_of(optimizer).evidence().probes.steps) == [2, 3, 4]


@pytest.mark.parametrize("part", ["_begin", "_measure_and_clip", "_look_back"])
def test_a_fault_of_gradstat_does_not_end_a_run_that_is_only_watched(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: Any) -> None:
        raise IndexError("a fault")

    model, plain_model = make_model(), make_model()
    optimizer = gradstat.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.1)
    train(plain_model, plain, 6)
    train(model, optimizer, 3)
    monkeypatch.setattr(_seam.Seam, part, fault)
    with pytest.warns(RuntimeWarning, match="gradstat stops watching.*a fault") as words:
        train(model, optimizer, 3, 3)
    assert len(words) == 1
    assert monitor_of(optimizer).step == 6
    assert same_bits(weights(model), weights(plain_model))


def test_a_fault_of_the_script_comes_out() -> None:
    model = make_model()
    optimizer = gradstat.attach(torch.optim.SGD(model.parameters(), lr=0.1), model)

    def closure() -> Tensor:
        raise IndexError("of the script")

    with pytest.raises(IndexError, match="of the script"):
        optimizer.step(closure)
    monitor_of(optimizer).on_step(lambda monitor: monitor.names.index("nowhere"))
    loss_of(model, 0).backward()
    with pytest.raises(ValueError, match="tuple"):
        optimizer.step()


@pytest.mark.parametrize("first", [True, False])
def test_steps_in_and_out_of_inference_mode(first: bool) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradstat.attach(optimizer, model, clip=gradstat.GlobalNorm(0.1), weights=True, updates=True)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        with torch.inference_mode(first == (step < 3)):
            optimizer.step()
    assert monitor_of(optimizer).clip_rate == 1.0
    assert len(monitor_of(optimizer).update_window) == 6
    assert isinstance(monitor_of(optimizer).diagnose(), list)
