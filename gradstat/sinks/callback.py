"""`Callback`: every record goes to a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradstat.errors import ArgumentTypeError
from gradstat.records import Record, Sink


class Callback(Sink):
    """Calls ``function(record)`` for each record of `gradstat.records`, on a background thread.

    Records hold host values only, so the function never waits for a device. An error that it
    raises is logged and ends this sink; the training goes on.

    Args:
        function: Takes one record; what it returns is ignored.

    Raises:
        ArgumentTypeError: ``function`` cannot be called.

    Example:
        >>> def tell(record):
        ...     if isinstance(record, gradstat.records.DiagnosisRecord):
        ...         send_message(record.step, record.findings)
        >>> gradstat.attach(optimizer, model, log=gradstat.sinks.Callback(tell))
    """

    def __init__(self, function: Callable[[Record], Any]) -> None:
        if not callable(function):
            raise ArgumentTypeError(
                f"function must be a function of one record, got {type(function).__name__}; pass "
                "for example print"
            )
        self._function = function

    def write(self, record: Record) -> None:
        """Call the function."""
        self._function(record)
