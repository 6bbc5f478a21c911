"""Rules on what the loss does: flat, zero, diverging, oscillating, stuck."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.curve import Shape
from gradstat.diagnosis.evidence import Floats
from gradstat.diagnosis.finding import Finding, Measure
from gradstat.diagnosis.medians import counted, median, medians_of_parts, middle, quantiles
from gradstat.diagnosis.rule import Case, Rule
from gradstat.diagnosis.task import are_probabilities


@dataclass(frozen=True)
class ZeroLoss(Rule):
    """A loss that is zero from the start: multiplied or masked away, or made of the outputs."""

    codes = ("zero-loss",)
    needs = ("loss",)

    nothing: float = 1e-6
    """Loss over that of a guess (else over the targets' mean square), below which only rounding is
    left of it."""

    early: int = 8
    """Steps in which no model is right in every row, unless it was trained before."""

    unsure: float = 0.3
    """Loss over that of all classes alike, from which a model was not trained before."""

    def judge(self, case: Case) -> Iterator[Finding]:
        loss = case.run.loss
        if loss is None or len(loss) < 10:
            return
        zero = float((loss.values == 0).mean())
        if zero >= 0.5 and (loss.values[:3] == 0).any():
            yield self._finding(
                "the loss is exactly 0 from the first steps on",
                Measure("share of losses that are 0", zero, threshold=0.5),
            )
            return
        largest = float(np.abs(loss.values[:10]).max())
        scale = self._scale(case)
        if largest < self.nothing * scale:
            yield self._finding(
                "the loss is nothing but rounding from the first steps on",
                Measure("largest early loss over a guess's", largest / scale,
                        threshold=self.nothing),
            )  # fmt: skip
        elif self._are_own_answers(case):
            yield self._finding(
                "an untrained model is right in every row: the targets are made from its outputs",
                Measure("share of rows that are right at first", 1.0, threshold=1.0),
            )

    def _scale(self, case: Case) -> float:
        if case.task.chance is not None:
            return case.task.chance
        targets = case.task.targets
        if case.task.kind != "numbers" or not targets.size:
            return 0.0
        # Distributions differ by about a nat.
        return 1.0 if are_probabilities(targets) else float(np.mean(targets**2))

    def _are_own_answers(self, case: Case) -> bool:
        """Whether the first answers are all right though the model is not sure of them."""
        task = case.task
        early = [b for b in task.paired if b.step < self.early and b.targets is not None]
        if task.kind not in ("classes", "binary"):
            return False
        least = self.unsure * np.log(task.n_classes or 2)
        if not any((batch.loss or 0.0) > least for batch in early):
            return False
        _, counts = counted(np.concatenate([b.targets.ravel() for b in early]))  # type: ignore[union-attr]
        is_constant = counts.sum() - counts.max() < 8  # that is easily right
        return not is_constant and all(task.accuracy([b]) == 1.0 for b in early)

    def _finding(self, text: str, seen: Measure) -> Finding:
        return Finding(
            "zero-loss",
            "error",
            0.93,
            text + ": nothing is left to be learnt from",
            (
                "check masks, weights and ignore_index: do they leave any element?",
                "check that the targets are not made from the outputs",
            ),
            (seen,),
            "no proper loss is 0 before training",
        )


@dataclass(frozen=True)
class FlatLoss(Rule):
    """A loss that has not moved by more than its own noise."""

    codes = ("flat-loss",)
    needs = ("loss",)

    fall: float = 0.03
    """Share of the first value that counts as movement. SageMaker Debugger asks for 0.1 % in ten
    steps, AutoTrainer for 1 % accuracy."""

    left: float = 0.97
    """Share of a guess's loss that is left, from which right answers are not enough: outputs that
    hardly differ from each other stay so, as behind a temperature that is too high."""

    noise: float = 0.1
    """Spread from step to step over the first value, at most, where it is not known what a guess
    scores: the losses of adversaries go to and fro."""

    def judge(self, case: Case) -> Iterator[Finding]:
        shape = case.loss
        is_low = case.left is None or case.left <= self.left
        is_right = case.learns and (is_low or case.generalises)
        if shape is None or is_right or shape.first == 0 or case.is_adversary:
            return
        chance = case.task.chance
        # An offset is soon learnt, and is no more than a guess.
        guess = None if case.may_be_adversary else chance
        start = shape.first if guess is None else min(abs(shape.first), guess)
        moved = abs(start - shape.last) / max(abs(start), 1e-12)
        noise = 2 * shape.noise / max(abs(shape.first), 1e-12) / 3
        quiet = shape.noise < self.noise * abs(shape.first)
        values = case.run.loss.finite if case.run.loss is not None else np.zeros(0)
        wanders = values.max() > 1.2 * shape.first or values.min() < 0.8 * shape.first
        if chance is None and (moved > self.fall or not quiet or wanders):
            return
        still = max(self.fall, noise)
        if moved > still or shape.peak > 3 * abs(shape.first):
            return
        if shape.still_falls:
            return
        near = chance is None or shape.last > 0.8 * chance
        if not near:
            return
        yield Finding(
            "flat-loss",
            "warning",
            0.6 if chance is not None else 0.45,
            "the loss stays where it began"
            if chance is None
            else "the loss stands at what guessing would score",
            (
                "overfit one batch first: gradstat.check(model, loss_fn, batch)",
                "look at the update-to-weight ratio: about 1e-3 a step is usual",
            ),
            (
                Measure(
                    "distance of the last loss from "
                    + ("the first" if start == abs(shape.first) else "that of a guess"),
                    moved,
                    "of it",
                    threshold=still,
                ),
                *([Measure("loss of a guess", chance)] if chance is not None else []),
            ),
            "SageMaker Debugger, LossNotDecreasing; AutoTrainer, slow convergence",
        )


@dataclass(frozen=True)
class Diverging(Rule):
    """A loss that ends well above what it had reached, or above where it began."""

    codes = ("diverging-loss",)
    needs = ("loss",)

    above: float = 2.0
    """Last over best, as in torch-lr-finder and TheDeepChecker."""

    above_climbing: float = 1.5
    """The same of a loss that climbs through the second half."""

    sure: float = 4.0
    """Rise over the second half over what noise alone would make of it, at least."""

    climb: float = 0.25
    """The same rise over the last value, at least."""

    many: int = 64
    """Losses from which a climb is told: a run may begin with one."""

    beneath: float = 10.0
    """How many times its first size a loss is below 0, and the last outputs are over the first,
    where it falls without end."""

    endless: float = 1e4
    """How many times its first size a loss is below 0, where nothing else is known."""

    faster: float = 2.0
    """Slope of the last third of a loss below -1 over that of the first, at least, where it falls
    faster and faster and is none that is known."""

    def judge(self, case: Case) -> Iterator[Finding]:
        shape = case.loss
        loss = case.run.loss
        if shape is not None and self._falls_for_ever(case, shape):
            yield Finding(
                "diverging-loss",
                "error",
                0.9,
                "the loss falls below 0 without end while the outputs grow: it has no lower bound",
                ("check the loss for a missing maximum, absolute value, square, or its sign",),
                (Measure("last loss", shape.last, threshold=-self.beneath * _size(shape)),),
                "a proper loss has a lower bound",
            )
            return
        if shape is not None and self._falls_faster(case, shape):
            yield Finding(
                "diverging-loss",
                "warning",
                0.7,
                "the loss falls below 0 faster and faster: it seems to have no lower bound",
                ("check the sign of the loss: is it to be maximised?",),
                (Measure("last loss", shape.last, threshold=0.0),),
                "a proper loss has a lower bound",
            )
            return
        if loss is None or case.learns:
            return
        if shape is None:
            if len(loss) >= 10 and len(loss.finite) < len(loss) / 2 and len(loss.finite) >= 2:
                grown = float(loss.finite[-1] / max(abs(loss.finite[0]), 1e-12))
                if grown > self.above:
                    yield self._finding(grown, self.above, False)
            return
        base = max(abs(shape.best), 0.05 * abs(shape.first), 1e-12)
        is_climb = shape.trend > max(self.sure * shape.trend_error, self.climb * shape.last)
        is_climb &= len(loss) >= self.many
        above = self.above_climbing if is_climb else self.above
        if shape.last > above * base and shape.last > shape.best + 4 * shape.noise / 3:
            yield self._finding(shape.last / base, above, shape.rises_steadily)

    def _falls_faster(self, case: Case, shape: Shape) -> bool:
        assert case.run.loss is not None
        loss, lrs = case.run.loss, case.run.probes.lrs
        # What stays within 1 may be a mean of probabilities, or of correlations.
        if shape.last >= -1 or len(loss) < self.many or case.task.loss is not None:
            return False
        if not lrs.size or (lrs[-1] > 1.1 * lrs[0]).any():  # steps that grow let any loss fall so
            return False
        is_finite = np.isfinite(loss.values)
        steps = loss.steps[is_finite]
        ends = np.searchsorted(steps, np.linspace(steps[0], steps[-1], 11)[1:-1])
        falls = -np.diff([median(part) for part in np.split(loss.finite, ends)])
        return bool(
            (falls > 0).all()
            and falls[-1] > 0.9 * falls.max()
            and falls[-3:].sum() > self.faster * falls[:3].sum()
        )

    def _falls_for_ever(self, case: Case, shape: Shape) -> bool:
        assert case.run.loss is not None
        if shape.last < -self.endless * _size_of_start(case.run.loss.finite):
            return True
        known = [b.outputs for b in case.run.batches if b.outputs is not None and b.outputs.size]
        if not shape.still_falls or len(known) < 4 or not case.is_supervised:
            return False
        first, last = (float(np.sqrt(np.mean(known[i] ** 2))) for i in (0, -1))
        return shape.last < -self.beneath * _size(shape) and last > self.beneath * first

    def _finding(self, grown: float, above: float, steadily: bool) -> Finding:
        return Finding(
            "diverging-loss",
            "error",
            0.8 if steadily else 0.65,
            f"the loss has risen to {grown:.2g} times what it had been"
            + (", and rises all the time" if steadily else ""),
            (
                *(["check the sign of the loss: is it to be maximised?"] if steadily else []),
                "multiply lr by 0.1",
                'clip: gradstat.attach(optimizer, model, clip="auto")',
                "go back to a checkpoint from before the rise",
            ),
            (Measure("last loss over the best", grown, threshold=above),),
            "TheDeepChecker (Ben Braiek and Khomh 2023)",
        )


def _size_of_start(values: Floats) -> float:
    """Return the largest size in the first tenth of a loss."""
    return float(np.abs(values[: max(3, len(values) // 10)]).max())


def _size(shape: Shape) -> float:
    """Return the size that a loss begins with; its first value may be next to 0 by chance."""
    return max(abs(shape.first), abs(shape.peak))


@dataclass(frozen=True)
class HardlyBegun(Rule):
    """A loss that falls to the last, steadily, and has fallen by next to nothing."""

    codes = ("underfitting",)
    needs = ("loss",)

    begun: float = 0.15
    """Fall of the loss over its first value, at most."""

    sure: float = 5.0
    """Fall over the second half over what noise alone would make of it, at least."""

    beyond_doubt: float = 20.0
    """The same from which a fall counts however small it is."""

    pace: float = 0.01
    """Fall over the second half over the last value, at least; and twice as far the last may lie
    above the best."""

    of_all: float = 0.25
    """Fall over the second half over the whole fall, at least: what comes to its end has less."""

    several: int = 4
    """Validation losses that fall throughout, from which a fall is sure."""

    usual: float = 1e-3
    """Median update over weight, below which steps are small (Karpathy, cs231n)."""

    def judge(self, case: Case) -> Iterator[Finding]:
        shape, val = case.loss, case.run.val_loss
        if shape is None or case.learns or shape.fall > self.begun:
            return
        if not case.is_judged_by_loss and not self._crawls(case):
            return
        if val is not None and len(val.finite) > 2 and val.finite[-1] > val.finite[0]:
            return
        sure = -shape.trend / max(shape.trend_error, 1e-12)
        falls = sure > self.beyond_doubt or (
            -shape.trend > self.pace * abs(shape.last)
            and (sure > self.sure or (case.is_fresh and case.falls_throughout(self.several)))
        )
        falls &= -shape.trend > self.of_all * (shape.first - shape.last)
        if not falls or shape.last > (1 + 2 * self.pace) * shape.best:
            return
        yield Finding(
            "underfitting",
            "warning",
            0.55,
            "the loss has only begun to fall, and still does",
            ("train longer", "use smaller batches: more steps an epoch", "multiply lr by 3"),
            (Measure("fall of the loss", shape.fall, "of the first", threshold=self.begun)
             .only("below"),),
            "Goodfellow et al. 2016, Deep Learning, section 8.1.3",
        )  # fmt: skip

    def _crawls(self, case: Case) -> bool:
        """Whether steps are small, where without targets a loss may be an adversary's."""
        if case.is_supervised or case.may_be_adversary or not case.is_fresh:
            return False
        ratio = case.total_update_ratio
        return median(ratio[np.isfinite(ratio)]) < self.usual


@dataclass(frozen=True)
class Oscillating(Rule):
    """A loss that swings to and fro by more than batches differ."""

    codes = ("oscillating-loss",)
    needs = ("loss", "targets")

    swing: float = 0.5
    """Spread of the second half (between its deciles) over its median, at least."""

    momentum: float = 0.98
    """From which swings are the optimizer's, though the run learns: it averages over 50 steps."""

    still: float = 0.1
    """Largest validation loss of the second half less the lowest, over the largest, up to which the
    model stands still."""

    gained: float = 0.9
    """Largest one over that of a guess then, at most."""

    least: float = 3e-4
    """Largest update over weight from which swings are made by steps: a third of what is usual."""

    of_first: float = 0.15
    """The same spread over the first value, at least: near zero all losses look unsteady."""

    def judge(self, case: Case) -> Iterator[Finding]:
        loss, shape = case.run.loss, case.loss
        if loss is None or shape is None or not case.is_supervised or case.is_steady:
            return
        optimizer = case.run.optimizer
        if case.learns and not (optimizer and optimizer.momentum >= self.momentum):
            return
        if self._is_noise(case) or self._stands(case):
            return
        half = loss.finite[len(loss.finite) // 2 :]
        low, middle, high = quantiles(half, [0.1, 0.5, 0.9])
        swing = float((high - low) / max(abs(middle), 1e-12))
        got_lower = low < 0.6 * shape.first
        is_large = high - low > self.of_first * abs(shape.first)
        if swing < self.swing or not got_lower or not is_large:
            return
        smooth = medians_of_parts(half, 12)
        turns = int((np.diff(np.sign(np.diff(smooth))) != 0).sum())
        if turns < 4:
            return
        yield Finding(
            "oscillating-loss",
            "warning",
            0.7,
            f"the loss swings by {swing:.0%} of its value in the second half and does not settle",
            ("multiply lr by 0.3", "lower momentum", "use a larger batch"),
            (
                Measure("spread over the median", swing, threshold=self.swing),
                Measure("turns", turns, "of 10"),
            ),
            "AutoTrainer (Zhang et al. 2021), oscillating loss",
        )

    def _stands(self, case: Case) -> bool:
        """Whether no step changes the weights enough to make a loss swing."""
        ratio = case.total_update_ratio
        finite = ratio[np.isfinite(ratio)]
        return bool(finite.size) and float(finite.max()) < self.least

    def _is_noise(self, case: Case) -> bool:
        """Whether it is the batches that differ: what is learnt holds, and stands still."""
        val, chance = case.run.val_loss, case.task.val_chance
        if val is None or chance is None or len(val.finite) < 4:
            return False
        half = val.finite[len(val.finite) // 2 :]
        return bool(np.ptp(half) < self.still * half.max() and half.max() < self.gained * chance)


@dataclass(frozen=True)
class Plateau(Rule):
    """Small gradients everywhere while the loss is high: a saddle or a plateau."""

    codes = ("plateau",)
    needs = ("loss",)

    small: float = 1e-4
    """Median size of the gradients over that of the weights."""

    def judge(self, case: Case) -> Iterator[Finding]:
        run, shape = case.run, case.loss
        if shape is None or case.learns or len(run.probes.steps) < 4 or abs(shape.fall) > 0.1:
            return
        if case.is_clipped:  # to next to nothing
            return
        chance = case.task.chance
        if chance is not None and shape.last < 0.5 * chance:
            return
        gradients = middle(run.probes.gradient_rms[:, run.dimensions >= 2], axis=0)
        finite = gradients[np.isfinite(gradients)]
        if not (finite > 0).any():
            return
        biggest = float(np.max(finite))
        scale = max(abs(shape.last), 1e-12)
        if biggest / scale > self.small:
            return
        yield Finding(
            "plateau",
            "warning",
            0.76,
            "every layer's gradient is tiny while the loss is high: the run sits on a plateau or "
            "saddle",
            (
                "start from larger random weights",
                "use momentum or Adam, which walk along flat directions",
                "raise lr until the loss moves",
            ),
            (
                Measure("largest gradient over the loss", biggest / scale, threshold=self.small),
                Measure("total norm", float(middle(run.probes.total_norms))),
            ),
            "Dauphin et al. 2014, 1406.2572",
        )  # fmt: skip
