"""Numbers, names and sentences of a report."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstat.render import elide, printable

WIDE, NARROW = 36, 18
"""Characters of a layer's name beside a chart, on a screen and on a phone."""


def number(value: float | None) -> str:
    """Return a number with four digits; whole ones up to a million in full."""
    if value is None or math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.4g}"


def percent(share: float) -> str:
    """Return a share with one decimal; 0 % and 100 % only where that is exact."""
    if math.isnan(share):
        return "-"
    if share in (0.0, 1.0):
        return f"{share:.0%}"
    return f"{min(max(share, 0.001), 0.999):.1%}"


def plural(count: int, noun: str) -> str:
    """Return a count with its noun."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def moment(seconds: float) -> str:
    """Return seconds since 1970 as date and time in UTC."""
    if not math.isfinite(seconds):
        return "unknown"
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def duration(seconds: float) -> str:
    """Return seconds in two units."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def short(name: str, width: int = WIDE) -> str:
    """Return a name cut in the middle to a width, fit to be printed."""
    return elide(printable(name), width)


def plain(name: str) -> str:
    """Return a name for plotly.js, which takes texts for a kind of HTML."""
    return html.escape(printable(name), quote=False)


def listed(names: Sequence[str], shown: int = 3) -> str:
    """Return the first names as a phrase."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(short(name, 40) for name in names[:shown]) + more


def course(values: NDArray[Any], steps: NDArray[Any]) -> str:
    """Return first, last and smallest value of a series as a sentence, and where it is broken."""
    finite = np.isfinite(values)
    if not len(values):
        return ""
    broken = np.flatnonzero(~finite)
    missing = ""
    if len(broken) and not finite.any():
        return "NaN or Inf on every step."
    if len(broken):
        missing = (
            f" NaN, Inf or unknown on {plural(len(broken), 'step')}, first at step "
            f"{int(steps[broken[0]]):,}."
        )
    known, at = values[finite], steps[finite]
    if len(known) == 1:
        return f"{number(float(known[0]))} at step {int(at[0]):,}.{missing}"
    lowest = int(known.argmin())
    return (
        f"From {number(float(known[0]))} at step {int(at[0]):,} to {number(float(known[-1]))} at "
        f"step {int(at[-1]):,}; lowest {number(float(known[lowest]))} at step "
        f"{int(at[lowest]):,}.{missing}"
    )
