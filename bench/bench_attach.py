"""What watching a whole run costs: everything that is done on some steps only is in the mean.

Both sides run on one thread: of two, a step of a small model mostly waits for the second one, which
hides what one side does while it waits and has made a watched run look faster than the same run
unwatched.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from bench_step import MAX_NORM, OPTIMIZERS
from models import MODELS, three_layers
from pairing import Pair, Reading, Side
from torch import nn

import gradstat

Compare = Callable[[Pair], None]
Keep = Callable[[Reading, Callable[[], object]], None]

TASKS = {"MLP, 3 layers": three_layers, **MODELS}
RUNS = [
    ("MLP, 3 layers", 160),
    ("MLP, 3 layers", 960),
    *((name, 16 if name.startswith("GPT") else 40) for name in MODELS),
]
"""Models and the steps of a run. The first steps are those that cost most: the longer run of the
smallest model shows what is left of it once looks and probes have become rare. A run of the largest
one has few, so that its bench ends in minutes."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Run on one thread, and on as many as before afterwards."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.mark.benchmark(max_time=4)
@pytest.mark.parametrize("against", ["nothing", "clip_grad_norm_"])
@pytest.mark.parametrize(("model", "n_steps"), RUNS)
def bench_watched_run(model: str, n_steps: int, against: str, compare: Compare) -> None:
    """A run from `attach` to `diagnose` as most scripts would have it, against the same unwatched.

    With the probes, the activations, the samples of batches and the diagnosis. Both sides train one
    model.
    """
    torch.manual_seed(0)
    task = TASKS[model]()

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
            f"{n_steps} steps of {model}, one thread, AdamW fused, watched and diagnosed",
            ours=Side("attach, observe and diagnose", watched, 0),
            against=Side(against, unwatched, 0),
            target=1.10 if against == "nothing" else 1.00,
            headline=True,
        )
    )


def bench_diagnose(keep: Keep) -> None:
    """A diagnosis of 500 parameters after 200 steps, of which all is observed, in CPU time.

    The first look is told beside the median of later ones, each after three more steps.
    """
    torch.manual_seed(0)
    model = nn.Sequential(*[part for _ in range(250) for part in (nn.Linear(16, 16), nn.ReLU())])
    optimizer = gradstat.attach(
        torch.optim.SGD(model.parameters(), 1e-3), model, window=200, diagnose=None
    )
    monitor = optimizer.gradstat  # type: ignore[attr-defined]

    def train(n_steps: int) -> None:
        for _ in range(n_steps):
            inputs, targets = torch.randn(64, 16), torch.randint(16, (64,))
            outputs = model(inputs)
            loss = nn.functional.cross_entropy(outputs, targets)
            monitor.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def milliseconds() -> float:
        start = time.thread_time()
        monitor.diagnose()
        return 1e3 * (time.thread_time() - start)

    train(200)
    first = milliseconds()
    later = []
    for _ in range(20):
        train(3)
        later.append(milliseconds())
    keep(
        Reading(
            "diagnose() of 500 parameters after 200 steps, one thread",
            statistics.median(later),
            "ms of CPU",
            at_most=5,
            note=f"{first:.1f} ms the first time",
        ),
        monitor.diagnose,
    )
