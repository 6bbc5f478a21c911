"""What a guard may do, upon which findings, and how often."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gradstat._json import json_values
from gradstat.diagnosis.finding import Finding
from gradstat.errors import ArgumentTypeError, ArgumentValueError

DIVERGENCE = ("nonfinite-loss", "nonfinite-gradient", "diverging-loss")
"""Findings that say that a run is being lost."""


@dataclass(frozen=True)
class GuardRule:
    """One thing that a guard may do, tied to findings and bounded."""

    on: tuple[str, ...] = ()
    """Codes of the findings that call for it, causes or symptoms."""

    at_most: int = 3
    """Times that it may happen in ``within`` steps; beyond that the rule is spent."""

    within: int = 1000
    """Steps, counted as they happen: going back does not turn this count back."""

    rest: int = 50
    """Steps from one time to the next, so that the run can answer."""

    min_confidence: float = 0.75
    """Of the finding: more than it takes to tell of it. Mere information never counts."""

    action: ClassVar[str]
    order: ClassVar[int]
    """Rules upon the same finding act in this order: what a roll-back restores is cut after it."""

    def __post_init__(self) -> None:
        if not isinstance(self.on, tuple):  # the letters of a code would be taken for codes
            raise ArgumentValueError(
                f"{type(self).__name__}: on must be a tuple of codes, got {self.on!r}; use for "
                'example on=("diverging-loss",)'
            )
        for name, least in (("at_most", 1), ("within", 1), ("rest", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ArgumentValueError(
                    f"{type(self).__name__}: {name} must be a whole number of at least {least}, "
                    f"got {value!r}; use for example {name}={getattr(GuardRule, name)}"
                )

    def cause_among(self, findings: Iterable[Finding]) -> Finding | None:
        """Return the first finding that calls for this, if one does."""
        for finding in findings:
            is_sure = finding.confidence >= self.min_confidence and finding.severity != "info"
            if is_sure and finding.code in self.on:
                return finding
        return None


def _check_factor(rule: CutLR | TightenClip) -> None:
    if not isinstance(rule.factor, int | float) or not 0 < rule.factor < 1:
        raise ArgumentValueError(
            f"{type(rule).__name__}: factor must lie between 0 and 1, got {rule.factor!r}; use for "
            "example factor=0.5"
        )


@dataclass(frozen=True)
class SkipNonfinite(GuardRule):
    """Skip a step whose gradients hold NaN or Inf: parameters and optimizer state stay.

    The skipping itself is that of `attach` and has no bound, since a NaN that is let in is there
    for good; what is spent is the hope that skipping helps.
    """

    on: tuple[str, ...] = ("nonfinite-gradient",)
    at_most: int = 20
    within: int = 100
    rest: int = 0
    action = "skip"
    order = 0


@dataclass(frozen=True)
class RollBack(GuardRule):
    """Go back to the last good snapshot; to the one before where that has not helped.

    Reference: PaLM (Chowdhery et al. 2022, arXiv:2204.02311), section 5.1, restarts some 100 steps
    before a spike and passes over the batches that led there.
    """

    on: tuple[str, ...] = DIVERGENCE
    rest: int = 10
    action = "roll-back"
    order = 1


@dataclass(frozen=True)
class CutLR(GuardRule):
    """Multiply the learning rates of all groups, and the rest of their schedule, by a factor."""

    on: tuple[str, ...] = ("lr-too-high", "diverging-loss", "nonfinite-loss")
    factor: float = 0.5
    action = "cut-lr"
    order = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factor(self)


@dataclass(frozen=True)
class TightenClip(GuardRule):
    """Hold the total norm to a factor of its median over the window, on top of the policy.

    Each further time multiplies that ceiling by the factor.
    """

    on: tuple[str, ...] = ("exploding-gradient", "diverging-loss")
    factor: float = 0.5
    action = "tighten-clip"
    order = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factor(self)


@dataclass(frozen=True)
class StopEarly(GuardRule):
    """Set `Guard.should_stop`; also where another rule is spent."""

    on: tuple[str, ...] = ("overfitting",)
    action = "stop"
    order = 4


@dataclass(frozen=True)
class GuardAction:
    """One thing that a guard has done."""

    step: int
    """Finished optimizer steps, by `Monitor.step`, before the action."""

    action: str
    """``"skip"``, ``"roll-back"``, ``"cut-lr"``, ``"tighten-clip"``, ``"stop"``, ``"release"``."""

    cause: str
    """Code of the finding that called for it; of the spent rule where a stop is owed to one."""

    because: str
    """The finding's sentence."""

    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, fit for strict JSON; None is NaN or Inf."""
        return dict(json_values(vars(self)))

    def __str__(self) -> str:
        cause = f"because of {self.cause}: {self.because}" if self.cause else self.because
        return (
            f"{self.action} after step {self.step} {cause}; "
            f"{_plain(self.before)} -> {_plain(self.after)}"
        )


def checked(rules: Iterable[GuardRule]) -> list[GuardRule]:
    """Return rules in the order in which they act.

    Raises:
        ArgumentTypeError: One is no rule.
    """
    given = list(rules) if isinstance(rules, Iterable) else [rules]
    for rule in given:
        if not isinstance(rule, GuardRule):
            raise ArgumentTypeError(
                f"rules must hold rules of a guard, got {type(rule).__name__}; use for example "
                "rules=[gradstat.SkipNonfinite(), gradstat.RollBack()]"
            )
    return sorted(given, key=lambda rule: rule.order)


def _plain(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
