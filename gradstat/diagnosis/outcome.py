"""Rules on what a run comes to: constant answers, too little learnt, or learnt by heart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.curve import Shape
from gradstat.diagnosis.finding import Finding, Measure, Severity
from gradstat.diagnosis.medians import median
from gradstat.diagnosis.rates import shrunk_weights
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


@dataclass(frozen=True)
class Underfitting(Rule):
    """A run that has stopped to improve with much of its loss left, and something that explains it.

    Without an explanation it is information only: what is left may be noise that nobody can learn,
    as of most text.
    """

    codes = ("underfitting",)
    needs = ("loss", "outputs", "targets")

    left: float = 0.5
    """Share of a guess's loss that is left, of classes."""

    left_of_numbers: float = 0.8
    """The same of numbers, which are often noisy: of scikit-learn's diabetes half is noise."""

    left_with_reason: float = 0.3
    """The same where something is seen that holds the model back."""

    left_without_bias: float = 0.8
    """The same of layers without a bias, which most tasks do not need."""

    left_of_one: float = 0.9
    """The same of a single linear layer, which is often all that is meant."""

    dropout: float = 0.7
    """Probability from which dropout takes too much; 0.5 is the largest in use (1207.0580)."""

    dropout_alone: float = 0.85
    """The same where it is not known how much of the loss is left."""

    fallen: float = 0.2
    """Fall of the loss over its first value in `many_steps`, up to which `dropout` keeps it from
    falling: it ends above that of validation, where dropout is off."""

    many_steps: int = 200
    """Steps after which a loss has fallen further if it ever does."""

    stalled: float = 0.05
    """Change over the second half of the run, over the last value, at most."""

    def judge(self, case: Case) -> Iterator[Finding]:
        shape, left, run = case.loss, case.left, case.run
        if shape is not None and left is None and not case.learns:
            yield from self._without_scale(case, shape)
        if shape is None or left is None:
            return
        is_stack = case.task.kind == "classes" and len(run.matrices) > 1 and self._is_linear(case)
        enough = 0.9 if is_stack else 0.7
        if left < self.left_with_reason or (case.skill is not None and case.skill > enough):
            return
        reason, remedy, confidence = self._reason(case)
        most = self.left if case.task.kind != "numbers" else self.left_of_numbers
        if reason:
            most = self.left_with_reason
        if left < most:
            return
        if not reason and abs(shape.fall) < 0.03:  # that is a flat loss, whatever the reason
            return
        stalls = -shape.trend < max(2 * shape.trend_error, self.stalled * abs(shape.last))
        if (
            not reason
            and stalls
            and not case.learns
            and not self._is_text(case)
            and run.val_loss is not None
            and run.step >= 100
        ):
            confidence = 0.5
        yield Finding(
            "underfitting",
            "warning" if confidence >= 0.5 else "info",
            confidence,
            f"{left:.0%} of a guess's loss is left" + (f": {reason}" if reason else ""),
            (*remedy, "use a larger model, or less regularisation", "train longer"),
            (Measure("loss over a guess", left, threshold=most),),
            "Goodfellow et al. 2016, Deep Learning, section 5.2",
        )

    def _without_scale(self, case: Case, shape: Shape) -> Iterator[Finding]:
        """Yield what decay or dropout comes to where no more than the loss is known."""
        run = case.run
        dropout = run.model.dropout if run.model is not None else 0.0
        if shrunk_weights(case):
            weights = run.probes.weight_rms[:, run.dimensions >= 2]
            least = float(np.nanmin(weights[-1] / weights[0]))
            seen = Measure("least of a weight's last size over its first", least, threshold=0.5)
            seen = seen.only("below")
        elif dropout >= self.dropout_alone and not shape.still_falls:
            seen = Measure("dropout", dropout, threshold=self.dropout_alone)
        elif dropout >= self.dropout and self._is_held_back(case, shape):
            seen = Measure("fall of the loss, which ends above that of validation", shape.fall,
                           threshold=self.fallen).only("below")  # fmt: skip
        else:
            return
        reason, remedy, _ = self._reason(case)
        yield Finding(
            "underfitting",
            "warning",
            0.8,
            reason,
            (*remedy, "train longer"),
            (seen,),
            "Goodfellow et al. 2016, Deep Learning, section 5.2",
        )

    def _is_held_back(self, case: Case, shape: Shape) -> bool:
        """Whether a loss that has hardly fallen is above that of validation, without dropout."""
        val = case.run.val_loss
        if val is None or not val.finite.size or case.run.step < self.many_steps:
            return False
        return shape.fall < self.fallen and float(val.finite[-1]) < shape.last

    def _is_text(self, case: Case) -> bool:
        """Whether tokens are to be told from tokens: what is left is the text's own entropy."""
        return any(
            {"inputs", "targets"} <= batch.integers
            and (
                batch.shapes["targets"] == batch.shapes["inputs"]
                or batch.shapes["targets"][:1] != batch.shapes["inputs"][:1]
            )
            for batch in case.run.batches
        )

    def _is_linear(self, case: Case) -> bool:
        run = case.run
        if run.model is None or run.sites or not len(run.matrices) or not run.activations_watched:
            return False
        if len(run.matrices) == 1 and self._best_left(case) < self.left_of_one:
            return False  # one that regresses is meant to be linear
        return all(
            kind.startswith(("Linear", "Conv", "Flatten", "Identity", "Dropout", "BatchNorm"))
            for kind in run.model.kinds
        )

    def _has_no_bias(self, case: Case) -> bool:
        """Whether a model of several layers that learns next to nothing has matrices alone."""
        run = case.run
        if run.model is None or case.learns or run.embeddings or len(run.matrices) < 2:
            return False
        if (case.left or 0.0) < self.left_without_bias:
            return False
        sizes = [math.prod(layer.shape) for layer in run.layers]
        if sum(sizes) < run.model.n_parameters:
            return False
        return all(n > max(la.shape, default=n) for n, la in zip(sizes, run.layers, strict=True))

    def _best_left(self, case: Case) -> float:
        """Return the share of a guess's loss that is left, in training or in validation."""
        val, chance = case.run.val_loss, case.task.val_chance
        known = [] if case.left is None else [case.left]
        if val is not None and val.finite.size and chance:
            known.append(float(val.finite.min()) / chance)
        return min(known, default=0.0)

    def _reason(self, case: Case) -> tuple[str, tuple[str, ...], float]:
        """Return what holds the model back, what to do, and how sure that is."""
        run = case.run
        if shrunk_weights(case) and run.optimizer is not None:
            decay = run.optimizer.weight_decay
            return (
                "weight decay has all but erased the weights",
                (f"lower weight_decay from {decay:g} to 0.01 or less",),
                0.94,
            )
        if run.model is not None and run.model.dropout >= self.dropout:
            p = run.model.dropout
            return (
                f"dropout takes {p:.0%} of a layer's units",
                (f"lower dropout from {p:g} to 0.1 ... 0.5: p is the share that is dropped",),
                0.94,
            )
        if self._is_linear(case):
            return (
                "no activation function stands between the layers, so the model is linear",
                ("put ReLU or GELU between the layers",),
                0.75,
            )
        if self._has_no_bias(case):
            return (
                "no layer has a bias, so what the model gives is fixed where its inputs are 0",
                ("leave out bias=False",),
                0.6,
            )
        widths = [run.layers[i].shape[0] for i in run.matrices[:-1]]
        widths += [
            run.layers[i].shape[1] for i in run.matrices[1:] if len(run.layers[i].shape) == 2
        ]
        if widths and min(widths) <= 2:
            return (
                f"a layer of {min(widths)} units is all that the inputs pass through",
                ("widen the narrowest layer",),
                0.7,
            )
        return "", (), 0.35
