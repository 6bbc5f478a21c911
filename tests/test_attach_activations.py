"""`attach(..., activations=...)`: steps of the optimizer, and two witnesses of the dead."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from small_training import hook_counts, same_bits, weights
from torch import Tensor, nn
from watched_models import SITES, batch, hook_state, make_model, train

import gradstat


def test_the_optimizers_step_is_the_clock():
    model = make_model()
    monitors: list[gradstat.Monitor] = []

    def after(optimizer: torch.optim.Optimizer) -> None:
        gradstat.attach(optimizer, model, activations={"every": 3, "window": 10})
        monitors.append(optimizer.gradstat)  # type: ignore[attr-defined]

    def accumulate(x: Tensor) -> Tensor:
        with torch.no_grad():
            model(x)
        return model(x[:4]).sum() + model(x[4:]).sum()

    train(model, 7, accumulate, after)
    activations = monitors[0].activations
    assert activations is not None
    assert (activations.every, activations.steps) == (3, 7)
    table = activations.table()
    assert table.names == SITES
    assert table.steps == 3
    assert [row.samples for row in table] == [30] * len(SITES)


@pytest.mark.parametrize("clip", [None, gradstat.GlobalNorm(0.1)], ids=["watch", "clip"])
def test_activations_change_no_bit_of_a_run(clip):
    def run(activations: bool) -> list[Tensor]:
        model = make_model()
        return train(
            model,
            8,
            after=lambda o: gradstat.attach(o, model, clip=clip, activations=activations),
        )

    assert same_bits(run(False), run(True))


def test_detach_leaves_model_and_optimizer_as_they_were():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = hook_state(model), hook_counts(optimizer)
    gradstat.attach(optimizer, model, activations=True)
    assert hook_state(model) != before[0]
    model(batch(0)).sum().backward()
    optimizer.step()
    gradstat.detach(optimizer)
    assert (hook_state(model), hook_counts(optimizer)) == before


def test_what_attach_refuses_leaves_no_hook():
    model = make_model()
    before = hook_state(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(gradstat.ArgumentValueError):
        gradstat.attach(
            optimizer, model, named_parameters=model.named_parameters(), activations=True
        )
    assert hook_state(model) == before


def test_the_wrapper_passes_it_on():
    model = make_model()
    optimizer = gradstat.GradStatOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model=model, activations=True
    )
    model(batch(0)).sum().backward()
    optimizer.step()
    activations = optimizer.inner.gradstat.activations
    assert activations.table().names == SITES
    assert activations.steps == 1


def test_a_step_that_is_skipped_is_a_step():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradstat.attach(optimizer, model, on_nonfinite="skip", activations={"every": 1})
    model(torch.full((2, 4), math.nan)).sum().backward()
    before = weights(model)
    optimizer.step()
    assert same_bits(before, weights(model))
    row = optimizer.gradstat.activations.table()[0]  # type: ignore[attr-defined]
    assert (row.samples, row.moments.nans) == (2, 6)


# ---- two witnesses ------------------------------------------------------------------------------


def test_dead_units_and_dead_rows_stand_side_by_side():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)
    )
    with torch.no_grad():
        model[0].bias[:3] = -1000.0
        model[3].weight[5] = 0.0
        model[3].bias[5] = -1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    gradstat.attach(optimizer, model, activations={"every": 2})
    monitor = optimizer.gradstat  # type: ignore[attr-defined]
    assert monitor.dead_units == []
    for step in range(6):
        optimizer.zero_grad()
        model(batch(step, 64)).square().sum().backward()
        optimizer.step()
    first, second = monitor.dead_units
    assert first == ("1/relu#0", 8, 3, "0.weight", 3)
    assert second == ("4/relu#0", 6, 1, "2.weight", 1)
    assert first._fields == ("site", "units", "dead_units", "weight", "dead_rows")


def test_dead_rows_are_the_fewest_of_any_step():
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    extra = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([*model.parameters(), extra], lr=0.1)
    gradstat.attach(optimizer)
    monitor = optimizer.gradstat  # type: ignore[attr-defined]
    assert monitor.dead_rows.shape == (0,)
    for dead in ([0, 1], [1, 2], [0, 1, 2]):
        grad = torch.ones(3, 2)
        grad[dead] = 0.0
        model[0].weight.grad = grad
        optimizer.step()
    assert monitor.dead_rows[0] == 2
    assert math.isnan(monitor.dead_rows[1])


def test_a_copy_of_the_monitor_keeps_what_is_known():
    model = make_model()
    optimizer = gradstat.attach(
        torch.optim.SGD(model.parameters(), lr=0.1), model, activations=True
    )
    model(batch(0)).sum().backward()
    optimizer.step()
    twin = copy.deepcopy(optimizer.gradstat)  # type: ignore[attr-defined]
    assert twin.dead_units == optimizer.gradstat.dead_units  # type: ignore[attr-defined]
    assert len(twin.dead_units) == len(SITES)


def test_without_asking_there_are_no_activations():
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    gradstat.attach(optimizer)
    assert optimizer.gradstat.activations is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["plain", "wrapped"])
@pytest.mark.parametrize("make", ["scripted", "compiled"])
def test_without_asking_a_model_that_is_not_run_in_python_is_left_alone(make, wrap):
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        model = torch.jit.script(model) if make == "scripted" else torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradstat.attach(optimizer, wrap(model))  # a warning would be an error
    assert optimizer.gradstat.activations is None  # type: ignore[attr-defined]
