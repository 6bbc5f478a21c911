"""Rules on what goes in: inputs, their order, and how common each class is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradstat.diagnosis.evidence import Floats
from gradstat.diagnosis.finding import Finding, Measure, Severity
from gradstat.diagnosis.medians import counted, median
from gradstat.diagnosis.rule import Case, Rule

_NORMALISES = ("BatchNorm", "LayerNorm", "InstanceNorm", "GroupNorm", "RMSNorm")


@dataclass(frozen=True)
class NonfiniteInputs(Rule):
    """NaN or Inf in the inputs or targets: everything behind them becomes NaN."""

    codes = ("bad-inputs", "bad-targets")
    needs = ("inputs",)

    def judge(self, case: Case) -> Iterator[Finding]:
        for name, code in (("inputs", "bad-inputs"), ("targets", "bad-targets")):
            for batch in case.run.batches:
                if not batch.holds_nonfinite(name):
                    continue
                share = 1 - float(np.isfinite(getattr(batch, name)).mean())
                yield Finding(
                    code,
                    "error",
                    0.98,
                    f"the {name} hold NaN or Inf, which every loss and gradient behind them "
                    "takes on",
                    (
                        f"find the rows: torch.isfinite({name}).all(-1)",
                        "drop them or fill the gaps before training",
                    ),
                    (Measure("share of values not finite", share, threshold=0.0),),
                    "IEEE 754 arithmetic",
                    steps=(batch.step + 1,),
                )
                break


@dataclass(frozen=True)
class InputScale(Rule):
    """Inputs far from the scale that initialisations assume, or features of very unlike scales."""

    codes = ("bad-inputs",)
    needs = ("inputs",)

    large: float = 10.0
    """Root mean square above which inputs are too large. Initialisations assume about 1 (He et al.
    2015, 1502.01852); DeepDiagnosis flags anything beyond [-1, 1], which standardised data is."""

    small: float = 1e-2
    """Root mean square below which inputs are too small: torch's default biases are as large as
    what comes of inputs of size one, so that they drown them."""

    unlike: float = 100.0
    """Ratio of the largest feature's deviation to the median one's, where the former is `large`."""

    left: float = 0.25
    """Share of a guess's loss that is left, from which large inputs are worth a warning though the
    run learns."""

    still: float = 0.1
    """Spread of the loss from step to step, and change over the second half, over its last value,
    at most, where one that has fallen to less than a tenth stands still."""

    def judge(self, case: Case) -> Iterator[Finding]:
        rows = case.input_rows
        if rows.shape[0] < 2:
            return
        rms, deviations = case.input_rms, case.input_deviations
        if not deviations.any():
            yield self._finding(
                "every sampled row of the inputs is the same, so nothing can be told from them",
                ("check what fills the batch: the data set, the transforms, a mask",),
                0.97,
                "error",
                Measure("largest deviation of a feature", 0.0, threshold=0.0),
            )
            return
        model = case.run.model
        if model is not None and model.modules and model.modules[0].startswith(_NORMALISES):
            return
        if any("inputs" in batch.integers for batch in case.run.batches):  # of tokens, say
            return
        normal = median(deviations[deviations > 0])
        widest = float(deviations.max())
        is_huge = rms > 10 * self.large
        is_well = case.is_well and (rms < self.large or case.left is None or case.left < self.left)
        severity = "info" if is_well else "error" if is_huge else "warning"
        certainty = 0.4 if is_well else 0.9
        if is_well and is_huge and self._has_only_come_down(case):
            severity, certainty = "warning", 0.6
        if rms > self.large:
            yield self._finding(
                f"the inputs are {rms:.3g} in size where initialisations assume about 1: "
                "first-layer sums saturate units and gradients grow with the inputs",
                (
                    "divide inputs by 255"
                    if rows.min() >= 0 and 100 < rows.max() <= 255
                    else "standardise each feature: (x - mean) / std over the training set",
                    "or put a normalisation layer first",
                ),
                certainty,
                severity,
                Measure("root mean square of the inputs", rms, threshold=self.large),
                Measure("widest feature's deviation over the median one's", widest / normal),
            )
        elif widest > self.large and widest / normal > self.unlike:
            yield self._finding(
                "one feature is so much larger than the others that they count for nothing",
                ("standardise each feature: (x - mean) / std over the training set",),
                certainty - 0.1,
                severity,
                Measure("ratio of deviations", widest / normal, threshold=self.unlike),
            )
        elif rms < self.small:
            yield self._finding(
                "the inputs are so small that the first layer's output is its bias",
                ("standardise each feature: (x - mean) / std over the training set",),
                certainty - 0.1,
                severity,
                Measure("root mean square of the inputs", rms, threshold=self.small),
            )

    def _has_only_come_down(self, case: Case) -> bool:
        """Whether the loss has fallen far and stands, where nothing else tells how well a run is.

        Large inputs make a large loss, of which a model that learns to pass over them gets rid. So
        does one that has come down to the noise, which nobody can tell from it here.
        """
        shape = case.loss
        if shape is None or case.has_scale or case.run.val_loss is not None:
            return False
        stands = abs(shape.trend) < max(2 * shape.trend_error, self.still * abs(shape.last))
        return stands and shape.noise < self.still * shape.last < self.still * shape.first / 10

    def _finding(
        self, text: str, remedy: tuple[str, ...], confidence: float, severity: str, *seen: Measure
    ) -> Finding:
        return Finding(
            "bad-inputs",
            severity,  # type: ignore[arg-type]
            confidence,
            text,
            remedy,
            seen,
            "LeCun et al. 1998, Efficient BackProp, section 4.3; He et al. 2015, 1502.01852",
        )


_WITH_BIAS = ("Linear", "Conv", "RNN", "GRU", "LSTM")
"""What the names of modules begin with whose bias is added to the product of weights and inputs."""


@dataclass(frozen=True)
class UnseenInputs(Rule):
    """Inputs that nobody has shown, whose scale the first layer's gradients tell.

    A row adds its inputs times d to the gradient of the weights, and d to that of the bias: the two
    stand to each other as the inputs to 1. Not so where a normalisation takes the bias away, or
    where the d of all rows add up to 0, as in a run that is well they may.
    """

    codes = ("bad-inputs",)
    needs = ("steps", "loss")

    large: float = 15.0
    """Gradient of the first weights over that of their bias, root mean squares, the median of the
    first steps, at least; up to 10 is seen of inputs that are standardised."""

    least: float = 6.0
    """The same in each of them: a bias's gradient is small now and then by chance."""

    lost: float = 0.5
    """Update over weight from which a first step loses the weights, and the gradients after it may
    tell nothing."""

    large_alone: float = 75.0
    """`large` of that step alone then."""

    cancelled: float = 1e6
    """The same from which the bias's gradient is what rounding leaves of rows that cancel."""

    faded: float = -2.0
    """Power of ten by which weights that start small make a signal smaller: little comes back."""

    def judge(self, case: Case) -> Iterator[Finding]:
        run = case.run
        if "inputs" in run.observed or case.is_well or len(run.matrices) < 2:
            return  # the rows' parts of a single layer's bias cancel in large batches
        if run.model is None or run.model.normalises:
            return
        if case.growth < self.faded:
            return
        first, _, _, module, _ = run.layers[run.matrices[0]]
        if not module.startswith(_WITH_BIAS):  # of attention the keys' bias has no gradient
            return
        biases = [i for i, layer in enumerate(run.layers) if layer.name == _bias_of(first)]
        gradients = run.probes.gradient_rms[:4]
        if not biases or run.matrices[0] > biases[0] or not len(gradients):
            return
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = gradients[:, run.matrices[0]] / gradients[:, biases[0]]
        ratio = self._ratio(ratios)
        if ratio is None and run.probes.steps[0] == 1 and case.total_update_ratio[0] > self.lost:
            ratio = self._ratio(ratios[:1], self.large_alone)
        if ratio is None:
            return
        yield Finding(
            "bad-inputs",
            "warning",
            0.85,
            f"the first layer's weights get gradients {ratio:.3g} times those of its bias, so its "
            "inputs are about as large, where initialisations assume about 1",
            (
                "standardise each feature: (x - mean) / std over the training set",
                "or put a normalisation layer first",
                "observe(inputs=...) tells more",
            ),
            (Measure("gradient of the first weights over their bias's", ratio,
                     threshold=self.large),),
            "LeCun et al. 1998, Efficient BackProp, section 4.3",
            (first,),
        )  # fmt: skip

    def _ratio(self, ratios: Floats, large: float | None = None) -> float | None:
        """Return the median of these ratios, where it is one of large inputs."""
        known = ratios[np.isfinite(ratios)]
        if not known.size or known.min() < self.least:
            return None
        ratio = median(known)
        return ratio if (large or self.large) < ratio < self.cancelled else None


def _bias_of(weight: str) -> str:
    """Return what the bias beside a weight is called."""
    owner, dot, own = weight.rpartition(".")
    return owner + dot + own.replace("weight", "bias")


@dataclass(frozen=True)
class Unshuffled(Rule):
    """Batches that hold one class each while all together hold several."""

    codes = ("oscillating-loss",)
    needs = ("targets",)

    within: float = 0.35
    """Share of the pooled entropy that a batch has, at most; a random batch has nearly all."""

    min_batches: int = 6

    left: float = 0.5
    """Share of a guess's loss that is left in training, from which it does harm."""

    gap: float = 5.0
    """Last validation loss over the training loss, from which it does harm though it is learnt."""

    def judge(self, case: Case) -> Iterator[Finding]:
        task = case.task
        if task.kind not in ("classes", "binary") or len(task.shares) < 2:
            return
        counts = _class_counts([b.targets for b in task.with_targets if b.targets is not None])
        counts = counts[counts.sum(1) >= 8]
        if len(counts) < self.min_batches:
            return
        pooled = float(_entropies(counts.sum(0)))
        share = median(_entropies(counts)) / pooled
        if pooled > 0.3 and share < self.within:
            yield Finding(
                "oscillating-loss",
                self._severity(case),
                0.96,
                "each batch holds hardly more than one class: the data is sorted and not shuffled, "
                "so each stretch of steps may unlearn the one before",
                ("shuffle: DataLoader(..., shuffle=True)", "check that the order is drawn anew"),
                (
                    Measure("entropy of a batch over that of all", share, threshold=self.within),
                    Measure("entropy of all batches", pooled, "nat"),
                ),
                "Bengio 2012, 1206.5533, section 3; DeepCrime's operator on batches",
            )

    def _severity(self, case: Case) -> Severity:
        """Return how much harm is seen: a model that follows the order is right in each batch."""
        val, shape = case.run.val_loss, case.loss
        if case.left is not None and case.left > self.left:
            return "error"
        if val is None or shape is None or not val.finite.size:
            return "info" if case.learns else "error"
        if not case.generalises:
            return "error"
        return "warning" if val.finite[-1] > self.gap * shape.last else "info"


def _class_counts(targets: list[Floats]) -> NDArray[np.int64]:
    """Return how often each class that occurs is in each batch: (batches, classes)."""
    values = np.concatenate([of_batch.ravel() for of_batch in targets])
    rows = np.repeat(np.arange(len(targets)), [of_batch.size for of_batch in targets])
    is_class = values >= 0  # losses ignore -100 and the like
    values, rows = values[is_class], rows[is_class]
    classes, _ = counted(values)
    places = rows * len(classes) + np.searchsorted(classes, values)
    return np.bincount(places, minlength=len(targets) * len(classes)).reshape(len(targets), -1)


def _entropies(counts: NDArray[np.int64]) -> Floats:
    """Return the entropy of each row of counts, in nat."""
    shares = counts / counts.sum(-1, keepdims=True)
    entropies: Floats = np.abs((shares * np.log(np.where(shares > 0, shares, 1.0))).sum(-1))
    return entropies


@dataclass(frozen=True)
class Imbalance(Rule):
    """A class so common that predicting it always is a good score, and that is what is learnt."""

    codes = ("class-imbalance",)
    needs = ("outputs", "targets")

    common: float = 0.85
    """Share of the commonest class: a ratio of about 6 to 1 for two classes. SageMaker Debugger
    warns from 10 to 1."""

    extreme: float = 0.95
    """Share of the commonest class from which an accuracy no better than that is enough to tell."""

    left: float = 0.7
    """Share of a guess's loss that is left where several classes are told at once, as of pixels,
    at least."""

    recall: float = 0.6
    """Share of the other classes' rows that is found, at most."""

    def judge(self, case: Case) -> Iterator[Finding]:
        task = case.task
        shares = task.shares
        if task.kind not in ("classes", "binary") or len(shares) < 2:
            return
        is_one_column = task.targets.ndim == 1 or task.targets.shape[-1] == 1
        is_common = (
            shares[0] >= self.common
            if len(shares) == 2
            else (shares[0] >= 0.7 and shares[0] / max(shares[-1], 1e-9) >= 10)
        )
        is_lost = shares[0] > self.extreme and case.left is not None and case.left > self.left
        if not is_common or not (is_one_column or is_lost):
            return
        found, error = _rare_recall(case)
        doubt = error if task.loss is None else 0.0  # it may be weighted by class
        certainty = 0.85
        is_no_better = case.skill is not None and case.skill <= 0
        if is_no_better and (found is None or shares[0] > self.extreme):
            certainty = 0.75
        elif found is None or found + doubt > self.recall:
            return
        yield Finding(
            "class-imbalance",
            "warning",
            certainty,
            f"one class makes up {shares[0]:.0%} of the targets, and the model does no better than "
            "to give that answer always",
            (
                "weight the loss by class (CrossEntropyLoss(weight=...), BCEWithLogitsLoss("
                "pos_weight=...))",
                "or sample the classes evenly (WeightedRandomSampler)",
                "judge by recall or balanced accuracy, not by accuracy",
            ),
            (
                Measure("share of the commonest class", float(shares[0]), threshold=self.common),
                *(
                    [
                        Measure(
                            "share of the other rows that is found", found, threshold=self.recall
                        ).only("below")
                    ]
                    if found is not None
                    else []
                ),
            ),
            "He and Garcia 2009, doi:10.1109/TKDE.2008.239; SageMaker Debugger, ClassImbalance",
        )


def _rare_recall(case: Case) -> tuple[float | None, float]:
    """Return the share of the rare classes' rows that is found late, and its standard error."""
    task = case.task
    values, counts = task.classes
    common = values[counts.argmax()]
    hits = total = others = rows = 0
    for batch in case.late:
        if not batch.is_paired or batch.outputs is None or batch.targets is None:
            continue
        targets = batch.targets.ravel()
        if task.kind == "classes":
            predicted = batch.outputs.argmax(-1)
        else:
            is_probability = batch.outputs.min() >= 0 and batch.outputs.max() <= 1
            if batch.outputs.size != targets.size:
                continue
            predicted = (batch.outputs.ravel() > (0.5 if is_probability else 0)).astype(float)
        rare = (targets != common) & (targets >= 0)
        hits += int((predicted[rare] == targets[rare]).sum())
        total += int(rare.sum())
        others += int((predicted != common).sum())
        rows += len(predicted)
    if total >= 3:
        return hits / total, 0.5 / np.sqrt(total)
    return (0.0 if rows >= 64 and others == 0 else None), 0.0
