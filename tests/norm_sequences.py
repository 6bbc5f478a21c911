"""Sequences of gradient norms to try policies on: made ones, and ones recorded from trainings."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

Steps = list[dict[str, float]]
"""The norm of every gradient by name, step by step."""


def _drawn(level: Callable[[int], float], n_steps: int = 300, seed: int = 0) -> Steps:
    """Draw two layers' norms around a level, by a factor of 1.3 up or down."""
    generator = np.random.default_rng(seed)
    noise = np.exp(0.25 * generator.standard_normal((n_steps, 2)))
    return [
        {"body": level(step) * noise[step, 0], "head": 0.3 * level(step) * noise[step, 1]}
        for step in range(n_steps)
    ]


def _rounded(steps: Steps) -> Steps:
    """Round, so that many norms are equal."""
    return [{name: max(0.1, round(norm, 1)) for name, norm in step.items()} for step in steps]


@functools.cache
def recorded(optimizer: str) -> Steps:
    """Return the norms of a small training, its batches now and then bad by a factor of 100."""
    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    parameters = dict(model.named_parameters())
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    stepper = kind(parameters.values(), lr=0.02)
    teacher = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    steps = []
    for step in range(300):
        inputs = torch.randn(16, 8, dtype=torch.float64, generator=generator)
        labels = (inputs @ teacher).argmax(1)
        if step % 37 == 36:
            inputs *= 100
        stepper.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        steps.append({name: p.grad.norm().item() for name, p in parameters.items()})
        stepper.step()
    return steps


SEQUENCES: dict[str, Callable[[], Steps]] = {
    "recorded-sgd": lambda: recorded("sgd"),
    "recorded-adamw": lambda: recorded("adamw"),
    "steady": lambda: _drawn(lambda _: 1.0),
    "spikes": lambda: _drawn(lambda step: 80.0 if step % 41 == 40 else 1.0),
    "spike-first": lambda: _drawn(lambda step: 1e4 if step < 2 else 0.5),
    "decay": lambda: _drawn(lambda step: 20 * math.exp(-step / 40)),
    "growth": lambda: _drawn(lambda step: 0.01 * math.exp(step / 40)),
    "level-changes": lambda: _drawn(lambda step: 5.0 if step // 60 % 2 else 0.4),
    "tiny": lambda: _drawn(lambda _: 1e-7),
    "duplicates": lambda: _rounded(_drawn(lambda _: 0.6)),
}
