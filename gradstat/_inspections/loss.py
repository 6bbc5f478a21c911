"""The first loss beside that of a guess, and the targets that it is made of."""

from __future__ import annotations

import math

import numpy as np

from gradstat._inspections.trial import MIN_ROWS, Notes, Trial
from gradstat.diagnosis.finding import Finding, Measure
from gradstat.diagnosis.task import Task


def targets(task: Task, notes: Notes) -> None:
    """Say so where there is only one target in the batch."""
    values = task.targets
    if len(values) >= MIN_ROWS and (values == values[:1]).all():
        notes.findings.append(
            Finding(
                "bad-targets",
                "warning",
                0.5,
                "every target of the batch is the same: sorted data, a rare class, or lost labels",
                ("shuffle: DataLoader(..., shuffle=True)", "check how the labels are made"),
                (Measure("different targets", 1.0, threshold=2.0),),
                "DeepCrime's operators on labels (Humbatova et al. 2021)",
            )
        )


def initial_loss(trial: Trial, task: Task, notes: Notes) -> None:
    """Compare the first loss with what a guess scores."""
    loss = trial.first.loss.item()
    notes.measures.append(Measure("initial loss", loss))
    guess, name = _guess(task)
    if not math.isfinite(loss):
        notes.not_judged["initial loss"] = "it is not finite"
        return
    if guess is None or guess <= 0:
        notes.not_judged["initial loss"] = (
            "needs a known loss (such as cross-entropy or MSE, averaged) with outputs and targets"
        )
        return
    notes.measures.append(Measure(name, guess))
    seen = (Measure("initial loss", loss, threshold=2 * guess), Measure(name, guess))
    source = "Karpathy 2019, A Recipe for Training Neural Networks: verify loss @ init"
    if loss > 2 * guess:
        notes.findings.append(
            Finding(
                "bad-initialization",
                "error" if loss > 10 * guess else "warning",
                0.7,
                f"the loss starts at {loss:.3g} where outputs that know nothing score {guess:.3g}: "
                "the model begins with answers that are sure and wrong",
                (
                    "initialise the last layer with smaller weights",
                    "check the scale of inputs and of the layers before it",
                ),
                seen,
                source,
            )
        )
    elif loss < 0.5 * guess:
        notes.findings.append(
            Finding(
                "trained-already",
                "info",
                0.5,
                f"the loss starts at {loss:.3g} where a guess scores {guess:.3g}: the model is "
                "trained already, or the targets are among its inputs",
                ("check that the targets cannot be read from the inputs",),
                (Measure("initial loss", loss, threshold=0.5 * guess), Measure(name, guess)),
                source,
            )
        )


def _guess(task: Task) -> tuple[float | None, str]:
    if task.loss is None or task.loss.reduction == "sum":
        return None, ""
    if task.loss.name in ("cross-entropy", "nll") and task.kind == "classes":
        return math.log(max(task.n_classes, 1)), "ln C"
    if task.loss.name in ("bce", "bce-with-logits"):
        return math.log(2), "ln 2"
    if task.loss.name == "mse":  # outputs of 0 score the variance and the squared mean
        return float(np.mean(task.targets**2)), "mean square of the targets"
    return None, ""
