"""Whole training steps: nothing, torch's clipping, and gradstat attached, side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import pytest
import torch
from models import MODELS
from pairing import Pair, Reading, Side, host_clock

import gradstat

Compare = Callable[[Pair], None]
Keep = Callable[[Reading, Callable[[], object]], None]

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


def make_step(model_name: str, optimizer_name: str) -> Callable[..., Callable[[], None]]:
    """Return a maker of functions that train one step of one model on one fixed batch.

    Both sides train the same model, each with an optimizer of its own: two copies of it would lie
    in memory differently, which alone makes steps differ by several percent.
    """
    torch.manual_seed(0)
    task = MODELS[model_name]()
    model = task.model

    def make(*, clip: gradstat.Policy | str | None, torch_clip: bool) -> Callable[[], None]:
        optimizer = OPTIMIZERS[optimizer_name](model.parameters())
        if clip is not None:
            gradstat.attach(optimizer, model, clip=clip)

        def step() -> None:
            optimizer.zero_grad()
            task.loss().backward()
            if torch_clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()

        return step

    return make


@pytest.mark.benchmark(max_time=3)
@pytest.mark.parametrize("policy", OURS)
@pytest.mark.parametrize("against", ["nothing", "clip_grad_norm_"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def bench_step(model: str, optimizer: str, against: str, policy: str, compare: Compare) -> None:
    make = make_step(model, optimizer)
    ours = make(clip=OURS[policy], torch_clip=False)
    theirs = make(clip=None, torch_clip=against == "clip_grad_norm_")
    many_layers = model == "MLP, 200 layers"
    target = 1.03 if against == "nothing" else 0.95 if many_layers else 1.00
    compare(
        Pair(
            f"step of {model}, {optimizer}, attached with clip={policy}",
            ours=Side(f"attach(clip={policy})", ours, 0),
            against=Side(against, theirs, 0),
            target=target,
            headline=optimizer == "AdamW fused" and policy == "GlobalNorm",
        )
    )


class NoStep(torch.optim.Optimizer):
    """An optimizer that does nothing, so that a step's time is that of torch's own wrapping."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        del closure


@pytest.mark.parametrize("n_tensors", [4, 100, 1000])
def bench_attach_alone(n_tensors: int, keep: Keep) -> None:
    """What `attach` adds to a step: its code and the kernels, on tensors of 64 elements."""
    parameters = [torch.randn(64, requires_grad=True) for _ in range(n_tensors)]
    for parameter in parameters:
        parameter.grad = torch.randn(64)
    plain = NoStep(parameters)
    attached = gradstat.attach(NoStep(parameters), clip=gradstat.GlobalNorm(MAX_NORM))
    samples = [(host_clock(plain.step), host_clock(attached.step)) for _ in range(2000)]
    microseconds = 1e6 * statistics.median(ours - bare for bare, ours in samples)
    work = f"attach(clip=GlobalNorm) alone, {n_tensors} x 64 fp32"
    at_most = 60 + 0.1 * n_tensors
    keep(Reading(work, microseconds, "us a step", at_most=at_most), attached.step)
