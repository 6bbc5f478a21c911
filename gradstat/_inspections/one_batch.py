"""The part of `check` that trains: whether a model can learn one batch by heart."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from gradstat._inspections.standing import output_range
from gradstat._inspections.trial import Notes, Trial
from gradstat.diagnosis.finding import Finding, Measure, Severity
from gradstat.diagnosis.task import Task

LRS = (1e-3, 1e-2)
"""Learning rates of Adam that are tried in turn: its usual one, and ten times that."""

LEARNT = 0.05
"""Share of a guess's loss at which training stops early."""

SOURCE = "Karpathy 2019, A Recipe for Training Neural Networks: overfit one batch"


def overfit(trial: Trial, task: Task, notes: Notes, steps: int) -> None:
    """Train copies on the batch and note how far the loss falls."""
    if steps == 0:
        notes.not_judged["overfitting one batch"] = "overfit_steps is 0"
        return
    if all(gradient is None for gradient in trial.gradients.values()):
        notes.not_judged["overfitting one batch"] = "no gradient reaches a parameter"
        return
    first = trial.first.loss.item()
    if not math.isfinite(first):
        notes.not_judged["overfitting one batch"] = "the loss is not finite"
        return
    floor = task.floor
    guess = task.chance
    from_guess = guess is not None and guess > floor + 1e-9
    reference = guess - floor if guess is not None and from_guess else abs(first)
    goal = floor + LEARNT * reference if from_guess else first - (1 - LEARNT) * reference
    best = first
    for lr in LRS:
        lowest, model = _trained(trial, lr, steps, goal)
        if lowest < best:
            best, trained = lowest, model
        if best <= goal:
            break
    if best < first:
        output_range(trial, trained, notes)
    notes.measures.append(Measure("loss after overfitting the batch", best))
    left = (best - floor) / reference if from_guess else 1 - (first - best) / max(reference, 1e-12)
    allowed = 0.5 if from_guess else 0.98
    if left <= allowed:
        return
    n_parameters = sum(p.numel() for p in trial.model.parameters() if p.requires_grad)
    is_small = task.kind != "unknown" and n_parameters < task.targets.size / 2
    severity: Severity = "warning"
    if is_small or from_guess:
        severity = "error" if left > 0.9 and not is_small else "info"
    notes.findings.append(
        Finding(
            "underfitting",
            severity,
            0.8 if from_guess else 0.5,
            f"not even this one batch can be learnt by heart: {left:.0%} of "
            + ("a guess's" if from_guess else "the first")
            + f" loss is left after {steps} steps"
            + (", but the model has fewer parameters than there are targets" if is_small else ""),
            (
                "look for what cuts inputs or gradients off: the other findings, detach(), masks, "
                "the order of targets",
                "check that the loss is computed from these outputs and these targets",
                "a larger model, or a larger overfit_steps",
            ),
            (Measure("share of the loss that is left", left, threshold=allowed),),
            SOURCE,
        )
    )


def _trained(trial: Trial, lr: float, steps: int, goal: float) -> tuple[float, nn.Module]:
    """Return the lowest mean of five losses in a row, and the model as training leaves it."""
    model = trial.twin()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            module.sparse = False  # Adam takes no sparse gradients
    trained = [p for p in model.parameters() if p.requires_grad]
    is_half = any(p.dtype == torch.float16 for p in trained)
    optimizer = torch.optim.Adam(trained, lr=lr, eps=1e-4 if is_half else 1e-8)
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        try:
            loss = trial.run(model).loss
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        except Exception:  # some models refuse the NaN of a rate that is too high for them
            break
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or np.mean(losses[-5:]) <= goal:
            break
    means = [float(np.mean(losses[max(0, i - 4) : i + 1])) for i in range(len(losses))]
    return min((mean for mean in means if math.isfinite(mean)), default=math.inf), model
