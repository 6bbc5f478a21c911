"""`Monitor`: what is known of a training run, for those who look at it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer

from gradstat import _kernels
from gradstat._accumulation import Accumulation
from gradstat._alarms import are_clipped
from gradstat._evidence import (
    Facts,
    batch_of,
    curve_of,
    facts_of,
    probes_of,
    sites_of,
)
from gradstat._loss_scale import OverflowCount
from gradstat._observations import Observation, Observations
from gradstat._probes import Probes
from gradstat._recorder import Recorder
from gradstat._rounds import Rounds
from gradstat._warnings import warn_user
from gradstat._watched import Watched
from gradstat._window import Ring
from gradstat.activations import ActivationMonitor, ActivationTable
from gradstat.clipping.clipper import Clipper
from gradstat.columns import DEAD_ROWS, INFS, L2, NANS, RAW_COLUMNS
from gradstat.diagnosis import Finding, coverage, diagnose
from gradstat.diagnosis.evidence import Evidence
from gradstat.errors import ArgumentValueError
from gradstat.table import StatTable

_STATE_VERSION = 1


class DeadUnits(NamedTuple):
    """Units of one layer that are dead, by two witnesses that know nothing of each other."""

    site: str
    """Where the activation was seen."""

    units: int
    dead_units: int
    """Units that no sample of the activations' window has activated."""

    weight: str | None
    """The weight whose rows make these units, where it is known."""

    dead_rows: int | None
    """Upper bound on its rows whose gradient was zero throughout the gradients' window."""


class Monitor:
    """What is known of a training run; made by `attach`, found at ``optimizer.gradstat``.

    Memory: ``window * (parameters + 1) * 12 * 8`` bytes for the gradients' tables on their device,
    and as much again for ``weights`` and for ``updates`` each; 4.8 MB for 100 steps of 500
    parameters. ``updates`` holds a copy of the parameters during a recorded step. Of each name that
    is observed the last ``window`` values are kept.

    Numbers and arrays are read from the device: their properties wait for a CUDA device, and no
    step does. A copy (`copy.deepcopy`, pickle) keeps what is known now and follows no optimizer.
    """

    def __init__(
        self,
        optimizer: Callable[[], Optimizer | None],
        watched: Watched,
        clipper: Clipper,
        recorder: Recorder,
        probes: Probes,
        overflows: OverflowCount,
        accumulation: Accumulation,
        activations: ActivationMonitor | None,
        rounds: Rounds,
    ) -> None:
        self._rounds = rounds
        self._source: Callable[[], Optimizer | None] | Facts = optimizer
        self._watched = watched
        self._accumulation = accumulation
        self._activations = activations
        self._first_activations: ActivationTable | None = None
        self._clipper = clipper
        self._recorder = recorder
        self._probes = probes
        self._overflows = overflows
        self._observations = Observations(recorder.length)
        self._callbacks: list[Callable[[Monitor], Any]] = []

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

    # ---- activations -----------------------------------------------------------------------------

    @property
    def activations(self) -> ActivationMonitor | None:
        """The activations of sampled steps; `None` unless `attach` was asked for them."""
        return self._activations

    @property
    def dead_units(self) -> list[DeadUnits]:
        """Dead units of each activation, beside the dead rows of the weight that makes them.

        Empty before the first sampled step.

        Raises:
            ArgumentValueError: `attach` was not asked for ``activations``.
        """
        if self._activations is None:
            raise ArgumentValueError(
                "activations must be asked for to be counted; use gradstat.attach(optimizer, "
                "model, activations=True)"
            )
        rows = dict(zip(self.names, self.dead_rows.tolist(), strict=True))
        found = []
        for site in self._activations.table():
            dead_rows = rows.get(site.weight or "", math.nan)
            found.append(
                DeadUnits(
                    site.name,
                    site.units,
                    site.dead_units,
                    site.weight,
                    None if math.isnan(dead_rows) else int(dead_rows),
                )
            )
        return found

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

    # ---- what the training script says -----------------------------------------------------------

    def observe(self, **values: Any) -> None:
        """Take note of values of this step: ``loss``, ``outputs``, ``val_loss``, any metric.

        Args:
            **values: Numbers, or tensors of any dtype on any device. Of a tensor with several
                elements the statistics are kept, not the elements. `None` is passed over.

        Does not synchronise and holds no graph. Keeps the last ``window`` values of each name.

        Raises:
            ArgumentTypeError: A value is neither a number nor a tensor.

        Example:
            >>> optimizer.gradstat.observe(loss=loss, outputs=logits)
        """
        self._observations.add(self.step, values, is_probed=self._probes.is_due(self.step + 1))

    def observed(self, name: str) -> list[Observation]:
        """Return what was observed under a name, oldest first; nothing under an unknown one."""
        return self._observations.under(name)

    def on_step(self, callback: Callable[[Monitor], Any]) -> Callable[[Monitor], Any]:
        """Call ``callback(monitor)`` after each finished step.

        It runs inside ``optimizer.step()``, after everything is put back; what it raises comes out
        there.

        Returns:
            ``callback``, so that this serves as a decorator.
        """
        self._callbacks.append(callback)
        return callback

    def call_back(self) -> None:
        """Run the callbacks of `on_step`."""
        if self._activations is not None and self.step == 1:
            self._first_activations = self._activations.table()
        for callback in self._callbacks:
            callback(self)

    # ---- diagnosis -------------------------------------------------------------------------------

    def evidence(self) -> Evidence:
        """Return all that is known of the run, on the host. Synchronises with a CUDA device."""
        facts = self._facts()
        names = self._observations.scalar_names
        fits = tuple(self._probes.names) == tuple(layer.name for layer in facts.layers)
        return Evidence(
            step=self.step,
            layers=facts.layers,
            probes=probes_of(self._probes.kept if fits else (), len(facts.layers)),
            recent_steps=self.recorded_steps,
            recent_nonfinite=self._recent_nonfinite(),
            decisions=self.decisions,
            curves={name: curve_of(self._observations.scalars(name)) for name in names},
            batches=tuple(batch_of(sample) for sample in self._observations.samples),
            optimizer=facts.optimizer,
            model=facts.model,
            sites=sites_of(self._activations.table()) if self._activations is not None else (),
            first_sites=sites_of(self._first_activations) if self._first_activations else (),
            activations_watched=self._activations is not None,
            skipped_steps=self.skipped_steps,
            accumulated_steps=self._accumulation.steps,
        )

    def _facts(self) -> Facts:
        """Return what is known of optimizer and model: now, or in a copy when it was made."""
        if isinstance(self._source, Facts):
            return self._source
        optimizer = self._source()
        if optimizer is None:
            raise ArgumentValueError(
                "a monitor must be asked for a diagnosis while its optimizer exists; keep the "
                "optimizer, or a copy.deepcopy of the monitor"
            )
        return facts_of(optimizer, self._watched)

    def _recent_nonfinite(self) -> NDArray[np.float64]:
        window = self._recorder.window
        if window is None:
            return np.zeros((0, 0))
        counts = window.tables.part(slice(NANS, INFS + 1))
        nonfinite: NDArray[np.float64] = window.to_numpy(counts).sum(-1)
        return nonfinite[:, :-1]

    def diagnose(self) -> list[Finding]:
        """Return what is wrong with the run: the likeliest cause first, each before its symptoms.

        An empty list says that nothing was found, and `coverage` what could be looked for. The
        rules, their thresholds and sources: docs/diagnosis.md. Takes milliseconds on the host;
        synchronises with a CUDA device, once for each kind of table.

        Example:
            >>> for finding in optimizer.gradstat.diagnose():
            ...     print(finding)
        """
        return diagnose(self.evidence())

    def coverage(self) -> dict[str, str]:
        """Return for each code ``"judged"``, or what has to be observed so that it can be judged.

        Synchronises with a CUDA device.
        """
        return coverage(self.evidence())

    def on_finding(self, callback: Callable[[Finding], Any]) -> Callable[[Finding], Any]:
        """Call ``callback(finding)`` for each cause that is found while training, once for a code.

        The run is looked at after 256, 512, 1024, ... steps, or every so many as `attach` was asked
        for with ``diagnose``. New causes also go to the logger ``gradstat``, as warnings. What the
        callback raises comes out of ``optimizer.step()``. Does not synchronise.

        Returns:
            ``callback``, so that this serves as a decorator.
        """
        self._rounds.callbacks.append(callback)
        return callback

    def make_rounds(self) -> None:
        """Look at the run, if it is time, and tell of what is new."""
        if self._rounds.is_due(self.step):
            self._rounds.tell(self.diagnose)

    # ---- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return counters, the policy's state and the window's tables, on the CPU.

        It travels in ``optimizer.state_dict()["gradstat"]``. Synchronises.
        """
        window = self._recorder.window
        return {
            "version": _STATE_VERSION,
            "step": self.step,
            "scaler_overflows": self.scaler_overflows,
            "clipper": self._clipper.state_dict(),
            "names": list(self.names),
            "recorded_steps": list(window.steps) if window is not None else [],
            "tables": torch.from_numpy(self._tables("tables")),
            "decisions": torch.from_numpy(self.decisions),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; tables of other parameters are left out.

        What was observed after the saved step is forgotten. Warns where the policy differs: its
        state then starts afresh.
        """
        if saved.get("version") != _STATE_VERSION:
            warn_user(
                f"the checkpoint's gradstat state is of version {saved.get('version')!r} and this "
                f"gradstat reads version {_STATE_VERSION}: statistics and policy start afresh",
                UserWarning,
            )
            return
        self._recorder.step = int(saved["step"])
        self._observations.forget_since(self.step)
        self._probes.forget_after(self.step)
        self._overflows.restore(int(saved["scaler_overflows"]))
        window = self._recorder.window
        device = window.device if window is not None else torch.device("cpu")
        learnt, policy = saved["clipper"], self._clipper.policy
        if not self._clipper.load_state_dict(learnt, device) and learnt["policy"] != "None":
            warn_user(
                f"the checkpoint holds the state of clip={learnt['policy']}, and this run uses "
                f"clip={policy!r}: its history starts afresh; attach with the same policy to go on "
                "with it",
                UserWarning,
            )
        if window is not None and window.names == tuple(saved["names"]):
            self._recorder.refill(saved["recorded_steps"], saved["tables"], saved["decisions"])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_callbacks": [], "_source": self._facts(), "_watched": None}

    def __repr__(self) -> str:
        return (
            f"Monitor(step={self.step}, parameters={len(self.names)}, "
            f"clip={self._clipper.policy!r})"
        )
