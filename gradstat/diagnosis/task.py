"""What the run is asked to do, told from samples of its batches.

Classes or numbers, which loss, and what guessing would score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradstat.diagnosis.evidence import Batch, Floats
from gradstat.diagnosis.medians import counted, median
from gradstat.diagnosis.samples import of_each

Kind = Literal["classes", "binary", "numbers", "unknown"]
Reduction = Literal["mean", "sum", "scaled"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum")

LOSS_TOLERANCE = 2e-3
"""A loss is taken for one of `LOSSES` where it agrees with it to this share: outputs may have been
fp16, and the loss computed in it."""

ENOUGH = 10
"""Samples by which a loss is recognised, of twice as many or more."""

SMALLEST = 1e-4
"""A loss over the first ones, at least, by which it is recognised."""

MIN_SCALED = 5
"""Samples from which a loss is taken for a multiple of one of `LOSSES`."""

MIN_SPREAD = 10 * LOSS_TOLERANCE
"""Deviation of these losses over their mean, at least."""


@dataclass(frozen=True)
class Loss:
    """A loss function that agrees with what was observed."""

    name: str
    reduction: Reduction
    factor: float = 1.0
    """What was observed over the mean: -1 where the loss is maximised, a half of an accumulated
    one, the number of values of a sum."""


def _rows(batches: Sequence[Batch]) -> list[tuple[Floats, Floats]]:
    """Return outputs and targets of the samples that have both, row beside row."""
    return [
        (batch.outputs, batch.targets)
        for batch in batches
        if batch.is_paired and batch.outputs is not None and batch.targets is not None
    ]


class Task:
    """The task of a run.

    Args:
        batches: Samples, oldest first.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.paired = [
            batch
            for batch in batches
            if batch.is_paired and batch.outputs is not None and batch.targets is not None
        ]
        self.with_targets = [batch for batch in batches if batch.targets is not None]

    @cached_property
    def kind(self) -> Kind:
        """What the targets are.

        Classes: integers beside one output for each class. Binary: zeros and ones beside as many
        outputs. Numbers: anything else of equal shape.
        """
        if not self.paired:
            return "unknown"
        outputs, targets = _rows(self.paired)[0]
        if targets.ndim < outputs.ndim:
            return "classes" if "targets" in self.paired[0].integers else "unknown"
        values = np.concatenate([rows.ravel() for _, rows in _rows(self.paired[:8])])
        return "binary" if ((values == 0) | (values == 1)).all() else "numbers"

    @cached_property
    def n_classes(self) -> int:
        """Classes that there is an output for; 0 where the targets are no classes."""
        outputs = self.paired[0].outputs if self.paired else None
        return outputs.shape[-1] if self.kind == "classes" and outputs is not None else 0

    @cached_property
    def targets(self) -> Floats:
        """Targets of all samples; (n,) or (n, features)."""
        arrays = [batch.targets for batch in self.with_targets if batch.targets is not None]
        width = arrays[0].shape[1:] if arrays else ()
        alike = [array for array in arrays if array.shape[1:] == width]
        return np.concatenate(alike) if alike else np.zeros(0)

    @cached_property
    def classes(self) -> tuple[Floats, NDArray[np.int64]]:
        """Classes among the targets, and how often each occurs; losses ignore -100 and the like."""
        return counted(self.targets[self.targets >= 0])

    @cached_property
    def shares(self) -> Floats:
        """Share of each class that occurs, largest first; empty where there are no classes."""
        if self.kind not in ("classes", "binary") or self.targets.size == 0:
            return np.zeros(0)
        _, counts = self.classes
        shares: Floats = np.sort(counts / max(counts.sum(), 1))[::-1]
        return shares

    @cached_property
    def loss(self) -> Loss | None:
        """The loss function, where the observed loss agrees with one on most samples."""
        # What is next to 0 agrees with whatever comes to nothing.
        known = [b for b in self.paired if b.loss and math.isfinite(b.loss)]
        least = SMALLEST * median([abs(b.loss or 0.0) for b in known[:4]])
        known = [b for b in known if abs(b.loss or 0.0) > least]
        known = known[:: max(1, len(known) // ENOUGH)]
        for name in LOSSES:
            if not any(_takes(name, batch.outputs, batch.targets) for batch in known[:3]):  # type: ignore[arg-type]
                continue
            some = _agreements(known[:3], name)
            if not any(map(any, some)):
                continue
            for reduction, of_some, most in zip(
                REDUCTIONS, some, _agreements(known, name), strict=True
            ):
                if any(of_some) and sum(most) / len(most) > 0.8:
                    values = median([batch.outputs.size for batch in known])  # type: ignore[union-attr]
                    if name in _BY_CLASS or name == "kl-div":
                        values /= max(1, self.n_classes)
                    return Loss(name, reduction, 1.0 if reduction == "mean" else float(values))
        return self._scaled_loss([batch for batch in known if batch.is_whole])

    def _scaled_loss(self, known: Sequence[Batch]) -> Loss | None:
        """Return the loss function that what was observed is a constant multiple of.

        Losses that hardly differ from step to step are multiples of anything.
        """
        observed = np.array([batch.loss for batch in known], dtype=float)
        if len(observed) < MIN_SCALED or np.std(observed) < MIN_SPREAD * abs(np.mean(observed)):
            return None
        for name in LOSSES:
            means = np.array([mean for mean, _, _ in _losses(known, name)])
            if not np.isfinite(means).any() or (means == 0).all():
                continue
            factors = observed / means
            factor = median(factors[~np.isnan(factors)])
            if np.mean(np.abs(factors - factor) <= LOSS_TOLERANCE * abs(factor)) > 0.8:
                return Loss(name, "scaled", factor)
        return None

    @cached_property
    def chance(self) -> float | None:
        """Loss of the best guess that does not look at the inputs; None where it is not known.

        Entropy of the classes, variance (mean absolute deviation) of the numbers. It has the unit
        of what was observed.
        """
        loss = self.loss
        if loss is None or self.targets.size == 0 or loss.factor <= 0:
            return None
        if loss.name.startswith("bce") and (self.targets.min() < 0 or self.targets.max() > 1):
            return None
        return None if (mean := self._mean_chance(loss.name)) is None else loss.factor * mean

    @cached_property
    def val_chance(self) -> float | None:
        """The same in the unit of a validation loss; None for a multiple of a mean."""
        is_mean = self.loss is not None and self.loss.reduction == "mean"
        return self.chance if is_mean else None

    def _mean_chance(self, name: str) -> float | None:
        if name in ("cross-entropy", "nll", "bce", "bce-with-logits"):
            if self.kind == "classes":
                return float(-(self.shares * np.log(self.shares)).sum())
            share = np.clip(self.targets.reshape(len(self.targets), -1).mean(0), 1e-9, 1 - 1e-9)
            if name == "cross-entropy":
                return float(-(share * np.log(share)).sum())
            return float(-(share * np.log(share) + (1 - share) * np.log1p(-share)).mean())
        if name in ("mse", "mae", "smooth-l1"):
            centre = np.mean if name == "mse" else np.median
            guess = np.broadcast_to(centre(self.targets, axis=0), self.targets.shape)
            return float(LOSSES[name](guess, self.targets).mean())
        return None

    @cached_property
    def floor(self) -> float:
        """The least that the loss can be: the entropy of targets that are probabilities, else 0."""
        if self.loss is None or self.loss.name not in ("bce", "bce-with-logits", "cross-entropy"):
            return 0.0
        if self.kind != "numbers":
            return 0.0
        p = np.clip(self.targets, 1e-12, 1 - 1e-12)
        if self.loss.name == "cross-entropy":
            return self.loss.factor * float(-(p * np.log(p)).sum(-1).mean())
        return self.loss.factor * float(-(p * np.log(p) + (1 - p) * np.log1p(-p)).mean())

    def accuracy(self, batches: Sequence[Batch]) -> float | None:
        """Return the share of right answers, of classes; None where there are none."""
        hits = [_hits(*rows, self.kind).ravel() for rows in _rows(batches)]
        known = np.concatenate(hits) if hits else np.zeros(0)
        known = known[~np.isnan(known)]
        return float(known.mean()) if known.size else None

    def skill(self, batches: Sequence[Batch]) -> float | None:
        """Return how much better than a guess the outputs of some batches are: 0 guess, 1 right.

        Classes: accuracy beyond the commonest class's share, or balanced accuracy beyond a guess's
        where the loss may be weighted by class. Numbers: share of explained variance.
        """
        chosen = _rows(batches)
        if not chosen or self.kind == "unknown":
            return None
        if self.kind in ("classes", "binary"):
            accuracy = self.accuracy(batches)
            common = self.shares[0] if len(self.shares) else 1.0
            if accuracy is None or common >= 1.0:
                return None
            plain = float((accuracy - common) / (1 - common))
            return plain if self.loss is not None else max(plain, self._balanced_skill(chosen))
        chosen = [pair for pair in chosen if pair[0].shape == pair[1].shape]
        if not chosen:
            return None
        errors = np.concatenate([(outputs - targets).ravel() for outputs, targets in chosen])
        variance = float(np.var(self.targets - np.mean(self.targets, axis=0)))
        if variance == 0.0 or not np.isfinite(errors).all():
            return None
        if self.loss is not None and self.loss.name not in _OF_NUMBERS:  # of other outputs than it
            return None
        return float(1 - np.mean(errors**2) / variance)

    def _balanced_skill(self, rows: Sequence[tuple[Floats, Floats]]) -> float:
        """Return the mean over the classes of the share that is found, beyond a guess's."""
        hits = np.concatenate([_hits(*pair, self.kind).ravel() for pair in rows])
        targets = np.concatenate([targets.ravel() for _, targets in rows])
        known = ~np.isnan(hits)
        _, places, counts = np.unique(targets[known], return_inverse=True, return_counts=True)
        if len(counts) < 2:
            return 0.0
        found = np.bincount(places, hits[known]) / counts
        return float((found.sum() - 1) / (len(counts) - 1))


def are_probabilities(rows: Floats) -> bool:
    """Whether each row could be a softmax: none below 0, and a sum of 1."""
    if rows.ndim != 2 or rows.shape[1] < 2 or not rows.size or not np.isfinite(rows).all():
        return False
    return bool(rows.min() >= 0 and (abs(rows.sum(-1) - 1) < 2e-2).all())


def log_softmax(rows: Floats) -> Floats:
    """Return the logarithm of the softmax of each row."""
    shifted: Floats = rows - rows.max(-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _hits(outputs: Floats, targets: Floats, kind: Kind) -> Floats:
    if kind == "classes":
        hits = (outputs.argmax(-1) == targets).astype(float)
        return np.where(targets >= 0, hits, np.nan)
    are_logits = outputs.min(initial=0.0) < 0 or outputs.max(initial=1.0) > 1
    right: Floats = ((outputs > (0.0 if are_logits else 0.5)) == (targets > 0.5)).astype(float)
    return right


def _picked(values: Floats, targets: Floats) -> Floats:
    """Return each row's value at its class, without rows whose class is ignored."""
    rows, classes = values.reshape(-1, values.shape[-1]), targets.ravel()
    kept = np.flatnonzero(_have_class(rows, classes))
    picked: Floats = rows[kept, classes[kept].astype(int)]
    return picked


def _have_class(values: Floats, targets: Floats) -> NDArray[np.bool_]:
    kept: NDArray[np.bool_] = (targets >= 0) & (targets < values.shape[-1])
    return kept


def _cross_entropy(outputs: Floats, targets: Floats) -> Floats:
    if targets.ndim == outputs.ndim:
        result: Floats = -(targets * log_softmax(outputs)).sum(-1)
        return result
    return -_picked(log_softmax(outputs), targets)


def _nll(outputs: Floats, targets: Floats) -> Floats:
    return -_picked(outputs, targets)


def _log_of_probability(outputs: Floats, targets: Floats) -> Floats:
    return -np.log(_picked(outputs, targets))


def _bce(outputs: Floats, targets: Floats) -> Floats:
    log_p = np.maximum(np.log(outputs), -100)  # torch's own limit
    log_q = np.maximum(np.log1p(-outputs), -100)
    result: Floats = -(targets * log_p + (1 - targets) * log_q)
    return result


def _bce_with_logits(outputs: Floats, targets: Floats) -> Floats:
    result: Floats = np.logaddexp(0, outputs) - outputs * targets
    return result


def _kl_div(outputs: Floats, targets: Floats) -> Floats:
    log_targets = np.log(np.where(targets > 0, targets, 1.0))
    result: Floats = (targets * (log_targets - outputs)).sum(-1)
    return result


def _mse(outputs: Floats, targets: Floats) -> Floats:
    result: Floats = (outputs - targets) ** 2
    return result


def _mae(outputs: Floats, targets: Floats) -> Floats:
    result: Floats = np.abs(outputs - targets)
    return result


def _smooth_l1(outputs: Floats, targets: Floats) -> Floats:
    error = np.abs(outputs - targets)
    result: Floats = np.where(error < 1, 0.5 * error**2, error - 0.5)
    return result


LOSSES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "cross-entropy": _cross_entropy,
    "nll": _nll,
    "log-of-probability": _log_of_probability,
    "mse": _mse,
    "mae": _mae,
    "smooth-l1": _smooth_l1,
    "kl-div": _kl_div,
    "bce": _bce,
    "bce-with-logits": _bce_with_logits,
}
"""Losses by element, as functions of outputs and targets."""

_OF_NUMBERS = ("mse", "mae", "smooth-l1", "bce")
_BY_CLASS = ("cross-entropy", "nll", "log-of-probability")


class _Value(NamedTuple):
    """What a loss function makes of a sample; NaN where it does not take it."""

    mean: float = math.nan
    sum: float = math.nan
    error: float = math.nan
    """Standard error of the mean, where the sample is not whole."""


def _losses(batches: Sequence[Batch], name: str) -> list[_Value]:
    """Return a loss of the rows of each sample."""
    found = of_each(batches, name, ("outputs", "targets"), partial(_values, name))
    return [_Value() if value is None else value for value in found]


def _takes(name: str, outputs: Floats, targets: Floats) -> bool:
    """Whether a loss function is one of such targets, which are classes or numbers."""
    return name == "cross-entropy" or (targets.ndim < outputs.ndim) == (name in _BY_CLASS)


def _values(
    name: str, batches: Sequence[Batch], outputs: Floats, targets: Floats
) -> Iterable[_Value]:
    if not _takes(name, outputs, targets):
        return [_Value()] * len(batches)
    if targets.ndim < outputs.ndim and len(batches) > 1 and not _have_class(outputs, targets).all():
        alone = zip(batches, outputs[:, None], targets[:, None], strict=True)  # rows are left out
        return [value for batch, *rows in alone for value in _values(name, [batch], *rows)]
    with np.errstate(all="ignore"):
        elements = LOSSES[name](outputs, targets).reshape(len(batches), -1)
    if not elements.size:
        return [_Value()] * len(batches)
    errors = np.full(len(batches), np.nan)
    if not all(batch.is_whole for batch in batches):
        errors = elements.std(1) / math.sqrt(elements.shape[1])
    columns = elements.mean(1), elements.sum(1), errors
    return map(_Value, *[column.tolist() for column in columns])


def _agreements(batches: Sequence[Batch], name: str) -> tuple[list[bool], list[bool]]:
    """Return for which samples a loss's mean, and its sum, is what was observed.

    Of a part of the rows the mean is so within four standard errors.
    """
    means, sums = [], []
    for batch, value in zip(batches, _losses(batches, name), strict=True):
        observed = batch.loss or 0.0
        allowed = LOSS_TOLERANCE * max(abs(observed), 1e-3)
        error = 0.0 if batch.is_whole else 4 * value.error
        means.append(abs(value.mean - observed) <= allowed + error)
        sums.append(batch.is_whole and abs(value.sum - observed) <= allowed)
    return means, sums
