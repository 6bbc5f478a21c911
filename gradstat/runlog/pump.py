"""`Pump`: a bounded queue, and the one background thread that feeds all sinks from it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

from gradstat.errors import GradstatError
from gradstat.records import DroppedRecord, LayersRecord, Record, RunEnd, RunStart, Sink
from gradstat.runlog.database import DatabaseSink
from gradstat.runlog.step import StepCopy

INTERVAL = 0.5
"""Seconds from one flush to the next."""

MAX_STEPS = 8192
MAX_BYTES = 64 << 20
"""What may wait in the queue: steps, and the bytes of their tables."""

PATIENCE = 30.0
"""Seconds that `Pump.close` waits for the sinks."""

RETRY = 15.0
RETRIES = 10
"""A database that cannot be written is tried again so many times, first after so many seconds, then
after twice as many: over four hours in all."""

_logger = logging.getLogger("gradstat")


class Pump:
    """Takes records without waiting, and hands them to the sinks on a thread of its own.

    `put` and `put_step` are for one thread. In a child process all calls do nothing.

    Args:
        sinks: Where the records go; the pump closes them.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self._queue: deque[Record | StepCopy | threading.Event] = deque()
        self._bytes_put = self._bytes_taken = 0
        self._wake = threading.Event()
        self._is_closing = False
        self._has_ended = False
        self._process = os.getpid()
        self.dropped = 0
        """Steps that found the queue full."""

        self._told_dropped = 0
        self._heads: dict[type, Record] = {}
        """What a database needs to hear first when it is opened again."""

        self._failures: dict[DatabaseSink, int] = {}
        self._due: dict[DatabaseSink, float] = {}
        """When each one that failed is tried again, on the clock of `time.monotonic`."""

        self._thread = threading.Thread(target=self._run, name="gradstat-log", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Queue a record that must not be lost; there are few of these."""
        if not self._is_idle:
            self._queue.append(record)

    def put_step(self, step: StepCopy) -> None:
        """Queue a step, or count it as dropped where the queue is full."""
        if self._is_idle:
            return
        waiting, waiting_bytes = len(self._queue), self._bytes_put - self._bytes_taken
        if waiting >= MAX_STEPS or waiting_bytes >= MAX_BYTES:
            self.dropped += 1
            return
        self._bytes_put += step.n_bytes
        self._queue.append(step)
        if 2 * waiting >= MAX_STEPS or 2 * waiting_bytes >= MAX_BYTES:
            self._wake.set()

    @property
    def _is_idle(self) -> bool:
        has_none = not (self._sinks or self._due)
        return self._is_closing or has_none or os.getpid() != self._process

    def flush(self) -> None:
        """Wait until the sinks have kept all records so far."""
        if self._is_idle:
            return
        kept = threading.Event()
        self._queue.append(kept)
        self._wake.set()
        kept.wait(PATIENCE)

    def close(self, *, has_ended: bool = True) -> None:
        """Wait until the sinks have kept all records and closed.

        Args:
            has_ended: The run has come to its end, rather than broken off.
        """
        if self._is_closing or os.getpid() != self._process:
            return
        self._has_ended = has_ended
        self._is_closing = True
        self._wake.set()
        if threading.current_thread() is not self._thread:  # the garbage collector runs anywhere
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                _logger.warning("the run log is not finished: its sinks took over %g s", PATIENCE)

    # ---- on the background thread ----------------------------------------------------------------

    def _run(self) -> None:
        is_last = False
        while not is_last:
            self._wake.wait(INTERVAL)
            self._wake.clear()
            is_last = self._is_closing
            for database, due in list(self._due.items()):
                if time.monotonic() >= due:
                    self._reopen(database)
            waiting = self._empty_queue()
            if self.dropped > self._told_dropped:
                self._tell_dropped()
            if is_last and self._has_ended:
                self._write(RunEnd(time.time(), self.dropped))
            for sink in list(self._sinks):
                self._attempt(sink, sink.flush)
            for event in waiting:
                event.set()
        for sink in list(self._sinks):
            self._sinks.remove(sink)
            self._attempt(sink, sink.close)

    def _empty_queue(self) -> list[threading.Event]:
        """Write what there is; return the events of those who wait until it is kept."""
        waiting = []
        while self._queue:
            item = self._queue.popleft()
            if isinstance(item, threading.Event):
                waiting.append(item)
            elif isinstance(item, StepCopy):
                self._write_step(item)
                self._bytes_taken += item.n_bytes
            else:
                self._write(item)
        return waiting

    def _write_step(self, step: StepCopy) -> None:
        try:
            records = step.records()
        except Exception:  # the device may be lost; the training will say so
            _logger.exception("the run log has lost step %d", step.step)
            return
        for record in records:
            self._write(record)

    def _write(self, record: Record) -> None:
        if isinstance(record, RunStart | LayersRecord):
            self._heads[type(record)] = record
        for sink in list(self._sinks):
            self._attempt(sink, partial(_write_to, sink, record))

    def _reopen(self, sink: DatabaseSink) -> None:
        """Let a database go on, as a further session of its run."""
        del self._due[sink]
        self._sinks.append(sink)
        self._attempt(sink, sink.reopen)
        for record in self._heads.values():
            if sink in self._sinks:
                self._attempt(sink, partial(_write_to, sink, record))

    def _attempt(self, sink: Sink, action: Callable[[], None]) -> None:
        """Do something with a sink, and do without it where it fails."""
        try:
            action()
        except Exception as error:  # the training goes on
            is_foreseen = isinstance(error, OSError | GradstatError)
            _logger.log(
                logging.DEBUG if sink in self._failures else logging.WARNING,
                "the run log stops writing to a %s: %s. The training goes on",
                type(sink).__name__,
                error if is_foreseen else repr(error),
                exc_info=None if is_foreseen else error,
            )
            if isinstance(sink, DatabaseSink) and not self._is_closing:
                failures = self._failures[sink] = self._failures.get(sink, 0) + 1
                if failures <= RETRIES:
                    self._due[sink] = time.monotonic() + RETRY * 2 ** (failures - 1)
            if sink in self._sinks:
                self._sinks.remove(sink)
                with suppress(Exception):  # what is wrong with it has been said
                    sink.close()

    def _tell_dropped(self) -> None:
        if not self._told_dropped:
            _logger.warning(
                "the run log cannot keep up and has dropped %d steps; run.dropped counts them. "
                "Raise log_every, or write to a faster disk",
                self.dropped,
            )
        self._told_dropped = self.dropped
        self._write(DroppedRecord(self.dropped))


def _write_to(sink: Sink, record: Record) -> None:
    try:
        sink.write(record)
    except UnicodeEncodeError:
        sink.write(_encodable(record))


def _encodable(value: Any) -> Any:
    """Return records and plain values with escapes for what no file holds: lone surrogates."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_encodable(key): _encodable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_encodable, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _encodable(getattr(value, f.name)) for f in fields(value)})
    return value
