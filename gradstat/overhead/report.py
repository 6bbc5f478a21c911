"""What a measurement of the overhead found, and how it is shown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradstat.errors import import_optional
from gradstat.overhead.blocks import Block
from gradstat.render import terminal_has_colours

RESAMPLES = 2000


class Estimate(NamedTuple):
    """A median over the rounds and its bootstrap interval (Efron 1979)."""

    value: float
    low: float
    """2.5th percentile of the medians of resampled rounds."""

    high: float
    """97.5th percentile."""


@dataclass(frozen=True)
class SideTime:
    """What a step takes."""

    name: str
    typical_seconds: float
    """Median over the rounds of the median step."""

    mean_seconds: float
    """Median over the rounds of the block's time by its steps: with all that is periodic."""


@dataclass(frozen=True)
class Ratio:
    """gradstat against another side: its time over theirs in the same round."""

    against: str
    typical: float
    """Of the median steps."""

    mean: Estimate
    """Of whole blocks."""


@dataclass(frozen=True)
class Part:
    """What one part of gradstat adds to a step, on average over whole blocks."""

    name: str
    seconds: Estimate
    share: float
    """Of a step without gradstat."""


@dataclass(frozen=True)
class OverheadReport:
    """What gradstat costs on a model, from `measure_overhead`.

    ``print(report)`` shows it in 80 columns; `to_dict` gives plain values.
    """

    work: str
    steps: int
    """Steps of a block."""

    rounds: int
    """Blocks of each side."""

    sides: tuple[SideTime, ...]
    ratios: tuple[Ratio, ...]
    parts: tuple[Part, ...]
    """In the order in which they were added; they sum up to the whole but for the medians."""

    look_seconds: float
    """One look of the diagnosis, which is not in the times of the steps."""

    machine: dict[str, Any]
    """Processor, versions, threads."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, fit for JSON."""
        plain = asdict(self)
        for entry in plain["ratios"]:
            entry["mean"] = entry["mean"]._asdict()
        for entry in plain["parts"]:
            entry["seconds"] = entry["seconds"]._asdict()
        return plain

    def __str__(self) -> str:
        return "\n".join(text for text, _ in self._lines())

    def render(self, *, plain: bool | None = None) -> str:
        """Return the lines of ``str(report)``, with colours where a terminal and rich allow them.

        Args:
            plain: True never colours, False always; None looks at stdout.

        Raises:
            MissingPackageError: ``plain`` is False and rich is not installed.
        """
        if plain or (plain is None and not terminal_has_colours()):
            return str(self)
        rich = import_optional("rich.console", purpose="render(plain=False)", install="rich")
        text = import_optional("rich.text", purpose="render(plain=False)", install="rich").Text
        console = rich.Console(force_terminal=True)
        with console.capture() as capture:
            for line, style in self._lines():
                console.print(text(line, style=style), soft_wrap=True)
        return str(capture.get()).rstrip("\n")

    def _lines(self) -> list[tuple[str, str]]:
        """Return each line with its style."""
        lines = [
            (f"{self.work[:80]}", "bold"),
            (
                f"{self.machine['device']}, {self.machine['threads']} threads; {self.rounds} "
                f"rounds of {self.steps} steps",
                "dim",
            ),
            ("", ""),
            (f"{'a step':<26}{'typical':>12}{'mean':>12}", "bold"),
        ]
        lines += [
            (f"{s.name:<26}{_show(s.typical_seconds):>12}{_show(s.mean_seconds):>12}", "")
            for s in self.sides
        ]
        lines += [
            ("", ""),
            (f"{'times the step of':<26}{'typical':>12}{'mean':>12}{'95 % interval':>22}", "bold"),
        ]
        for ratio in self.ratios:
            interval = f"{ratio.mean.low:.3f} to {ratio.mean.high:.3f}"
            numbers = f"{ratio.typical:>12.3f}{ratio.mean.value:>12.3f}{interval:>22}"
            lines.append((f"{ratio.against:<26}{numbers}", _verdict(ratio.mean)))
        lines += [
            ("", ""),
            (f"{'where it goes':<26}{'a step':>12}{'share':>12}{'95 % interval':>22}", "bold"),
        ]
        for part in self.parts:
            interval = f"{_show(part.seconds.low)} to {_show(part.seconds.high)}"
            numbers = f"{_show(part.seconds.value):>12}{part.share:>12.1%}{interval:>22}"
            lines.append((f"{part.name:<26}{numbers}", ""))
        look = f"one look of the diagnosis: {_show(self.look_seconds)}, not in the above"
        return [*lines, (look, "dim")]


def _verdict(ratio: Estimate) -> str:
    return "green" if ratio.high < 1.0 else "red" if ratio.low > 1.05 else ""


def _show(seconds: float) -> str:
    """Return a duration, which may be negative, in a unit that suits it."""
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if abs(seconds) * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


# ---- from blocks to figures ---------------------------------------------------------------------


def figures(
    names: Sequence[str], blocks: Mapping[str, Sequence[Block]], steps: int
) -> dict[str, Any]:
    """Return ``sides``, ``ratios`` and ``parts`` of a report.

    Args:
        names: The sides: without gradstat, torch's clipping, and each with one part more.
        blocks: By side, one block of each round.
        steps: Of a block.
    """
    plain, clipping, *parts = names
    whole = blocks[parts[-1]]
    times = {plain: blocks[plain], clipping: blocks[clipping], "gradstat": whole}
    sides = tuple(_side_time(name, found, steps) for name, found in times.items())
    ladder = [plain, *parts]
    added = [
        _part(more, blocks[more], blocks[less], steps, sides[0].mean_seconds)
        for less, more in pairwise(ladder)
    ]
    return {
        "sides": sides,
        "ratios": tuple(_ratio(name, whole, blocks[name]) for name in (plain, clipping)),
        "parts": tuple(added),
    }


def estimate(values: Sequence[float]) -> Estimate:
    """Return the median with its 95 % percentile interval; the same for the same values."""
    given: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0).integers(len(given), size=(RESAMPLES, len(given)))
    low, high = np.percentile(np.median(given[draws], axis=1), (2.5, 97.5))
    return Estimate(float(np.median(given)), float(low), float(high))


def _side_time(name: str, blocks: Sequence[Block], steps: int) -> SideTime:
    return SideTime(
        name,
        statistics.median(block.typical for block in blocks),
        statistics.median(block.total for block in blocks) / steps,
    )


def _ratio(against: str, ours: Sequence[Block], theirs: Sequence[Block]) -> Ratio:
    pairs = list(zip(ours, theirs, strict=True))
    typical = statistics.median(a.typical / b.typical for a, b in pairs)
    return Ratio(against, typical, estimate([a.total / b.total for a, b in pairs]))


def _part(
    name: str, more: Sequence[Block], less: Sequence[Block], steps: int, plain_seconds: float
) -> Part:
    seconds = estimate([(a.total - b.total) / steps for a, b in zip(more, less, strict=True)])
    return Part(name, seconds, seconds.value / plain_seconds)
