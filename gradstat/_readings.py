"""The numbers of a training run: newest decisions, counters and the window of recorded steps."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gradstat import _kernels
from gradstat._alarms import are_clipped
from gradstat._loss_scale import OverflowCount
from gradstat._recorder import Recorder
from gradstat._window import Ring
from gradstat.clipping.clipper import Clipper
from gradstat.columns import DEAD_ROWS, INFS, L2, NANS, RAW_COLUMNS
from gradstat.errors import ArgumentValueError
from gradstat.table import StatTable


class Readings:
    """What recorder, clipper and scaler know, as numbers and arrays on the host."""

    def __init__(self, clipper: Clipper, recorder: Recorder, overflows: OverflowCount) -> None:
        self._clipper = clipper
        self._recorder = recorder
        self._overflows = overflows

    # ---- numbers ---------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in the order of the tables; none before the first step."""
        return self._recorder.window.names if self._recorder.window is not None else ()

    @property
    def step(self) -> int:
        """Finished optimizer steps, skipped ones included."""
        return self._recorder.step

    @property
    def every(self) -> int:
        """Steps from one recorded step to the next."""
        return self._recorder.every

    @property
    def last(self) -> StatTable | None:
        """The newest recorded table of the gradients, in true units, before clipping.

        `None` before the first. Does not wait; the first look at the table does.
        """
        window = self._recorder.window
        if window is None or not window.steps:
            return None
        return StatTable(window.names, window.tables[window.newest].clone(), kind="gradient")

    @property
    def total_norm(self) -> float:
        """Total L2 norm of the newest recorded step, before clipping; NaN or Inf if one is."""
        return self._decision(_kernels.OUT_NORM)

    @property
    def clip_coef(self) -> float:
        """Total norm after clipping over total norm before, in the newest recorded step."""
        return self._decision(_kernels.OUT_COEFFICIENT)

    @property
    def clip_threshold(self) -> float:
        """Norm that the policy allowed in the newest recorded step; Inf where it allowed any."""
        return self._decision(_kernels.OUT_ALLOWED)

    @property
    def clip_rate(self) -> float:
        """Share of all steps with gradients that were clipped; NaN before the first."""
        counters = self._counters()
        measured = counters[_kernels.COUNTER_STEPS]
        return counters[_kernels.COUNTER_CLIPPED] / measured if measured else math.nan

    @property
    def skipped_steps(self) -> int:
        """Steps that the policy skipped: for a NaN or Inf, or as a spike."""
        return int(self._counters()[_kernels.COUNTER_SKIPPED])

    @property
    def skipped_in_a_row(self) -> int:
        """Steps skipped since the last one that was not."""
        return int(self._counters()[_kernels.COUNTER_SKIPPED_IN_A_ROW])

    @property
    def scaler_overflows(self) -> int:
        """Steps that a GradScaler dropped.

        Those of an optimizer that is not fused are counted where `attach` was given ``scaler``: its
        step is not called then, so they are no part of `step` either.
        """
        return self._overflows.total

    @property
    def already_clipped(self) -> bool:
        """Whether the window's gradients look as if they had been clipped before the step.

        That is so where most total norms agree to 1e-4 and differ by rounding only.
        """
        return are_clipped(self.decisions[:, _kernels.OUT_NORM])

    def _decision(self, place: int) -> float:
        window = self._recorder.window
        if window is None or not window.steps:
            return math.nan
        return window.decisions[window.newest][place].item()

    def _counters(self) -> list[float]:
        state = self._clipper.state
        if state is None:
            return [0.0] * _kernels.NUM_CLIP_COUNTERS
        counters: list[float] = state[: _kernels.NUM_CLIP_COUNTERS].tolist()
        return counters

    # ---- the window ------------------------------------------------------------------------------

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the window's columns."""
        return tuple(column.name for column in RAW_COLUMNS)

    @property
    def recorded_steps(self) -> NDArray[np.int64]:
        """Number of each recorded step in the window, that of a run's first being 1."""
        window = self._recorder.window
        return np.array(window.steps if window is not None else (), dtype=np.int64)

    @property
    def window(self) -> NDArray[np.float64]:
        """Tables of the recorded steps: (steps, layers, columns), oldest first.

        The row of a parameter without a gradient is NaN.
        """
        return self._tables("tables")[:, :-1]

    @property
    def totals(self) -> NDArray[np.float64]:
        """Totals over all layers of the recorded steps: (steps, columns), oldest first."""
        return self._tables("tables")[:, -1]

    @property
    def decisions(self) -> NDArray[np.float64]:
        """Decisions on the recorded steps, oldest first: (steps, 6).

        Columns: total norm, factor of the global policies, clip coefficient, whether skipped, norm
        allowed, whether all gradients were finite.
        """
        window = self._recorder.window
        if window is None:
            return np.zeros((0, _kernels.NUM_CLIP_OUT))
        return window.to_numpy(window.decisions)

    @property
    def weight_window(self) -> NDArray[np.float64]:
        """Tables of the parameters before each recorded step, like `window`.

        Raises:
            ArgumentValueError: `attach` was not asked for ``weights`` or ``updates``.
        """
        return self._tables("weights")[:, :-1]

    @property
    def update_window(self) -> NDArray[np.float64]:
        """Tables of the change of the parameters in each recorded step, like `window`.

        Raises:
            ArgumentValueError: `attach` was not asked for ``updates``.
        """
        return self._tables("updates")[:, :-1]

    @property
    def update_ratio(self) -> NDArray[np.float64]:
        """Norm of each parameter's change over its own norm before it: (steps, layers).

        Around 1e-3 is usual (Karpathy, cs231n, "Ratio of weights:updates"). NaN or Inf where a
        parameter was all zero.

        Raises:
            ArgumentValueError: `attach` was not asked for ``updates``.
        """
        updates, weights = self.update_window[..., L2], self.weight_window[..., L2]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio: NDArray[np.float64] = updates / weights
        return ratio

    @property
    def dead_rows(self) -> NDArray[np.float64]:
        """Smallest number of dead rows in the window's gradients, (layers,); NaN where none was.

        An upper bound on the rows that were zero throughout, which would need each row's own count:
        a row that is dead in every step is among the dead of each.
        """
        dead = self.window[..., DEAD_ROWS]
        known = np.where(np.isnan(dead), np.inf, dead).min(axis=0, initial=np.inf)
        return np.where(np.isinf(known), np.nan, known)

    def _tables(self, which: str) -> NDArray[np.float64]:
        if which != "tables" and not getattr(self._recorder, f"wants_{which}"):
            raise ArgumentValueError(
                f"{which} must be asked for to be recorded; use gradstat.attach(..., {which}=True)"
            )
        window = self._recorder.window
        if window is None:
            return np.zeros((0, 1, _kernels.NUM_COLUMNS))
        ring: Ring = getattr(window, which)
        return window.to_numpy(ring)

    def _recent_nonfinite(self) -> NDArray[np.float64]:
        window = self._recorder.window
        if window is None:
            return np.zeros((0, 0))
        counts = window.tables.sums_up_to(window.newest, len(window.steps), (NANS, INFS))
        return counts[:, :-1]
