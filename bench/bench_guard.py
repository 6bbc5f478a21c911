"""Trainings that are lost without a guard, and what becomes of them with one.

`python bench/bench_guard.py` trains each of five tasks on five seeds: undisturbed (also with a
guard, which must not act), disturbed, with the default guard, and with one that also rolls back and
cuts the learning rate. A disturbance
belongs to iterations of the loop, which it hits once; the loop goes on until the optimizer has done
its steps, so that steps that were rolled back are done again. A run reaches its target if the loss
on clean held-out data ends within a quarter of the mean of the undisturbed runs. Nothing here
measures time.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import machine
import torch
from spike_tasks import TASKS, Bad

import gradstat

SEEDS = 5
WITHIN = 1.25
"""Held-out loss over that of the undisturbed runs, at most, where a run has reached its target."""

ALL_RULES = (gradstat.SkipNonfinite(), gradstat.RollBack(), gradstat.CutLR(factor=0.7))
GUARDS: dict[str, tuple[gradstat.GuardRule, ...] | None] = {
    "no guard": None,
    "Guard()": (gradstat.SkipNonfinite(),),
    "Guard, roll-back and cut": ALL_RULES,
}


class Trouble(NamedTuple):
    """A training and what befalls it."""

    title: str
    task: str
    optimizer: str
    lr: float
    lr_factor: Callable[[int], float] = lambda iteration: 1.0
    bad: Callable[[int], Bad | None] = lambda iteration: None
    dtype: torch.dtype = torch.float32
    loss_scale: float = 1.0
    """Fixed; the undisturbed run has none."""


def spike(iteration: int) -> float:
    """Return what the learning rate is multiplied by: a hundred for ten steps."""
    return 100.0 if 150 <= iteration < 160 else 1.0


def shard(iteration: int) -> Bad | None:
    """Return what is wrong with a batch: a dozen in a row come from a damaged file."""
    return Bad.LARGE_INPUTS if 150 <= iteration < 162 else None


TROUBLES = (
    Trouble("lr x 100 for 10 steps", "digits", "sgd", 0.1, lr_factor=spike),
    Trouble("lr x 100 for 10 steps", "text", "adamw", 0.01, lr_factor=spike),
    Trouble("12 batches x 100", "digits", "sgd", 0.1, bad=shard),
    Trouble("12 batches x 100", "digits", "adamw", 0.01, bad=shard),
    Trouble(
        "fp16, fixed loss scale",
        "digits",
        "sgd",
        0.1,
        dtype=torch.float16,
        loss_scale=1.2 * 2.0**17,
    ),
)


class Outcome(NamedTuple):
    """How a run ended."""

    loss: float
    actions: dict[str, int]


def train(trouble: Trouble, seed: int, *, disturbed: bool, rules: Any = None) -> Outcome:
    """Train and return the loss on clean held-out data, Inf where it is no number."""
    task = TASKS[trouble.task]()
    torch.manual_seed(seed)
    model = task.model().to(trouble.dtype)

    def forward(images: Any, *rest: Any) -> torch.Tensor:
        is_half = trouble.dtype == torch.float16
        scores: torch.Tensor = model(images.half() if is_half else images, *rest)
        return scores.float()

    optimizer: torch.optim.Optimizer
    if trouble.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr=trouble.lr, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=trouble.lr, fused=True)
    guard = None
    if rules is not None:
        gradstat.attach(optimizer, model, diagnose=False, activations=False)
        guard = gradstat.Guard(optimizer.gradstat, rules, snapshot_every=25)
    batches = torch.Generator().manual_seed(1000 + seed)
    scale = trouble.loss_scale if disturbed else 1.0
    step = 0
    for iteration in range(2 * task.steps):
        lr = trouble.lr * (1 + math.cos(math.pi * step / task.steps)) / 2
        lr *= trouble.lr_factor(iteration) if disturbed else 1.0
        for group in optimizer.param_groups:
            group["lr"] = lr * (guard.lr_factor if guard is not None else 1.0)
        optimizer.zero_grad()
        loss = task.loss(forward, batches, trouble.bad(iteration) if disturbed else None)
        if guard is not None:
            optimizer.gradstat.observe(loss=loss)
        (loss * scale).backward()
        for parameter in model.parameters():
            parameter.grad /= scale
        optimizer.step()
        step = optimizer.gradstat.step if guard is not None else step + 1
        if step == task.steps:
            break
    with torch.no_grad():
        final = task.held_out_loss(model.float()).item()
    actions = Counter(action.action for action in guard.actions) if guard is not None else {}
    return Outcome(final if math.isfinite(final) else math.inf, dict(actions))


def main() -> None:
    """Run everything, print the table, and write it beside the machine's description."""
    torch.set_num_threads(1)
    logging.getLogger("gradstat").setLevel(logging.CRITICAL)
    results = []
    print("| trouble | training | target | " + " | ".join(GUARDS) + " | done |")
    print("|---|---|--:" + "|--:" * len(GUARDS) + "|---|")
    for trouble in TROUBLES:
        calm = [train(trouble, seed, disturbed=False).loss for seed in range(SEEDS)]
        target = WITHIN * fmean(calm)
        watched = [train(trouble, seed, disturbed=False, rules=ALL_RULES) for seed in range(SEEDS)]
        assert watched == [Outcome(loss, {}) for loss in calm], "an idle guard has changed a run"
        cells = []
        done: Counter[str] = Counter()
        for name, rules in GUARDS.items():
            outcomes = [train(trouble, seed, disturbed=True, rules=rules) for seed in range(SEEDS)]
            losses = [outcome.loss for outcome in outcomes]
            reached = sum(loss <= target for loss in losses)
            cells.append(f"{reached} of {SEEDS} ({min(losses):.3g} to {max(losses):.3g})")
            done = sum((Counter(outcome.actions) for outcome in outcomes), Counter())
            results.append({
                "trouble": trouble.title, "task": trouble.task, "optimizer": trouble.optimizer,
                "guard": name, "target": target, "undisturbed": calm,
                "losses": losses, "actions": [outcome.actions for outcome in outcomes],
            })  # fmt: skip
        kinds = ", ".join(f"{n} {kind}" for kind, n in done.items())
        training = f"{trouble.task}, {trouble.optimizer}"
        print(f"| {trouble.title} | {training} | {target:.3f} | {' | '.join(cells)} | {kinds} |")
    path = Path(__file__).parent / "results" / f"guard-{datetime.date.today():%Y-%m-%d}.json"
    path.parent.mkdir(exist_ok=True)
    result = {"machine": machine.machine(), "commit": machine.commit(), "runs": results}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
