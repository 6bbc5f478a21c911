"""What watching a whole run costs: everything that is done on some steps only is in the mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bench_step import MAX_NORM, OPTIMIZERS
from models import MODELS, three_layers
from pairing import Pair, Side

import gradstat

Compare = Callable[[Pair], None]

RUNS = {"MLP, 3 layers": three_layers, **MODELS}
STEPS = {"MLP, 3 layers": 160, "GPT, 10.8M": 16}
"""Of a run; 40 of the others. The first steps are those that cost most, and a run of the largest
model is one of few steps so that its bench ends in minutes."""


@pytest.mark.benchmark(max_time=4)
@pytest.mark.parametrize("against", ["nothing", "clip_grad_norm_"])
@pytest.mark.parametrize("model", RUNS)
def bench_watched_run(model: str, against: str, compare: Compare) -> None:
    """A run from `attach` to `diagnose` as most scripts would have it, against the same unwatched.

    With the probes, the activations, the samples of batches and the diagnosis. Both sides train one
    model.
    """
    torch.manual_seed(0)
    task = RUNS[model]()
    n_steps = STEPS.get(model, 40)

    def watched() -> None:
        optimizer = OPTIMIZERS["AdamW fused"](task.model.parameters())
        monitor = gradstat.attach(optimizer, task.model).gradstat  # type: ignore[attr-defined]
        for _ in range(n_steps):
            outputs = task.model(task.inputs)
            loss = task.loss_of(outputs, task.targets)
            monitor.observe(inputs=task.inputs, outputs=outputs, targets=task.targets, loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        monitor.diagnose()
        gradstat.detach(optimizer)

    def unwatched() -> None:
        optimizer = OPTIMIZERS["AdamW fused"](task.model.parameters())
        for _ in range(n_steps):
            loss = task.loss()
            optimizer.zero_grad()
            loss.backward()
            if against == "clip_grad_norm_":
                torch.nn.utils.clip_grad_norm_(task.model.parameters(), MAX_NORM)
            optimizer.step()

    compare(
        Pair(
            f"{n_steps} steps of {model}, AdamW fused, watched and diagnosed",
            ours=Side("attach, observe and diagnose", watched, 0),
            against=Side(against, unwatched, 0),
            target=1.10 if against == "nothing" else 1.00,
            headline=True,
        )
    )
