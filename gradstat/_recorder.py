"""What is kept of each step: gradients' tables in true units, weights, updates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradstat import _kernels
from gradstat._window import Window
from gradstat.columns import RAW_COLUMNS

_POWERS = {"g": 1.0, "g^2": 2.0}
"""How a column of this unit grows with the gradients; all others are counts."""


class Histogram(NamedTuple):
    """Magnitudes of the gradients of one step by binary exponent."""

    counts: Tensor
    """int64 (parameters + 1, 256), totals last."""

    scale: Tensor | None
    """fp32 scalar that these gradients were multiplied with, under loss scaling."""


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

        self.first_nonfinite: int | None = None
        """The first step known to have had NaN or Inf in its gradients; found some steps later."""

        self.is_recording = False
        """Whether the step under way is recorded."""

        self.histogram_every: int | None = None
        """Recorded steps from one to the next whose gradients' magnitudes are counted."""

        self.histogram: Histogram | None = None
        """Magnitudes of the gradients of that step, where they are counted."""

        self.window: Window | None = None
        self.wants_weights = weights or updates
        self.wants_updates = updates
        self._has_measured = False
        self._scratch: tuple[Tensor, Tensor] | None = None
        self._powers: Tensor | None = None
        self._weights: Tensor | None = None
        self._before: list[Tensor] = []
        self._measure: _kernels.Measure | None = None
        self._program: Any = None
        """That of `_measure`, which is made anew with each one and for each window."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_measure": None, "_program": None}  # a copy is for reading

    def begin(self, parameters: Sequence[Tensor]) -> None:
        """Start a step, before a closure can have changed the parameters."""
        self.is_recording = self.step % self.every == 0
        self._has_measured, self.histogram = False, None
        if self.wants_weights and self.is_recording:
            self._weights = _table(parameters)
            if self.wants_updates:
                self._before = [parameter.detach().clone() for parameter in parameters]

    def bind(self, names: Sequence[str], device: torch.device) -> bool:
        """Make room for these parameters on this device; return whether anything has changed.

        The window starts anew where the names are others.
        """
        window, names = self.window, tuple(names)
        if window is not None and window.device == device and window.names == names:
            window.names = names  # the very tuple, which `measure` asks for
            return False
        self._make_room(names, device)
        return True

    @torch.inference_mode(False)
    def _make_room(self, names: Sequence[str], device: torch.device) -> None:
        """Do so in a way that steps in and out of inference mode can write there."""
        window = self.window
        if window is not None and window.names == tuple(names):
            window.move(device)
        else:
            self.window = window = Window(
                names,
                device,
                self.length,
                weights=self.wants_weights,
                updates=self.wants_updates,
            )
        self._measure = self._program = None
        self._scratch = (torch.zeros_like(window.tables[0]), torch.zeros_like(window.decisions[0]))
        powers = [_POWERS.get(column.unit, 0.0) for column in RAW_COLUMNS]
        self._powers = torch.tensor(powers, dtype=torch.float64, device=device)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return where the step's table and decision go: the window, or a place of no memory."""
        assert self.window is not None
        assert self._scratch is not None
        return self.window.rows(self.step + 1) if self.is_recording else self._scratch

    def measure(self, parameters: Sequence[Tensor], names: Sequence[str], program: Any) -> bool:
        """Measure the gradients of an ordinary step at once, and keep them.

        Args:
            parameters: Those with the gradients.
            names: Their names.
            program: What the kernel runs.

        Returns:
            Whether it is done. It is not, and nothing is written, where the step is not recorded,
            where the window does not lie on the CPU or is of another tuple of names, and where
            `_kernels.measurer` does not measure them.
        """
        window = self.window
        if window is None or window.names is not names or not self.is_recording:
            return False
        if self._program is not program:
            self._program = program
            self._measure = _kernels.measurer(window.tables.data, window.decisions.data, program)
        if self._measure is None:
            return False
        place = window.place(self.step + 1)
        if not self._measure(parameters, place, torch.get_num_threads()):
            return False
        self.keep()
        return True

    @property
    def decision(self) -> Tensor | None:
        """Decision on the step under way or the newest; None where it was not measured."""
        window, scratch = self.window, self._scratch
        if not self._has_measured or window is None or scratch is None:
            return None
        return window.decisions[window.newest] if self.is_recording else scratch[1]

    def keep(self) -> None:
        """Count what has been written to the rows of the step."""
        self._has_measured = True
        if self.is_recording and self.window is not None:
            self.window.open(self.step + 1)
            if self.wants_weights:
                self.window.put(self.window.weights, self._weights)

    @property
    def wants_histogram(self) -> bool:
        """Whether the magnitudes of the step under way are counted."""
        due = self.histogram_every
        return due is not None and self.is_recording and self.step // self.every % due == 0

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
        """Record what the step just counted did to the parameters.

        Nothing is known of it where it has put others, or of another shape, in their place.
        """
        before, self._before = self._before, []
        window = self.window
        if not before or window is None or not window.steps or window.steps[-1] != self.step:
            return
        if [old.shape for old in before] == [new.shape for new in parameters]:
            changes = [new.detach() - old for new, old in zip(parameters, before, strict=True)]
            window.put(window.updates, _table(changes))
        else:
            window.put(window.updates, torch.full_like(window.tables[0], torch.nan))


def _table(tensors: Sequence[Tensor]) -> Tensor:
    return _kernels.moments(_kernels.gather(tensors))[0]
