"""Whole steps with activations watched on every tenth; bench_units.py times the kernel alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bench_step import OPTIMIZERS
from models import MODELS
from pairing import Pair, Side

import gradstat

Compare = Callable[[Pair], None]


@pytest.mark.benchmark(max_time=6)
@pytest.mark.parametrize("model", ["CNN, 0.3M", "GPT, 10.8M"])
def bench_step_with_activations(model: str, compare: Compare) -> None:
    """Ten steps, of which one is sampled, against ten that are not watched."""
    torch.manual_seed(0)
    task = MODELS[model]()
    network = task.model

    def make(activations: bool) -> Callable[[], None]:
        optimizer = OPTIMIZERS["AdamW fused"](network.parameters())
        gradstat.attach(optimizer, network)

        def steps() -> None:
            # Both sides train one model: it is watched while it is our turn.
            monitor = gradstat.ActivationMonitor(network, every=10) if activations else None
            for _ in range(10):
                optimizer.zero_grad()
                task.loss().backward()
                optimizer.step()
            if monitor is not None:
                assert monitor.steps == 10
                monitor.remove()

        return steps

    compare(
        Pair(
            f"10 steps of {model}, AdamW fused, activations at every=10",
            ours=Side("attach and ActivationMonitor", make(True), 0),
            against=Side("attach", make(False), 0),
            target=1.02,
        )
    )
