"""The kinds of activation as data: when a unit is active, where it saturates, what that means.

All rules are on the output y alone, so that nothing has to be kept of the input. Where a bound is
no limit of the function itself it is where the derivative falls below `FLAT`, or the usual one of
the literature. docs/activations.md holds the same table for readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from gradstat._units import ActiveRule, UnitRule
from gradstat.errors import ArgumentTypeError, ArgumentValueError

FLAT = 0.02
"""Derivative below which a unit passes next to nothing back: tanh's at abs y = 0.99 is 0.0199."""

_SELU_FLOOR = 1.0507009873554805 * 1.6732632423543772
"""Scale times alpha (Klambauer et al. 2017, 1706.02515): minus SELU's lower limit."""


class Bounds(NamedTuple):
    """Low is low_from <= y <= low_to, high is y >= high_from; by default no y is either."""

    low_from: float = math.inf
    low_to: float = -math.inf
    high_from: float = math.nan


def _below(bound: float) -> float:
    """Return the last number before a bound that is itself not low."""
    return math.nextafter(bound, -math.inf)


def _above(bound: float) -> float:
    return math.nextafter(bound, math.inf)


@dataclass(frozen=True)
class Kind:
    """One kind of activation."""

    name: str
    active: ActiveRule
    """When an output is active; a unit without one active output in the window is dead."""

    low: str
    """Outputs that are saturated low, in words."""

    high: str
    """Outputs that are saturated high, in words."""

    derivative: str
    """dy/dx there, or everywhere where no output is saturated."""

    source: str
    bounds: Callable[..., Bounds] = Bounds
    """Gives the bounds, from the function's parameters where they depend on them."""

    parameters: tuple[tuple[str, float], ...] = ()
    """The parameters of torch's function that ``bounds`` takes, in order, with their defaults."""

    closed: bool = False
    """Whether the bounds themselves are saturated: limits that the function reaches."""

    by_position: bool = False
    """Whether the outputs of one position sum to 1: one of them saturates all."""

    def rule(self, bounds: Bounds, dtype: torch.dtype) -> UnitRule:
        """Return what the kernel is told of outputs of a dtype.

        A limit that the function reaches is one of the dtype's numbers: 0.7 in fp32 lies below 0.7.
        """
        if self.closed and dtype.is_floating_point:
            bounds = Bounds(
                *(torch.tensor(bound, dtype=dtype, device="cpu").item() for bound in bounds)
            )
        return UnitRule(self.active, *bounds)

    def __reduce__(self) -> tuple[Any, ...]:
        return find_kind, (self.name,)


_POSITIVE, _NONZERO, _NOT_LOW = ActiveRule
_NONE = "none"

_ALL = (
    Kind("relu", _POSITIVE, _NONE, _NONE, "1, and 0 where y = 0", "Lu et al., 1903.06733"),
    Kind("relu6", _POSITIVE, _NONE, "y >= 6", "0", "Howard et al., 1704.04861",
         lambda: Bounds(high_from=6.0), closed=True),
    Kind("leaky_relu", _NONZERO, "y < 0 if slope <= 0.02", _NONE, "slope", "Maas et al. 2013",
         lambda slope: Bounds(-math.inf, _below(0.0)) if slope <= FLAT else Bounds(),
         (("negative_slope", 0.01),)),
    Kind("prelu", _NONZERO, _NONE, _NONE, "1 or the learnt slope", "He et al., 1502.01852"),
    Kind("rrelu", _NONZERO, _NONE, _NONE, "1 or a slope of 1/8 to 1/3", "Xu et al., 1505.00853"),
    Kind("elu", _NOT_LOW, "y < 0.02 - alpha", _NONE, "y + alpha < 0.02",
         "Clevert et al., 1511.07289",
         lambda alpha: Bounds(-math.inf, _below(min(FLAT - alpha, 0.0))), (("alpha", 1.0),)),
    Kind("selu", _NOT_LOW, "y < -1.7381", _NONE, "y + 1.7581 < 0.02",
         "Klambauer et al., 1706.02515", lambda: Bounds(-math.inf, _below(FLAT - _SELU_FLOOR))),
    Kind("celu", _NOT_LOW, "y < -0.98 alpha", _NONE, "1 + y / alpha < 0.02",
         "Barron, 1704.07483",
         lambda alpha: Bounds(-math.inf, _below((FLAT - 1.0) * alpha)), (("alpha", 1.0),)),
    Kind("gelu", _NOT_LOW, "-0.0069 <= y <= 0", _NONE, "abs < 0.02 for x < -2.8",
         "Hendrycks and Gimpel, 1606.08415", lambda: Bounds(-0.0069, 0.0)),
    Kind("silu", _NOT_LOW, "-0.0247 <= y <= 0", _NONE, "abs < 0.02 for x < -5.38",
         "Elfwing et al., 1702.03118", lambda: Bounds(-0.0247, 0.0)),
    Kind("mish", _NOT_LOW, "-0.0246 <= y <= 0", _NONE, "abs < 0.02 for x < -5.39",
         "Misra, 1908.08681", lambda: Bounds(-0.0246, 0.0)),
    Kind("hardswish", _NONZERO, _NONE, _NONE, "0 where y = 0 (x <= -3)",
         "Howard et al., 1905.02244"),
    Kind("hardshrink", _NONZERO, _NONE, _NONE, "0 where y = 0 (abs x <= lambd)",
         "Donoho and Johnstone 1994"),
    Kind("softshrink", _NONZERO, _NONE, _NONE, "0 where y = 0 (abs x <= lambd)", "Donoho 1995"),
    Kind("hardtanh", _NONZERO, "y <= min_val", "y >= max_val", "0", "Collobert 2004",
         lambda low, high: Bounds(-math.inf, low, high), (("min_val", -1.0), ("max_val", 1.0)),
         closed=True),
    Kind("hardsigmoid", _NONZERO, "y <= 0", "y >= 1", "0", "Courbariaux et al., 1511.00363",
         lambda: Bounds(-math.inf, 0.0, 1.0), closed=True),
    Kind("sigmoid", _NOT_LOW, "y < 0.01", "y > 0.99", "y (1 - y) < 0.0099",
         "Glorot and Bengio 2010", lambda: Bounds(-math.inf, _below(0.01), _above(0.99))),
    Kind("logsigmoid", _NONZERO, _NONE, "y > log 0.99", "1 - exp y < 0.01",
         "as sigmoid, of which it is the logarithm",
         lambda: Bounds(high_from=_above(math.log(0.99)))),
    Kind("tanh", _NONZERO, "y < -0.99", "y > 0.99", "1 - y^2 < 0.0199",
         "Glorot and Bengio 2010", lambda: Bounds(-math.inf, _below(-0.99), _above(0.99))),
    Kind("softsign", _NONZERO, "y < -0.8586", "y > 0.8586", "(1 - abs y)^2 < 0.02",
         "Glorot and Bengio 2010",
         lambda: Bounds(-math.inf, _below(math.sqrt(FLAT) - 1.0), _above(1.0 - math.sqrt(FLAT)))),
    Kind("softplus", _NOT_LOW, "y < 0.0202 / beta", _NONE, "1 - exp(-beta y) < 0.02",
         "Dugas et al. 2001", lambda beta: Bounds(-math.inf, _below(-math.log1p(-FLAT) / beta)),
         (("beta", 1.0),)),
    Kind("softmax", _POSITIVE, _NONE, "y > 0.999", "y (1 - y) < 0.001",
         "Zhai et al., 2303.06296", lambda: Bounds(high_from=_above(0.999)), by_position=True),
    Kind("log_softmax", _NOT_LOW, "y = -Inf", "y > log 0.999", "1 - exp y < 0.001",
         "as softmax, of which it is the logarithm",
         lambda: Bounds(-math.inf, -math.inf, _above(math.log(0.999))), by_position=True),
    Kind("threshold", _NOT_LOW, "y = value", _NONE, "0", "Lu et al., 1903.06733",
         lambda _threshold, value: Bounds(value, value), (("threshold", 0.0), ("value", 0.0)),
         closed=True),
    Kind("identity", _NONZERO, _NONE, _NONE, "1", "none: it has no flat part"),
)  # fmt: skip

KINDS = {kind.name: kind for kind in _ALL}
ALIASES = {
    "linear": "identity",
    "swish": "silu",
    "log_sigmoid": "logsigmoid",
    "expit": "sigmoid",
}


def find_kind(name: object) -> Kind:
    """Return a kind by its name.

    Raises:
        ArgumentTypeError: It is no str.
        ArgumentValueError: There is no such kind.
    """
    if not isinstance(name, str):
        raise ArgumentTypeError(
            f'kind must be a str, got {type(name).__name__}; pass for example kind="relu"'
        )
    kind = KINDS.get(ALIASES.get(name, name))
    if kind is None:
        raise ArgumentValueError(
            f"kind must be one of {', '.join(KINDS)}; got {name!r}; docs/activations.md tells what "
            'each counts, and kind="identity" saturates nowhere'
        )
    return kind


def chosen_bounds(kind: Kind, low: float | None, high: float | None) -> Bounds:
    """Return a kind's bounds with its default parameters, or those given in their place.

    Raises:
        ArgumentTypeError: A bound is no number.
        ArgumentValueError: A bound is NaN, low and high outputs overlap, or the kind's low outputs
            are a band that one number does not describe.
    """
    for name, value in (("low", low), ("high", high)):
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise ArgumentTypeError(
                f"{name} must be a number, got {type(value).__name__}; leave it out for the bound "
                f"of kind={kind.name!r}"
            )
    if any(value is not None and math.isnan(value) for value in (low, high)) or (
        low is not None and high is not None and low >= high
    ):
        raise ArgumentValueError(
            f"low must lie below high and neither be NaN, got low={low} and high={high}; leave "
            f"them out for the bounds of kind={kind.name!r}"
        )
    bounds = kind.bounds(*(value for _, value in kind.parameters))
    if low is not None:
        if math.isfinite(bounds.low_from):
            raise ArgumentValueError(
                f"low must be left out for kind={kind.name!r}, whose low outputs are {kind.low}, "
                f"got low={low}; use another kind, or read active_counts"
            )
        bounds = bounds._replace(low_from=-math.inf, low_to=low if kind.closed else _below(low))
    if high is not None:
        bounds = bounds._replace(high_from=high if kind.closed else _above(high))
    if bounds.low_to >= bounds.high_from:
        raise ArgumentValueError(
            f"low and high must leave room between them, got low={low} and high={high} for "
            f"kind={kind.name!r}, whose own bounds are {kind.low} and {kind.high}; pass both"
        )
    return bounds
