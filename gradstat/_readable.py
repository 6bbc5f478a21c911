"""What a kernel reads in place of a tensor that it cannot read as it is, or a clear refusal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gradstat.errors import ArgumentTypeError, UnsupportedTensorError

READABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass
class Readable:
    """A dense, real tensor with memory of its own."""

    tensor: Tensor
    rows: int | None = None
    """Rows of the sparse tensor that it came from."""

    dead_rows: int = 0
    """Rows of that tensor without an element that differs from zero."""


def make_readable(tensor: Any, name: str) -> Readable:
    """Return what stands in for ``tensor`` when it is measured.

    Sparse tensors give their coalesced values, complex ones their magnitudes (in fp64), tensors
    with gaps, overlaps or a lazy negation a contiguous copy. May synchronise for sparse tensors.

    Raises:
        ArgumentTypeError: It is no tensor.
        UnsupportedTensorError: It holds no floating-point numbers in memory.
    """
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(
            f"every item must be a torch.Tensor, got {type(tensor).__name__} for {name}; "
            "pass parameters, (name, parameter) pairs or a dict of tensors (torch.from_numpy makes "
            "one of an array)"
        )
    _refuse_without_memory(tensor, name)
    if type(tensor) in (Tensor, torch.nn.Parameter) and _is_readable(tensor):
        return Readable(tensor)  # it is only on another device than the first one
    with torch.no_grad():
        tensor = tensor.detach()
        if type(tensor) is not Tensor:
            tensor = tensor.as_subclass(Tensor)
        if tensor.layout is torch.strided:
            return Readable(_dense(tensor, name))
        if tensor.layout is torch._mkldnn:  # type: ignore[attr-defined]
            return Readable(_dense(tensor.to_dense(), name))
        coo = (tensor if tensor.layout is torch.sparse_coo else tensor.to_sparse()).coalesce()
        if coo.sparse_dim() == 0:  # no dimension has indices: a dense tensor in disguise
            return Readable(_dense(coo.to_dense(), name))
        values = _dense(coo.values(), name)
        rows, stored = coo.size(0), coo.indices()[0]
        non_zero = values != 0 if values.dim() == 1 else (values != 0).flatten(1).any(1)
        return Readable(values, rows, rows - int(stored[non_zero].unique().numel()))


def _refuse_without_memory(tensor: Tensor, name: str) -> None:
    what, remedy = "", ""
    kind = type(tensor).__name__
    if is_lazy(tensor):
        what = f"an {kind}, whose shape is not known yet"
        remedy = "run one batch through the model first"
    elif tensor.is_meta:
        what, remedy = "a meta tensor", "materialise it first, for example with to_empty()"
    elif hasattr(tensor, "to_local"):
        what = f"a {kind}, which is spread over ranks"
        remedy = "pass tensor.to_local() for this rank's share"
    elif type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        what = f"a {kind}, a tensor subclass that need not have memory of its own"
        remedy = "pass the plain tensor that it wraps"
    elif torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        what = "a tensor inside a torch.func transform"
        remedy = "measure outside of vmap, grad and the like"
    elif tensor.is_nested:
        what, remedy = "a nested tensor", "pass tensor.values()"
    elif tensor.is_quantized:
        what, remedy = f"a quantised tensor ({tensor.dtype})", "pass tensor.dequantize()"
    elif not (tensor.is_floating_point() or tensor.is_complex()):
        what, remedy = f"dtype {tensor.dtype}", "pass tensor.float()"
    elif not tensor.is_complex() and tensor.dtype not in READABLE_DTYPES:
        what, remedy = f"dtype {tensor.dtype}", "pass tensor.to(torch.float32)"
    elif tensor.layout is torch.strided and tensor.numel() > 0 and tensor.data_ptr() == 0:
        what = "a tensor without memory (its storage was freed, or torch only stands in zeros)"
        remedy = "measure it while its storage is there, or pass tensor.clone()"
    if what:
        accepted = "fp64, fp32, bf16, fp16 or complex numbers in memory"
        raise UnsupportedTensorError(
            f"every tensor must hold {accepted}, got {what} for {name}; {remedy}"
        )


def _dense(tensor: Tensor, name: str) -> Tensor:
    if tensor.is_complex():
        # In complex128 the magnitude of finite fp32 parts cannot overflow.
        return tensor.resolve_conj().to(torch.complex128).abs().contiguous()
    if tensor.dtype not in READABLE_DTYPES:
        raise UnsupportedTensorError(
            f"every tensor must hold fp64, fp32, bf16, fp16 or complex numbers, got "
            f"{tensor.dtype} for {name}; pass tensor.to(torch.float32)"
        )
    if tensor.is_neg():
        return tensor.resolve_neg().contiguous()
    return tensor if _is_dense(tensor) else tensor.contiguous()


def _is_readable(tensor: Tensor) -> bool:
    """Return whether a kernel of the right device reads the tensor as it is."""
    return (
        tensor.layout is torch.strided
        and tensor.dtype in READABLE_DTYPES
        and not tensor.is_neg()
        and _is_dense(tensor)
    )


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in dims if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def check_writable(tensor: Tensor, name: str) -> None:
    """Refuse a tensor of which two elements share one place in memory.

    Raises:
        ArgumentTypeError: It is an expanded view.
    """
    if tensor.layout is not torch.strided:
        return
    if any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
        raise ArgumentTypeError(
            f"a gradient that is written must not overlap itself in memory, got an expanded view "
            f"of shape {tuple(tensor.shape)} for {name}; assign grad.contiguous() first"
        )
