"""Rules on what a run comes to: constant answers, or what is learnt by heart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.finding import Finding, Measure, Severity
from gradstat.diagnosis.medians import median
from gradstat.diagnosis.rule import Case, Rule
from gradstat.diagnosis.samples import output_spreads


@dataclass(frozen=True)
class ConstantPredictions(Rule):
    """Outputs that do not depend on the inputs."""

    codes = ("constant-predictions",)
    needs = ("outputs",)

    varies: float = 1e-3
    """Deviation over the rows of a batch, over the outputs' own size."""

    rounding: float = 1e-5
    """The same in the first batches, below which nothing of the inputs gets through by design."""

    skill: float = 0.1
    """Skill up to which a loss that has fallen is no sign of learning: a penalty may have."""

    alike: float = 0.1
    """Correlation of outputs and targets within a column, at most."""

    columns: int = 8
    """Columns from which the targets' mean can be told from chance."""

    rows: int = 64
    """Rows from which a correlation is seen."""

    collapsed: float = 0.05
    """Deviation over the rows, of their size and as it is, and loss over the first ones, at most,
    where nothing but the outputs themselves is compared."""

    def judge(self, case: Case) -> Iterator[Finding]:
        likeness = self._likeness(case)
        is_unlike = likeness is not None and likeness < self.alike
        is_lucky = case.skill is not None and case.skill > self.skill
        seems_right = case.has_scale and (case.skill is None or is_lucky)
        if case.learns and seems_right and not is_unlike:
            return
        spreads = output_spreads(case.run.batches[-max(3, len(case.late)) :])
        targets = case.task.targets
        if len(spreads) < 3 or (targets.size and (targets == targets[:1]).all()):
            return
        if likeness is not None and is_unlike:
            yield self._finding(
                "the outputs have the targets' mean over all rows, but a row's own output has "
                "nothing to do with its target: the inputs do not get through",
                Measure("correlation of outputs and targets within a column", likeness,
                        threshold=self.alike),
            )  # fmt: skip
            return
        spread = median(spreads)
        if self._collapses(case, spread):
            yield self._finding(
                "the outputs become the same for every row, which a loss without targets rewards: "
                "nothing keeps them apart",
                Measure("deviation over the rows", spread, "of the outputs' size"),
                0.6,
                "warning",
            )
            return
        if spread <= self.varies:
            yield self._finding(
                "the outputs are the same for every row: the inputs do not get through",
                Measure("deviation over the rows", spread, "of the outputs' size",
                        threshold=self.varies),
                self._confidence(case),
            )  # fmt: skip

    def _collapses(self, case: Case, spread: float) -> bool:
        if "targets" in case.run.observed or case.loss is None:
            return False
        first = median(output_spreads(case.run.batches)[:3])
        is_met = 0 <= case.loss.last < self.collapsed * case.loss.first
        if not is_met or not spread < self.collapsed * first:
            return False
        outputs = [b.outputs for b in case.run.batches if b.outputs is not None]
        began, ended = (
            median([float(rows.std(0).mean()) for rows in some if len(rows)])
            for some in (outputs[:3], outputs[-3:])
        )
        return ended < self.collapsed * began

    def _confidence(self, case: Case) -> float:
        """Return how sure it is that nothing else is the cause: they were alike from the start.

        A last layer that starts at 0 makes them so in the first batch alone.
        """
        if max(output_spreads(case.run.batches)[:3]) >= self.rounding:
            return 0.75
        is_dead = any(site.is_dead for site in case.run.sites) or case.ends_in_zeros
        return 0.85 if is_dead else 0.94

    def _likeness(self, case: Case) -> float | None:
        """Return how outputs go with targets from row to row, where they do from column to column.

        None where they do not, so that they need not be alike, or where there are few columns, or
        a loss whose scale is known tells more.
        """
        rows = [
            (b.outputs, b.targets)
            for b in case.late
            if b.is_paired and b.outputs is not None and b.targets is not None
        ]
        if case.task.kind not in ("numbers", "binary") or case.task.chance is not None or not rows:
            return None
        if rows[0][0].ndim != 2 or rows[0][0].shape[1] < self.columns:
            return None
        width = rows[0][0].shape[1:]
        rows = [pair for pair in rows if pair[0].shape[1:] == pair[1].shape[1:] == width]
        if not rows:
            return None
        outputs, targets = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        if len(outputs) < self.rows or not np.isfinite(outputs).all():
            return None
        if np.corrcoef(outputs.mean(0), targets.mean(0))[0, 1] < 0.5:
            return None
        own = np.corrcoef((outputs - outputs.mean(0)).ravel(), (targets - targets.mean(0)).ravel())
        return float(own[0, 1])

    def _finding(
        self, text: str, seen: Measure, confidence: float = 0.75, severity: Severity = "error"
    ) -> Finding:
        return Finding(
            "constant-predictions",
            severity,
            confidence,
            text,
            (
                "look at the first finding for what cuts the inputs off (dead units, saturation, "
                "weight decay, dropout)",
                "in a variational autoencoder: lower the weight of the divergence, or raise it "
                "from 0 (warm-up)",
                "check that the inputs differ: gradstat.check(model, loss_fn, batch)",
            ),
            (seen,),
            "UMLAUT (Schoop et al. 2021); Bowman et al. 2016, 1511.06349, section 3.1",
        )


@dataclass(frozen=True)
class NothingComesIn(Rule):
    """A first layer whose inputs are always 0, as after the normalisation of a single number."""

    codes = ("constant-predictions",)
    needs = ("steps",)

    def judge(self, case: Case) -> Iterator[Finding]:
        if not case.is_unfed or case.learns:
            return
        first = case.run.layers[case.run.matrices[0]].name
        yield Finding(
            "constant-predictions",
            "error",
            0.96,
            "the first layer's weights get a gradient of exactly 0 while its bias gets one: what "
            "comes into it is always 0",
            (
                "look at what stands before it: a normalisation of a single feature gives 0, and "
                "so does a mask",
                "check that the inputs are not 0: gradstat.check(model, loss_fn, batch)",
            ),
            (Measure(f"largest gradient of {first}", 0.0, threshold=0.0),),
            "the gradient of a weight is its input times the gradient of its output",
            (first,),
        )


@dataclass(frozen=True)
class Overfitting(Rule):
    """A validation loss that rises while the training loss falls."""

    codes = ("overfitting",)
    needs = ("loss", "val_loss")

    rise: float = 0.15
    """Last validation loss above its lowest, as a share of it; SageMaker Debugger asks for 10 %."""

    gap: float = 1.15
    """Validation loss over training loss at the end, at least."""

    learnt: float = 0.9
    """Share of a guess's loss that is left in training, above which nothing is learnt by heart."""

    matters: float = 0.5
    """Validation loss over that of a guess, from which it is more than information."""

    matters_by_heart: float = 0.3
    """The same where hardly any training loss is left."""

    by_heart: float = 50.0
    """Validation over training loss from which that is so, if the former has risen twice as far, or
    stands at twice as much."""

    def judge(self, case: Case) -> Iterator[Finding]:
        val, shape = case.run.val_loss, case.loss
        if val is None or shape is None or len(val.finite) < 4:
            return
        values = val.finite
        k = max(1, len(values) // 10)
        last, lowest = median(values[-k:]), float(values.min())
        if shape.last < 0 < last:  # another loss than the one that is validated
            return
        if case.left is not None and case.left > self.learnt:
            return
        rise = last / max(abs(lowest), 1e-12) - 1
        # The two may be sums over unlike numbers of rows: compare what has become of each.
        began = float(values[0]) / max(abs(shape.first), 1e-12)
        fair = began if not 0.5 < began < 2 else 1.0
        train = shape.last * fair
        if last < self.gap * train or shape.fall < 0.2:
            return
        chance = case.task.val_chance
        first = max(median(values[:2]), shape.first if 0.1 < began < 10 else 0.0)
        guess = chance if chance is not None else first
        is_by_heart = last > self.by_heart * train and (
            rise > 2 * self.rise or last > 2 * self.by_heart * train
        )
        matters = last > (self.matters_by_heart if is_by_heart else self.matters) * guess
        is_comparable = 0.1 < began < 10  # the one may hold a penalty that the other does not
        lost = last > 10 * train or (last > 5 * train and rise > self.rise / 3)
        is_last = values.argmin() == len(values) - 2  # one value alone may lie so high by chance
        has_risen = rise >= (2 if is_last else 1) * self.rise
        if not has_risen and not (matters and is_comparable and lost):
            return
        yield Finding(
            "overfitting",
            "warning" if matters else "info",
            0.85 if matters else 0.3,
            (
                f"the validation loss has risen by {rise:.0%} from its lowest while the training "
                "loss fell"
                if has_risen
                else "the validation loss stays high while the training loss falls"
            )
            + ": the model learns its training rows by heart",
            (
                "stop at the lowest validation loss",
                "more data or augmentation; weight decay or dropout; a smaller model",
            ),
            (
                Measure("rise of the validation loss", rise, threshold=self.rise).only("above"),
                Measure("validation over training loss", last / max(train, 1e-12),
                        threshold=self.gap),
            ),
            "Goodfellow et al. 2016, Deep Learning, section 7.8; SageMaker Debugger, Overfit",
            steps=(int(val.steps[np.flatnonzero(val.values == lowest)[0]]),),
        )  # fmt: skip


@dataclass(frozen=True)
class ValidationScale(Rule):
    """A validation loss that no guess would score, beside a run that learns."""

    codes = ("bad-inputs",)
    needs = ("loss", "val_loss", "outputs", "targets")

    above: float = 4.0
    """Lowest validation loss over that of a guess, at least: the outputs are sure and wrong."""

    left: float = 0.5
    """Share of a guess's loss that is left in training, at most."""

    common: float = 0.7
    """Share of the commonest class, at most: one that is learnt alone scores so where it is not."""

    def judge(self, case: Case) -> Iterator[Finding]:
        val, chance, left = case.run.val_loss, case.task.val_chance, case.left
        if val is None or len(val.finite) < 2 or chance is None or left is None:
            return
        shares = case.task.shares  # the validation rows' own may be others
        guess = max(chance, math.log(len(shares))) if len(shares) else chance
        lowest = float(val.finite.min()) / guess
        is_rare = len(shares) > 0 and shares[0] > self.common
        if left > self.left or lowest < self.above or is_rare or case.is_wild:
            return
        yield Finding(
            "bad-inputs",
            "warning",
            0.88,
            f"the training rows are learnt while the validation loss is never below {lowest:.2g} "
            "times that of a guess: the validation rows seem to be prepared otherwise",
            (
                "put both through the same scaling, with the training set's mean and deviation",
                "check model.eval(), and that the labels mean the same in both",
                "if both are alike, the training rows are learnt by heart: more data",
            ),
            (Measure("lowest validation loss over a guess", lowest, threshold=self.above),),
            "Sculley et al. 2015, Hidden Technical Debt, on skew of training and serving",
        )
