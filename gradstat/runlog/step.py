"""`StepCopy`: what one step leaves, on its way from the device to records on the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat import _kernels
from gradstat._recorder import Histogram
from gradstat.activations import ActivationTable
from gradstat.columns import L2
from gradstat.records import (
    ActivationRecord,
    HistogramRecord,
    Record,
    SiteRecord,
    StepRecord,
    TableKind,
    TableRecord,
    UpdateRatioRecord,
)

NAN = float("nan")


@dataclass
class StepCopy:
    """Copies of one step's numbers, asked for on the training thread, read on another.

    The first does not wait for a CUDA device: its copies go to pinned memory, and `records`, on
    the other, waits until they are there.
    """

    step: int
    time: float
    lr: float | Tensor = NAN
    decision: Tensor | list[float] | None = None
    scalars: dict[str, float | Tensor] = field(default_factory=dict)
    tables: dict[TableKind, Tensor] = field(default_factory=dict)
    ratio: tuple[Tensor, Tensor] | None = None
    """Norms of the change and of the layers before it, (layers,) each."""

    histogram: Histogram | None = None
    activations: ActivationTable | None = None
    n_bytes: int = 0
    """Of all copies."""

    _events: dict[torch.device, Any] = field(default_factory=dict)

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy on the host; of one on a CUDA device, a copy that is still to arrive."""
        tensor = tensor.detach()
        self.n_bytes += tensor.nbytes
        if tensor.device.type != "cuda":
            return tensor.to("cpu", copy=True)
        self._events[tensor.device] = None
        return tensor.to("cpu", non_blocking=True)

    def copy_few(self, tensor: Tensor) -> Tensor | list[float]:
        """Return the numbers of a small tensor on the host, or a copy that is still to arrive."""
        # Most operations of torch let go of the GIL, and to have it back may mean to wait.
        return tensor.tolist() if tensor.device.type == "cpu" else self.copy(tensor)

    def copy_scalar(self, value: float | Tensor) -> float | Tensor:
        """Return a number, or the copy of a tensor of one element."""
        if not isinstance(value, Tensor):
            return float(value)
        # Others, such as those spread over ranks, are not read on one rank and one thread alone.
        return self.copy(value) if type(value) is Tensor else NAN

    def seal(self) -> None:
        """All copies were asked for."""
        for device in self._events:
            with torch.cuda.device(device):
                self._events[device] = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._events[device].record()

    def records(self) -> list[Record]:
        """Return the records of this step. Waits until the copies have arrived."""
        for event in self._events.values():
            event.synchronize()
        return list(self._records())

    def _records(self) -> Iterator[Record]:
        decision = self.decision
        if isinstance(decision, Tensor):
            decision = decision.tolist()
        elif decision is None:
            decision = [NAN] * _kernels.NUM_CLIP_OUT
        scalars = {name: _number(value) for name, value in self.scalars.items()}
        yield StepRecord(
            step=self.step,
            time=self.time,
            loss=scalars.pop("loss", NAN),
            lr=_number(self.lr),
            total_norm=decision[_kernels.OUT_NORM],
            clip_coef=decision[_kernels.OUT_COEFFICIENT],
            clip_threshold=decision[_kernels.OUT_ALLOWED],
            is_skipped=decision[_kernels.OUT_SKIP] == 1,
            scalars=scalars,
        )
        for kind, table in self.tables.items():
            yield TableRecord(self.step, kind, table.numpy())
        if self.ratio is not None:
            changes, norms = (norms.numpy() for norms in self.ratio)
            with np.errstate(divide="ignore", invalid="ignore"):
                yield UpdateRatioRecord(self.step, changes / norms)
        if self.histogram is not None:
            counts = self.histogram.counts.numpy()
            scale = self.histogram.scale
            yield HistogramRecord(self.step, counts if scale is None else unscaled(counts, scale))
        if self.activations is not None:
            yield ActivationRecord(self.step, tuple(_sites(self.activations)))


def unscaled(counts: NDArray[np.int64], scale: Tensor) -> NDArray[np.int64]:
    """Return histograms of scaled gradients as they are in true units.

    A scale is a power of two, as `torch.amp.GradScaler` makes it, or is taken for the nearest one:
    that moves the counts by whole bins. What falls off an end is counted in the last bin there.

    Args:
        counts: Shape (layers, 256).
        scale: One number; where it is not finite or not positive the counts stay as they are.
    """
    factor = float(scale)
    if not (0 < factor < float("inf")):
        return counts
    shift = -round(float(np.log2(factor)))
    place = np.clip(np.arange(counts.shape[1]) + shift, 0, counts.shape[1] - 1)
    moved = np.zeros_like(counts)
    for from_bin, to_bin in enumerate(place):
        moved[:, to_bin] += counts[:, from_bin]
    return moved


def ratio_of(step: StepCopy, updates: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return copies of the norms in two tables, (layers + 1, 12) each, without the totals."""
    return step.copy(updates[:-1, L2]), step.copy(weights[:-1, L2])


def _number(value: float | Tensor) -> float:
    if isinstance(value, Tensor):
        return float(value.abs() if value.is_complex() else value)
    return value


def _sites(table: ActivationTable) -> Iterator[SiteRecord]:
    for row in table:
        yield SiteRecord(
            name=row.name,
            kind=row.kind,
            units=row.units,
            dead_units=row.dead_units,
            saturated_low=row.low_fraction,
            saturated_high=row.high_fraction,
            zero_fraction=row.zero_fraction,
            mean=row.moments.mean,
            std=row.moments.std,
        )
