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
    """A run starts, or goes on: after a resume, or after it went back to an earlier step.

    Steps that follow take the place of those of the same number and later ones from before.
    """

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
    """The newest of each other number that was observed since the step before: ``val_loss``, ..."""


@dataclass(frozen=True)
class TableRecord:
    """Statistics of every layer at one step."""

    step: int
    kind: TableKind
    data: NDArray[np.float64]
    """(layers, columns), in the order of the newest `LayersRecord` and of `Monitor.columns`; the
    row of a layer without a gradient is NaN."""


@dataclass(frozen=True)
class UpdateRatioRecord:
    """How far one step moved every layer, as a share of the layer."""

    step: int
    ratios: NDArray[np.float64]
    """(layers,): norm of the change over the norm before it, of a large layer those of its first
    65,536 elements; NaN or Inf where a layer was all zero."""


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
class DiagnosisRecord:
    """All that a look at the run has found; what it does not hold is there no more."""

    step: int
    findings: tuple[Finding, ...]
    """The likeliest cause first, each before its symptoms."""


@dataclass(frozen=True)
class ActionRecord:
    """Something that a guard has done."""

    step: int
    action: GuardAction


@dataclass(frozen=True)
class DroppedRecord:
    """More steps have found the queue full; said when the number has grown."""

    dropped: int
    """Steps of this process, so far, of which nothing was kept."""


@dataclass(frozen=True)
class RunEnd:
    """The run ends in good order: the optimizer went, or the interpreter shut down."""

    time: float
    dropped: int
    """As in `DroppedRecord`."""


Record: TypeAlias = (
    RunStart
    | LayersRecord
    | StepRecord
    | TableRecord
    | UpdateRatioRecord
    | HistogramRecord
    | ActivationRecord
    | DiagnosisRecord
    | ActionRecord
    | DroppedRecord
    | RunEnd
)


class Sink(ABC):
    """Keeps the records of a run somewhere.

    All methods are called on one background thread. A sink that raises is closed and said to be so
    once; the training goes on.
    """

    @abstractmethod
    def write(self, record: Record) -> None:
        """Take one record; it may wait for `flush`."""

    def flush(self) -> None:  # noqa: B027 - most sinks keep at once
        """Keep all records so far; called about twice a second and at the end."""

    def close(self) -> None:  # noqa: B027
        """Let go of files; nothing follows."""
