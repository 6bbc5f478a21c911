"""The texts of errors about tensors that hold no numbers."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import parameter
from messages import message_of
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from gradstat import (
    ArgumentTypeError,
    UnsupportedTensorError,
    clip_grad_norm_,
    get_total_norm,
    grad_stats,
    tensor_stats,
)

INF, NAN = math.inf, math.nan


class Spread(Tensor):
    """Like a DTensor: one tensor over several ranks."""

    def to_local(self) -> Tensor:
        return self


class Wrapper(Tensor):
    """A subclass that has no memory of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise NotImplementedError(func)


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(2)


UNSUPPORTED: dict[str, tuple[Callable[[], Tensor], str, str]] = {
    "meta": (lambda: torch.ones(2, device="meta"), "a meta tensor", "materialise it first"),
    "fake": (fake, "a FakeTensor, a tensor subclass", "pass the plain tensor that it wraps"),
    "wrapper": (
        lambda: Wrapper(torch.ones(2)),
        "a Wrapper, a tensor subclass that need not have memory of its own",
        "pass the plain tensor that it wraps",
    ),
    "spread": (
        lambda: torch.ones(2).as_subclass(Spread),
        "a Spread, which is spread over ranks",
        "pass tensor.to_local() for this rank's share",
    ),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "a nested tensor",
        "pass tensor.values()",
    ),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "a quantised tensor (torch.qint8)",
        "pass tensor.dequantize()",
    ),
    "int64": (lambda: torch.ones(2, dtype=torch.int64), "dtype torch.int64", "tensor.float()"),
    "bool": (lambda: torch.ones(2, dtype=torch.bool), "dtype torch.bool", "tensor.float()"),
    "fp8": (
        lambda: torch.ones(2).to(torch.float8_e4m3fn),
        "dtype torch.float8_e4m3fn",
        "tensor.to(torch.float32)",
    ),
    "sparse_int64": (
        lambda: torch.ones(2, dtype=torch.int64).to_sparse(),
        "dtype torch.int64",
        "tensor.float()",
    ),
    "uninitialised": (
        lambda: nn.LazyLinear(2).weight,
        "an UninitializedParameter, whose shape is not known yet",
        "run one batch through the model first",
    ),
}
NAMES = ("a", "b", "head.bias")
CALLS: dict[str, tuple[Callable[[list[Any]], object], str]] = {
    "tensor_stats": (tensor_stats, "'tensor2'"),
    "tensor_stats_with_names": (lambda ts: tensor_stats(ts, NAMES), "'head.bias'"),
    "tensor_stats_of_a_dict": (
        lambda ts: tensor_stats(dict(zip(NAMES, ts, strict=True))), "'head.bias'"),
    "get_total_norm": (get_total_norm, "tensor 2"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore:.*[Qq]uantiz", "ignore:.*ested")
@pytest.mark.parametrize(("call", "place"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("make", "what", "remedy"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_tensors(make, what, remedy, call, place):
    beside = [torch.ones(3), torch.ones(2)]
    text = message_of(UnsupportedTensorError, lambda: call([*beside, make()]))
    assert "must hold fp64, fp32, bf16, fp16 or complex numbers in memory" in text
    assert f"got {what}" in text
    assert f" for {place};" in text
    assert remedy in text


WITHOUT_MEMORY = """
import torch, gradstat
freed = torch.ones(3)
freed.untyped_storage().resize_(0)
zeros = torch._efficientzerotensor(3)
functional = torch._to_functional_tensor(torch.ones(3))
for tensor in (freed, zeros, functional):
    try:
        gradstat.tensor_stats([torch.ones(2), tensor])
    except gradstat.UnsupportedTensorError as error:
        print(error)
"""


def test_tensors_without_memory():
    # They say that they are plain ones, and a pointer that leads nowhere may end the process.
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout.count("got a tensor without memory") == 3
    assert done.stdout.count("for 'tensor1'; measure it while its storage is there") == 3


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], object]] = {
    "vmap": lambda look: torch.func.vmap(look)(torch.ones(3, 2)),
    "grad": lambda look: torch.func.grad(lambda x: look(x).sum())(torch.ones(2)),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_tensors_inside_of_a_transform(transform):
    beside = torch.ones(2)

    def look(x: Tensor) -> Tensor:
        get_total_norm([beside, x])
        return x

    text = message_of(UnsupportedTensorError, lambda: transform(look))
    assert "got a tensor inside a torch.func transform for tensor 1;" in text
    assert "measure outside of vmap, grad and the like" in text


def test_gradients_are_named_by_their_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to("meta")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert " for '0.weight';" in message_of(UnsupportedTensorError, lambda: grad_stats(model))
    pairs = list(model.named_parameters())
    text = message_of(UnsupportedTensorError, lambda: clip_grad_norm_(pairs, 1.0))
    assert " for '0.weight';" in text
    text = message_of(UnsupportedTensorError, lambda: clip_grad_norm_(model.parameters(), 1.0))
    assert " for parameter 0;" in text


def test_positions_are_those_of_the_list_that_was_passed():
    first, bad = parameter(torch.ones(2)), parameter(torch.ones(2, dtype=torch.float8_e4m3fn))
    text = message_of(UnsupportedTensorError, lambda: clip_grad_norm_([first, first, bad], 1.0))
    assert " for parameter 2;" in text
    third = parameter(torch.ones(1).expand(2))
    text = message_of(ArgumentTypeError, lambda: clip_grad_norm_([first, first, third], 1.0))
    assert " for parameter 2;" in text
