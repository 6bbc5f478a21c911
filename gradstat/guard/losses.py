"""Tells from the losses of the last steps whether a run is being lost, without looking far."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

from gradstat.diagnosis.finding import Finding, Measure

NONFINITE_IN_A_ROW = 3
"""Losses that are NaN or Inf, one after the other, that are no accident of a batch."""

RECENT = 5
"""Losses whose median is the loss now: two bad batches do not move it."""

LENGTH = 64
"""Losses before those that make the level."""

LEAST = 16
"""Losses that make a level; with fewer, nothing is said of finite losses: fresh optimizers jump."""

ABOVE = 2.0
"""Loss now over the level, as in torch-lr-finder and TheDeepChecker (Ben Braiek and Khomh 2023)."""

SPREADS = 6.0
"""Robust deviations above the level, besides (OLMo-core skips at six)."""

QUANTILE = 0.95
"""Of the level's losses, which the loss now exceeds too: some losses have heavy tails."""

OF_FIRST = 0.2
"""Share of the first loss that a level counts as, at least: near zero every loss is unsteady, and a
run that loses a tenth of what it gained is not lost."""


class LossWatch:
    """Follows the losses.

    A loss beyond the limit counts as the limit in the level: accidents leave no trace there, and a
    level that lasts becomes the new one in time.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._level: deque[float] = deque(maxlen=LENGTH)
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._in_a_row = 0
        self.last = math.nan
        """The newest loss."""

    def add(self, losses: Iterable[float]) -> None:
        """Take further losses, oldest first."""
        for loss in losses:
            self.last = loss
            if not math.isfinite(loss):
                self._in_a_row += 1
                continue
            self._in_a_row = 0
            if self._first is None:
                self._first = loss
            if len(self._recent) == RECENT:
                limit = self._limit()
                oldest = self._recent[0]
                self._level.append(limit if oldest > limit else oldest)
            self._recent.append(loss)

    def go_back(self) -> None:
        """Forget the losses that led to a roll-back; the level stays."""
        self._recent.clear()
        self._in_a_row = 0
        self.last = math.nan

    @property
    def is_calm(self) -> bool:
        """Whether the newest loss, if there is one, is finite and no higher than usual."""
        if self._first is None and self._in_a_row == 0:
            return True
        return math.isfinite(self.last) and not self.last > self._limit()

    def findings(self) -> list[Finding]:
        """Return what the newest losses show."""
        if self._in_a_row >= NONFINITE_IN_A_ROW:
            return [
                Finding(
                    "nonfinite-loss",
                    "error",
                    0.95,
                    f"the last {self._in_a_row} losses are NaN or Inf",
                    ("go back to before it", "lower lr and clip"),
                    (Measure("losses in a row", self._in_a_row, threshold=NONFINITE_IN_A_ROW),),
                    "IEEE 754 arithmetic",
                )
            ]
        if len(self._recent) < RECENT:
            return []
        now, limit = sorted(self._recent)[RECENT // 2], self._limit()
        if not now > limit:
            return []
        return [
            Finding(
                "diverging-loss",
                "error",
                0.8,
                f"the median of the last {RECENT} losses is {now:.3g}, after one of "
                f"{_quantile(sorted(self._level), 0.5):.3g}",
                ("go back to before it", "multiply lr by 0.1", "clip"),
                (Measure("median of the last losses", now, threshold=limit),),
                "TheDeepChecker (Ben Braiek and Khomh 2023)",
            )
        ]

    def _limit(self) -> float:
        """Return the loss from which it is too high, NaN where there is no level yet."""
        if self._first is None or len(self._level) < LEAST:
            return math.nan
        level = sorted(self._level)
        usual, high = _quantile(level, 0.5), _quantile(level, QUANTILE)
        spread = 1.4826 * _quantile(sorted(abs(loss - usual) for loss in level), 0.5)
        scale = max(abs(usual), OF_FIRST * abs(self._first))
        return max(high, usual + SPREADS * spread, usual + (ABOVE - 1) * scale)


def _quantile(ascending: Sequence[float], share: float) -> float:
    return ascending[int(share * len(ascending))]  # numpy's takes longer than a small step
