"""The parts of `check`: each looks at a copy of the model on one batch and notes what it finds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from gradstat._batch_sample import first_tensor
from gradstat._trial import Outcome, Program, fresh, kept_randomness, tensors_of
from gradstat.diagnosis import RULES, data, diagnose, fit, flow, units, weights
from gradstat.diagnosis.evidence import Evidence
from gradstat.diagnosis.finding import Finding, Measure
from gradstat.diagnosis.task import Task
from gradstat.monitor import Monitor
from gradstat.optimizer import attach, detach

STANDING_STEPS = 4
"""Passes over the batch that the rules judge, with parameters that stay as they are."""

MIN_ROWS = 16
"""Fewer rows do not tell a dead unit from one that they happen not to wake."""

_RULES = tuple(
    rule
    for rule in RULES
    if isinstance(
        rule,
        data.NonfiniteInputs | data.InputScale | data.TargetScale
        | fit.ProbabilitiesAsLogits | fit.LogitsAsLogProbabilities | fit.OneUnitSoftmax
        | fit.Broadcast | weights.Initialization
        | flow.Vanishing | flow.Exploding | flow.Nonfinite | units.DeadUnits | units.Saturated,
    )
)  # fmt: skip
"""Those that need no more than one batch and a model that has not been trained."""

_MIXING = (nn.modules.batchnorm._BatchNorm,)


@dataclass
class Notes:
    """What the inspections have found so far."""

    findings: list[Finding] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    not_judged: dict[str, str] = field(default_factory=dict)


@dataclass
class Trial:
    """A model's private copy with a batch, and what the first pass over it gave.

    Args:
        model: The copy. Nothing trains it: inspections that do copy it once more.
        program: How the loss comes about.
        batch: The user's own, of which every pass gets a copy.
        batch_dim: Dimension of rows in inputs and outputs.
    """

    model: nn.Module
    program: Program
    batch: Any
    batch_dim: int

    first: Outcome = field(init=False)
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = field(init=False, default=None)
    """Arguments of the model's first call; None where it was not called as a whole."""

    outputs: Tensor | None = field(init=False, default=None)
    called: set[str] = field(init=False, default_factory=set)
    """Names of the modules that took part."""

    def __post_init__(self) -> None:
        if not self.model.training:
            self.model.train()
        model = copy.deepcopy(self.model)
        with self._listening(model):
            self.first = self.run(model)
        if self.first.loss.requires_grad:
            self.first.loss.backward()  # type: ignore[no-untyped-call]
        self.gradients = {name: p.grad for name, p in model.named_parameters()}

    def run(self, model: nn.Module) -> Outcome:
        """Return what a pass over a copy of the batch gives."""
        return self.program(model, fresh(self.batch, model))

    @property
    def inputs(self) -> Tensor | None:
        """The first tensor that the model was given."""
        tensors = tensors_of(self.call) if self.call is not None else []
        return tensors[0] if tensors else None

    def told(self, outcome: Outcome) -> dict[str, Tensor]:
        """Return inputs, outputs and targets of a pass, as far as they are known."""
        found = {
            "inputs": self.inputs,
            "outputs": as_tensor(outcome.outputs),
            "targets": as_tensor(outcome.targets),
        }
        if found["outputs"] is None:
            found["outputs"] = self.outputs
        return {name: value for name, value in found.items() if value is not None}

    @contextmanager
    def _listening(self, model: nn.Module) -> Iterator[None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            if self.call is None:
                copied = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
                self.call = copied

        def after(module: nn.Module, args: Any, outputs: Any) -> None:
            del module, args
            if self.outputs is None:
                self.outputs = as_tensor(outputs)

        def listener(name: str) -> Callable[..., None]:
            return lambda *_: self.called.add(name)

        handles = [
            module.register_forward_pre_hook(listener(name))
            for name, module in model.named_modules()
        ]
        handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(model.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def as_tensor(given: Any) -> Tensor | None:
    """Return the tensor in what a model gives: its logits, or the first one."""
    found = first_tensor(given)
    return found if isinstance(found, Tensor) else None


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
    evidence = evidence_of(trial, copy.deepcopy(trial.model))
    found = diagnose(evidence, _RULES)
    outputs = trial.outputs
    if outputs is not None and outputs.dim() and outputs[..., :1].numel() < MIN_ROWS:
        found = [f for f in found if f.code not in ("dead-units", "saturated-activation")]
        notes.not_judged["dead and saturated units"] = f"needs a batch of {MIN_ROWS} rows"
    # Constant weights alone do no harm where their gradients differ: `symmetry` looks at that.
    named = trial.model.named_parameters()
    equal = {name for name, p in named if p.numel() and (p == p.flatten()[0]).all()}
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
    return Task(evidence.batches)


def output_range(trial: Trial, trained: nn.Module, notes: Notes) -> None:
    """Judge whether outputs reach the targets, of a model that has learnt the batch if it can.

    An untrained one gives small numbers, which could be cut off anywhere.
    """
    rules = [rule for rule in RULES if isinstance(rule, fit.OutputRange)]
    notes.findings += diagnose(evidence_of(trial, trained), rules)


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
    if guess is None or guess <= 0 or not math.isfinite(loss):
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


def gradients(trial: Trial, notes: Notes) -> None:
    """Name the parameters that no gradient reaches."""
    parameters = dict(trial.model.named_parameters())
    frozen = tuple(name for name, p in parameters.items() if not p.requires_grad)
    trained = [name for name in parameters if name not in frozen]
    missing = [name for name in trained if trial.gradients[name] is None]
    unused = tuple(name for name in missing if name.rpartition(".")[0] not in trial.called)
    cut_off = tuple(name for name in missing if name not in unused)
    zero = tuple(
        name
        for name in trained
        if (gradient := trial.gradients[name]) is not None and not gradient.to_dense().any()
    )
    n_reached = len(trained) - len(missing)
    notes.measures.append(Measure("parameters with a gradient", n_reached, f"of {len(trained)}"))

    def note(severity: Any, text: str, names: tuple[str, ...], *remedy: str) -> None:
        notes.findings.append(
            Finding(
                "parameters-not-updating", severity, 0.95, text, remedy,
                (Measure("parameters", len(names), threshold=1),),
                "torch.autograd: a gradient reaches what the loss was computed from", names,
            )
        )  # fmt: skip

    if not trained:
        note(
            "error", "no parameter of the model requires a gradient, so nothing can be trained",
            frozen, "set requires_grad=True on what is to be trained",
        )  # fmt: skip
        return
    if n_reached == 0:
        note(
            "error", "the loss does not depend on any parameter by a gradient", tuple(trained),
            "look between model and loss for detach(), .data, .item(), numpy(), argmax, no_grad()",
        )  # fmt: skip
        return
    if cut_off:
        note(
            "warning", f"{len(cut_off)} parameters belong to modules that are used, but no "
            "gradient comes back to them", cut_off,
            "look for detach(), .data or no_grad() behind these modules",
            "or freeze them with requires_grad=False if that is meant",
        )  # fmt: skip
    if unused:
        note(
            "warning", f"{len(unused)} parameters belong to modules that are never called", unused,
            "use the modules in forward(), or remove them",
            "DistributedDataParallel needs find_unused_parameters=True with them",
        )  # fmt: skip
    if len(zero) == len(trained):
        note(
            "error",
            "every gradient is exactly 0: the loss does not depend smoothly on the parameters",
            zero,
            "look for round, argmax, sign, a comparison or a clamp between model and loss",
            "check that the loss is not masked away, and that not all units are dead",
        )  # fmt: skip
    if frozen:
        note(
            "info", f"{len(frozen)} parameters are frozen", frozen,
            "set requires_grad=True if that is not meant",
        )  # fmt: skip


def symmetry(trial: Trial, notes: Notes) -> None:
    """Find layers whose units start equal and get equal gradients, so that they stay equal."""
    known = {n for f in notes.findings if f.code == "bad-initialization" for n in f.layers}
    found = []
    for module_name, module in trial.model.named_modules():
        for own_name, weight in module.named_parameters(recurse=False):
            name = f"{module_name}.{own_name}" if module_name else own_name
            gradient = trial.gradients.get(name)
            is_judged = gradient is not None and weight.dim() >= 2 and name not in known
            if not is_judged or isinstance(module, nn.Embedding | nn.EmbeddingBag):
                continue
            assert gradient is not None
            dim = 1 if "Transpose" in type(module).__name__ else 0
            if weight.shape[dim] > 1 and _are_alike(weight, gradient, dim):
                found.append(name)
    if found:
        notes.findings.append(
            Finding(
                "bad-initialization",
                "error",
                0.9,
                "most units of these layers start equal and get equal gradients, so they compute "
                "the same for ever",
                ("initialise them at random: torch.nn.init.kaiming_normal_ or xavier_uniform_",),
                (Measure("layers of equal units", len(found), threshold=1),),
                "Goodfellow et al. 2016, Deep Learning, section 8.4",
                tuple(found),
            )
        )


def _are_alike(weight: Tensor, gradient: Tensor, dim: int) -> bool:
    """Whether at most half of the units differ from the others, of 64 and of 4096 numbers each."""
    parts = []
    for tensor in (weight.detach(), gradient.to_dense()):
        rows = tensor.movedim(dim, 0).flatten(1)[:64, :4096].double().cpu().numpy()
        scale = float(np.abs(rows).max(initial=0.0))
        if not math.isfinite(scale):
            return False
        parts.append(rows / scale if scale > 0 else rows)
    rows = np.concatenate(parts, axis=1)
    # Equal rows have equal projections; products on several threads may differ in rounding.
    at = np.sort(rows @ np.random.default_rng(0).standard_normal(rows.shape[1]))
    return 1 + int((np.diff(at) > 1e-5 * math.sqrt(rows.shape[1])).sum()) <= len(at) / 2


def independence(trial: Trial, notes: Notes) -> None:
    """Find out whether a row's output changes when the other rows of the batch are replaced.

    That is what a gradient of one row's output by another row's input would tell, and it serves
    integers too. In evaluation mode, where BatchNorm goes by its running statistics.
    """
    if trial.call is None or trial.outputs is None or trial.inputs is None:
        notes.not_judged["independence of rows"] = "the model was not called as a whole on tensors"
        return
    model = copy.deepcopy(trial.model).eval()
    excepted = [m for m in model.modules() if isinstance(m, _MIXING) and m.running_mean is None]
    if excepted:
        notes.not_judged["independence of rows"] = "BatchNorm without running statistics mixes rows"
        return
    if any(isinstance(module, _MIXING) for module in model.modules()):
        notes.not_judged["independence of rows in BatchNorm"] = (
            "it mixes rows by design while training; judged with its running statistics"
        )
    dims = [trial.batch_dim]
    if trial.batch_dim == 0 and trial.inputs.dim() > 2 and trial.outputs.dim() > 2:
        dims.append(1)  # recurrent and attention layers may hold time first
    leaks = [_leak(model, trial, dim) for dim in dims]
    if all(leak is None for leak in leaks):
        notes.not_judged["independence of rows"] = (
            "inputs and outputs have no dimension of rows in common; pass batch_dim"
        )
        return
    known = [leak for leak in leaks if leak is not None]
    notes.measures.append(Measure("change of a row's output with other rows", min(known)))
    if min(known) > 1e-4:
        notes.findings.append(
            Finding(
                "mixed-rows",
                "error",
                0.85,
                "a row's output depends on the other rows of its batch, so it will be another one "
                "in another batch",
                (
                    "look for view or reshape where transpose or permute is meant",
                    "recurrent and attention layers want (time, batch, features) unless "
                    "batch_first=True",
                    "look for a mean, norm, softmax or sort over dimension 0",
                ),
                (Measure("change of the outputs", min(known), "of their size", threshold=1e-4),),
                "Karpathy 2019, A Recipe for Training Neural Networks: use backprop to chart "
                "dependencies",
            )
        )


def _leak(model: nn.Module, trial: Trial, dim: int) -> float | None:
    """Return the largest change of a row's output, over the outputs' size; None: no rows there."""
    assert trial.call is not None
    assert trial.inputs is not None
    assert trial.outputs is not None
    if max(dim, -dim - 1) >= min(trial.inputs.dim(), trial.outputs.dim()):
        return None
    n = trial.inputs.shape[dim]
    if n < 2 or trial.outputs.shape[dim] != n:
        return None

    def replaced(tensor: Tensor, kept: int, other: int) -> Tensor:
        if max(dim, -dim - 1) >= tensor.dim() or tensor.shape[dim] != n:
            return tensor.clone()
        places = torch.full((n,), other, device=tensor.device)
        places[kept] = kept
        return tensor.index_select(dim, places)

    def output(kept: int, other: int | None) -> Tensor | None:
        def chosen(tensor: Tensor) -> Tensor:
            return tensor.clone() if other is None else replaced(tensor, kept, other)

        args, kwargs = tree_map_only(Tensor, chosen, trial.call)
        with torch.no_grad(), kept_randomness():
            found = as_tensor(model(*args, **kwargs))
        same = found is not None and found.dim() > 0 and found.shape[dim] == n
        return found.select(dim, kept).double() if found is not None and same else None

    changes = []
    for kept, other in ((0, n - 1), (n - 1, 0)):
        before, after = output(kept, None), output(kept, other)
        if before is None or after is None or before.shape != after.shape:
            return None
        scale = max(float(before.abs().max()), 1e-30) if before.numel() else 1.0
        changes.append(float((after - before).abs().max()) / scale if before.numel() else 0.0)
    return max(changes) if all(map(math.isfinite, changes)) else None
