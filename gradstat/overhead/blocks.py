"""Blocks of steps, timed: sides take turns, in an order that is reversed every other round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch


class Block(NamedTuple):
    """The times of the steps of one block, in seconds."""

    total: float
    """From the start of the first to the end of the last, the device's work included."""

    typical: float
    """Median of single steps."""


class Work(NamedTuple):
    """What is timed."""

    step: Callable[[], object]
    finish: Callable[[], object] = lambda: None
    """Waits, at the end of a block, for what the steps have left to a background thread."""


class Clock(Protocol):
    """Times blocks."""

    def block(self, work: Work, steps: int) -> Block:
        """Run this many steps and return their times."""


class HostClock:
    """For steps that are over when they return."""

    def block(self, work: Work, steps: int) -> Block:
        """Run this many steps and return their times."""
        marks = [time.perf_counter()]
        for _ in range(steps):
            work.step()
            marks.append(time.perf_counter())
        work.finish()
        total = time.perf_counter() - marks[0]
        return Block(total, statistics.median(after - before for before, after in pairwise(marks)))


class DeviceClock:
    """For steps that return while a device still works.

    Synchronises with it around a block; within, events on the current stream part the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def block(self, work: Work, steps: int) -> Block:
        """Run this many steps and return their times."""
        marks = [torch.Event(self._device, enable_timing=True) for _ in range(steps + 1)]
        torch.accelerator.synchronize(self._device)
        start = time.perf_counter()
        marks[0].record()
        for mark in marks[1:]:
            work.step()
            mark.record()
        work.finish()
        torch.accelerator.synchronize(self._device)
        total = time.perf_counter() - start
        single = [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]
        return Block(total, statistics.median(single))


@dataclass(frozen=True)
class Side:
    """One of the things that are compared."""

    name: str
    installed: Callable[[], AbstractContextManager[Work]]
    """Puts on what the side stands for, gives the step to time, and takes it off again."""


def run_block(side: Side, clock: Clock, *, warmup: int, steps: int) -> Block:
    """Install a side, run some steps that are not timed, and then those that are."""
    with side.installed() as work:
        for _ in range(warmup):
            work.step()
        return clock.block(work, steps)


def in_turn(sides: Sequence[Side], round_number: int) -> Sequence[Side]:
    """Return the order of a round: forwards, then backwards, so that a drift cancels out."""
    return sides if round_number % 2 == 0 else sides[::-1]
