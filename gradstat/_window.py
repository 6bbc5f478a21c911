"""The rows of the last recorded steps, kept on the device and written in place."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat import _kernels


class Ring:
    """Rows of equal shape, fp64, found by a number that keeps rising."""

    def __init__(self, length: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.length = length
        self._all = torch.zeros((length, *shape), dtype=torch.float64, device=device)

    @cached_property
    def rows(self) -> tuple[Tensor, ...]:
        """Each of them, in the order of memory: number n lies at n modulo the length.

        Made at the first look, all at once: one by one a cold step takes ten times as long for it.
        """
        return self._all.unbind(0)

    def __getitem__(self, number: int) -> Tensor:
        return self.rows[number % self.length]

    def move(self, device: torch.device) -> None:
        """Continue on another device."""
        self.__setstate__(self._all.to(device))

    def __getstate__(self) -> Tensor:
        return self._all  # pickle would write all of it for every row

    def __setstate__(self, state: Tensor) -> None:
        self.__dict__ = {"length": len(state), "_all": state}

    @property
    def data(self) -> Tensor:
        """All rows, in no order."""
        return self._all

    def up_to(self, newest: int, count: int) -> NDArray[np.float64]:
        """Return the ``count`` rows up to number ``newest``, oldest first. Synchronises once."""
        return self._in_order(self._all, newest, count)

    def sums_up_to(self, newest: int, count: int, columns: tuple[int, int]) -> NDArray[np.float64]:
        """Return the sums of two columns of these rows alone, or zeros where the totals are 0."""
        first, second = columns
        totals = self._all[:, -1, first] + self._all[:, -1, second]
        if not totals.any():
            return np.broadcast_to(0.0, (count, self._all.shape[1]))
        return self._in_order(self._all[..., first] + self._all[..., second], newest, count)

    def _in_order(self, rows: Tensor, newest: int, count: int) -> NDArray[np.float64]:
        host: NDArray[np.float64] = rows.cpu().numpy()
        return host[np.arange(newest - count + 1, newest + 1) % self.length]


class Window:
    """Tables, decisions, weights and updates of the last recorded steps.

    Args:
        names: Names of the parameters.
        device: Where the rows lie: the gradients' device.
        length: Steps remembered.
        weights: Whether there are tables of the weights.
        updates: Whether there are tables of the updates.
    """

    def __init__(
        self,
        names: Sequence[str],
        device: torch.device,
        length: int,
        *,
        weights: bool,
        updates: bool,
    ) -> None:
        self.names = tuple(names)
        self.device = device
        shape = (len(self.names) + 1, _kernels.NUM_COLUMNS)
        self.tables = Ring(length, shape, device)
        self.decisions = Ring(length, (_kernels.NUM_CLIP_OUT,), device)
        self.weights = Ring(length, shape, device) if weights else None
        self.updates = Ring(length, shape, device) if updates else None
        self.steps: deque[int] = deque(maxlen=length)
        """Number of each recorded step, the first being 1; oldest first."""

        self.newest = 0
        """Number of the newest row of every ring."""

    def place(self, step: int) -> int:
        """Return where in the rings' memory a step's rows lie; they count once it is opened."""
        newest = self.newest if self.steps and self.steps[-1] == step else self.newest + 1
        return newest % self.tables.length

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        """Return where a step's table and decision go."""
        place = self.place(step)
        return self.tables.rows[place], self.decisions.rows[place]

    def open(self, step: int) -> None:
        """Begin the rows of a step; those of a step that is measured again are written again."""
        if not self.steps or self.steps[-1] != step:
            self.steps.append(step)
            self.newest += 1

    def put(self, ring: Ring | None, row: Tensor | None) -> None:
        """Write a row of the newest step, where there is one and a ring for it."""
        if ring is not None and row is not None:
            ring[self.newest].copy_(row)

    def to_numpy(self, ring: Ring) -> NDArray[np.float64]:
        """Return the recorded rows of a ring, oldest first. Synchronises once."""
        return ring.up_to(self.newest, len(self.steps))

    def move(self, device: torch.device) -> None:
        """Continue on another device."""
        self.device = device
        for ring in (self.tables, self.decisions, self.weights, self.updates):
            if ring is not None:
                ring.move(device)
