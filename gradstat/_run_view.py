"""What reports and figures ask of a run: a run log answers it, and so does a monitor."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradstat import _kernels
from gradstat.columns import HISTOGRAM_BINS, RAW_COLUMNS, derive
from gradstat.config import get_config
from gradstat.diagnosis import Finding
from gradstat.errors import ArgumentTypeError, ArgumentValueError
from gradstat.guard import GuardAction
from gradstat.monitor import Monitor
from gradstat.records import TableKind
from gradstat.runlog import DatabaseSink, Run, open_run

Steps = NDArray[np.int64]
Floats = NDArray[np.float64]

RunSource: TypeAlias = "str | os.PathLike[str] | Run | Monitor"
"""A run log, open or by its path, or a monitor."""


@contextmanager
def viewed(source: RunSource) -> Iterator[RunView]:
    """Give the run behind what was passed, open for as long as the context lasts.

    Of a monitor that writes a run log it is that log, brought up to date. Synchronises with a CUDA
    device for a monitor, else not.

    Raises:
        ArgumentTypeError: It is nothing of these.
        RunLogError: The file is no run log.
    """
    if isinstance(source, Monitor):
        log = source.log
        paths = [sink.path for sink in log.sinks if isinstance(sink, DatabaseSink)] if log else []
        if log is None or not paths:
            yield MonitorView(source)
            return
        log.flush()
        source = paths[0]
    if isinstance(source, str | os.PathLike):
        with open_run(source) as run:
            yield run
    elif isinstance(source, Run):
        yield source
    else:
        raise ArgumentTypeError(
            f"source must be a run log, its path or a monitor, got {type(source).__name__}; pass "
            'for example "runs/first.db" or optimizer.gradstat'
        )


class LayerView(Protocol):
    """A watched parameter."""

    @property
    def name(self) -> str:
        """Name in the model."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of its dimensions."""

    @property
    def numel(self) -> int:
        """Its elements."""


class RunView(Protocol):
    """A run that can be looked at; `gradstat.runlog.Run` says what each part holds."""

    @property
    def path(self) -> Path | None:
        """The run log; None of a monitor."""

    @property
    def id(self) -> str:
        """The same after a resume; empty of a monitor."""

    @property
    def status(self) -> str:
        """``"running"``, ``"finished"`` or ``"interrupted"``."""

    @property
    def meta(self) -> dict[str, Any]:
        """Model, optimizer, config, versions and machine."""

    @property
    def layers(self) -> list[Any]:
        """The parameters, as `LayerView`."""

    @property
    def steps(self) -> dict[str, NDArray[Any]]:
        """Step, time, loss, lr, total_norm, clip_coef, clip_threshold and skipped: each (s,)."""

    @property
    def scalars(self) -> dict[str, tuple[Steps, Floats]]:
        """What else was observed, by name."""

    def tables(
        self, columns: Sequence[str], kind: TableKind = "gradient"
    ) -> tuple[Steps, dict[str, Floats]]:
        """Return steps (s,) and, for each column, values (s, layers)."""

    def update_ratio(self) -> tuple[Steps, Floats] | None:
        """Return steps (s,) and ratios (s, layers); None where they were not recorded."""

    @property
    def activations(self) -> dict[str, dict[str, NDArray[Any]]]:
        """Counts of each site over its steps."""

    @property
    def histogram_steps(self) -> Steps:
        """Steps with histograms."""

    def histogram_table(self, step: int) -> NDArray[np.int64]:
        """Return those of all layers at a step, (layers, 256)."""

    @property
    def findings(self) -> list[tuple[int, Finding]]:
        """Findings with the step at which each was told."""

    @property
    def actions(self) -> list[GuardAction]:
        """What a guard did."""

    @property
    def dropped(self) -> int:
        """Steps of which nothing was kept."""


class MonitorLayer(NamedTuple):
    """A parameter that a monitor watches."""

    name: str
    shape: tuple[int, ...]
    numel: int


class MonitorView:
    """The window of a monitor as a run: what it keeps in memory, without learning rates and times.

    Making it reads everything once, and synchronises with a CUDA device.
    """

    path: Path | None = None
    id = ""
    status = "running"
    dropped = 0

    def __init__(self, monitor: Monitor) -> None:
        evidence = monitor.evidence()
        shapes = {layer.name: layer.shape for layer in evidence.layers}
        self._monitor = monitor
        self.layers: list[Any] = [
            MonitorLayer(name, shapes.get(name, ()), math.prod(shapes.get(name, ())))
            for name in monitor.names
        ]
        self.actions: list[GuardAction] = []
        self.findings = [
            (found.steps[0] if found.steps else monitor.step, found) for found in monitor.diagnose()
        ]
        model = vars(evidence.model) if evidence.model is not None else {}
        self.meta: dict[str, Any] = {
            "model": {"parameters": model.get("n_parameters", "unknown")},
            "optimizer": dict(vars(evidence.optimizer)) if evidence.optimizer is not None else {},
            "versions": get_config().to_dict(),
        }
        # A loss is told before the step that it leads to, any other number after the last one.
        curves = {name: (curve.steps, curve.values) for name, curve in evidence.curves.items()}
        told, losses = curves.pop("loss", (np.zeros(0, np.int64), np.zeros(0)))
        self.scalars = curves
        self.steps = _steps(monitor, told + 1, losses)

    def tables(
        self, columns: Sequence[str], kind: TableKind = "gradient"
    ) -> tuple[Steps, dict[str, Floats]]:
        """Return steps (s,) and, for each column, values (s, layers)."""
        windows = {"gradient": "window", "weight": "weight_window", "update": "update_window"}
        window: Floats = getattr(self._monitor, windows[kind])
        derived = derive(window.reshape(-1, len(RAW_COLUMNS)))
        found = {name: derived[name].reshape(window.shape[:2]) for name in columns}
        return self._monitor.recorded_steps, found

    def update_ratio(self) -> tuple[Steps, Floats] | None:
        """Return steps (s,) and ratios (s, layers); None where updates were not asked for."""
        try:
            return self._monitor.recorded_steps, self._monitor.update_ratio
        except ArgumentValueError:
            return None

    @property
    def activations(self) -> dict[str, dict[str, NDArray[Any]]]:
        """Counts of each site over the window, as of one step."""
        watched = self._monitor.activations
        step = np.array([self._monitor.step])
        if watched is None:
            return {}
        return {
            site.name: {
                "step": step,
                "units": np.array([site.units]),
                "dead_units": np.array([site.dead_units]),
                "saturated_low": np.array([site.low_fraction]),
                "saturated_high": np.array([site.high_fraction]),
            }
            for site in watched.table()
        }

    @property
    def histogram_steps(self) -> Steps:
        """None: a monitor keeps no histograms."""
        return np.zeros(0, np.int64)

    def histogram_table(self, step: int) -> NDArray[np.int64]:
        """Return zeros."""
        del step
        return np.zeros((len(self.layers), HISTOGRAM_BINS), np.int64)


def _steps(monitor: Monitor, told: Steps, losses: Floats) -> dict[str, NDArray[Any]]:
    recorded, decisions = monitor.recorded_steps, monitor.decisions
    step = np.union1d(recorded, told[told <= monitor.step])
    empty = np.full(len(step), np.nan)
    result: dict[str, NDArray[Any]] = {"step": step, "time": empty, "lr": empty}
    at = np.searchsorted(step, recorded)
    columns = {
        "total_norm": _kernels.OUT_NORM,
        "clip_coef": _kernels.OUT_COEFFICIENT,
        "clip_threshold": _kernels.OUT_ALLOWED,
        "skipped": _kernels.OUT_SKIP,
    }
    for name, column in columns.items():
        result[name] = empty.copy()
        result[name][at] = decisions[:, column]
    result["skipped"] = result["skipped"] == 1.0
    result["loss"] = empty.copy()
    kept = told <= monitor.step
    result["loss"][np.searchsorted(step, told[kept])] = losses[kept]
    return result
