"""The counts of every site over the last sampled steps, in two halves of a window."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradstat import _kernels
from gradstat._units import UnitCounts
from gradstat.activations.kinds import Bounds, Kind
from gradstat.activations.table import ActivationTable, Measured


@dataclass
class _Half:
    """Counts of one site, one window for each device, and the positions that they are of."""

    by_device: dict[torch.device, UnitCounts] = field(default_factory=dict)
    positions: int = 0

    def clear(self) -> None:
        """Begin anew in the same memory."""
        self.positions = 0
        for window in self.by_device.values():
            window.counts.zero_()
            window.row.zero_()


@dataclass
class _Site:
    kind: Kind
    bounds: Bounds
    units: int
    weight: str | None
    newer: _Half = field(default_factory=_Half)
    older: _Half = field(default_factory=_Half)


class Call(NamedTuple):
    """One call of an activation."""

    name: str
    kind: Kind
    bounds: Bounds
    output: Tensor
    unit_dim: int
    positions: int = 0
    weight: str | None = None


class Windows:
    """Counts over at least half of the last ``length`` sampled steps, and at most all of them.

    Memory, on the device of the activations: two halves of 24 bytes a unit and 96 a site.

    Args:
        length: Sampled steps in a full window.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._half_length = max(1, length // 2)
        self._sites: dict[str, _Site] = {}
        self._newer_steps = 0
        self._older_steps = 0
        self._step: int | None = None
        self._lock = threading.Lock()

    def add(self, step: int, call: Call) -> None:
        """Count an activation of a step. A site that changes its kind or units begins anew."""
        units = call.output.size(call.unit_dim) if call.output.dim() else 1
        with self._lock:
            if step != self._step:
                self._step = step
                self._open_step()
            site = self._sites.get(call.name)
            if site is None or (site.kind, site.bounds, site.units) != (
                call.kind,
                call.bounds,
                units,
            ):
                site = _Site(call.kind, call.bounds, units, call.weight)
            half, device = site.newer, call.output.device
            half.by_device[device] = _kernels.units(
                call.output,
                call.kind.rule(call.bounds, call.output.dtype),
                call.unit_dim,
                half.by_device.get(device),
                name=call.name,
            )
            half.positions += call.positions
            self._sites[call.name] = site

    def table(self) -> ActivationTable:
        """Return what both halves hold. Does not synchronise."""
        with self._lock:
            measured = [
                Measured(
                    name,
                    site.kind,
                    [*site.newer.by_device.values(), *site.older.by_device.values()],
                    site.newer.positions + site.older.positions,
                    site.weight,
                )
                for name, site in self._sites.items()
            ]
            return ActivationTable(measured, steps=self._newer_steps + self._older_steps)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def _open_step(self) -> None:
        """Begin a sampled step; the older half is forgotten where the newer one is full."""
        if self._newer_steps == self._half_length:
            for site in self._sites.values():
                if self._length > 1:
                    site.newer, site.older = site.older, site.newer
                site.newer.clear()
            self._older_steps = self._newer_steps if self._length > 1 else 0
            self._newer_steps = 0
        self._newer_steps += 1
