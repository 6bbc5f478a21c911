"""Rules on targets: out of scale, without content, or with little to do with their inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.finding import Finding, Measure
from gradstat.diagnosis.medians import median, n_different, quantiles
from gradstat.diagnosis.recurrence import is_plain, length
from gradstat.diagnosis.rule import Case, Rule
from gradstat.diagnosis.samples import input_sums


@dataclass(frozen=True)
class TargetScale(Rule):
    """Targets to be regressed that are far larger than what a network gives at first."""

    codes = ("bad-targets",)
    needs = ("outputs", "targets")

    large: float = 10.0
    """Root mean square of the targets above which the first gradients are too large."""

    beyond: float = 10.0
    """How many times the first outputs that has to be."""

    def judge(self, case: Case) -> Iterator[Finding]:
        task = case.task
        if task.kind != "numbers" or "targets" in task.paired[0].integers:
            return
        if case.is_well:
            return
        first = task.paired[0].outputs
        targets = task.targets[np.isfinite(task.targets)]
        if first is None or targets.size == 0:
            return
        rms = float(np.sqrt(np.mean(targets**2)))
        first = first[np.isfinite(first)]
        outputs = float(np.sqrt(np.mean(first**2))) if first.size else 0.0
        if rms > self.large and rms > self.beyond * outputs:
            yield Finding(
                "bad-targets",
                "error" if rms > 10 * self.large else "warning",
                0.91 if task.loss is not None else 0.6,
                f"the targets are {rms:.3g} in size and the first outputs {outputs:.2g}: the loss "
                "and its gradients start out of proportion to the weights",
                (
                    "standardise the targets: (y - mean) / std over the training set, and undo it "
                    "when predicting",
                    "or set the last layer's bias to the targets' mean",
                ),
                (
                    Measure("root mean square of the targets", rms, threshold=self.large),
                    Measure("root mean square of the first outputs", outputs),
                ),
                "Bishop 1995, Neural Networks for Pattern Recognition, section 8.2",
            )


@dataclass(frozen=True)
class Leak(Rule):
    """Integer targets that are the inputs: a text that is to predict itself."""

    codes = ("zero-loss", "bad-targets")
    needs = ("inputs", "targets")

    min_values: int = 64

    learnt: float = 0.1
    """Last loss over the first, up to which it goes to nothing: a copy is soon learnt."""

    def judge(self, case: Case) -> Iterator[Finding]:
        compared = 0
        for batch in case.run.batches:
            if batch.inputs is None or batch.targets is None:
                continue
            both_integers = {"inputs", "targets"} <= batch.integers
            count = min(batch.inputs.size, batch.targets.size)
            inputs, targets = batch.inputs.ravel()[:count], batch.targets.ravel()[:count]
            sizes = {math.prod(batch.shapes[name]) for name in ("inputs", "targets")}
            if not both_integers or len(sizes) > 1:
                return
            if (inputs != targets).any():
                return
            compared += count
        if compared < self.min_values:
            return
        shape = case.loss
        yield Finding(
            "zero-loss" if shape and shape.last < self.learnt * shape.first else "bad-targets",
            "error",
            0.93,
            "the targets are the inputs: there is nothing to predict",
            ("shift the targets by one: inputs = tokens[:, :-1], targets = tokens[:, 1:]",),
            (Measure("targets that equal their inputs", 1.0, "share", threshold=1.0),),
            "definition of a language model's loss",
        )


@dataclass(frozen=True)
class MissingTargets(Rule):
    """Numbers among which one far from all others comes again and again: it stands for none."""

    codes = ("bad-targets",)
    needs = ("targets",)

    beyond: float = 20.0
    """Distance from the median of the others, over the range of their middle four fifths."""

    share: float = 0.005
    """Share of the targets that are that number, at least; and three of them."""

    enough: int = 8192
    """Targets that tell; of more, about so many in rows spread over all are looked at."""

    def judge(self, case: Case) -> Iterator[Finding]:
        targets = case.task.targets
        values = targets[:: max(1, targets.size // self.enough)]
        values = values[np.isfinite(values)]
        if case.task.kind != "numbers" or values.size < 64:
            return
        for code in (float(values.min()), float(values.max())):
            count = np.count_nonzero(values == code)
            if values.size < 2 * count or count < max(3, self.share * values.size):
                continue
            others = values[values != code]
            low, middle, high = quantiles(others, [0.1, 0.5, 0.9])
            distance = abs(code - middle) / (high - low) if high > low else 0.0
            if distance > self.beyond:
                yield Finding(
                    "bad-targets",
                    "error",
                    0.9,
                    f"{count / values.size:.1%} of the targets are exactly {code:.6g}, far from "
                    "all others: it seems to stand for a missing value, and rules the loss",
                    ("leave these rows out, or mask them in the loss",),
                    (Measure("distance from the median", distance, "of the others' range",
                             threshold=self.beyond),),
                    "the square of an outlier outweighs all other rows",
                )  # fmt: skip
                return


@dataclass(frozen=True)
class ConstantTargets(Rule):
    """Targets that are all the same."""

    codes = ("bad-targets",)
    needs = ("targets",)

    min_values: int = 64

    learnt: float = 0.1
    """Last loss over the first, at most: a constant is learnt at once. One that is not is an
    adversary's, as when a generator wants all its images taken for real."""

    def judge(self, case: Case) -> Iterator[Finding]:
        targets = case.task.targets
        if targets.shape[:1] < (self.min_values,) or not (targets == targets[:1]).all():
            return
        is_learnt = case.loss is None or case.loss.last < self.learnt * abs(case.loss.first)
        if not is_learnt:
            return
        yield Finding(
            "bad-targets",
            "error",
            0.85,
            "every sampled target is the same, so there is nothing to learn but a constant",
            ("check how the labels are made and joined to the inputs",),
            (Measure("different targets", 1.0, threshold=2.0),),
            "DeepCrime's operator on labels (Humbatova et al. 2021)",
        )


@dataclass(frozen=True)
class RandomTargets(Rule):
    """Nothing is learnt that holds for other rows, though the run itself is in order."""

    codes = ("bad-targets", "underfitting")
    needs = ("outputs", "targets", "loss")

    reach: float = 0.3
    """Updates over weights, times the steps: below that the run has not tried."""

    unseen: float = 0.95
    """Best validation loss over that of a guess, at least."""

    falls: float = 0.05
    """Fall over the second half of the run, over the last value: what still falls may yet learn."""

    several: int = 6
    """Validation losses, each below the one before, that fall however little."""

    orderly: float = 1.5
    """Largest loss over that of a guess, at most, in a run whose steps are no reason for it."""

    moves: float = 1e-5
    """Spread of the loss from step to step over that of a guess, below which a run has stopped. It
    goes to and fro with targets that do not fit."""

    long: int = 30
    """Steps of a sequence from which a recurrent network may forget what the target depends on, so
    that nothing learnt says little of the targets (Bengio et al. 1994, doi:10.1109/72.279181)."""

    short: int = 13
    """The same of one without gates: torch's default leaves a thousandth of a gradient there."""

    even: float = 0.1
    """Distance of the share of ones from one half, up to which inputs of two values are bits."""

    def judge(self, case: Case) -> Iterator[Finding]:
        run, shape, chance = case.run, case.loss, case.task.chance
        if shape is None or chance is None or chance <= 0:
            return
        if len(case.task.shares) and case.task.shares[0] > 0.85:  # imbalance looks the same
            return
        val = run.val_loss
        if val is not None and len(val.finite) >= 3:
            if case.task.val_chance is None:
                return
            best, judged = float(val.finite.min()), "validation"
            if not case.learns and best > 0.85 * chance and val.finite[0] < chance:
                best *= chance / float(val.finite[0])  # the guess's own on these rows
            half = val.finite[len(val.finite) // 2 :]
            falls = half[0] - half[-1] > self.falls * abs(half[-1])
            falls |= case.falls_throughout(self.several)
        elif not case.may_be_adversary:
            best, judged = shape.best, "training"
            falls = shape.still_falls
        else:
            return
        ratio = case.total_update_ratio
        ratio = ratio[np.isfinite(ratio)]  # of weights that are zero there is none
        reach = float(ratio.mean()) * run.step if ratio.size else 0.0
        if falls or best < self.unseen * chance or shape.last > 1.1 * chance or reach < self.reach:
            return
        if case.learns and shape.last > 0.9 * best:  # right, and not by heart: it may yet learn
            return
        has_stopped = judged == "training" and shape.noise < self.moves * chance
        is_excused = has_stopped or self._may_be_out_of_reach(case)
        confidence = 0.68 if shape.peak < self.orderly * chance else 0.5
        yield Finding(
            "underfitting" if case.sees_no_order else "bad-targets",
            "warning",
            0.7 if case.learns else 0.35 if is_excused else confidence,
            f"the weights have moved far, but {judged} is never better than a guess: "
            + (
                "attention that is not told positions, as seems so here, does not see the order of "
                "what it is given; or the targets have nothing to do with the inputs"
                if case.sees_no_order
                else "the targets seem to have nothing to do with the inputs"
            ),
            (
                *(["add positions to the embeddings"] if case.sees_no_order else []),
                "look at some rows: does each target belong to its input?",
                "check that inputs and targets are shuffled and split together",
            ),
            (
                Measure("way of the weights", reach, "of their size", threshold=self.reach),
                Measure(f"best {judged} loss over a guess", best / chance,
                        threshold=self.unseen),
            ),
            "Zhang et al. 2017, 1611.03530",
        )  # fmt: skip

    def _may_be_out_of_reach(self, case: Case) -> bool:
        """Whether there may be something to learn that such a network does not come to.

        It forgets it, or no part of the inputs tells anything by itself, as of the bits of a parity
        (Shalev-Shwartz et al. 2017, 1703.07950).
        """
        if case.forgets_at_once:
            return True
        n_steps = length(case)
        if n_steps >= self.long or (is_plain(case) and not 0 < n_steps < self.short):
            return True
        rows = [b.inputs for b in case.run.batches if b.inputs is not None and b.inputs.size]
        if not rows or len(case.task.shares) > 2:
            return False
        values = np.concatenate([row.ravel() for row in rows])
        low, high = values.min(), values.max()
        are_bits = bool(((values == low) | (values == high)).all())
        return are_bits and abs(float((values == high).mean()) - 0.5) < self.even


@dataclass(frozen=True)
class Contradictions(Rule):
    """Rows of inputs that come again with another class."""

    codes = ("bad-targets",)
    needs = ("inputs", "targets")

    share: float = 0.25
    """Share of the rows that come again whose class is not the same each time, at least."""

    min_rows: int = 16
    """Rows that come again, at least."""

    features: int = 8
    """Numbers in a row, at least: a few may be alike in rows that are not."""

    left: float = 0.3
    """Share of a guess's loss that is left, at least."""

    def judge(self, case: Case) -> Iterator[Finding]:
        if case.task.kind != "classes" or case.left is None or case.left < self.left:
            return
        rows, classes = [np.zeros(0)], []
        batches = case.run.batches
        for batch, sums in zip(batches, input_sums(batches), strict=True):
            inputs, targets = batch.inputs, batch.targets
            if inputs is None or targets is None or "inputs" in batch.integers or not inputs.size:
                continue
            if targets.ndim != 1 or batch.shapes["targets"] != batch.shapes["inputs"][:1]:
                continue
            if inputs[0].size < self.features:
                return
            n = min(len(inputs), len(targets))
            rows.append(sums[:n])
            classes.append(targets)
        all_sums = np.concatenate(rows)
        if all_sums.size - n_different(all_sums) < self.min_rows:
            return
        order = np.argsort(all_sums, kind="stable")
        comes_again = np.diff(all_sums[order]) == 0
        row = np.cumsum(~comes_again)
        n_alike = n_different(row[comes_again])
        if n_alike < self.min_rows:
            return
        if any(n_different(targets) == targets.size for targets in classes):
            return  # a class of its own for each row of a batch says which rows are pairs
        labels = np.concatenate([t[: len(s)] for t, s in zip(classes, rows[1:], strict=True)])
        order = np.lexsort((labels, all_sums))
        differ = n_different(row[comes_again & (np.diff(labels[order]) != 0)]) / n_alike
        if differ < self.share:
            return
        yield Finding(
            "bad-targets",
            "error",
            0.92,
            f"{differ:.0%} of the inputs that come again have another class than "
            "before: no model can be right about both",
            (
                "look at some of them: which of their labels is right?",
                "check that inputs and targets are shuffled together",
            ),
            (Measure("inputs whose class changes", differ, "of those that come again",
                     threshold=self.share),),
            "Northcutt et al. 2021, 1911.00068",
        )  # fmt: skip


@dataclass(frozen=True)
class NoisyTraining(Rule):
    """A training loss that stays far above the validation loss: labels that only training has."""

    codes = ("bad-targets",)
    needs = ("loss", "val_loss", "inputs", "outputs", "targets")

    ratio: float = 0.8
    """Validation over training loss, at most; without dropout they are alike or the former is
    larger."""

    left: float = 0.5
    """Share of a guess's loss that is left in training, at least: labels of a small share that are
    wrong do no harm."""

    different: float = 0.95
    """Share of the rows of inputs that are different, at most: those that come again are not made
    anew each time."""

    def judge(self, case: Case) -> Iterator[Finding]:
        shape, val, model = case.loss, case.run.val_loss, case.run.model
        if shape is None or val is None or len(val.finite) < 3 or case.task.kind != "classes":
            return
        if case.task.val_chance is None or case.left is None or case.left < self.left:
            return
        if model is None or model.dropout > 0:
            return
        # Validation comes at the end of an epoch, when a loss that falls has come further.
        train = shape.last + (0.3 * shape.trend if shape.still_falls else 0.0)
        last = median(val.finite[-max(1, len(val.finite) // 5) :])
        if last > self.ratio * train:
            return
        sums = np.concatenate(input_sums(case.run.batches))
        n_rows, n_unlike = len(sums), n_different(sums)
        if n_unlike > self.different * n_rows:  # augmentation or mixup makes them hard
            return
        yield Finding(
            "bad-targets",
            "warning",
            0.65,
            "the model does far better on the validation rows than on those that it is trained "
            "on: some of the training labels seem to be wrong",
            (
                "look at the training rows with the largest loss: are their labels right?",
                "if training inputs are distorted (augmentation, mixup), distort them less",
            ),
            (
                Measure("validation over training loss", last / train, threshold=self.ratio),
                Measure("training loss over a guess", case.left, threshold=self.left),
                Measure("different rows of inputs", n_unlike, f"of {n_rows}"),
            ),
            "Northcutt et al. 2021, 1911.00068; DeepCrime's operator on labels",
        )
