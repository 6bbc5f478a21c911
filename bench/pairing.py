"""Two sides timed in turn in one run, so that a busy machine disturbs both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

Run = Callable[[], object]
Clock = Callable[[Run], float]
"""Calls a function once and returns the seconds that it took."""


def host_clock(run: Run) -> float:
    """Return the seconds of host time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Side:
    """One of the things timed."""

    name: str
    run: Run
    n_bytes: int
    """Bytes of memory that one call has to move: reads and writes, each pass counted."""


@dataclass(frozen=True)
class Pair:
    """A work and what it is measured against."""

    work: str
    ours: Side
    against: Side
    read: Side | None = None
    """The read peak: `torch.sum` of one flat tensor. It may be ``against`` itself; `None` where
    memory is not what limits the work."""

    target: float | None = None
    """The ratio of the times to reach, ours over theirs; `None`: for information only."""

    headline: bool = True
    """Whether the front page shows it, where it has a target."""


@dataclass(frozen=True)
class Result:
    """What the report needs of one pair; times are medians in seconds."""

    work: str
    ours: str
    ours_seconds: float
    against: str
    against_seconds: float
    ratio: float
    """Median over the rounds of (our time / their time in the same round)."""

    ratio_low: float
    """Lower quartile of the same; ``ratio_high`` is the upper one."""

    ratio_high: float
    target: float | None
    headline: bool
    n_bytes: int
    gb_per_second: float | None
    read_gb_per_second: float | None
    of_read_peak: float | None
    rounds: int

    def line(self) -> str:
        """Return the one line that a run prints."""
        target = "no target" if self.target is None else f"target {self.target:.2f}"
        rate = ""
        if self.gb_per_second is not None and self.of_read_peak is not None:
            rate = f", {self.gb_per_second:.1f} GB/s, {self.of_read_peak:.2f} of read peak"
        return (
            f"{self.work}: {show_seconds(self.ours_seconds)}, {self.against} "
            f"{show_seconds(self.against_seconds)}, ratio {self.ratio:.3f} "
            f"[{self.ratio_low:.3f}, {self.ratio_high:.3f}] ({target}){rate}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {"kind": "pair", **asdict(self)}


@dataclass(frozen=True)
class Reading:
    """A single figure that has no other side: a count, a rate."""

    work: str
    value: float
    unit: str
    at_most: float | None = None
    note: str = ""

    def line(self) -> str:
        """Return the one line that a run prints."""
        target = "no target" if self.at_most is None else f"target <= {self.at_most:g}"
        note = f" [{self.note}]" if self.note else ""
        return f"{self.work}: {self.value:.5g} {self.unit} ({target}){note}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {"kind": "reading", **asdict(self)}


def show_seconds(seconds: float) -> str:
    """Return a duration in a unit that suits it."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def time_pair(
    benchmark: Any, pair: Pair, *, clock: Clock, seconds_per_side: float, min_rounds: int
) -> Result | None:
    """Time the sides of a pair in turn and return the medians.

    The rounds are pytest-benchmark's: it times our side, too, and calls the others in its set-up.

    Returns:
        The figures, or `None` where pytest-benchmark is told not to time (``--benchmark-disable``).
    """
    sides = [pair.against, pair.ours]
    if pair.read is not None and pair.read is not pair.against:
        # First, so that our call follows the one that it is compared with.
        sides.insert(0, pair.read)
    samples: dict[Side, list[float]] = {side: [] for side in sides}

    def others() -> None:
        for side in sides[:-1]:
            samples[side].append(clock(side.run))

    def ours() -> None:
        samples[pair.ours].append(clock(pair.ours.run))

    rounds = _rounds(sides, clock, seconds_per_side, min_rounds) if benchmark.enabled else 1
    benchmark.pedantic(ours, setup=others, rounds=rounds)
    return _result(pair, samples) if benchmark.enabled else None


def _rounds(sides: list[Side], clock: Clock, seconds_per_side: float, min_rounds: int) -> int:
    """Return how many rounds fit; the calls that find out warm every side up."""
    one_round = 0.0
    for side in sides:
        clock(side.run)
        one_round += host_clock(lambda run=side.run: clock(run))
    return max(min_rounds, int(seconds_per_side * len(sides) / one_round))


def _result(pair: Pair, samples: dict[Side, list[float]]) -> Result:
    ours, against = samples[pair.ours], samples[pair.against]
    ratios = [a / b for a, b in zip(ours, against, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    ours_seconds = statistics.median(ours)
    rate = read_rate = None
    if pair.read is not None:
        rate = pair.ours.n_bytes / ours_seconds / 1e9
        read_rate = pair.read.n_bytes / statistics.median(samples[pair.read]) / 1e9
    return Result(
        work=pair.work,
        ours=pair.ours.name,
        ours_seconds=ours_seconds,
        against=pair.against.name,
        against_seconds=statistics.median(against),
        ratio=ratio,
        ratio_low=low,
        ratio_high=high,
        target=pair.target,
        headline=pair.headline,
        n_bytes=pair.ours.n_bytes,
        gb_per_second=rate,
        read_gb_per_second=read_rate,
        of_read_peak=rate / read_rate if rate is not None and read_rate is not None else None,
        rounds=len(ours),
    )
