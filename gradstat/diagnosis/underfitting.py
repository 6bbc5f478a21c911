"""The rule on a run that gains too little, and what holds it back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.curve import Shape
from gradstat.diagnosis.finding import Finding, Measure
from gradstat.diagnosis.rates import shrunk_weights
from gradstat.diagnosis.rule import Case, Rule


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
