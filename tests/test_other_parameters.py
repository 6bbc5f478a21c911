"""Parameters of the model that the watched optimizer does not hold: forgotten, or another's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_training import make_model, monitor_of
from torch import nn
from torch.optim import Optimizer

import gradstat


def findings_of(
    other: Callable[[list[Any]], Optimizer] | None,
    *,
    sparse: bool = False,
    thaw: int | None = None,
    steps: int = 40,
) -> list[gradstat.Finding]:
    """Train the head with a watched optimizer and the words with another one, or with none.

    The words are frozen before step ``thaw``. The run is looked at every ten steps.
    """
    torch.manual_seed(0)
    model = nn.ModuleDict({"words": nn.Embedding(9, 4, sparse=sparse), "head": nn.Linear(4, 2)})
    words = list(model["words"].parameters())
    optimizer = gradstat.attach(torch.optim.Adam(model["head"].parameters(), lr=0.01), model)
    second = other(words) if other is not None else None
    found = []
    for step in range(steps):
        words[0].requires_grad_(thaw is None or step >= thaw)
        x = torch.randint(5, 9, (8,))
        loss = nn.functional.cross_entropy(model["head"](model["words"](x)), x % 2)
        for each in (optimizer, second):
            if each is not None:
                each.zero_grad()
        loss.backward()
        optimizer.step()
        if second is not None:
            second.step()
        if step % 10 == 9:
            found = monitor_of(optimizer).diagnose()
    return [f for f in found if f.code == "parameters-not-updating"]


class WritesToData(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad, alpha=0.1)


OTHERS: dict[str, Callable[[list[Any]], Optimizer]] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "fused": lambda ps: torch.optim.Adam(ps, fused=True),
    "data": lambda ps: WritesToData(ps, lr=0.1),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_what_another_optimizer_changes_is_not_forgotten(other: Any) -> None:
    assert findings_of(other) == []


def test_dense_adam_beside_sparse_adam() -> None:
    assert findings_of(torch.optim.SparseAdam, sparse=True) == []


@pytest.mark.parametrize("sparse", [False, True])
def test_what_nobody_changes_is_forgotten(sparse: bool) -> None:
    (finding,) = findings_of(None, sparse=sparse)
    assert finding.layers == ("words.weight",)


def test_what_is_thawed_and_not_given_to_the_optimizer_is_forgotten() -> None:
    assert findings_of(None, thaw=35) == []
    (finding,) = findings_of(None, thaw=15)
    assert finding.layers == ("words.weight",)


def test_two_adversaries_in_one_model() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"maker": nn.Linear(3, 2), "critic": nn.Linear(2, 1)})
    optimizers = [
        gradstat.attach(torch.optim.Adam(model[name].parameters(), lr=0.01, fused=True), model)
        for name in model
    ]
    for _ in range(20):
        for sign, optimizer in zip((1, -1), optimizers, strict=True):
            optimizer.zero_grad()
            (sign * model["critic"](model["maker"](torch.randn(8, 3))).tanh().mean()).backward()
            optimizer.step()
    for optimizer in optimizers:
        codes = [finding.code for finding in monitor_of(optimizer).diagnose()]
        assert "parameters-not-updating" not in codes


def test_what_cannot_be_measured_is_left_out() -> None:
    model = make_model()
    model.register_parameter("far", nn.Parameter(torch.ones(3, device="meta")))
    optimizer = torch.optim.SGD([p for p in model.parameters() if not p.is_meta], lr=0.1)
    gradstat.attach(optimizer, model)
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        model.far.grad = torch.ones(3, device="meta")
        optimizer.step()
    codes = [finding.code for finding in monitor_of(optimizer).diagnose()]
    assert "parameters-not-updating" not in codes


def test_a_copy_of_the_monitor_knows_them() -> None:
    model = make_model()
    optimizer = gradstat.attach(torch.optim.SGD(model[0].parameters(), lr=0.1), model)
    for _ in range(8):
        model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert copy.deepcopy(monitor_of(optimizer)).evidence().model.forgotten == (
        "2.weight",
        "2.bias",
    )
