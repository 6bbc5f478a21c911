"""torch.nn.utils' clipping functions, with one read of the gradients and the whole fp64 range."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradstat import _kernels
from gradstat.errors import ArgumentTypeError, ArgumentValueError, NonFiniteNormError
from gradstat.stats import collect

TensorOrTensors = Tensor | Iterable[Tensor]


def clip_grad_norm_(
    parameters: TensorOrTensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Return the total norm of the gradients, and scale them in place so that it is ``max_norm``.

    Every gradient is multiplied by ``c = min(1, max_norm / (total_norm + 1e-6))``; where ``c`` is 1
    none is written. Signature and meaning are those of `torch.nn.utils.clip_grad_norm_`, with these
    differences, all for the better:

    - The norm is right over the whole range: no overflow above 1.8e19, no zero below 1e-23.
    - A NaN norm leaves the gradients as they are (torch turns all of them into NaN), and so does
      ``max_norm=inf`` whatever the norm.
    - An Inf norm gives ``c = 0`` and zeros all gradients (torch turns Inf into NaN).
    - A parameter that is listed twice counts once, and a gradient that two parameters share is
      scaled once.
    - A generator that yields nothing is an error (torch warns): most often it was used up before.

    Args:
        parameters: A parameter or an iterable of parameters; those without a gradient are passed
            over. Any shapes, fp64, fp32, bf16, fp16 or complex, on any devices.
        max_norm: The largest norm allowed, in the gradients' unit; ``inf`` only measures.
        norm_type: Order of the norm; 1, 2 and ``inf`` are fused into one pass.
        error_if_nonfinite: Raise where the norm is NaN or Inf. Synchronises.
        foreach: Accepted for torch's sake and ignored: there is one implementation.

    Returns:
        The norm before clipping, shape (), fp64 where a gradient is fp64 and else fp32, on the
        first gradient's device. Finite gradients whose norm exceeds fp32's 3.4e38 are clipped
        rightly and give Inf here. Does not synchronise with a CUDA device unless
        ``error_if_nonfinite``.

    Raises:
        ArgumentValueError: ``max_norm`` is NaN or negative, ``norm_type`` is NaN, or
            ``parameters`` is a generator that yields nothing.
        ArgumentTypeError: An item is no tensor, or a gradient overlaps itself in memory.
        UnsupportedTensorError: A gradient holds no floating-point numbers in memory.
        NonFiniteNormError: The norm is NaN or Inf and ``error_if_nonfinite``. No gradient is
            changed then, nor by any other error.

    Reference:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks, 2013,
        arXiv:1211.5063, algorithm 1.
    """
    max_norm = _non_negative(max_norm, "max_norm", 'use float("inf") to disable clipping')
    batch, name_of = _gather(parameters, "parameters", take_grad=True)
    norm = _measure(batch, name_of, max_norm, norm_type, error_if_nonfinite)
    if norm.coefficient.device.type != "cpu" or norm.coefficient.item() < 1:
        _kernels.scale(batch, norm.coefficient, name_of=name_of)
    return norm.result


def get_total_norm(
    tensors: TensorOrTensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Return the norm over all tensors, taken together as one vector.

    Args:
        tensors: A tensor or an iterable of tensors: gradients, not parameters. Any shapes, fp64,
            fp32, bf16, fp16 or complex, on any devices.
        norm_type: Order of the norm; 1, 2 and ``inf`` take one pass.
        error_if_nonfinite: Raise where the norm is NaN or Inf. Synchronises.
        foreach: Accepted for torch's sake and ignored.

    Returns:
        The norm, as from `clip_grad_norm_`; 0 where there are no tensors.

    Raises:
        ArgumentValueError: ``norm_type`` is NaN, or ``tensors`` is a generator that yields nothing.
        ArgumentTypeError: An item is no tensor.
        UnsupportedTensorError: A tensor holds no floating-point numbers in memory.
        NonFiniteNormError: The norm is NaN or Inf and ``error_if_nonfinite``.
    """
    batch, name_of = _gather(tensors, "tensors", take_grad=False)
    return _measure(batch, name_of, math.inf, norm_type, error_if_nonfinite).result


def clip_grad_value_(
    parameters: TensorOrTensors, clip_value: float, foreach: bool | None = None
) -> None:
    """Clamp every element of every gradient in place to [-clip_value, clip_value]. NaN stays NaN.

    Args:
        parameters: A parameter or an iterable of parameters with real gradients (fp64, fp32, bf16
            or fp16); those without a gradient are passed over.
        clip_value: The largest magnitude allowed, in the gradients' unit. It is rounded to the
            gradient's dtype.
        foreach: Accepted for torch's sake and ignored.

    Does not synchronise.

    Raises:
        ArgumentValueError: ``clip_value`` is NaN or negative, or ``parameters`` is a generator that
            yields nothing.
        ArgumentTypeError: An item is no tensor, a gradient is complex or overlaps itself in memory.
        UnsupportedTensorError: A gradient holds no floating-point numbers in memory.
    """
    limit = _non_negative(clip_value, "clip_value", 'use float("inf") to disable clipping')
    batch, name_of = _gather(parameters, "parameters", take_grad=True)
    if limit < math.inf:
        _kernels.clamp(batch, limit, name_of=name_of)


def _gather(
    source: Any, argument: str, *, take_grad: bool
) -> tuple[_kernels.Batch, _kernels.NameOf]:
    """Return the batch, and how an error names the tensor at a position of it."""
    if isinstance(source, torch.nn.Module):
        remedy = "module.parameters()"
        if not take_grad:
            remedy = f"[p.grad for p in {remedy} if p.grad is not None]"
        raise ArgumentTypeError(
            f"{argument} must be tensors, got the module {type(source).__name__}; pass {remedy}"
        )
    names, items = collect(source, argument, unnamed="parameter " if take_grad else "tensor ")
    positions: Sequence[int] = range(len(items))

    def name_of(index: int) -> str:
        position = positions[index]
        return names()[position] if callable(names) else repr(names[position])

    try:
        return _kernels.gather(items, take_grad=take_grad, name_of=name_of), name_of
    except _kernels.RepeatedError as error:
        # A tied parameter has one gradient: it counts once and is scaled once.
        positions = sorted(set(positions) - set(error.positions))
        kept = [items[position] for position in positions]
        return _kernels.gather(kept, take_grad=take_grad, name_of=name_of), name_of


def _non_negative(value: Any, argument: str, remedy: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentTypeError(
            f"{argument} must be a number, got {type(value).__name__}; {remedy}"
        ) from None
    if not number >= 0:
        raise ArgumentValueError(f"{argument} must be zero or positive, got {number}; {remedy}")
    return number


def _measure(
    batch: _kernels.Batch,
    name_of: _kernels.NameOf,
    max_norm: float,
    norm_type: Any,
    error_if_nonfinite: bool,
) -> _kernels.Norm:
    """Return the norm and its coefficient; raise where asked to."""
    try:
        order = float(norm_type)
    except (TypeError, ValueError):
        raise ArgumentTypeError(
            f"norm_type must be a number, got {norm_type!r}; use 2.0 or math.inf"
        ) from None
    if math.isnan(order):
        raise ArgumentValueError("norm_type must not be NaN, got nan; use 2.0 or math.inf")
    norm = _kernels.total_norm(batch, max_norm, order)
    if error_if_nonfinite and not math.isfinite(norm.exact.item()):
        raise NonFiniteNormError(
            f"the total norm of order {order} must be finite for error_if_nonfinite=True, got "
            f"{norm.exact.item()}{_culprits(norm.table, name_of)}; no gradient was changed. Pass "
            "error_if_nonfinite=False to go on, or skip the step"
        )
    return norm


def _culprits(table: Tensor | None, name_of: _kernels.NameOf) -> str:
    if table is None:
        return ""
    counts = table[:-1, 2:4].nan_to_num().sum(1)
    bad = counts.nonzero().flatten().tolist()
    shown = ", ".join(map(name_of, bad[:5])) + (", ..." if len(bad) > 5 else "")
    return f" (NaN or Inf in {shown})" if bad else ""
