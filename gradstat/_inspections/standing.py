"""What the rules of diagnosis say of a model that stands still."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradstat._inspections.trial import MIN_ROWS, Notes, Trial
from gradstat.diagnosis import RULES, data, diagnose, fit, flow, shapes, targets, units, weights
from gradstat.diagnosis.evidence import Evidence
from gradstat.diagnosis.finding import Measure
from gradstat.diagnosis.task import Task
from gradstat.monitor import Monitor
from gradstat.optimizer import attach, detach

STANDING_STEPS = 4
"""Passes over the batch that the rules judge, with parameters that stay as they are."""

_RULES = tuple(
    rule
    for rule in RULES
    if isinstance(
        rule,
        data.NonfiniteInputs | data.InputScale | targets.TargetScale
        | fit.ProbabilitiesAsLogits | fit.LogitsAsLogProbabilities | fit.OneUnitSoftmax
        | shapes.Broadcast | weights.Initialization
        | flow.Vanishing | flow.Exploding | flow.Nonfinite | units.DeadUnits | units.Saturated,
    )
)  # fmt: skip
"""Those that need no more than one batch and a model that has not been trained."""


class _Standing(Optimizer):
    """An optimizer whose step changes nothing."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure


def evidence_of(trial: Trial, model: nn.Module) -> Evidence:
    """Return what a monitor sees of a model that is given the batch a few times and not trained."""
    trained = [p for p in model.parameters() if p.requires_grad] or [nn.Parameter(torch.zeros(1))]
    optimizer = attach(_Standing(trained), model, activations={"every": 1}, diagnose=False)
    monitor: Monitor = optimizer.gradstat  # type: ignore[attr-defined]
    for _ in range(STANDING_STEPS):
        optimizer.zero_grad()
        outcome = trial.run(model)
        monitor.observe(loss=outcome.loss, **trial.told(outcome))
        if outcome.loss.requires_grad:
            outcome.loss.backward()  # type: ignore[no-untyped-call]
        if any(p.grad is not None for p in trained):
            optimizer.step()
    evidence = monitor.evidence()
    detach(optimizer)
    return evidence


def standing(trial: Trial, notes: Notes) -> Task:
    """Judge the untrained model by the rules of diagnosis; return the task they see."""
    evidence = evidence_of(trial, trial.twin())
    task = Task(evidence.batches)
    found = diagnose(evidence, _RULES)
    if task.loss is not None and task.loss.reduction == "sum":  # gradients grow with the batch
        found = [f for f in found if f.code != "exploding-gradient"]
    inputs, outputs = trial.inputs, trial.outputs
    if inputs is not None and inputs.dim() and inputs.shape[0] == 1:
        found = [f for f in found if f.code != "bad-inputs"]
        notes.not_judged["scale of the inputs"] = "needs a batch of 2 rows"
    if outputs is not None and outputs.dim() and outputs[..., :1].numel() < MIN_ROWS:
        found = [f for f in found if f.code not in ("dead-units", "saturated-activation")]
        notes.not_judged["dead and saturated units"] = f"needs a batch of {MIN_ROWS} rows"
    # Constant weights alone do no harm where their gradients differ: `symmetry` looks at that.
    named = trial.model.named_parameters()
    equal = {name for name, p in named if p.dim() > 1 and (p == p.flatten()[0]).all()}
    notes.findings += [
        f for f in found if f.code != "bad-initialization" or not equal.issuperset(f.layers)
    ]
    for name in ("inputs", "outputs", "targets"):
        if name not in evidence.observed:
            notes.not_judged[name] = (
                "the model was not called as a whole"
                if name == "inputs"
                else "return (loss, outputs, targets) from step"
            )
    shares = [site.dead_units / site.units for site in evidence.sites if site.units]
    if shares:
        notes.measures.append(Measure("dead units", max(shares), "of the worst layer"))
    return task


def output_range(trial: Trial, trained: nn.Module, notes: Notes) -> None:
    """Judge whether outputs reach the targets, of a model that has learnt the batch if it can.

    An untrained one gives small numbers, which could be cut off anywhere.
    """
    rules = [rule for rule in RULES if isinstance(rule, fit.OutputRange)]
    notes.findings += diagnose(evidence_of(trial, trained), rules)
