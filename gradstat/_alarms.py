"""What is said about a run, each thing once: no gradients, skips without end, clipped before."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat import _kernels
from gradstat._capture import is_capturing
from gradstat._warnings import warn_user
from gradstat._window import Window

SKIPS_BEFORE_WARNING = 20
STEPS_BETWEEN_LOOKS = 50
"""Steps between two looks at the norms of the window, and the fewest recorded ones that tell."""

_SAME_NORM = 1e-4
"""torch's clipping leaves ``c * n / (n + 1e-6)``: within 1e-4 of c for norms above 0.01."""

_LEAST_LIMIT = 1e-5
"""Norm below which nobody clips: limits in use lie between 0.01 and 100. A batch that has been
learnt by heart leaves gradients far smaller, which are equal but for rounding."""


class LateCopy:
    """A copy on the host that is asked for now and read when it is there: no step waits for it."""

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._event: Any = None

    @property
    def is_idle(self) -> bool:
        """Whether none is under way."""
        return self._copy is None

    def start(self, tensor: Tensor) -> None:
        """Ask for a copy."""
        if tensor.device.type != "cuda":
            self._copy = tensor.detach().to("cpu", copy=True)
            return
        if is_capturing():
            return
        with torch.cuda.device(tensor.device):
            self._copy = tensor.detach().to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def take(self) -> Tensor | None:
        """Return the copy if it has arrived."""
        if self._event is not None:
            if is_capturing() or not self._event.query():
                return None
            self._event = None
        copy, self._copy = self._copy, None
        return copy


class Alarms:
    """Looks at every step and warns where the user should know."""

    def __init__(self) -> None:
        self._told: set[str] = set()
        self._in_a_row = 0
        self._state = LateCopy()
        self._decisions = LateCopy()
        self.next_look = STEPS_BETWEEN_LOOKS
        """Finished steps from which on `look_at_norms` has something to do."""

        self._looked_at = 0
        self._steps: tuple[int, ...] = ()

    def no_gradients(self) -> None:
        """Say that there was nothing to measure."""
        self._tell(
            "no gradients",
            "no parameter had a gradient at optimizer.step(), so gradstat measures nothing: call "
            "backward() before it. An optimizer that steps inside backward leaves no gradients",
        )

    def look_at_skips(self, step: int, skipped: bool | None, state: Tensor | None) -> None:
        """Warn of many skips in a row.

        Args:
            step: Finished steps.
            skipped: Whether the step was skipped, `None` where only the device knows.
            state: State of the policy with its counters.
        """
        if skipped is not None:
            self._in_a_row = self._in_a_row + 1 if skipped else 0
        elif state is not None and "skips" not in self._told:
            counters = self._state.take()
            if counters is not None:
                self._in_a_row = int(counters[_kernels.COUNTER_SKIPPED_IN_A_ROW])
            if self._state.is_idle:
                self._state.start(state[: _kernels.NUM_CLIP_COUNTERS])
        if self._in_a_row >= SKIPS_BEFORE_WARNING:
            self._tell(
                "skips",
                f"{self._in_a_row} steps in a row were skipped by step {step}: the model does not "
                "learn any more, and skipping is no cure. Look for NaN and Inf in "
                "optimizer.gradstat.last, lower the learning rate, or go back to a checkpoint",
            )

    def look_at_norms(self, window: Window) -> int | None:
        """Warn where the gradients come clipped; to be called once in a while: see `next_look`.

        Returns:
            The first of the steps looked at whose gradients held NaN or Inf.
        """
        if self._decisions.is_idle:
            self._looked_at, self._steps = window.newest, tuple(window.steps)
            self._decisions.start(window.decisions.data[:, _kernels.OUT_NORM])
        copy = self._decisions.take()
        if copy is None:
            return None
        self.next_look = self._steps[-1] + STEPS_BETWEEN_LOOKS
        count = len(self._steps)
        norms = copy.numpy()[
            np.arange(self._looked_at - count + 1, self._looked_at + 1) % len(copy)
        ]
        if "clipped before" not in self._told and are_clipped(norms):
            self._tell(
                "clipped before",
                "gradients seem to be already clipped when gradstat sees them: most of the last "
                f"{np.count_nonzero(norms)} total norms are {constant_norm(norms):.4g}. "
                "All statistics are then those of clipped gradients; leave the clipping to "
                "gradstat.attach(optimizer, clip=...) and drop the other call",
            )
        bad = ~np.isfinite(norms)
        return self._steps[int(bad.argmax())] if bad.any() else None

    def _tell(self, what: str, message: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warn_user(
                f'{message}. To silence: warnings.filterwarnings("ignore", '
                f'message="{message[:24]}")'
            )


def constant_norm(norms: NDArray[np.float64]) -> float:
    """Return the norm that most of these agree on to 1e-4, NaN where most do not."""
    values = np.sort(norms[np.isfinite(norms) & (norms > 0)])
    half = len(values) // 2
    if len(values) < STEPS_BETWEEN_LOOKS:
        return float("nan")
    limits = values * (1 + _SAME_NORM)
    if not (values[half:] <= limits[: len(values) - half]).any():  # so it is in most runs
        return float("nan")
    counts = np.searchsorted(values, limits, "right") - np.arange(len(values))
    start = int(counts.argmax())
    return float(np.median(values[start : start + counts[start]]))


def are_clipped(norms: NDArray[np.float64]) -> bool:
    """Return whether these norms, in order, look as if somebody had clipped them.

    Clipped norms agree on a value but for the rounding of each element. Norms that are equal to the
    last bit, or that creep in one direction, come from a loss that hardly changes.
    """
    level = constant_norm(norms)
    if not level > _LEAST_LIMIT:
        return False
    at_level = norms[np.abs(norms - level) <= _SAME_NORM * level]
    change = np.diff(at_level)
    turns = np.count_nonzero(change[1:] * change[:-1] < 0)
    return bool(turns > len(at_level) / 4)
