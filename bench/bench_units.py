"""The counts of units on the CPU: against reading the bytes, and against torch operations."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from float64_checks import check_units
from pairing import Pair, Side
from torch import Tensor

from gradstat import _kernels
from gradstat._units import ActiveRule, UnitRule

Compare = Callable[[Pair], None]

RELU = UnitRule(ActiveRule.POSITIVE)
SIGMOID = UnitRule(ActiveRule.NOT_LOW, -math.inf, 0.01, 0.99)
RULES = {"ReLU": (RELU, torch.relu), "sigmoid": (SIGMOID, torch.sigmoid)}
RULE = pytest.mark.parametrize("rule", RULES)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SHAPE = pytest.mark.parametrize("shape", [(128, 64, 56, 56), (4096, 4096)], ids=str)

pytestmark = [RULE, DTYPE, SHAPE]


def activation(shape: tuple[int, ...], dtype: torch.dtype, rule: str) -> Tensor:
    """Return what the function makes of normal numbers around 0, of standard deviation 3."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.empty(shape).normal_(0.0, 3.0, generator=generator)
    return RULES[rule][1](inputs).to(dtype)


def by_torch_operations(tensor: Tensor, rule: UnitRule) -> list[Tensor]:
    """Return the same numbers: the counts of each unit and the moments.

    Written for speed: in the tensor's own dtype, with sums in fp32 (in fp64 they take 25 times as
    long, and are as accurate as ours) and counts in int32 (in int64, torch's default, twice).
    """
    dims = [dim for dim in range(tensor.dim()) if dim != 1]
    is_zero = tensor == 0
    if rule.active is ActiveRule.POSITIVE:
        conditions = [tensor > 0]  # nothing of a ReLU is low or high
    else:
        conditions = [tensor > rule.low_to, tensor <= rule.low_to, tensor >= rule.high_from]
    return [
        *(met.sum(dims, dtype=torch.int32) for met in conditions),
        is_zero.count_nonzero(),
        tensor.isnan().count_nonzero(),
        tensor.isinf().count_nonzero(),
        tensor.sum(dtype=torch.float32),
        torch.linalg.vector_norm(tensor, 1, dtype=torch.float32),
        torch.linalg.vector_norm(tensor, dtype=torch.float32),
        torch.stack(tensor.aminmax()).abs().max(),
        tensor.abs().masked_fill(is_zero, torch.inf).min(),
    ]


def sides(
    shape: tuple[int, ...], dtype: torch.dtype, rule: str, device: str = "cpu"
) -> tuple[str, Side, Side, Side]:
    """Return the name of the work, our side, checked, that of torch, and reading alone.

    What is read is the activation's own memory: how fast that is depends on where it lies.
    """
    tensor = activation(shape, dtype, rule).to(device)
    chosen = RULES[rule][0]
    check_units(_kernels.units(tensor, chosen, 1), tensor, chosen)
    n_bytes = tensor.numel() * tensor.element_size()
    ours = Side("units", lambda: _kernels.units(tensor, chosen, 1), n_bytes)
    torchs = Side("torch operations", lambda: by_torch_operations(tensor, chosen), n_bytes)
    words = tensor.flatten().view(torch.float32)
    reading = Side("torch.sum of the same bytes", words.sum, n_bytes)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return f"units of {rule}, {' x '.join(map(str, shape))} {name}", ours, torchs, reading


def bench_against_reading(
    shape: tuple[int, ...], dtype: torch.dtype, rule: str, compare: Compare
) -> None:
    work, ours, _, reading = sides(shape, dtype, rule)
    compare(Pair(work, ours, reading, reading, target=1.15, headline=is_headline(shape, dtype)))


def is_headline(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether the front page shows it: what a convolution gives, and rows in half precision."""
    return (len(shape) == 4) == (dtype == torch.float32)


def bench_against_torch_operations(
    shape: tuple[int, ...], dtype: torch.dtype, rule: str, compare: Compare
) -> None:
    work, ours, torchs, reading = sides(shape, dtype, rule)
    compare(Pair(work, ours, torchs, reading, target=0.25, headline=is_headline(shape, dtype)))
