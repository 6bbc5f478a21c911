"""`measure_overhead`: what gradstat costs a user's own training step."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradstat._probes import FIRST_STRIDE
from gradstat._trial import whole_number
from gradstat.errors import ArgumentTypeError, ArgumentValueError
from gradstat.optimizer import DEFAULT_EVERY
from gradstat.overhead.blocks import (
    Block,
    Clock,
    DeviceClock,
    HostClock,
    Side,
    Work,
    in_turn,
    run_block,
)
from gradstat.overhead.kept import Kept
from gradstat.overhead.machine import machine
from gradstat.overhead.report import OverheadReport, figures
from gradstat.overhead.sides import Training, our_sides, plain_side, torch_side

WARMUP = FIRST_STRIDE
"""Steps in front of each block that are not timed: the first ones make the optimizer's state and
are all probed, which no later step is."""

MIN_ROUNDS, MAX_ROUNDS = 6, 40
"""Of those that the time given decides on; below the least an interval says little."""

BLOCK_SECONDS = 0.5
"""A log is written about that often."""

MAX_PERIODS = 5
"""Of a block whose length is up to us: after some 300 steps probes come half as often."""

LOOKS = 5


def measure_overhead(
    step_fn: Callable[[], Any],
    optimizer: Optimizer,
    model: nn.Module | None = None,
    *,
    steps: int | None = None,
    rounds: int | None = None,
    seconds: float = 60.0,
    log: bool = True,
    also: Sequence[Any] = (),
    progress: Callable[[int, int], Any] | None = None,
    **options: Any,
) -> OverheadReport:
    """Return what `attach` costs a training step, and where it goes.

    The step is run in blocks: without gradstat, with `torch.nn.utils.clip_grad_norm_`, and with
    ever more parts of gradstat. Each round has one block of each, and every other round goes
    through them backwards. Each block starts from the same parameters, optimizer state and random
    numbers. Afterwards model and optimizer are as they were: parameters, gradients, buffers,
    training flags, groups, state; and the random numbers of Python, NumPy and torch.

    Args:
        step_fn: Does one training step, ``optimizer.step()`` included, without clipping and without
            ``optimizer.gradstat``. A loss that it returns is handed to `Monitor.observe`.
        optimizer: Steps in ``step_fn``; gradstat is not attached to it.
        model: Gives the names, and the activations.
        steps: Steps of a block, rounded up to a multiple of all periods (8 steps from one probe to
            the next, 20 of the activations, 10 of a log, or those in ``options``). None: one such
            multiple, or as many as make half a second, up to 5.
        rounds: Blocks of each side, at least 2; None: as many as fit in ``seconds``, 6 to 40.
        seconds: See ``rounds``.
        log: Also measure a log of the run, in a temporary file. Its histograms, every 100th step,
            are in blocks of 200 steps and more.
        also: What else ``step_fn`` changes and has ``state_dict`` and ``load_state_dict``:
            schedulers, a `GradScaler`.
        progress: ``progress(done, all)`` is called after each block.
        **options: Of `attach`: ``clip`` (by default ``"auto"``), ``activations``, ``updates``, ...

    Synchronises with a CUDA device around each block.

    Raises:
        ArgumentTypeError: An argument has the wrong type.
        ArgumentValueError: gradstat is attached already, or ``step_fn`` does not step.

    Example:
        >>> def step():
        ...     optimizer.zero_grad()
        ...     loss = loss_fn(model(x), y)
        ...     loss.backward()
        ...     optimizer.step()
        ...     return loss.detach()
        >>> print(gradstat.measure_overhead(step, optimizer, model))
    """
    if not callable(step_fn):
        raise ArgumentTypeError(
            f"step_fn must be a function without arguments, got {type(step_fn).__name__}; let it "
            "do one training step, optimizer.step() included"
        )
    if not isinstance(optimizer, Optimizer):
        raise ArgumentTypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    if hasattr(optimizer, "gradstat"):
        raise ArgumentValueError(
            "optimizer must not have gradstat attached already, or there is no step without it; "
            "call gradstat.detach(optimizer) first"
        )
    for name, number, least in (("steps", steps, 1), ("rounds", rounds, 2)):
        if number is not None:
            whole_number(name, number, least)
    device = device_of(optimizer)
    clock: Clock = HostClock() if device.type == "cpu" else DeviceClock(device)
    training = Training(step_fn, optimizer, model, Kept(optimizer, model, also))
    sides = [
        plain_side(training),
        torch_side(training),
        *our_sides(training, {"clip": "auto", **options}, log=log),
    ]
    try:
        _try_out(training)
        found = [run_block(side, clock, warmup=WARMUP, steps=2) for side in sides]
        if steps is None:
            fit = math.ceil(BLOCK_SECONDS / max(found[0].typical, 1e-9))
            steps = min(fit, MAX_PERIODS * whole_blocks(1, options, log))
        steps = whole_blocks(steps, options, log)
        if rounds is None:
            one_round = sum(block.typical for block in found) * (WARMUP + steps)
            rounds = rounds_within(seconds, one_round)
        blocks = run_rounds(sides, clock, rounds, steps, progress or (lambda *_: None))
        look_seconds = _look(training, sides[-1], steps)
    finally:
        training.kept.restore()
    names = [side.name for side in sides]
    return OverheadReport(
        work=_work(optimizer, model),
        steps=steps,
        rounds=rounds,
        look_seconds=look_seconds,
        machine=machine(device),
        **figures(names, blocks, steps),
    )


def whole_blocks(steps: int, options: Mapping[str, Any], log: bool) -> int:
    """Return the least number of steps from this one on that holds whole periods of everything."""
    given = options.get("activations")
    sampled = given.get("every", DEFAULT_EVERY) if isinstance(given, Mapping) else DEFAULT_EVERY
    every = options.get("every", 1)
    periods = (FIRST_STRIDE, sampled, every, every * options.get("log_every", 10) if log else 1)
    whole = math.lcm(*(period for period in periods if isinstance(period, int) and period > 0))
    return math.ceil(steps / whole) * whole


def rounds_within(seconds: float, one_round: float) -> int:
    """Return how many rounds fit, as an even number: half of them go backwards."""
    fit = int(seconds / max(one_round, 1e-9))
    return min(max(fit - fit % 2, MIN_ROUNDS), MAX_ROUNDS)


def run_rounds(
    sides: Sequence[Side],
    clock: Clock,
    rounds: int,
    steps: int,
    progress: Callable[[int, int], Any],
) -> dict[str, list[Block]]:
    """Return the blocks of each side, by name, in the order of the rounds."""
    blocks: dict[str, list[Block]] = {side.name: [] for side in sides}
    done = 0
    for number in range(rounds):
        gc.collect()
        for side in in_turn(sides, number):
            blocks[side.name].append(run_block(side, clock, warmup=WARMUP, steps=steps))
            done += 1
            progress(done, rounds * len(sides))
    return blocks


def device_of(optimizer: Optimizer) -> torch.device:
    """Return the device of the parameters: the first that is not the CPU, where there is one."""
    devices = [p.device for group in optimizer.param_groups for p in group["params"]]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _try_out(training: Training) -> None:
    """Run a step, to see whether it is one."""
    calls = []
    try:
        with training.again():
            training.optimizer.register_step_post_hook(lambda *_: calls.append(1))
            for _ in range(WARMUP):  # a GradScaler may drop the first ones
                training.step_fn()
    except AttributeError as error:
        if error.obj is training.optimizer and error.name == "gradstat":
            raise ArgumentValueError(
                "step_fn must do without optimizer.gradstat, which is not there in the blocks "
                "without it; return the loss, and it is observed"
            ) from error
        raise
    if not calls:
        raise ArgumentValueError(
            f"step_fn must call optimizer.step(), got {WARMUP} calls without one; pass the "
            "optimizer that it steps"
        )


def _look(training: Training, side: Side, steps: int) -> float:
    """Return the time of one look of the diagnosis at a run of one block."""
    with side.installed() as work:
        for _ in range(WARMUP + steps):
            work.step()
        diagnose = training.optimizer.gradstat.diagnose  # type: ignore[attr-defined]
        return HostClock().block(Work(diagnose), LOOKS).typical


def _work(optimizer: Optimizer, model: nn.Module | None) -> str:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    size = sum(parameter.numel() for parameter in parameters)
    name = type(model).__name__ if model is not None else "parameters"
    return f"{name}: {size:,} parameters in {len(parameters)} tensors, {type(optimizer).__name__}"
