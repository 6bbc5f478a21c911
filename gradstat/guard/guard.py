"""`Guard`: acts upon findings while a run trains, within bounds, and keeps a record of it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gradstat import _kernels
from gradstat._capture import is_capturing
from gradstat._evidence import curve_of
from gradstat.diagnosis.finding import Finding, Measure
from gradstat.errors import ArgumentValueError
from gradstat.guard.arguments import check_counts, checked_schedulers, optimizer_of
from gradstat.guard.losses import LossWatch
from gradstat.guard.rules import (
    DIVERGENCE,
    CutLR,
    GuardAction,
    GuardRule,
    RollBack,
    SkipNonfinite,
    StopEarly,
    TightenClip,
    checked,
)
from gradstat.guard.schedules import rates_of, scale_rates
from gradstat.guard.snapshots import DiskRing, HostRing, Ring
from gradstat.guard.state import RunState, is_whole, size_of

if TYPE_CHECKING:
    from gradstat._observations import Observation
    from gradstat.monitor import Monitor

SKIPS_IN_A_ROW = 5
"""Steps skipped one after the other that are no accident of a batch."""

SKIPS_OF_A_SCALER = 25
"""The same under a `GradScaler`, whose scale may halve more than sixteen times before it fits."""

EVERY_ON_A_DEVICE = 20

_logger = logging.getLogger("gradstat")


class Guard:
    """Acts upon findings while a run trains; by default upon non-finite steps only.

    It looks every so many steps, from inside ``optimizer.step()``, and changes nothing unless it
    acts: without an action the weights are those of the same run without it, bit by bit. What it
    does is logged (logger ``gradstat``), stands in `actions`, and is bounded by its rule. An error
    of its own is logged and ends the guard, not the run.

    A snapshot is taken only where the newest loss is finite and as low as usual, parameters are
    finite, and no finding of a divergence is open. It costs one copy to the host, of ``parameters +
    buffers + optimizer state`` bytes (for AdamW about three times the model), see
    `snapshot_bytes`; ``keep`` of them are held, in host memory or in ``directory``.

    Tell the monitor the loss of each step (``monitor.observe(loss=loss)``): without it only
    gradients speak. Where several processes train one model, tell it the same loss on all of them,
    or their guards part ways.

    Synchronises with a CUDA device at each look, and to make sure of `SkipNonfinite` as `attach`
    says of ``on_nonfinite="skip"``.

    Args:
        monitor: Of `attach`; `RollBack` needs its ``model``.
        rules: What may be done: any of `SkipNonfinite`, `RollBack`, `CutLR`, `TightenClip` and
            `StopEarly`, each with its own findings and bounds.
        scheduler: The schedulers in use, one or several: `CutLR` scales what they will still set,
            and they are part of a snapshot.
        scaler: The `GradScaler` in use, part of a snapshot.
        every: Steps from one look to the next; None: 1 where all parameters are on the CPU, else
            20.
        diagnose_every: Steps from one `Monitor.diagnose` to the next, about 5 ms each; none is made
            where no rule but `SkipNonfinite` asks.
        snapshot_every: Steps from one snapshot to the next, at least.
        keep: Snapshots held.
        directory: Where snapshots go in place of host memory, each written whole or not at all. One
            for each run, and each process of it.

    Raises:
        ArgumentTypeError: An argument has the wrong type.
        ArgumentValueError: An argument has a value that does not fit.

    Example:
        >>> optimizer = gradstat.attach(optimizer, model)
        >>> guard = gradstat.Guard(
        ...     optimizer.gradstat,
        ...     rules=[gradstat.SkipNonfinite(), gradstat.RollBack(), gradstat.CutLR()],
        ...     scheduler=scheduler,
        ... )
    """

    def __init__(
        self,
        monitor: Monitor,
        rules: Iterable[GuardRule] = (SkipNonfinite(),),
        *,
        scheduler: Any = None,
        scaler: Any = None,
        every: int | None = None,
        diagnose_every: int = 100,
        snapshot_every: int = 100,
        keep: int = 2,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        optimizer = optimizer_of(monitor)
        self._monitor = monitor
        self._rules = checked(rules)
        self._schedulers = checked_schedulers(scheduler)
        check_counts(
            every=1 if every is None else every,
            diagnose_every=diagnose_every,
            snapshot_every=snapshot_every,
            keep=keep,
        )
        model = monitor._watched.model
        rolls_back = any(isinstance(rule, RollBack) for rule in self._rules)
        if model is None and (rolls_back or directory is not None):
            raise ArgumentValueError(
                "monitor must know the model where snapshots are taken, got one without; use "
                "gradstat.attach(optimizer, model)"
            )
        self._state = RunState(optimizer, model, self._schedulers, scaler)
        self._ring: Ring | None = None
        if directory is not None:
            self._ring = DiskRing(directory, keep)
        elif rolls_back:
            self._ring = HostRing(keep)
        self._every = every or (1 if self._is_on_host() else EVERY_ON_A_DEVICE)
        asks = any(not isinstance(rule, SkipNonfinite) for rule in self._rules)
        self._diagnose_every = diagnose_every if asks else None
        self._snapshot_every = snapshot_every
        self._skips_that_last = SKIPS_IN_A_ROW if scaler is None else SKIPS_OF_A_SCALER

        self.actions: list[GuardAction] = []
        """What was done, oldest first."""

        self.should_stop = False
        """Whether `StopEarly` says that the run should end: ``if guard.should_stop: break``."""

        self.lr_factor = 1.0
        """Product of all cuts; multiply learning rates with it that a loop sets by hand."""

        self.snapshot_bytes = 0
        """Size of one snapshot's tensors; 0 before the first."""

        self._losses = LossWatch()
        self._newest: Observation | None = None
        self._steps = 0
        """Steps seen: unlike the monitor's, never set back."""

        self._has_stepped = False
        self._is_active = True
        self._times: dict[GuardRule, list[int]] = {rule: [] for rule in self._rules}
        self._spent: set[GuardRule] = set()
        self._diagnosed: list[Finding] = []
        self._snapshot_at = -math.inf
        self._was_used = False
        self._skipped = monitor.skipped_steps
        self._is_skipping = False
        if any(isinstance(rule, SkipNonfinite) for rule in self._rules):
            self._state.optimizer._gradstat_seam.skip_nonfinite()  # type: ignore[attr-defined]
        monitor.on_step(self._after_step)

    # ---- looking ---------------------------------------------------------------------------------

    def look(self) -> None:
        """Look now, unless the optimizer's step has been seen since the last call of this.

        A `GradScaler` that drops a step does not call an optimizer that is not fused, and the guard
        hears nothing of it: call this at the end of each iteration, after ``scaler.update()``.
        Synchronises with a CUDA device if it looks.
        """
        has_stepped, self._has_stepped = self._has_stepped, False
        if not has_stepped:
            self._steps += 1
            self._attempt(self._look)

    def _after_step(self, monitor: Monitor) -> None:
        del monitor
        self._has_stepped = True
        self._steps += 1
        if is_capturing():
            return
        if self._steps % self._every == 0:
            self._attempt(self._look)

    def _attempt(self, action: Callable[[], None]) -> None:
        if not self._is_active:
            return
        try:
            action()
        except Exception:  # the run goes on without a guard rather than end by one
            self._is_active = False
            _logger.exception("the guard failed and will not act again; the run goes on")

    def _look(self) -> None:
        monitor = self._monitor
        heard = monitor._observations.after("loss", self._newest)
        if heard:
            self._newest = heard[-1]
            self._losses.add(curve_of(heard).values.tolist())
        findings = self._losses.findings() + self._look_at_skips()
        if self._diagnose_every is not None and self._steps % self._diagnose_every < self._every:
            self._diagnosed = monitor.diagnose()
            findings = findings + self._diagnosed
        self._act_upon(findings)
        if self._ring is not None and self._steps - self._snapshot_at >= self._snapshot_every:
            diverges = any(finding.code in DIVERGENCE for finding in findings + self._diagnosed)
            if not diverges and not self._is_skipping and self._losses.is_calm:
                self._take_snapshot()

    def _look_at_skips(self) -> list[Finding]:
        """Note the steps that were skipped; return a finding where they last."""
        counters = self._monitor._counters()
        total = int(counters[_kernels.COUNTER_SKIPPED])
        in_a_row = int(counters[_kernels.COUNTER_SKIPPED_IN_A_ROW])
        before, self._skipped, self._is_skipping = self._skipped, total, in_a_row > 0
        if total <= before or self._newest_was_finite():
            return []
        finding = _nonfinite_gradients(total - before, in_a_row, self._skips_that_last)
        for rule in self._rules:
            if isinstance(rule, SkipNonfinite) and self._may(rule, finding):
                self._note(rule, finding, {"skipped_steps": before}, {"skipped_steps": total})
        return [finding] if in_a_row >= self._skips_that_last else []

    def _newest_was_finite(self) -> bool:
        """Whether the newest recorded step was one of finite gradients, skipped as a spike."""
        window = self._monitor._recorder.window
        if window is None or not window.steps or self._monitor.every > 1 or self._every > 1:
            return False
        return bool(window.decisions[window.newest][_kernels.OUT_FINITE])

    def _is_on_host(self) -> bool:
        groups = self._state.optimizer.param_groups
        return all(p.device.type == "cpu" for group in groups for p in group["params"])

    # ---- acting ----------------------------------------------------------------------------------

    def _act_upon(self, findings: Sequence[Finding]) -> None:
        for rule in self._rules:
            finding = rule.cause_among(findings)
            if finding is None or isinstance(rule, SkipNonfinite):
                continue
            if isinstance(rule, StopEarly) and self.should_stop:
                continue
            if not self._may(rule, finding):
                continue
            if isinstance(rule, RollBack):
                self._roll_back(rule, finding)
            elif isinstance(rule, CutLR):
                self._cut(rule, finding)
            elif isinstance(rule, TightenClip):
                self._tighten(rule, finding)
            elif isinstance(rule, StopEarly):
                self._stop(rule, finding.code, finding.explanation)

    def _may(self, rule: GuardRule, finding: Finding) -> bool:
        """Whether the rule's bounds leave room; says so, once, where they do not."""
        times = self._times[rule]
        recent = sum(self._steps - time < rule.within for time in times)
        if recent < rule.at_most:
            self._spent.discard(rule)
            return not times or self._steps - times[-1] >= rule.rest
        if rule not in self._spent:
            self._spent.add(rule)
            text = f"{rule.action} has happened {recent} times in {rule.within} steps"
            _logger.error("guard: %s, and %s is still there", text, finding.code)
            for stop in self._rules:
                if isinstance(stop, StopEarly) and not self.should_stop:
                    self._stop(stop, finding.code, f"{text}, and has not helped")
        return False

    def _note(
        self, rule: GuardRule, finding: Finding, before: dict[str, Any], after: dict[str, Any]
    ) -> None:
        self._times[rule].append(self._steps)
        step = before.get("step", self._monitor.step)
        self._record(
            GuardAction(step, rule.action, finding.code, finding.explanation, before, after)
        )

    def _record(self, action: GuardAction) -> None:
        self.actions.append(action)
        _logger.warning("guard: %s", action)
        if self._monitor.log is not None:
            self._monitor.log.note_action(action)

    def _roll_back(self, rule: RollBack, finding: Finding) -> None:
        ring, monitor = self._ring, self._monitor
        assert ring is not None
        if self._was_used and len(ring) > 1:
            ring.drop_newest()
        state = ring.newest()
        if state is None:
            _logger.error("guard: %s, and there is no snapshot to go back to", finding.code)
            self._times[rule].append(self._steps)
            return
        before = {"step": monitor.step, "loss": self._losses.last, "lr": self._rates()}
        self._restore(state)
        self._was_used = True
        self._note(rule, finding, before, {"step": monitor.step, "lr": self._rates()})

    def _restore(self, state: dict[str, Any]) -> None:
        self._state.restore(state)
        factor = self.lr_factor / state["lr_factor"]
        if factor != 1:  # what was cut since the snapshot stays cut
            scale_rates(self._state.optimizer, self._schedulers, factor)
        self._losses.go_back()
        self._diagnosed = []
        self._snapshot_at = self._steps
        self._skipped = self._monitor.skipped_steps
        self._newest = next(iter(self._monitor._observations.after("loss", None)[-1:]), None)

    def _cut(self, rule: CutLR, finding: Finding) -> None:
        before = {"lr": self._rates()}
        scale_rates(self._state.optimizer, self._schedulers, rule.factor)
        self.lr_factor *= rule.factor
        self._note(rule, finding, before, {"lr": self._rates()})

    def _tighten(self, rule: TightenClip, finding: Finding) -> None:
        clipper, decisions = self._monitor._clipper, self._monitor.decisions
        usual = clipper.ceiling
        if usual is None:
            norms = decisions[:, _kernels.OUT_NORM] * decisions[:, _kernels.OUT_COEFFICIENT]
            norms = norms[np.isfinite(norms) & (norms > 0)]
            if not norms.size:
                return
            usual = float(np.median(norms))
        before = {"max_norm": clipper.ceiling}
        clipper.ceiling = usual * rule.factor
        self._note(rule, finding, before, {"max_norm": clipper.ceiling})

    def _stop(self, rule: StopEarly, cause: str, because: str) -> None:
        self.should_stop = True
        flags = {"should_stop": False}, {"should_stop": True}
        self._record(GuardAction(self._monitor.step, rule.action, cause, because, *flags))

    def release(self) -> None:
        """Take back cuts of the learning rate and the ceiling of the norm, and act no more.

        The run goes on from where it is. Steps with NaN or Inf are still skipped. A second time
        there is nothing left to do. Does not synchronise.
        """
        if self.actions and self.actions[-1].action == "release":
            return
        before = {"lr_factor": self.lr_factor, "max_norm": self._monitor._clipper.ceiling}
        scale_rates(self._state.optimizer, self._schedulers, 1 / self.lr_factor)
        self._monitor._clipper.ceiling = None
        self._is_active, self.lr_factor, self.should_stop = False, 1.0, False
        after = {"lr_factor": 1.0, "max_norm": None}
        because = "as the script asked"
        self._record(GuardAction(self._monitor.step, "release", "", because, before, after))

    def _rates(self) -> list[float]:
        return rates_of(self._state.optimizer)

    # ---- snapshots -------------------------------------------------------------------------------

    def _take_snapshot(self) -> None:
        assert self._ring is not None
        state = self._state.take()
        if not is_whole(state):
            return
        state["step"] = self._monitor.step
        state["lr_factor"] = self.lr_factor
        state["max_norm"] = self._monitor._clipper.ceiling
        state["actions"] = [dict(vars(action)) for action in self.actions]
        self.snapshot_bytes = size_of(state)
        self._snapshot_at = self._steps
        try:
            self._ring.put(state)
        except (OSError, RuntimeError) as error:  # a full disk: those before it are still there
            _logger.error(
                "guard: no snapshot could be written after step %d: %s", state["step"], error
            )
            return
        self._was_used = False

    def resume(self) -> int | None:
        """Put back the newest snapshot in ``directory`` that can be read.

        Call it before the loop, on a run that is set up as the old one was. Files that are damaged
        are passed over with a warning. The snapshot is of the moment after ``optimizer.step()``:
        where the loop goes on with ``scheduler.step()``, do that once after this. A `GradScaler`'s
        count of good steps is then one short. Synchronises with a CUDA device.

        Returns:
            Finished steps, or None where there is no snapshot, and nothing has changed.

        Raises:
            ArgumentValueError: The guard has no ``directory``, or the snapshot is of another run.
        """
        if not isinstance(self._ring, DiskRing):
            raise ArgumentValueError(
                "directory must be given to resume from, got None; use gradstat.Guard(..., "
                'directory="snapshots")'
            )
        self._ring.adopt()
        state = self._ring.newest()
        if state is None:
            return None
        self.lr_factor = state["lr_factor"]
        self._restore(state)
        self._monitor._clipper.ceiling = state["max_norm"]
        self.actions = [GuardAction(**action) for action in state["actions"]]
        return self._monitor.step

    def to_list(self) -> list[dict[str, Any]]:
        """Return `actions` as plain values, fit for strict JSON; None is NaN or Inf."""
        return [action.to_dict() for action in self.actions]

    def __repr__(self) -> str:
        names = ", ".join(rule.action for rule in self._rules)
        n_snapshots = len(self._ring) if self._ring is not None else 0
        return f"Guard([{names}], actions={len(self.actions)}, snapshots={n_snapshots})"


def _nonfinite_gradients(n_skipped: int, in_a_row: int, threshold: int) -> Finding:
    return Finding(
        "nonfinite-gradient",
        "error",
        1.0,
        f"gradients held NaN or Inf in {n_skipped} more skipped steps, {in_a_row} now in a row",
        ("go back to before it", "lower lr and clip", "look for overflow in fp16"),
        (Measure("steps skipped in a row", in_a_row, threshold=threshold),),
        "IEEE 754 arithmetic",
    )
