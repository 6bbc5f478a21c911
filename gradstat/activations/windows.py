"""The counts of every site over the last sampled steps, in two halves of a window."""

from __future__ import annotations

import threading
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from gradstat import _kernels
from gradstat._units import UnitCounts
from gradstat.activations.kinds import Bounds, Kind
from gradstat.activations.table import ActivationTable, Layout, Measured, packed


class Call(NamedTuple):
    """One call of an activation."""

    name: str
    kind: Kind
    bounds: Bounds
    output: Tensor
    unit_dim: int
    positions: int = 0
    weight: str | None = None


class _Site(NamedTuple):
    kind: Kind
    bounds: Bounds
    units: int
    weight: str | None


class _Half:
    """Counts of the sites over some steps, one window for each device that a site was on."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, torch.device], UnitCounts] = {}
        self.positions: Counter[str] = Counter()
        self.memory: dict[torch.device, Tensor] = {}
        """The numbers of all windows, side by side once `pack` has been called."""

        self.names: dict[torch.device, list[str]] = {}
        """The sites that they are of, in order."""

    def begin(self, key: tuple[str, torch.device], window: UnitCounts) -> None:
        """Take a window of a site on a device."""
        self.counts[key] = window
        self.memory = {}

    def forget(self, name: str) -> None:
        """Drop the windows of a site."""
        self.counts = {key: window for key, window in self.counts.items() if key[0] != name}
        del self.positions[name]
        self.memory = {}

    def pack(self) -> None:
        """Lay the windows of each device side by side, so that one copy takes them all."""
        if self.memory:
            return
        keys: dict[torch.device, list[tuple[str, torch.device]]] = {}
        for key, window in self.counts.items():
            keys.setdefault(window.row.device, []).append(key)
        self.names = {device: [name for name, _ in of_one] for device, of_one in keys.items()}
        for device, of_one in keys.items():
            parts = [packed(self.counts[key]) for key in of_one]
            self.memory[device] = memory = torch.cat(parts)
            for key, part in zip(of_one, memory.split_with_sizes([*map(len, parts)]), strict=True):
                row, counts = part.tensor_split([_kernels.NUM_COLUMNS])
                shape = self.counts[key].counts.shape
                self.counts[key] = UnitCounts(counts.view(shape), row.view(torch.float64))

    def clear(self) -> None:
        """Begin anew in the same memory."""
        self.pack()
        self.positions.clear()
        for memory in self.memory.values():
            memory.zero_()


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
        self._newer = _Half()
        self._older = _Half()
        self._newer_steps = 0
        self._older_steps = 0
        self._layout: Layout | None = None
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
            is_known = site is not None and site[:3] == (call.kind, call.bounds, units)
            key = call.name, call.output.device
            before = self._newer.counts.get(key) if is_known else None
            window = _kernels.units(
                call.output,
                call.kind.rule(call.bounds, call.output.dtype),
                call.unit_dim,
                before,
                name=call.name,
            )
            if not is_known:
                if site is not None:
                    self._newer.forget(call.name)
                    self._older.forget(call.name)
                self._sites[call.name] = _Site(call.kind, call.bounds, units, call.weight)
                self._layout = None
            if before is None:
                self._newer.begin(key, window)
            self._newer.positions[call.name] += call.positions

    def table(self) -> ActivationTable:
        """Return what both halves hold. Does not synchronise."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            halves = (self._newer, self._older)
            for half in halves:
                half.pack()
            devices = self._newer.memory | self._older.memory
            parts = {
                device: [name for half in halves for name in half.names.get(device, ())]
                for device in devices
            }
            if self._layout is None or self._layout.parts != parts:
                sites = [
                    Measured(name, site.kind, site.units, site.weight)
                    for name, site in self._sites.items()
                ]
                self._layout = Layout(sites, parts)
            memory = {
                device: torch.cat([h.memory[device] for h in halves if device in h.memory])
                for device in devices
            }
            newer, older = (half.positions for half in halves)
            positions = [newer.get(name, 0) + older.get(name, 0) for name in self._sites]
            steps = self._newer_steps + self._older_steps
            return ActivationTable(self._layout, memory, positions, steps=steps)

    def __reduce__(self) -> tuple[type[_Copy], tuple[ActivationTable]]:
        return _Copy, (self.table(),)

    def _open_step(self) -> None:
        """Begin a sampled step; the older half is forgotten where the newer one is full."""
        if self._newer_steps == self._half_length:
            if self._length > 1:
                self._newer, self._older = self._older, self._newer
            self._newer.clear()
            self._older_steps = self._newer_steps if self._length > 1 else 0
            self._newer_steps = 0
        self._newer_steps += 1


class _Copy(NamedTuple):
    """What a copy of windows holds: it counts nothing."""

    kept: ActivationTable

    def table(self) -> ActivationTable:
        """Return what both halves held."""
        return self.kept
