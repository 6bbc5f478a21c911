"""Whether the rows of a batch depend on each other."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gradstat._inspections.trial import Notes, Trial, as_tensor
from gradstat._trial import kept_randomness
from gradstat.diagnosis.finding import Finding, Measure

_MIXING = (nn.modules.batchnorm._BatchNorm,)


def independence(trial: Trial, notes: Notes) -> None:
    """Find out whether a row's output changes when the other rows of the batch are replaced.

    That is what a gradient of one row's output by another row's input would tell, and it serves
    integers too. In evaluation mode, where BatchNorm goes by its running statistics.
    """
    if trial.call is None or trial.outputs is None or trial.inputs is None:
        notes.not_judged["independence of rows"] = (
            "the model was not called as a whole, or on and for no tensors"
        )
        return
    model = trial.twin().eval()
    excepted = [m for m in model.modules() if isinstance(m, _MIXING) and m.running_mean is None]
    if excepted:
        notes.not_judged["independence of rows"] = "BatchNorm without running statistics mixes rows"
        return
    if any(isinstance(module, _MIXING) for module in model.modules()):
        notes.not_judged["independence of rows in BatchNorm"] = (
            "it mixes rows by design while training; judged with its running statistics"
        )
    dims = [trial.batch_dim]
    if trial.batch_dim == 0 and trial.outputs.dim() > 2:
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
