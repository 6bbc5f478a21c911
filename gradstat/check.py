"""`check`: what is wrong with a model before training begins, from one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gradstat._html import html_table
from gradstat._inspections.loss import initial_loss, targets
from gradstat._inspections.one_batch import overfit
from gradstat._inspections.parameters import gradients, symmetry
from gradstat._inspections.rows import independence
from gradstat._inspections.standing import standing
from gradstat._inspections.trial import Notes, Trial
from gradstat._json import json_values
from gradstat._trial import (
    LossFn,
    Program,
    Step,
    inner_model,
    kept_randomness,
    private,
    tensors_of,
    whole_number,
)
from gradstat.diagnosis.causes import rank
from gradstat.diagnosis.finding import Finding, Measure
from gradstat.errors import ArgumentValueError


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; ``print(report)`` shows it."""

    findings: tuple[Finding, ...]
    """The likeliest cause first, each before its symptoms."""

    measures: tuple[Measure, ...]
    """Numbers that were looked at, found wanting or not."""

    not_judged: Mapping[str, str]
    """What could not be looked at, and why."""

    @property
    def ok(self) -> bool:
        """Whether nothing was found but information."""
        return all(finding.severity == "info" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values, fit for strict JSON; None is NaN or Inf."""
        plain: dict[str, Any] = json_values(
            {
                "ok": self.ok,
                "findings": [finding.to_dict() for finding in self.findings],
                "measures": [vars(measure) for measure in self.measures],
                "not_judged": dict(self.not_judged),
            }
        )
        return plain

    def _repr_html_(self) -> str:
        measures = [(m.name, f"{m.value:.3g} {m.unit}".rstrip()) for m in self.measures]
        return "".join(
            [
                *(finding._repr_html_() for finding in self.findings),
                html_table(("measured", "value"), measures),
            ]
        )

    def __str__(self) -> str:
        n_serious = sum(finding.severity != "info" for finding in self.findings)
        lines = ["check: " + ("nothing wrong was found" if self.ok else f"{n_serious} found")]
        lines += [str(finding) for finding in self.findings]
        lines += [f"measured: {measure}" for measure in self.measures]
        lines += [f"not judged: {what} ({why})" for what, why in self.not_judged.items()]
        return "\n".join(lines)


def check(
    model: nn.Module,
    loss_fn: LossFn | None = None,
    batch: Any = None,
    *,
    step: Step | None = None,
    batch_dim: int = 0,
    overfit_steps: int = 200,
) -> CheckReport:
    """Return what is wrong with a model, its loss and one batch, before training.

    Looks at the initial loss, the scale of inputs and targets, whether outputs and loss fit, dead
    and saturated units, equal weights, parameters that no gradient reaches, rows that depend on
    each other, and whether the batch can be learnt by heart; docs/check.md tells how.

    Everything happens on copies: parameters, buffers, gradients, hooks and training flags of the
    model, the batch, and the random number generators of Python, NumPy and torch are left as they
    are, also after an exception. A model that is merely bad raises nothing; what model, loss or
    ``step`` raise on the first pass comes out. Takes two copies of the model's memory and Adam's
    state, up to ``2 * overfit_steps + 20`` passes, and synchronises with a CUDA device.

    Args:
        model: The model as training will find it; where it is in evaluation mode, its copy is set
            to training mode.
        loss_fn: ``loss_fn(outputs, targets)``, a mean over the rows.
        batch: ``(inputs, targets)``; several inputs as ``(a, b, targets)``, or in a tuple, or in a
            dict of keyword arguments. With ``step``, anything. It is copied to the model's device.
        step: In place of ``loss_fn``, a function of ``(model, batch)`` that returns the loss, or
            ``(loss, outputs, targets)``, with which more can be judged.
        batch_dim: Dimension of the rows in inputs and outputs.
        overfit_steps: Steps of Adam on the one batch for each of two learning rates; 0 for none.

    Raises:
        ArgumentTypeError: An argument has the wrong type, the loss is no tensor, or the model
            cannot be copied.
        ArgumentValueError: An argument has a value that does not fit, or the loss is no scalar.

    Example:
        >>> report = gradstat.check(model, loss_fn, next(iter(loader)))
        >>> print(report)
        >>> assert report.ok
    """
    program = Program(loss_fn, step)
    whole_number("overfit_steps", overfit_steps, 0)
    whole_number("batch_dim", batch_dim)
    own = inner_model(model)
    if batch is None or not tensors_of(batch):
        raise ArgumentValueError(
            f"batch must hold tensors, got {type(batch).__name__}; pass (inputs, targets), such as "
            "next(iter(loader))"
        )
    with kept_randomness(), torch.enable_grad():
        (program,) = private(program)
        trial = Trial(own, program, batch, batch_dim)
        notes = Notes()
        task = standing(trial, notes)
        initial_loss(trial, task, notes)
        targets(task, notes)
        gradients(trial, notes)
        symmetry(trial, notes)
        independence(trial, notes)
        overfit(trial, task, notes, overfit_steps)
    findings = rank(replace(finding, caused_by=None) for finding in notes.findings)
    return CheckReport(tuple(findings), tuple(notes.measures), notes.not_judged)
