"""A run looked at again and again, from before its file exists until it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from gradstat.errors import RunLogError, RunNotFoundError
from gradstat.runlog import Run, open_run
from gradstat.show.state import RunState, read_state

_PATIENCE = 5
"""Looks at a file that is no run yet, as one that is just being made, before that is an error."""

_MAX_LOAD = 0.2
"""Share of the time that reading may take: a long run is looked at less often."""


def states(path: Path, interval: float) -> Iterator[RunState | None]:
    """Yield the run's state at intervals until it has ended; None while there is no run yet.

    Args:
        path: Of the run log.
        interval: Seconds.

    Raises:
        RunLogError: The file is no run log, or cannot be read any more.
    """
    refusals = 0
    run: Run | None = None
    while run is None:
        try:
            run = open_run(path)
        except RunNotFoundError:
            refusals = 0
        except RunLogError:
            refusals += 1
            if refusals > _PATIENCE:
                raise
        if run is None:
            yield None
            time.sleep(interval)
    with run:
        while True:
            began = time.monotonic()
            state = read_state(run)
            took = time.monotonic() - began
            yield state
            if state.summary.status != "running":
                return
            time.sleep(max(interval, took / _MAX_LOAD))
