"""Parameters that no gradient reaches, and layers whose units are all the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor, nn

from gradstat._inspections.trial import Notes, Trial
from gradstat.diagnosis.finding import Finding, Measure


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
