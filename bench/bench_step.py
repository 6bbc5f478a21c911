"""Whole training steps: nothing, torch's clipping, and gradstat attached, side by side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from models import MODELS
from pairing import Pair, Side

import gradstat

Compare = Callable[[Pair], None]
Attach = Callable[[torch.optim.Optimizer, torch.nn.Module], None]

MAX_NORM = 1e9
"""Never reached: what is measured is the price of watching, as on most steps of a run."""

OPTIMIZERS = {
    "AdamW fused": partial(torch.optim.AdamW, lr=1e-4, fused=True),
    "AdamW foreach": partial(torch.optim.AdamW, lr=1e-4, foreach=True),
    "SGD": partial(torch.optim.SGD, lr=1e-4, momentum=0.9),
}
# gradstat with clipping and the full table on every step, and what it is compared with.
OURS: dict[str, gradstat.Policy | str] = {
    "GlobalNorm": gradstat.GlobalNorm(MAX_NORM),
    "auto": "auto",
}


def make_step(
    model_name: str, optimizer_name: str, *, clip: gradstat.Policy | str | None, torch_clip: bool
) -> Callable[[], None]:
    """Return a function that trains one step of a fresh model on a fixed batch."""
    torch.manual_seed(0)
    model, loss_of = MODELS[model_name]()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    if clip is not None:
        gradstat.attach(optimizer, model, clip=clip)

    def step() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        if torch_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()

    return step


@pytest.mark.parametrize("policy", OURS)
@pytest.mark.parametrize("against", ["nothing", "clip_grad_norm_"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def bench_step(model: str, optimizer: str, against: str, policy: str, compare: Compare) -> None:
    ours = make_step(model, optimizer, clip=OURS[policy], torch_clip=False)
    theirs = make_step(model, optimizer, clip=None, torch_clip=against == "clip_grad_norm_")
    many_layers = model == "MLP, 200 layers"
    target = 1.03 if against == "nothing" else 0.95 if many_layers else 1.00
    compare(
        Pair(
            f"step of {model}, {optimizer}, attach(clip={policy}) against {against}",
            ours=Side(f"attach(clip={policy})", ours, 0),
            against=Side(against, theirs, 0),
            target=target,
        )
    )
