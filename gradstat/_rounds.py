"""Looks at a run from time to time while it trains, and tells of each cause once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Any

from gradstat.diagnosis import Finding

FIRST = 256
"""Steps after which the first look is worth it; the next ones come after twice as many each."""

FIRST_TO_KEEP = 32
"""The same where somebody keeps all that is found: a short run has its findings too."""

SHARE = 0.01
"""Of the time since the last look, or since the start, the most that the next one may take."""

FIRST_TAKES = 0.005
"""Seconds that the first look is taken to need; of each later one, what the last one needed."""

MIN_CONFIDENCE = 0.6
"""Of a cause that is told of while the run goes on."""

_logger = logging.getLogger("gradstat")


class Rounds:
    """When to look, and what has been told.

    Args:
        every: Steps from one look to the next. 0: at `FIRST` and after twice as many steps each
            time, or as soon after that as a look takes no more than `SHARE`; where somebody keeps
            all that is found, at steps that are the same in each run. None: never.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._next = FIRST
        self._not_before = monotonic() + FIRST_TAKES / SHARE
        self._told: set[str] = set()
        self.callbacks: list[Callable[[Finding], Any]] = []
        """Called for each cause that is new."""

        self.listeners: list[Callable[[Sequence[Finding]], Any]] = []
        """Called after each look with all that was found."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"callbacks": [], "listeners": []}  # a copy is for reading

    def is_due(self, step: int) -> bool:
        """Whether to look after this many finished steps."""
        if self._every is None:
            return False
        if self._every:
            return step % self._every == 0
        if self.listeners:
            return step >= FIRST_TO_KEEP and step & (step - 1) == 0
        return step >= self._next and monotonic() >= self._not_before

    def tell(self, findings: Callable[[], Iterable[Finding]], step: int) -> None:
        """Log and pass on the causes that are new; a look that fails is the last."""
        start = monotonic()
        try:
            found = list(findings())
        except Exception:  # a run that is only watched must go on
            self._every = None
            _logger.exception("gradstat could not look at the run and will not try again")
            return
        end = monotonic()
        self._next, self._not_before = 1 << step.bit_length(), end + (end - start) / SHARE
        for listener in self.listeners:
            listener(found)
        if self._every == 0 and step < FIRST:
            return
        for finding in found:
            is_cause = finding.caused_by is None and finding.severity != "info"
            if not is_cause or finding.confidence < MIN_CONFIDENCE or finding.code in self._told:
                continue
            self._told.add(finding.code)
            _logger.warning("%s", finding)
            for callback in self.callbacks:
                callback(finding)
