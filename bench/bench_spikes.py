"""Training through bad batches: final losses of each clip policy. `python bench/bench_spikes.py`.

Two models, two optimizers, five seeds. In a training with bad batches, each step has a chance of
2 % of inputs 100 times too large, 2 % of random labels, and 2 % of an Inf in the inputs; a seed
draws the same ones for every policy. The learning rate falls along a cosine from the value at which
the clean training without clipping ends best (`--tune` prints that search), so that no policy wins
by mending a learning rate. The loss is that of clean held-out data at the end, averaged over the
seeds. Nothing here measures time.

Options: --tune; --seeds N; --only POLICY,...; --jobs N (processes; by default one a core).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import machine
import torch
from spike_tasks import TASKS, Bad, Task
from torch import Tensor

import gradstat
from gradstat.clipping.resolve import auto_policy

CHANCE_OF_EACH_KIND = 0.02
CONSTANTS = (0.1, 0.3, 1.0, 3.0, 10.0)
SEEDS = 5

# What attach is asked for; None: a plain optimizer.
POLICIES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "none, skip NaN and Inf": {"on_nonfinite": "skip"},
    **{f"GlobalNorm({c:g})": {"clip": gradstat.GlobalNorm(c)} for c in CONSTANTS},
    "AutoClip()": {"clip": gradstat.AutoClip()},
    "ZClip()": {"clip": gradstat.ZClip()},
    "AdaGC()": {"clip": gradstat.AdaGC()},
    "SkipOnSpike()": {"clip": gradstat.SkipOnSpike()},
    "AGC()": {"clip": gradstat.AGC()},
    "auto": {"clip": "auto"},
}

OPTIMIZERS: dict[str, Callable[[list[Tensor], float], torch.optim.Optimizer]] = {
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, fused=True),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
}
LEARNING_RATES = {
    ("digits", "adamw"): 0.02,
    ("digits", "sgd"): 0.2,
    ("text", "adamw"): 0.02,
    ("text", "sgd"): 0.8,
}


class Run(NamedTuple):
    """One training."""

    task: str
    optimizer: str
    policy: str
    bad: bool
    seed: int
    lr: float


class Cell(NamedTuple):
    """The trainings that share a column of the table."""

    task: str
    optimizer: str
    bad: bool


def final_loss(run: Run, policies: dict[str, dict[str, Any] | None] = POLICIES) -> float:
    """Train and return the loss on clean held-out data, Inf where it is no number."""
    torch.set_num_threads(1)
    task = TASKS[run.task]()
    torch.manual_seed(run.seed)
    model = task.model()
    optimizer = OPTIMIZERS[run.optimizer](list(model.parameters()), run.lr)
    wanted = policies[run.policy]
    if wanted is not None:
        gradstat.attach(optimizer, model, **wanted)
    batches = torch.Generator().manual_seed(1000 + run.seed)
    accidents = torch.Generator().manual_seed(2000 + run.seed)
    for step in range(task.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.lr * (1 + math.cos(math.pi * step / task.steps)) / 2
        bad = _accident(accidents) if run.bad else None
        optimizer.zero_grad()
        task.loss(model, batches, bad).backward()
        optimizer.step()
    with torch.no_grad():
        loss = task.held_out_loss(model).item()
    return loss if math.isfinite(loss) else math.inf


def _accident(generator: torch.Generator) -> Bad | None:
    draw = torch.rand((), generator=generator).item()
    kinds = list(Bad)
    index = int(draw / CHANCE_OF_EACH_KIND)
    return kinds[index] if index < len(kinds) else None


def losses_of(
    runs: Sequence[Run],
    jobs: int,
    policies: dict[str, dict[str, Any] | None] = POLICIES,
) -> dict[Run, float]:
    """Return the final loss of each run, from so many processes."""
    work = functools.partial(final_loss, policies=policies)
    if jobs == 1:
        return {run: work(run) for run in runs}
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return dict(zip(runs, pool.map(work, runs, chunksize=2), strict=True))


Table = dict[str, dict[Cell, list[float]]]
"""Losses by policy and column, one a seed, in the seeds' order."""


def table_of(policies: Sequence[str], losses: dict[Run, float]) -> Table:
    """Return the losses in the order in which they are shown."""
    table: Table = {policy: {} for policy in policies}
    for run, loss in losses.items():
        cell = Cell(run.task, run.optimizer, run.bad)
        table[run.policy].setdefault(cell, []).append(loss)
    return table


def n_diverged(policy: str, losses: dict[Run, float]) -> int:
    """Return the trainings that ended no better than a model that knows nothing."""
    mine = [(run, loss) for run, loss in losses.items() if run.policy == policy]
    return sum(not loss < TASKS[run.task]().loss_of_ignorance for run, loss in mine)


def show(table: Table, losses: dict[Run, float]) -> None:
    """Print the means in Markdown, with auto's distance from the best constant."""
    cells = list(next(iter(table.values())))
    heads = [f"{c.task} {c.optimizer}{'' if c.bad else ', clean'}" for c in cells]
    print("| policy | " + " | ".join(heads) + " | diverged |")
    print("|---" + "|--:" * (len(cells) + 1) + "|")
    for policy, row in table.items():
        means = [fmean(row[cell]) for cell in cells]
        figures = [f"{mean:.4f}" if mean < math.inf else "-" for mean in means]
        print(f"| {policy} | " + " | ".join(figures) + f" | {n_diverged(policy, losses)} |")
    if "auto" in table:
        figures = [over_best(table, cell) for cell in cells]
        print("| auto over best constant | " + " | ".join(figures) + " | |")


def over_best(table: Table, cell: Cell) -> str:
    """Return how far auto's mean is above that of the best constant, in percent.

    After it stands the standard error of the seeds' own ratios, which share all that is random.
    """
    constants = [row[cell] for policy, row in table.items() if policy.startswith("GlobalNorm")]
    best = min(constants, key=fmean)
    auto = table["auto"][cell]
    ratios = [mine / other for mine, other in zip(auto, best, strict=True)]
    error = stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
    return f"{100 * (fmean(auto) / fmean(best) - 1):+.1f} ± {100 * error:.1f} %"


def _auto(optimizer: str) -> str:
    return repr(auto_policy(OPTIMIZERS[optimizer]([torch.zeros(1)], 0.1)))


def tune(jobs: int) -> None:
    """Print the final loss of clean training without clipping for each learning rate."""
    for task_name, optimizer in LEARNING_RATES:
        task: Task = TASKS[task_name]()
        runs = [
            Run(task_name, optimizer, "none", False, seed, lr)
            for lr in task.learning_rates[optimizer]
            for seed in range(SEEDS)
        ]
        losses = losses_of(runs, jobs)
        for lr in task.learning_rates[optimizer]:
            mine = [loss for run, loss in losses.items() if run.lr == lr]
            print(f"{task_name} {optimizer} lr={lr:g}: {fmean(mine):.4f}", flush=True)


def main() -> None:
    """Run everything, print the table, and write it beside the machine's description."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", default=",".join(POLICIES).replace(", ", "; "))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.tune:
        tune(options.jobs)
        return
    policies = [name.replace("; ", ", ") for name in options.only.split(",")]
    runs = [
        Run(task, optimizer, policy, bad, seed, lr)
        for bad in (True, False)
        for (task, optimizer), lr in LEARNING_RATES.items()
        for policy in policies
        for seed in range(options.seeds)
    ]
    losses = losses_of(runs, options.jobs)
    show(table_of(policies, losses), losses)
    result = {
        "machine": machine.machine(),
        "commit": machine.commit(),
        "chance_of_each_kind": CHANCE_OF_EACH_KIND,
        "learning_rates": {" ".join(key): lr for key, lr in LEARNING_RATES.items()},
        "auto": {name: _auto(name) for name in OPTIMIZERS},
        "runs": [{**run._asdict(), "loss": loss} for run, loss in losses.items()],
    }
    path = Path(__file__).parent / "results" / f"spikes-{datetime.date.today():%Y-%m-%d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
