"""What is kept of each step: gradients' tables in true units, weights, updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradstat import _kernels
from gradstat._window import Window
from gradstat.columns import RAW_COLUMNS

_POWERS = {"g": 1.0, "g^2": 2.0}
"""How a column of this unit grows with the gradients; all others are counts."""


class Recorder:
    """Counts the steps and fills the window with those that are recorded.

    Args:
        every: Steps from one recorded step to the next.
        length: Recorded steps that are remembered.
        weights: Also record tables of the weights.
        updates: Also record tables of each step's change of the weights.
    """

    def __init__(self, *, every: int, length: int, weights: bool, updates: bool) -> None:
        self.every = every
        self.length = length
        self.step = 0
        """Finished steps."""

        self.is_recording = False
        """Whether the step under way is recorded."""

        self.window: Window | None = None
        self.wants_weights = weights or updates
        self.wants_updates = updates
        self._scratch: tuple[Tensor, Tensor] | None = None
        self._powers: Tensor | None = None
        self._weights: Tensor | None = None
        self._before: list[Tensor] = []

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Start a step, before a closure can have changed the parameters."""
        self.is_recording = self.step % self.every == 0
        if self.wants_weights and self.is_recording:
            self._weights = _table(parameters)
            if self.wants_updates:
                self._before = [parameter.detach().clone() for parameter in parameters]

    def bind(self, names: Sequence[str], device: torch.device) -> bool:
        """Make room for these parameters on this device; return whether anything has changed.

        The window starts anew where the names are others.
        """
        window = self.window
        if window is not None and window.device == device and window.names is names:
            return False
        if window is not None and window.names == tuple(names):
            if window.device == device:
                return False
            window.move(device)
        else:
            self.window = window = Window(
                names,
                device,
                self.length,
                weights=self.wants_weights,
                updates=self.wants_updates,
            )
        self._scratch = (torch.zeros_like(window.tables[0]), torch.zeros_like(window.decisions[0]))
        powers = [_POWERS.get(column.unit, 0.0) for column in RAW_COLUMNS]
        self._powers = torch.tensor(powers, dtype=torch.float64, device=device)
        return True

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return where the step's table and decision go: the window, or a place of no memory."""
        assert self.window is not None
        assert self._scratch is not None
        if not self.is_recording:
            return self._scratch
        window = self.window
        window.open(self.step + 1)
        window.put(window.weights, self._weights)
        return window.tables[window.newest], window.decisions[window.newest]

    def unscale(self, table: Tensor, grad_scale: Tensor) -> None:
        """Bring a table of scaled gradients into true units."""
        assert self._powers is not None
        table.mul_(grad_scale.double().reciprocal().pow(self._powers))

    def refill(self, steps: Sequence[int], tables: Tensor, decisions: Tensor) -> None:
        """Fill the window with saved rows in place of its own."""
        window = self.window
        assert window is not None
        window.steps.clear()
        for step, table, decision in zip(steps, tables, decisions, strict=True):
            window.open(step)
            window.put(window.tables, table)
            window.put(window.decisions, decision)

    def finish(self, parameters: Sequence[Tensor]) -> None:
        """Count the step, and record what it did to the parameters."""
        if self._before:
            changes = [
                new.detach() - old for new, old in zip(parameters, self._before, strict=True)
            ]
            self._before = []
            window = self.window
            if window is not None and window.steps and window.steps[-1] == self.step + 1:
                window.put(window.updates, _table(changes))
        self.step += 1


def _table(tensors: Sequence[Tensor]) -> Tensor:
    return _kernels.moments(_kernels.gather(tensors))[0]
