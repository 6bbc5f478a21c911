"""What writes tensors in place: scaling and clamping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradstat import _fallback
from gradstat._kernels.batch import Batch, NameOf, Part, describe_position
from gradstat._kernels.compiled import _cuda_device, _native
from gradstat._readable import check_writable
from gradstat.errors import ArgumentTypeError


def scale(batch: Batch, coefficient: Tensor, *, name_of: NameOf = describe_position) -> None:
    """Multiply every tensor of a batch in place by a coefficient that lies on a device.

    Args:
        batch: Tensors; those that were replaced for reading are scaled where they are.
        coefficient: fp64 of shape (1,), or (size,) for one coefficient a tensor. Where it is 1 or
            NaN nothing is written; where it is 0 zeros are written, over NaN and Inf too.
        name_of: Gives the name of the tensor at a position, for an error.

    Raises:
        ArgumentTypeError: A tensor overlaps itself in memory. No tensor is changed then.
    """
    per_tensor = coefficient.numel() != 1

    def of(index: int) -> Tensor:
        return coefficient[index] if per_tensor else coefficient[0]

    _write(
        batch,
        name_of,
        native=lambda part, tensors: _native.scale(
            tensors, coefficient.to(part.device), per_tensor, torch.get_num_threads()
        ),
        other=lambda index, tensor: _fallback.scale_(tensor, of(index)),
    )


def clamp(batch: Batch, limit: float, *, name_of: NameOf = describe_position) -> None:
    """Clamp every element of a batch in place to [-limit, limit]; NaN stays.

    Raises:
        ArgumentTypeError: A tensor is complex, or overlaps itself in memory. None is changed then.
    """
    for index, tensor in enumerate(batch.originals or []):
        if tensor is not None and tensor.is_complex():
            raise ArgumentTypeError(
                f"clip_grad_value_ needs real gradients, got {tensor.dtype} for {name_of(index)}: "
                "complex numbers have no order; use clip_grad_norm_"
            )
    _write(
        batch,
        name_of,
        native=lambda _part, tensors: _native.clamp(tensors, limit, torch.get_num_threads()),
        other=lambda _index, tensor: _fallback.clamp_(tensor, limit),
    )


def _write(
    batch: Batch,
    name_of: NameOf,
    *,
    native: Callable[[Part, Any], None],
    other: Callable[[int, Tensor], None],
) -> None:
    """Change a batch in place: what the kernels read as it is by them, the rest by torch."""
    if batch.originals is not None:
        for index, tensor in enumerate(batch.originals):
            if tensor is not None:
                check_writable(tensor, name_of(index))
    for part in batch.parts:
        replaced = set(part.readable) if part.native else set(range(batch.size))
        tensors = part.tensors
        if part.native:
            if replaced:
                objects = [None if i in replaced else t for i, t in enumerate(part.objects)]
                tensors = _native.TensorList(objects, False)
            if part.device.type == "cuda":
                with _cuda_device(part.device):
                    native(part, tensors)
            else:
                native(part, tensors)
            torch.autograd.graph.increment_version([t for t in tensors.objects if t is not None])
        for index in sorted(replaced):
            original = batch.originals[index] if batch.originals is not None else None
            if original is not None and part.objects[index] is not None:
                with torch.no_grad():
                    other(index, original)
