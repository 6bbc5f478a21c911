"""Rules on the size of the steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.evidence import ABS_MAX, Curve, Floats
from gradstat.diagnosis.finding import Finding, Measure
from gradstat.diagnosis.medians import median, middle, quantiles
from gradstat.diagnosis.rule import Case, Rule

SOURCE = "Karpathy, cs231n (about 1e-3 of the weights a step); DeepDiagnosis ([1e-5, 1e-1])"


USUAL_UPDATE = 1e-5
"""Update over weight that is the least in use (DeepDiagnosis)."""

STRONG_DECAY = 0.1
"""Ten times AdamW's default, from which decay may erase weights; a smaller one takes a rate for it
that is itself the fault."""


def shrunk_weights(case: Case) -> bool:
    """Whether weight decay has erased the weights.

    A third have come down to a twentieth, or nearer to zero, by a strong one to a half; or decay
    alone would have taken them there, as it does where it is not scaled with the gradient.
    """
    run, optimizer = case.run, case.run.optimizer
    if optimizer is None or optimizer.weight_decay == 0 or len(run.probes.steps) < 4:
        return False
    if not (run.dimensions >= 2).any():
        return False
    is_strong = optimizer.weight_decay >= STRONG_DECAY
    is_decoupled = not optimizer.is_adaptive or optimizer.name == "AdamW"
    alone = float(run.probes.lrs.mean()) * optimizer.weight_decay * run.step
    if not optimizer.is_adaptive:
        alone /= max(1 - optimizer.momentum, 1e-2)
    if is_strong and is_decoupled and alone > 3:
        return True
    rms = run.probes.weight_rms[:, run.dimensions >= 2]
    least = rms[0] / (2 if is_strong else 20) if rms.size else rms
    return bool(rms.size and (rms[-1] < least).mean() > 0.3)


def schedule_has_ended(case: Case) -> bool:
    """Whether a schedule has taken the rate to next to nothing in the first half."""
    lrs = case.run.probes.lrs.max(axis=1)
    ratio = case.total_update_ratio
    is_small = bool(ratio.size) and median(ratio[np.isfinite(ratio)]) < 10 * USUAL_UPDATE
    return is_small and median(lrs) < 1e-2 * float(lrs.max())


@dataclass(frozen=True)
class TooHigh(Rule):
    """Steps so large that the loss does not settle."""

    codes = ("lr-too-high",)
    needs = ("steps",)

    large: float = 0.1
    """Update over weight above which a step is no small correction (DeepDiagnosis)."""

    back: float = 5.0
    """A tenth of the losses of the second half over their median, from which a run that learns has
    not left the harm of its first steps behind."""

    spike: float = 10.0
    """How many times larger a weight is at the next probe, from which a step between is judged."""

    unseen: float = 2.0
    """Update over weight above which a step is too large whatever the loss, where it is not known:
    nothing is left of what the weights were."""

    usual: float = 0.01
    """Median update over weight from which a run that has stopped to gain is kept from it by its
    steps: ten times what is usual."""

    left: float = 0.5
    """Share of a guess's loss that is left then, at least."""

    striding: float = 0.05
    """Median update over weight from which the swings of validation are made by steps: half of
    `large`."""

    swing: float = 0.3
    """Spread of the second half of the validation losses over their median then, at least, with a
    turn at every other one."""

    overwhelming: float = 100.0
    """Update over weight in the first step, from which it comes before gradients that are as large:
    in a network of up to `shallow` layers, which is no reason for their size, without targets that
    may be one."""

    shallow: int = 4
    """Weights with two dimensions or more, at most."""

    sweeping: float = 0.4
    """Update over weight in one of the first probes, from which the initialisation is lost, where
    the weights end `swept` times as large."""

    swept: float = 5.0
    """Last size of a weight over its first."""

    left_swept: float = 0.3
    """Share of a guess's loss that is left then in a run that learns, at least."""

    sound: float = 0.2
    """Gain of weights that do not begin small; torch's default for Linear is 0.58."""

    died: float = 1e-5
    """Median update over weight, below which large steps have left no gradient (DeepDiagnosis)."""

    def judge(self, case: Case) -> Iterator[Finding]:
        run, shape = case.run, case.loss
        ratio = case.total_update_ratio
        if ratio.size < 3 or shrunk_weights(case):
            return
        finite = ratio[np.isfinite(ratio)]
        largest = max(float(finite.max(initial=0.0)), self._largest_growth(case))
        usual = median(finite) if finite.size else 0.0
        losses = run.loss.values if run.loss is not None else np.zeros(0)
        began = losses.size > 0 and bool(np.isfinite(losses[0]))
        known = losses[np.isfinite(losses)]
        rose = began and bool(known.max() > 3 * max(abs(float(losses[0])), 1e-12))
        is_hurt = not case.generalises or (case.left is not None and case.left > 0.5)
        is_known = run.val_loss is not None or self._comes_back(losses)
        is_extreme = rose and largest > 10 * self.large and is_known
        sweeps = float(finite[:4].max(initial=0.0)) > self.sweeping and self._are_swept(case)
        is_lost = not case.has_scale or (case.left is not None and case.left > self.left_swept)
        is_unknown = case.left is None and case.skill is None
        is_lost |= is_unknown and self._has_gained_nothing(case)
        if case.learns and not (is_extreme and is_hurt) and not (sweeps and is_lost):
            return
        lost = began and not np.isfinite(losses[-3:]).any()
        worse = shape is not None and shape.last > shape.first * 1.05
        gained_nothing = self._has_gained_nothing(case)
        got_to = 0.9 if gained_nothing else 0.8
        unsettled = (
            shape is not None
            and not case.is_settled
            and not (shape.last < 0 and shape.still_falls)  # shares of such a loss say little
            and shape.best < got_to * shape.first
            and shape.last > shape.best + shape.noise
        )
        has_died = largest > self.large and usual < self.died and gained_nothing
        has_faded = largest > self.large / 2 and self._has_faded(case) and gained_nothing
        swings = usual > 0.003 and (unsettled or (rose and (worse or gained_nothing)))
        strides = largest > 3 * self.large and usual > self.usual and self._has_stalled(case)
        if self._overwhelms(case):
            confidence = 0.955
        elif largest > 3 * self.large and rose and lost:  # it has grown into the NaN
            confidence = 0.905
        elif largest > 10 * self.large and (rose or lost or worse):
            confidence = 0.9
        elif (largest > 3 * self.large and (rose or lost or worse)) or (
            usual > self.large and (rose or worse)
        ):
            confidence = 0.8
        elif largest > 3 * self.large and gained_nothing:
            confidence = 0.75 if rose else 0.6
        elif has_faded:
            confidence = 0.8
        elif sweeps:
            confidence = 0.6 if case.learns else 0.75
        elif has_died or (swings and case.is_judged_by_loss) or usual > 3 * self.large:
            confidence = 0.7
        elif (
            strides
            or (run.loss is None and largest > self.unseen)
            or (usual > self.striding and self._swings(run.val_loss))
        ):
            confidence = 0.6
        else:
            return
        if shape is not None and shape.rises_steadily and largest < self.large:
            return
        optimizer = run.optimizer
        momentum = optimizer is not None and optimizer.momentum >= 0.98
        outcome = "is lost" if lost else "rises" if rose or worse else "does not settle"
        told = f", and the loss {outcome}" if run.loss is not None else ""
        yield Finding(
            "lr-too-high",
            "error" if confidence >= 0.8 else "warning",
            confidence,
            f"a step changes the weights by up to {largest:.1%} of their size{told}",
            (
                *(["lower momentum to 0.9"] if momentum else []),
                "multiply lr by 0.1",
                "warm lr up over the first steps, and clip",
                "gradstat.lr_range_test(...) finds the largest that works",
            ),
            (
                Measure("largest update over weight", largest, threshold=self.large).only("above"),
                Measure("median update over weight", usual),
            ),
            SOURCE,
        )

    def _largest_growth(self, case: Case) -> float:
        """Return what the steps between two probes must have changed the weights by, at least.

        In one of them, where a weight is many times as large after them: a spike that no probe saw.
        """
        weights, steps = case.run.probes.weight_rms[:, case.run.matrices], case.run.probes.steps
        growth = weights[1:] / weights[:-1]
        growth[~np.isfinite(growth) | (weights[:-1] == 0)] = 1.0
        if growth.size == 0 or growth.max() < self.spike:
            return 0.0
        each = growth.max(axis=1) ** (1 / np.diff(steps)) - 1
        return float(each.max())

    def _overwhelms(self, case: Case) -> bool:
        """Whether the first step is many times the weights, which began at a sound size."""
        run, first = case.run, case.total_update_ratio[0]
        if run.probes.steps[0] != 1 or not self.overwhelming < first < np.inf:
            return False
        if (run.probes.weight_rms[0, run.matrices] * case.root_fans < self.sound).any():
            return False
        has_reason = len(run.matrices) > self.shallow or case.growth > 0.5
        has_reason = has_reason or len(run.recurrent) > 0
        if has_reason or "targets" in run.observed:
            return False
        sizes = run.probes.gradient_rms[0, run.matrices]
        return bool(sizes.size and sizes[0] < 10 * sizes[-1])

    def _are_swept(self, case: Case) -> bool:
        """Whether most weights end many times as large as they began, which was not small."""
        weights = case.run.probes.weight_rms[:, case.run.matrices]
        had_size = weights[0] * case.root_fans > self.sound
        return bool(
            had_size.any() and (weights[-1] > self.swept * weights[0])[had_size].mean() > 0.5
        )

    def _has_stalled(self, case: Case) -> bool:
        """Whether the loss has come to stand where much of a guess's is left."""
        if case.loss is None or case.left is None or case.left < self.left:
            return False
        return case.is_judged_by_loss and case.loss.trend > -case.loss.trend_error

    def _swings(self, val: Curve | None) -> bool:
        if val is None or len(val.finite) < 8:
            return False
        half = val.finite[len(val.finite) // 2 :]
        turns = np.count_nonzero(np.diff(np.sign(np.diff(half))))
        return bool(np.ptp(half) > self.swing * abs(median(half)) and 2 * turns >= len(half))

    def _comes_back(self, losses: Floats) -> bool:
        """Whether losses many times the usual one go on to the end."""
        half = losses[len(losses) // 2 :]
        return half.size >= 20 and bool(quantiles(half, [0.9])[0] > self.back * median(half) > 0)

    def _has_faded(self, case: Case) -> bool:
        """Whether the first layers' gradient was sound, and became nothing in a few steps."""
        gradients = case.run.probes.gradient_rms[:, case.run.matrices]
        if gradients.shape[1] < 4 or len(gradients) < 4:
            return False
        first, last = gradients[0], middle(gradients[len(gradients) // 2 :], axis=0)
        return bool(first[0] > 0.01 * first[-1] and last[0] < self.died * first[0])

    def _has_gained_nothing(self, case: Case) -> bool:
        if case.loss is None or case.may_be_adversary:
            return False
        if case.is_wild:
            return True
        return case.loss.last > 0.9 * (case.task.chance or case.start)


@dataclass(frozen=True)
class TooLow(Rule):
    """Steps so small that the run cannot get anywhere."""

    codes = ("lr-too-low",)
    needs = ("steps",)

    reach: float = 0.02
    """Share of their own size that the weights could have moved by all steps in one direction."""

    reach_of_rate: float = 0.1
    """The same of an adaptive optimizer, whose steps are of the size of the rate, where the loss
    stands still."""

    still: float = 0.02
    """Spread of the loss from step to step over its first value, at most, to stand still."""

    usual: float = USUAL_UPDATE
    """Update over weight, below which a step is too small (DeepDiagnosis)."""

    fair: float = 2e-3
    """Update over weight from which a loss that falls slowly has another reason than the rate."""

    sparing: float = 5e-4
    """The same up to which the rate is the likelier reason: half of what is usual."""

    far: float = 1.0
    """Reach from which steps that have become small did so because the gradients died."""

    left: float = 0.5
    """Share of a guess's loss that is left where a schedule has ended early, from which that is too
    early though something was learnt."""

    clipped_at: float = 0.02
    """Norm that gradients are clipped to, up to which that is what makes steps small. Limits in use
    begin at about that."""

    reach_of_clipped: float = 0.3
    """`reach` of a run whose gradients are clipped so, at most."""

    usual_lr: float = 0.01
    """Rate of SGD that is usual: a step that is too small all the same is a small gradient's."""

    hardly: float = 0.95
    """Share of a guess's loss that is left, at least, or of the first loss, where a fall is steady
    and hardly one."""

    many_steps: int = 200
    """Steps after which a loss should have fallen further, where there is no validation."""

    nothing: float = 1e-7
    """Update over weight up to which a step is one for no purpose: fp32 rounds it away."""

    several: int = 5
    """Validation losses, each below the one before, by which a fall is steady."""

    started_low: float = 0.5
    """First loss of weights that did not begin as torch makes them, up to which they were trained
    before, where a guess's is not known: small steps are meant then."""

    min_steps: int = 30

    def judge(self, case: Case) -> Iterator[Finding]:
        run, shape = case.run, case.loss
        ratio = case.total_update_ratio
        ratio = ratio[np.isfinite(ratio)]
        if run.step < self.min_steps or ratio.size < 4:
            return
        if len(run.matrices) and not run.probes.gradients[:, run.matrices, ABS_MAX].any():
            return  # whatever the rate, it multiplies nothing
        usual = median(ratio)
        has_ended = schedule_has_ended(case)
        if case.learns and not (has_ended and case.left is not None and case.left > self.left):
            return
        is_off = not run.probes.lrs[-1].any() or run.skipped_steps > 0.5 * run.step
        if not (run.probes.total_norms > 0).mean() > 0.5 or (usual == 0 and is_off):
            return
        reach = float(np.mean(ratio)) * run.step
        if reach > self.far and not has_ended:
            return
        stands = shape is not None and (
            abs(shape.fall) < 0.1 or abs(shape.first - shape.last) < 3 * shape.noise or has_ended
        )
        slow = usual < self.usual or reach < self.reach or has_ended
        if usual > self.nothing and self._was_trained(case):
            return
        crawls = usual < self.fair and self._crawls(case)
        optimizer = run.optimizer
        is_faint = (
            optimizer is not None
            and optimizer.is_adaptive
            and reach < self.reach_of_rate
            and shape is not None
            and abs(shape.fall) < self.still
            and shape.noise < self.still * abs(shape.first)
        )
        is_held = (
            case.is_clipped
            and not (optimizer and optimizer.is_adaptive)  # they take steps of the rate's size
            and float(run.probes.total_norms.max(initial=0.0)) < self.clipped_at
            and (
                (reach < self.reach_of_clipped and (shape is None or stands))
                or (reach < self.far and shape is not None and shape.still_falls)
            )
        )
        if not ((slow and (stands or shape is None)) or crawls or is_faint or is_held):
            return
        is_lr = (
            optimizer is None
            or optimizer.is_adaptive
            or float(run.probes.lrs[0].max()) < self.usual_lr
            or case.is_clipped
            or has_ended
        )
        if is_held and not slow:
            confidence = 0.7
        elif slow and stands:
            confidence = 0.85 if (usual < self.usual and is_lr) or has_ended else 0.6
        else:
            confidence = 0.6 if crawls and usual < self.sparing else 0.5 if is_faint else 0.45
        yield Finding(
            "lr-too-low",
            "warning",
            confidence,
            f"a step changes the weights by {usual:.1g} of their size; all {run.step} steps "
            f"together could not have moved them by more than {reach:.1g}",
            (
                "multiply lr by 10 until the update is about 1e-3 of the weights",
                "check that clipping, weight decay or a scheduler does not shrink the step",
            ),
            (
                Measure("median update over weight", usual, threshold=self.usual).only("below"),
                Measure("reach of all steps", reach, threshold=self.reach).only("below"),
            ),
            SOURCE,
        )

    def _was_trained(self, case: Case) -> bool:
        """Whether weights that torch did not make were trained: an own start has biases of 0."""
        run, shape, val = case.run, case.loss, case.run.val_loss
        if shape is None or val is None or case.task.chance is not None or case.is_fresh:
            return False
        biases = run.probes.weight_rms[0, run.dimensions == 1]
        starts_low = 0 <= shape.first < self.started_low and val.finite[:1].sum() < self.started_low
        return starts_low and bool(run.probes.steps[0] == 1 and biases.size and biases.all())

    def _crawls(self, case: Case) -> bool:
        """Whether the loss falls, steadily but so slowly that hardly anything is gained."""
        shape, chance, val = case.loss, case.task.chance, case.run.val_loss
        is_sure = case.falls_throughout(self.several)
        if shape is None or (-shape.trend < 2 * shape.trend_error and not is_sure):
            return False
        if chance is None and val is not None:
            return is_sure and case.is_fresh and shape.fall < 1 - self.hardly
        if chance is None or shape.fall < 0.02:
            return False
        if val is None or not val.finite.size:
            is_late = case.run.step >= self.many_steps
            return is_late and case.is_fresh and shape.last > self.hardly * chance
        has_fallen = is_sure or bool(val.finite.min() < 0.98 * val.finite[0])
        return has_fallen and shape.last > 0.85 * chance
