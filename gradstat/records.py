"""What a run leaves behind as it trains: one record after the other, for a sink to keep.

Records hold host values only. A `Sink` gets them in order, on one background thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradstat.diagnosis import Finding
from gradstat.guard import GuardAction

TableKind: TypeAlias = Literal["gradient", "weight", "update"]


@dataclass(frozen=True)
class RunStart:
    """A run starts, or goes on after a resume."""

    run_id: str
    """Random, and the same after a resume into the same log."""

    time: float
    """Seconds since 1970 UTC, as in all records."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    config: dict[str, Any]
    """What `attach` was given."""

    versions: dict[str, str]
    machine: dict[str, Any]


@dataclass(frozen=True)
class LayersRecord:
    """The watched parameters, before the first table and whenever they change."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class StepRecord:
    """One finished optimizer step; numbers that are not known are NaN."""

    step: int
    """Number of the step, that of a run's first being 1."""

    time: float
    loss: float
    lr: float
    """Learning rate of the first group."""

    total_norm: float
    """Before clipping, in true units; NaN also on steps that were not measured."""

    clip_coef: float
    clip_threshold: float
    """Norm that the policy allowed; Inf where it allowed any."""

    is_skipped: bool
    scalars: dict[str, float] = field(default_factory=dict)
    """Whatever else was observed since the step before, as ``val_loss``; of a tensor its mean."""


@dataclass(frozen=True)
class TableRecord:
    """Statistics of every layer at one step."""

    step: int
    kind: TableKind
    data: NDArray[np.float64]
    """(layers, columns), in the order of the newest `LayersRecord` and of `Monitor.columns`."""


@dataclass(frozen=True)
class HistogramRecord:
    """Magnitudes of every layer's gradient at one step, by binary exponent."""

    step: int
    counts: NDArray[np.int64]
    """(layers, 256); the bins' edges are those of `gradstat.columns.histogram_edges`."""


@dataclass(frozen=True)
class SiteRecord:
    """One activation site of an `ActivationRecord`; the fields are those of its table's row."""

    name: str
    kind: str
    units: int
    dead_units: int
    saturated_low: float
    """Share of the elements, as the next two."""

    saturated_high: float
    zero_fraction: float
    mean: float
    std: float


@dataclass(frozen=True)
class ActivationRecord:
    """Activations over the window that ends at one step."""

    step: int
    sites: tuple[SiteRecord, ...]


@dataclass(frozen=True)
class FindingRecord:
    """A finding, when it was first told of or when it changed."""

    step: int
    finding: Finding


@dataclass(frozen=True)
class ActionRecord:
    """Something that a guard has done."""

    step: int
    action: GuardAction


@dataclass(frozen=True)
class RunEnd:
    """The run ends in good order: the monitor was closed, or the interpreter shut down."""

    time: float
    dropped: int
    """Records that found the queue full."""


Record: TypeAlias = (
    RunStart
    | LayersRecord
    | StepRecord
    | TableRecord
    | HistogramRecord
    | ActivationRecord
    | FindingRecord
    | ActionRecord
    | RunEnd
)


class Sink(ABC):
    """Keeps the records of a run somewhere.

    All methods are called on one background thread. A sink that raises an OSError or a
    `GradstatError` is closed and said to be so once; the training goes on.
    """

    @abstractmethod
    def write(self, record: Record) -> None:
        """Take one record; it may wait for `flush`."""

    def flush(self) -> None:  # noqa: B027 - most sinks keep at once
        """Keep all records so far; called about twice a second and at the end."""

    def close(self) -> None:  # noqa: B027
        """Let go of files; nothing follows."""
