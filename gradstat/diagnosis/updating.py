"""Rules on whether the parameters move: frozen, stale, rounded away, never zeroed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.evidence import (
    ABS_MAX,
    ABS_SUM,
    INFS,
    L2,
    NANS,
    NUMEL,
    SUM,
    ZEROS,
    rms,
)
from gradstat.diagnosis.finding import Finding, Measure
from gradstat.diagnosis.medians import median, middle
from gradstat.diagnosis.rule import Case, Rule


@dataclass(frozen=True)
class NoGradient(Rule):
    """Parameters of the optimizer that no gradient reaches, or that are not the model's."""

    codes = ("parameters-not-updating",)
    needs = ("steps",)

    min_probes: int = 4

    many: float = 0.3
    """Share of the weights without a gradient that is worth a warning though the run learns."""

    enough: float = 0.5
    """Share of the weights that are trained, below which frozen ones may be why nothing is learnt.
    """

    left: float = 0.75
    """Share of a guess's loss that is left then, at least."""

    def judge(self, case: Case) -> Iterator[Finding]:
        probes, model = case.run.probes, case.run.model
        if len(probes.steps) < self.min_probes:
            return
        never = np.asarray(np.isnan(probes.gradients[..., NUMEL]).all(0))
        if model is not None and model.n_own == 0 and model.n_strangers:
            yield self._finding(
                "none of the optimizer's parameters belong to the model: it was built before the "
                "model was replaced or copied, and trains one that nobody uses",
                (
                    "make the optimizer after the model is final: optimizer = "
                    "...(model.parameters())",
                ),
                0.98,
                Measure("parameters of the optimizer that are the model's", 0, threshold=1),
            )
        elif never.all():
            frozen = model is not None and len(model.frozen) > 0
            yield self._finding(
                "no gradient ever reaches a parameter of the optimizer"
                + (": they do not require one" if frozen else ""),
                (
                    "set requires_grad=True on what is to be trained"
                    if frozen
                    else "look for detach(), .data, .item(), numpy() or no_grad() between the "
                    "model "
                    "and the loss",
                    "check that the optimizer holds the parameters of the model that is trained",
                ),
                0.97,
                Measure("parameters with a gradient", 0, threshold=1),
                layers=tuple(layer.name for layer in case.run.layers),
            )
        elif (
            model is not None
            and model.frozen
            and (trained := self._trained_share(case)) < self.enough
            and (not case.learns if trained == 0 else (case.left or 0.0) > self.left)
        ):
            yield self._finding(
                f"{len(model.frozen)} of the model's parameters are frozen, and the weights that "
                "are left cannot learn the task",
                ("set requires_grad=True on what is to be trained",),
                0.9 if trained == 0 else 0.75,
                Measure("share of the weights that is trained", trained, threshold=self.enough),
                layers=model.frozen,
            )
        elif model is not None and model.forgotten:
            yield self._finding(
                f"{len(model.forgotten)} parameters of the model get gradients, but no optimizer "
                "has changed them",
                ("give the optimizer all of model.parameters(), or freeze what is to stay",),
                0.9,
                Measure("parameters forgotten", len(model.forgotten), threshold=1),
                layers=model.forgotten,
            )
        elif self._are_all_zero(case):
            yield self._finding(
                "every gradient is exactly 0 in every step: the loss does not depend on the "
                "parameters smoothly",
                (
                    "look between model and loss for round, argmax, sign, a comparison or a "
                    "clamp: their derivative is 0",
                    "check that the loss is not masked away or multiplied by 0",
                ),
                0.92,
                Measure("largest gradient", 0.0, threshold=0.0),
                layers=tuple(layer.name for layer in case.run.layers),
            )
        else:
            frozen_names = model.frozen if model is not None else ()
            matrices = case.run.matrices
            names = [case.run.layers[i].name for i in matrices[never[matrices]]]
            silent = [name for name in names if name not in frozen_names]
            if silent and len(silent) < len(matrices):
                matters = not case.learns or len(silent) >= self.many * len(matrices)
                yield self._finding(
                    f"{len(silent)} weights require a gradient and never get one: they take no "
                    "part in the loss",
                    (
                        "look for detach() or no_grad() on the way from these layers to the loss",
                        "freeze them with requires_grad=False if that is meant",
                    ),
                    0.85 if matters else 0.5,
                    Measure("weights without a gradient", len(silent), threshold=1),
                    layers=tuple(silent),
                    severity="warning" if matters else "info",
                )

    def _are_all_zero(self, case: Case) -> bool:
        """Whether no gradient is anything but 0, and no layer is dead, which would explain it."""
        if any(site.units and site.dead_units == site.units for site in case.run.sites):
            return False
        tables = case.run.probes.gradients
        return not any((tables[..., at] > 0).any() for at in (ABS_MAX, NANS, INFS))

    def _trained_share(self, case: Case) -> float:
        """Return the share of the weights that get a gradient; biases and gains do not count."""
        run = case.run
        missing = np.isnan(run.probes.gradients[:, run.matrices, NUMEL])
        reached = np.count_nonzero(~missing.all(axis=0))
        watched = {layer.name for layer in run.layers}
        frozen = [name for name in run.model.frozen if name not in watched] if run.model else []
        total = len(run.matrices) + sum(name.endswith("weight") for name in frozen)
        return float(reached) / max(total, 1)

    def _finding(
        self,
        text: str,
        remedy: tuple[str, ...],
        confidence: float,
        seen: Measure,
        layers: tuple[str, ...] = (),
        severity: str = "error",
    ) -> Finding:
        return Finding(
            "parameters-not-updating",
            severity,  # type: ignore[arg-type]
            confidence,
            text,
            remedy,
            (seen,),
            "SageMaker Debugger, UnchangedTensor",
            layers,
        )


@dataclass(frozen=True)
class NoStep(Rule):
    """Losses without a single step of the optimizer."""

    codes = ("parameters-not-updating",)
    needs = ("loss",)

    losses: int = 64
    """Losses from which that is no accumulation: few runs add up so many batches for a step."""

    def judge(self, case: Case) -> Iterator[Finding]:
        loss = case.run.loss
        if loss is None or len(loss) < self.losses or case.run.step > 0:
            return
        yield Finding(
            "parameters-not-updating",
            "error",
            0.97,
            f"the loss has been observed {len(loss)} times, and the optimizer has not made a step",
            (
                "call optimizer.step() after loss.backward()",
                "check that the optimizer that steps is the one that attach was given",
            ),
            (Measure("losses before the first step", len(loss), threshold=self.losses),),
            "torch.optim's documentation, taking an optimization step",
        )


@dataclass(frozen=True)
class NoUpdate(Rule):
    """A gradient that is not zero beside an update that is: lr 0, or lost to rounding."""

    codes = ("parameters-not-updating",)
    needs = ("steps",)

    min_probes: int = 6

    at_zero: float = 0.8
    """Share of the probes with a learning rate of 0: a warm-up begins and a schedule ends there."""

    lost: float = 0.9
    """Share of a parameter's elements that stay as they are though their gradient is not zero."""

    lost_in_half: float = 0.75
    """The same of 16 bits in a run that is not known to learn: the rest is moved too far."""

    left: float = 1e-3
    """Share of a guess's loss that is left, below which there is nothing more to move for."""

    def judge(self, case: Case) -> Iterator[Finding]:
        run = case.run
        probes = run.probes
        if len(probes.steps) < self.min_probes or not run.layers:
            return
        has_gradient = probes.slices[..., L2] > 0
        n_judged = has_gradient.sum(0)
        judged = n_judged >= self.min_probes
        if not judged.any():
            return
        groups = np.array([layer.group for layer in run.layers])
        at_zero = (probes.lrs == 0).mean(0) >= (1.0 if case.learns else self.at_zero)
        by_lr = judged & at_zero[groups]
        if by_lr.any():
            everything = bool(by_lr[judged].all())
            yield Finding(
                "parameters-not-updating",
                "error" if everything else "warning",
                0.97 if everything else 0.6,
                "the learning rate is 0 in nearly all steps, so the parameters stay as they are",
                ("set lr above 0", "check the scheduler: what does it multiply lr with?"),
                (Measure("learning rate", 0.0, threshold=0.0),),
                "definition of the step",
                tuple(run.layers[i].name for i in np.flatnonzero(by_lr)),
            )
            return
        unmoved = probes.updates[..., ZEROS] / probes.updates[..., NUMEL]
        in_16_bits = run.epsilons > 1e-4
        most = np.where(in_16_bits & (not case.learns), self.lost_in_half, self.lost)
        rounded = (unmoved > most) & has_gradient
        has_converged = case.left is not None and case.left < self.left
        if not rounded.any() or has_converged or run.skipped_steps > 0.5 * run.step:
            return
        alive = 1 - probes.slices[..., ZEROS] / probes.slices[..., NUMEL]
        rounded &= alive > 0.5
        is_on = probes.lrs > 0
        if not is_on.all():
            rounded &= is_on[:, groups]
        share = rounded.sum(0) / np.maximum(n_judged, 1)
        matrix = np.zeros(len(run.layers), bool)
        matrix[run.matrices] = True
        lost = judged & matrix & (share > 0.7)
        if lost.any():
            in_half = bool(in_16_bits[lost].any())
            exact = not (probes.updates[..., L2] > 0)[:, lost].any()
            yield Finding(
                "parameters-not-updating",
                "error" if lost[matrix & judged].mean() > 0.5 else "warning",
                0.95 if in_half else 0.7 if exact else 0.6,
                "the gradients are not zero, yet the parameters stay as they are: the step is less "
                "than half of the distance to the next number of their dtype",
                (
                    "keep the parameters in fp32 and use autocast for the rest"
                    if in_half
                    else "raise lr: the update is below the rounding of the parameters",
                    "or use an optimizer with fp32 master weights, or stochastic rounding",
                ),
                (
                    Measure("share of elements unmoved", float(middle(unmoved[:, lost].ravel())),
                            threshold=self.lost),
                    Measure("distance from 1 to the next number",
                            float(run.epsilons.max())),
                ),
                "Micikevicius et al. 2018, 1710.03740, section 3.1",
                tuple(run.layers[i].name for i in np.flatnonzero(lost)),
            )  # fmt: skip


@dataclass(frozen=True)
class WrittenBack(Rule):
    """Parameters that lose between two steps what the first of them has changed.

    The sum of a parameter before a step is what it was before the last one, and the sum of the
    change: else something wrote to it in between. Its largest element tells that from a constraint
    on the sum, which leaves the elements free to move. The first steps are all probed.
    """

    codes = ("parameters-not-updating",)
    needs = ("steps",)

    kept: float = 0.1
    """Share of a step's change that is there before the next, at most. An average of weights that
    is copied over them keeps 0.01 or less; methods that go back a part of the way keep more."""

    rounding: float = 1e-3
    """Change of a sum over that of the magnitudes, below which it is rounding."""

    def judge(self, case: Case) -> Iterator[Finding]:
        probes = case.run.probes
        if case.learns:
            return
        follows = np.flatnonzero(np.diff(probes.steps) == 1)
        if len(follows) < 2:
            return
        before, after = probes.weights[follows], probes.weights[follows + 1]
        change = probes.updates[follows][..., SUM]
        moved = after[..., SUM] - before[..., SUM]
        noise = self.rounding * probes.updates[follows][..., ABS_SUM]
        noise += case.run.epsilons * before[..., ABS_SUM]
        is_clear = (np.abs(change) > noise) & (after[..., NANS] + after[..., INFS] == 0)
        if not is_clear.any():
            return
        kept = median(moved[is_clear] / change[is_clear])
        if abs(kept) > self.kept:
            return
        largest = np.abs(after[..., ABS_MAX] - before[..., ABS_MAX]) / rms(probes.updates[follows])
        if median(largest[is_clear]) > self.kept:
            return
        yield Finding(
            "parameters-not-updating",
            "error",
            0.9,
            f"of what a step changes {abs(kept):.0%} is left before the next one: something writes "
            "the parameters back in between",
            (
                "look for copy_(), load_state_dict() or .data = in the loop",
                "keep an average of the weights (EMA, SWA) in a copy of the model, and validate "
                "that",
            ),
            (Measure("share of a step's change that is kept", kept, threshold=self.kept),),
            "definition of the step",
            steps=tuple(int(step) for step in probes.steps[follows]),
        )


@dataclass(frozen=True)
class NotZeroed(Rule):
    """Gradients that are added to those of the step before.

    Compared in the first steps, and then in every seventh.
    """

    codes = ("gradient-accumulation",)
    needs = ("steps",)

    share: float = 0.5
    """Share of the steps looked at, at least."""

    def judge(self, case: Case) -> Iterator[Finding]:
        run = case.run
        looks = run.accumulation_looks
        if run.step < 8 or not looks or run.accumulated_steps < self.share * looks:
            return
        largest = np.nan_to_num(run.probes.gradients[..., ABS_MAX])
        if largest.size and not largest.any():  # zeroed before the step
            return
        yield Finding(
            "gradient-accumulation",
            "error",
            0.97,
            "each step's gradients are added to those of all steps before: zero_grad() is missing",
            (
                "call optimizer.zero_grad() once in every step, before backward()",
                "if accumulation is meant, call it after each optimizer.step()",
            ),
            (
                Measure(
                    "share of steps that start from old gradients",
                    run.accumulated_steps / looks,
                    threshold=self.share,
                ),
            ),
            "torch.optim's documentation, zero_grad",
        )
