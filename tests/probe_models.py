"""Models, batches and exact snapshots for the tests of the probes."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classes(rows: int = 64, features: int = 12, n: int = 4) -> Batch:
    """Inputs of scale 1 and classes that follow from them."""
    inputs = torch.randn(rows, features, generator=generator(1))
    weight = torch.randn(features, n, generator=generator(2))
    return inputs, (inputs @ weight).argmax(1)


def numbers(rows: int = 64, features: int = 12) -> Batch:
    inputs = torch.randn(rows, features, generator=generator(1))
    weight = torch.randn(features, 1, generator=generator(2)) / features**0.5
    return inputs, (inputs @ weight).tanh()


def mlp(*last: nn.Module, outputs: int = 4, width: int = 48) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, outputs), *last,
    )  # fmt: skip


def random_states() -> list[Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return [random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()]


def state_of(model: nn.Module) -> dict[str, Any]:
    """All of a model that a probe could change, bit for bit."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        "values": {name: tensor.detach().clone() for name, tensor in named},
        "versions": {name: tensor._version for name, tensor in named},
        "ids": {name: id(tensor) for name, tensor in named},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in named},
        "requires": {name: tensor.requires_grad for name, tensor in named},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": {
            (name, kind): list(hooks)
            for name, module in model.named_modules()
            for kind, hooks in vars(module).items()
            if kind.endswith("_hooks")
        },
        "random": random_states(),
    }


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return bool(first == second)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = {
        str(place): dict(optimizer.state[p])
        for place, p in enumerate(optimizer.param_groups[0]["params"])
        if p in optimizer.state
    }
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return copy.deepcopy({"state": state, "groups": groups})


class Everything(nn.Module):
    """A model with all that a probe might leave behind: statistics, noise, drawn numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1))
        self.frozen = nn.Linear(32, 32).requires_grad_(False).eval()
        self.head = nn.Linear(32, 4)
        self.calls = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        inputs += random.random() * 1e-3 + np.random.rand() * 1e-3  # noqa: NPY002
        outputs: Tensor = self.head(self.frozen(self.body(inputs)))
        return outputs


def everything() -> Everything:
    """Return it in the middle of a training: gradients, statistics and a hook are there."""
    model = Everything()
    model.head.register_forward_hook(lambda *_: None)
    inputs, targets = classes()
    nn.functional.cross_entropy(model(inputs), targets).backward()
    return model
