"""The oracle of activation statistics: each kind's rule written out, in plain float64 torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Rule = Callable[[Tensor], Tensor]


def never(y: Tensor) -> Tensor:
    return torch.zeros_like(y, dtype=torch.bool)


@dataclass(frozen=True)
class Reference:
    """What a kind computes, and which of its outputs are what."""

    function: Callable[[Tensor], Tensor]
    active: Rule
    low: Rule = never
    high: Rule = never
    flat: float | None = None
    """Largest magnitude of the derivative at saturated outputs."""

    ambiguous: float = 0.0
    """Inputs of up to this magnitude have outputs that look saturated and are not."""


def positive(y: Tensor) -> Tensor:
    return y > 0


def nonzero(y: Tensor) -> Tensor:
    return (y != 0) & ~y.isnan()


def softmax(x: Tensor) -> Tensor:
    return functional.softmax(x, -1)


SELU_FLOOR = -1.7580993408473766

REFERENCES: dict[str, Reference] = {
    "relu": Reference(functional.relu, positive),
    "relu6": Reference(functional.relu6, positive, high=lambda y: y >= 6, flat=0.0),
    "leaky_relu": Reference(functional.leaky_relu, nonzero, low=lambda y: y < 0, flat=0.01),
    "prelu": Reference(lambda x: torch.prelu(x, x.new_tensor([0.25])), nonzero),
    "rrelu": Reference(functional.rrelu, nonzero),
    "elu": Reference(functional.elu, lambda y: y >= -0.98, low=lambda y: y < -0.98, flat=0.02),
    "selu": Reference(
        functional.selu,
        lambda y: y >= SELU_FLOOR + 0.02,
        low=lambda y: y < SELU_FLOOR + 0.02,
        flat=0.0200001,
    ),
    "celu": Reference(functional.celu, lambda y: y >= -0.98, low=lambda y: y < -0.98, flat=0.02),
    "gelu": Reference(
        functional.gelu,
        lambda y: (y < -0.0069) | (y > 0),
        low=lambda y: (y >= -0.0069) & (y <= 0),
        flat=0.02,
        ambiguous=0.014,
    ),
    "silu": Reference(
        functional.silu,
        lambda y: (y < -0.0247) | (y > 0),
        low=lambda y: (y >= -0.0247) & (y <= 0),
        flat=0.02,
        ambiguous=0.0507,
    ),
    "mish": Reference(
        functional.mish,
        lambda y: (y < -0.0246) | (y > 0),
        low=lambda y: (y >= -0.0246) & (y <= 0),
        flat=0.02,
        ambiguous=0.0421,
    ),
    "hardswish": Reference(functional.hardswish, nonzero),
    "hardshrink": Reference(functional.hardshrink, nonzero),
    "softshrink": Reference(functional.softshrink, nonzero),
    "hardtanh": Reference(
        functional.hardtanh, nonzero, low=lambda y: y <= -1, high=lambda y: y >= 1, flat=0.0
    ),
    "hardsigmoid": Reference(
        functional.hardsigmoid, nonzero, low=lambda y: y <= 0, high=lambda y: y >= 1, flat=0.0
    ),
    "sigmoid": Reference(
        torch.sigmoid,
        lambda y: y >= 0.01,
        low=lambda y: y < 0.01,
        high=lambda y: y > 0.99,
        flat=0.0099,
    ),
    "logsigmoid": Reference(
        functional.logsigmoid, nonzero, high=lambda y: y > math.log(0.99), flat=0.01
    ),
    "tanh": Reference(
        torch.tanh, nonzero, low=lambda y: y < -0.99, high=lambda y: y > 0.99, flat=0.0199
    ),
    "softsign": Reference(
        functional.softsign,
        nonzero,
        low=lambda y: y < math.sqrt(0.02) - 1,
        high=lambda y: y > 1 - math.sqrt(0.02),
        flat=0.02,
    ),
    "softplus": Reference(
        functional.softplus,
        lambda y: y >= -math.log1p(-0.02),
        low=lambda y: y < -math.log1p(-0.02),
        flat=0.02,
    ),
    "softmax": Reference(softmax, positive, high=lambda y: y > 0.999),
    "log_softmax": Reference(
        lambda x: functional.log_softmax(x, -1),
        lambda y: y > -math.inf,
        low=lambda y: y == -math.inf,
        high=lambda y: y > math.log(0.999),
    ),
    "threshold": Reference(
        lambda x: functional.threshold(x, 0.0, 0.0),
        lambda y: (y < 0) | (y > 0),
        low=lambda y: y == 0,
        flat=0.0,
    ),
    "identity": Reference(lambda x: x, nonzero),
}


@dataclass(frozen=True)
class Expected:
    """Every figure of the result, computed one by one."""

    active_counts: list[int]
    low_counts: list[int]
    high_counts: list[int]
    dead_units: int
    saturated_fraction: float
    zero_fraction: float
    l2: float
    mean: float
    nans: int


def expected(kind: str, output: Tensor, unit_dim: int) -> Expected:
    """Return what must be found in an output whose softmax, if it is one, is over ``unit_dim``."""
    reference = REFERENCES[kind]
    wide = output.detach().double()
    others = [dim for dim in range(wide.dim()) if dim != unit_dim % wide.dim()]

    def per_unit(rule: Rule) -> list[int]:
        met = rule(wide) & ~wide.isnan()
        counts: list[int] = (met.sum(others) if others else met.long()).tolist()
        return counts

    active, low, high = (
        per_unit(rule) for rule in (reference.active, reference.low, reference.high)
    )
    if "softmax" in kind:
        saturated = sum(high) / (wide.numel() / wide.size(unit_dim))
    else:
        saturated = (sum(low) + sum(high)) / wide.numel()
    finite = wide[wide.isfinite()]
    return Expected(
        active,
        low,
        high,
        active.count(0),
        saturated,
        (wide == 0).double().mean().item(),
        finite.square().sum().sqrt().item(),
        finite.mean().item(),
        int(wide.isnan().sum()),
    )
