"""`RunLog`: follows a monitor after each step and queues what there is to keep."""

from __future__ import annotations

import atexit
import logging
import math
import os
import sys
import time
import uuid
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

from torch.optim import Optimizer

from gradstat._capture import is_capturing
from gradstat._recorder import Histogram
from gradstat._window import Ring
from gradstat.columns import L2
from gradstat.diagnosis import Finding
from gradstat.errors import ArgumentTypeError
from gradstat.guard import GuardAction
from gradstat.monitor import Monitor
from gradstat.records import (
    ActionRecord,
    DiagnosisRecord,
    LayersRecord,
    RunStart,
    Sink,
    TableKind,
)
from gradstat.runlog.about import about_machine, about_model, about_optimizer, about_versions
from gradstat.runlog.database import DatabaseSink
from gradstat.runlog.pump import Pump
from gradstat.runlog.step import StepCopy, ratio_of

Log: TypeAlias = "str | os.PathLike[str] | Sink | Sequence[str | os.PathLike[str] | Sink]"

HISTOGRAM_EVERY = 10
"""Tables from one to the next that come with histograms and activations."""

_logger = logging.getLogger("gradstat")
_open: weakref.WeakSet[RunLog] = weakref.WeakSet()


class RunLog:
    """The log of a run while it is written; made by ``attach(log=...)``, found at `Monitor.log`.

    After each step it asks for copies of what the monitor has measured and goes on: the sinks are
    fed on a background thread. It ends with `gradstat.detach`, with the optimizer, or when the
    interpreter shuts down. An error of its own is logged and ends the log, not the run.

    Args:
        monitor: What is followed.
        log: A path, a sink, or several.
        every: Recorded steps from one table to the next.
        config: What `attach` was given.
        looks_at_end: Diagnose the run when it ends.

    Raises:
        ArgumentTypeError: ``log`` is nothing of these.
        RunLogError: A path cannot be written.
    """

    def __init__(
        self,
        monitor: Monitor,
        log: Log,
        *,
        every: int,
        config: dict[str, Any],
        looks_at_end: bool,
    ) -> None:
        self._monitor = monitor
        self._every = every
        self._config = config
        self._looks_at_end = looks_at_end
        self._process = os.getpid()
        self._is_open = True
        self._step = 0
        self._looked_at = 0
        self._names: tuple[str, ...] = ()
        self._ratio_at = 0
        self.sinks = _sinks_of(log)
        """What is written to, in order."""

        ids = [sink.run_id for sink in self.sinks if isinstance(sink, DatabaseSink)]
        self.run_id: str = ids[0] if ids else uuid.uuid4().hex
        """Random, and the same after a resume into the same file."""

        self._pump = Pump(self.sinks)
        self._start()
        monitor._recorder.histogram_every = every * HISTOGRAM_EVERY
        monitor.on_step(self._after_step)
        monitor._rounds.listeners.append(self._note_findings)
        # The pump holds no monitor, whose callbacks may hold the optimizer.
        weakref.finalize(self._optimizer, self._pump.close).atexit = False
        _open.add(self)

    @property
    def dropped(self) -> int:
        """Steps of which nothing is kept, because the sinks were too slow."""
        return self._pump.dropped

    def flush(self) -> None:
        """Wait until the sinks have kept all steps so far. Synchronises with a CUDA device."""
        self._pump.flush()

    def close(self, *, has_ended: bool = True) -> None:
        """End the log: look at the run once more, and wait until the sinks have closed.

        Args:
            has_ended: The run has come to its end; else its log says that it broke off.
        """
        if not self._is_open or os.getpid() != self._process:
            return
        if self._looks_at_end and self._step and self._looked_at != self._monitor.step:
            try:
                self._note_findings(self._monitor.diagnose())
            except Exception as error:  # the optimizer may be gone, or the device lost
                _logger.debug("no last look at the run: %s", error)
        self._is_open = False
        self._pump.close(has_ended=has_ended)

    # ---- on the training thread ------------------------------------------------------------------

    @property
    def _optimizer(self) -> Optimizer:
        source = self._monitor._source
        assert callable(source)
        optimizer = source()
        assert optimizer is not None
        return optimizer

    def _start(self) -> None:
        optimizer = self._optimizer
        self._pump.put(
            RunStart(
                run_id=self.run_id,
                time=time.time(),
                model=about_model(self._monitor._watched.model),
                optimizer=about_optimizer(optimizer),
                config=self._config,
                versions=about_versions(),
                machine=about_machine(),
            )
        )

    def _after_step(self, monitor: Monitor) -> None:
        del monitor
        if not self._is_open or is_capturing():
            return
        try:
            self._look()
        except Exception:  # a run that is only watched must go on
            self._is_open = False
            _logger.exception("the run log failed and ends; the training goes on")
            self._pump.close()

    def _look(self) -> None:
        monitor, step = self._monitor, self._monitor.step
        if step <= self._step:  # a checkpoint was loaded, or a guard has gone back
            self._start()
        self._step = step
        optimizer = self._optimizer
        copies = StepCopy(step, time.time())
        copies.lr = copies.copy_scalar(optimizer.param_groups[0].get("lr", math.nan))
        told = monitor._observations.newest(step - 1)
        copies.scalars = {name: copies.copy_scalar(value) for name, value in told.items()}
        if monitor._recorder.decision is not None:
            copies.decision = copies.copy_few(monitor._recorder.decision)
        self._copy_tables(copies, optimizer)
        self._copy_probe(copies)
        copies.seal()
        self._pump.put_step(copies)

    def _copy_tables(self, copies: StepCopy, optimizer: Optimizer) -> None:
        monitor, recorder = self._monitor, self._monitor._recorder
        window = recorder.window
        place = (copies.step - 1) // recorder.every
        is_measured = window is not None and window.steps and window.steps[-1] == copies.step
        if window is None or not is_measured or place % self._every:
            return
        if window.names != self._names:
            self._names = window.names
            parameters = monitor._watched.parameters(optimizer.param_groups)
            shapes = tuple(tuple(parameter.shape) for parameter in parameters)
            dtypes = tuple(str(parameter.dtype).removeprefix("torch.") for parameter in parameters)
            self._pump.put(LayersRecord(window.names, shapes, dtypes))
        rings: dict[TableKind, Ring | None] = {
            "gradient": window.tables,
            "weight": window.weights,
            "update": window.updates,
        }
        for kind, ring in rings.items():
            if ring is not None:
                copies.tables[kind] = copies.copy(ring[window.newest][:-1])
        if window.updates is not None and window.weights is not None:
            updates, weights = window.updates[window.newest], window.weights[window.newest]
            copies.ratio = ratio_of(copies, updates, weights)
        if recorder.histogram is not None:
            counts, scale = recorder.histogram
            copies.histogram = Histogram(
                copies.copy(counts[:-1]), None if scale is None else copies.copy(scale)
            )
        if place % (self._every * HISTOGRAM_EVERY) == 0:
            self._copy_activations(copies)

    def _copy_activations(self, copies: StepCopy) -> None:
        if self._monitor.activations is not None:
            table = self._monitor.activations.table()
            if len(table):
                table.copy_by(copies.copy)
                copies.activations = table

    def _copy_probe(self, copies: StepCopy) -> None:
        """Take the ratio from the probe of this step, where there is one and no whole ratio."""
        probes = self._monitor._probes
        if copies.ratio is not None or not probes.kept or probes.kept[-1].step != copies.step:
            return
        probe = probes.kept[-1]
        if probe.changes is not None and tuple(probes.names) == self._names:
            norms, n_layers = probe.changes[:-1, L2], len(self._names)
            copies.ratio = copies.copy(norms[n_layers:]), copies.copy(norms[:n_layers])

    def _note_findings(self, findings: Sequence[Finding]) -> None:
        if self._is_open:
            self._looked_at = self._monitor.step
            self._pump.put(DiagnosisRecord(self._monitor.step, tuple(findings)))

    def note_action(self, action: GuardAction) -> None:
        """Keep what a guard has done."""
        if self._is_open:
            self._pump.put(ActionRecord(action.step, action))


def _sinks_of(log: Log) -> tuple[Sink, ...]:
    given = list(log) if isinstance(log, list | tuple) else [log]
    with ExitStack() as undo:
        sinks: list[Sink] = []
        for one in given:
            if not isinstance(one, str | os.PathLike | Sink):
                raise ArgumentTypeError(
                    f"log must be a path, a sink or a list of these, got {type(one).__name__}; "
                    'pass for example log="runs/first.db"'
                )
            sink = one if isinstance(one, Sink) else DatabaseSink(one)
            undo.callback(sink.close)
            sinks.append(sink)
        undo.pop_all()
    return tuple(sinks)


@atexit.register
def _close_all() -> None:
    has_failed = getattr(sys, "last_value", None) is not None  # an exception ended the script
    for log in list(_open):
        log.close(has_ended=not has_failed)
