"""What the policies and the argument `clip` accept, and what they say to the rest."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from policy_calls import Halving

import gradstat
from gradstat.clipping.policy import Policy, policies_of
from gradstat.clipping.resolve import AUTO, AUTO_SCALE_FREE, auto_policy, resolve

INVALID: dict[str, Callable[[], object]] = {
    'GlobalNorm: max_norm must be positive, got -1.0; use float("inf") for no limit': (
        lambda: gradstat.GlobalNorm(-1.0)
    ),
    'PerLayer: max_norm must be positive, got 0; use float("inf") for no limit': (
        lambda: gradstat.PerLayer(0)
    ),
    'Value: max_value must be positive, got nan; use float("inf") for no limit': (
        lambda: gradstat.Value(math.nan)
    ),
    "AutoClip: percentile must lie in 0..100, got 101; the published value is 10": (
        lambda: gradstat.AutoClip(101)
    ),
    "AutoClip: window must be a whole number of at least 1, got 0; use for example 1000": (
        lambda: gradstat.AutoClip(window=0)
    ),
    "ZClip: alpha must lie in [0, 1), got 1; the published value is 0.97": (
        lambda: gradstat.ZClip(alpha=1)
    ),
    "AdaGC: warmup_steps must be a whole number of at least 0, got 1.5; the published value is "
    "100": lambda: gradstat.AdaGC(warmup_steps=1.5),  # type: ignore[arg-type]
    "SkipOnSpike: min_history must be a whole number of at least 2, got 1; the published value "
    "is 64": lambda: gradstat.SkipOnSpike(min_history=1),
    "AGC: clipping must be positive, got 'much'; the published value is 0.01": (
        lambda: gradstat.AGC("much")  # type: ignore[arg-type]
    ),
    "AGC: exclude must be a tuple of names, got 'head'; use exclude=('head',)": (
        lambda: gradstat.AGC(exclude="head")  # type: ignore[arg-type]
    ),
    'clip must be a policy or "auto", got \'automatic\'; use clip="auto"': (
        lambda: resolve("automatic")
    ),
    "AutoClip must stand before Value: it works on the norms of the one read of the gradients, "
    "the other changes them; swap the two": lambda: resolve([gradstat.Value(1.0), AUTO]),
    "AGC must stand before Value: it works on the norms of the one read of the gradients, the "
    "other changes them; swap the two": lambda: resolve(gradstat.Value(1.0) | gradstat.AGC()),
    "clip must combine at most 4 of the fused policies, got 5; drop some, or subclass "
    "gradstat.Policy": lambda: resolve([gradstat.GlobalNorm(1.0)] * 5),
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_value_is_named_with_a_remedy(message: str) -> None:
    with pytest.raises(gradstat.ArgumentValueError) as raised:
        INVALID[message]()
    assert str(raised.value) == message


@pytest.mark.parametrize("clip", [1.0, [gradstat.AGC(), 1.0], ["auto"]], ids=repr)
def test_what_is_no_policy_is_a_type_error(clip: object) -> None:
    with pytest.raises(gradstat.ArgumentTypeError, match="use for example"):
        resolve(clip)


def test_resolve_makes_one_policy_of_what_it_is_given() -> None:
    a, b, c = gradstat.PerLayer(1.0), gradstat.GlobalNorm(1.0), gradstat.Value(1.0)
    assert resolve(None) is None
    assert resolve([]) is None
    assert resolve(a) is a
    assert policies_of(resolve([a, b | c])) == (a, b, c)
    assert policies_of(resolve((a | b) | c)) == (a, b, c)
    assert policies_of(resolve(policy for policy in (a, b))) == (a, b)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (torch.optim.SGD, AUTO),
        (torch.optim.ASGD, AUTO),
        (torch.optim.LBFGS, AUTO),
        (torch.optim.Adam, AUTO_SCALE_FREE),
        (torch.optim.AdamW, AUTO_SCALE_FREE),
        (torch.optim.NAdam, AUTO_SCALE_FREE),
        (torch.optim.RMSprop, AUTO_SCALE_FREE),
        (torch.optim.Adagrad, AUTO_SCALE_FREE),
        (type("MyOwn", (torch.optim.Adam,), {}), AUTO_SCALE_FREE),
    ],
)
def test_auto_depends_on_the_optimizer(kind: type[torch.optim.Optimizer], expected: Policy) -> None:
    optimizer = kind([torch.zeros(1)], lr=0.1)  # type: ignore[call-arg]
    assert auto_policy(optimizer) is expected
    assert resolve("auto", optimizer) is expected
    gradstat.attach(optimizer, clip="auto")
    assert repr(expected) in repr(optimizer.gradstat)  # type: ignore[attr-defined]


def test_policies_read_as_they_are_written() -> None:
    assert repr(gradstat.GlobalNorm(1.0) | Halving()) == "GlobalNorm(max_norm=1.0) | Halving()"
    assert gradstat.ZClip() == gradstat.ZClip(alpha=0.97)
