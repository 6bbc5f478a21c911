"""What a run log costs: bytes and work a step, and whole steps with and without it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairing import Pair, Reading, Side
from torch import nn

import gradstat

Compare = Callable[[Pair], None]
Keep = Callable[[Reading, Callable[[], object]], None]

LAYERS = 500
STEPS = 1000
STEP_SECONDS = 0.05
"""A step of the length that the target is given for: the log may take 1 % of it."""


def small_layers() -> torch.optim.Optimizer:
    """Return an optimizer of 500 parameters of 64 elements, with gradients."""
    parameters = [nn.Parameter(torch.randn(8, 8)) for _ in range(LAYERS)]
    for parameter in parameters:
        parameter.grad = torch.randn(8, 8)
    return torch.optim.SGD(parameters, lr=1e-6)


class Timed:
    """A callback of the monitor, with the CPU time that it has taken."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self.seconds = 0.0

    def __call__(self, monitor: gradstat.Monitor) -> None:
        start = time.thread_time()
        self._function(monitor)
        self.seconds += time.thread_time() - start


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What a log of 1000 steps has taken: bytes, and seconds of both threads."""
    path = tmp_path_factory.mktemp("log") / "run.db"
    optimizer = gradstat.attach(small_layers(), log=path, diagnose=False)
    monitor: Any = optimizer.gradstat  # type: ignore[attr-defined]
    timed = monitor._callbacks[0] = Timed(monitor._callbacks[0])
    writer = time.pthread_getcpuclockid(monitor.log._pump._thread.ident)
    for step in range(STEPS):
        monitor.observe(loss=float(step))
        optimizer.step()
    monitor.log.flush()
    seconds = time.clock_gettime(writer)
    dropped = monitor.log.dropped
    gradstat.detach(optimizer)
    assert dropped == 0
    return {"bytes": path.stat().st_size, "training": timed.seconds, "writer": seconds}


def bench_bytes(logged: dict[str, float], keep: Keep) -> None:
    work = f"run log, {LAYERS} layers, log_every=10"
    keep(Reading(work, logged["bytes"] / STEPS / 1024, "KB a step"), lambda: None)


def bench_work(logged: dict[str, float], keep: Keep) -> None:
    """CPU time, which other programs do not lengthen."""
    training, writer = (logged[name] / STEPS * 1e6 for name in ("training", "writer"))
    keep(
        Reading(
            f"run log, {LAYERS} layers, log_every=10",
            training + writer,
            "us of CPU a step",
            at_most=0.01 * STEP_SECONDS * 1e6,
            note=f"{training:.0f} us on the training thread, {writer:.0f} us on the log's own",
        ),
        lambda: None,
    )


@pytest.mark.benchmark(max_time=5)
def bench_step_with_a_log(tmp_path: Path, compare: Compare) -> None:
    """Ten steps of some 50 ms, of which one logs the layers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(LAYERS // 2):
        layers += [nn.Linear(96, 96), nn.Tanh()]
    model = nn.Sequential(*layers)
    inputs = torch.randn(128, 96)

    def make(log: Path | None) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        gradstat.attach(optimizer, model, clip="auto", activations=False, log=log)

        def steps() -> None:
            for _ in range(10):
                optimizer.zero_grad()
                loss = model(inputs).square().mean()
                optimizer.gradstat.observe(loss=loss)  # type: ignore[attr-defined]
                loss.backward()
                optimizer.step()

        return steps

    compare(
        Pair(
            f"10 steps of MLP, {LAYERS} layers, attached with a run log",
            ours=Side("attach(log=...)", make(tmp_path / "run.db"), 0),
            against=Side("attach", make(None), 0),
            target=1.01,
        )
    )
