"""Adaptive gradient clipping: limits on the gradient of each unit, relative to its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradstat.clipping.policies import AGC


@torch.no_grad()
def clip_units_(
    policy: AGC,
    parameters: Sequence[Tensor],
    names: Sequence[str],
    grad_scale: Tensor | None = None,
) -> Tensor:
    """Scale the gradient of each unit in place; return whether any was, as a bool on its device.

    A unit with a NaN or Inf, and a sparse gradient, is left alone. Does not synchronise.

    Args:
        policy: The limits.
        parameters: Parameters whose ``grad`` is clipped.
        names: Their names.
        grad_scale: Scalar that the gradients are multiplied with, under loss scaling.
    """
    found: list[Tensor] = []
    for name, parameter in zip(names, parameters, strict=True):
        gradient = parameter.grad
        if gradient is None or policy.excludes(name) or gradient.layout is not torch.strided:
            continue
        allowed = _unit_norms(parameter).clamp_min(policy.eps) * policy.clipping
        if grad_scale is not None:
            allowed = allowed * grad_scale.to(allowed.device)
        norms = _unit_norms(gradient)
        is_above = (norms > allowed) & norms.isfinite()
        gradient.mul_(torch.where(is_above, allowed / norms, 1.0).to(gradient.dtype))
        found.append(is_above.any().to(found[0].device if found else is_above.device))
    return torch.stack(found).any() if found else torch.tensor(False)


def _unit_norms(tensor: Tensor) -> Tensor:
    """Return the L2 norm of each unit, shaped to broadcast against the tensor."""
    dims = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else None
    magnitudes = tensor.abs() if tensor.is_complex() else tensor
    # fp64, or a large fp32 gradient would have a norm of Inf; mps has none.
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    norms: Tensor = torch.linalg.vector_norm(
        magnitudes, dim=dims, keepdim=dims is not None, dtype=dtype
    )
    return norms
