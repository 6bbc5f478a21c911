"""Which finding explains which: from the findings of all rules to an order of causes."""

from __future__ import annotations

from collections.abc import Iterable, Set

from gradstat.diagnosis.finding import Finding

_OUTCOMES = frozenset(
    {"flat-loss", "constant-predictions", "plateau", "underfitting", "oscillating-loss",
     "diverging-loss"}
)  # fmt: skip
"""What any fault can come to."""

_FLOW = frozenset(
    {"vanishing-gradient", "exploding-gradient", "dead-units", "saturated-activation",
     "sparse-gradients", "nonfinite-loss", "nonfinite-gradient"}
)  # fmt: skip
"""What becomes of signals and gradients on their way."""

_DOUBTS = frozenset({"bad-targets", "class-imbalance", "overfitting"})
"""What is also seen where a model cannot learn for another reason."""

EXPLAINS: dict[str, Set[str]] = {
    "parameters-not-updating": _OUTCOMES | _DOUBTS | {"lr-too-low", "vanishing-gradient"},
    "gradient-accumulation": _OUTCOMES | _DOUBTS | _FLOW | {"lr-too-high"},
    "loss-output-mismatch": _OUTCOMES | _DOUBTS | _FLOW
    | {"zero-loss", "lr-too-high", "parameters-not-updating"},
    "bad-inputs": _OUTCOMES | _DOUBTS | _FLOW
    | {"lr-too-high", "lr-too-low", "bad-initialization"},
    "bad-targets": _OUTCOMES | _FLOW
    | {"lr-too-high", "bad-initialization", "class-imbalance", "overfitting"},
    "bad-initialization": _OUTCOMES | _DOUBTS | _FLOW
    | {"lr-too-high", "lr-too-low", "parameters-not-updating"},
    "zero-loss": _OUTCOMES | _DOUBTS
    | {"bad-inputs", "lr-too-low", "vanishing-gradient", "dead-units", "sparse-gradients",
       "parameters-not-updating"},
    "class-imbalance": _OUTCOMES | {"bad-targets", "overfitting", "lr-too-high"},
    "lr-too-high": _OUTCOMES | _FLOW | {"overfitting", "bad-targets"},
    "lr-too-low": _OUTCOMES | {"parameters-not-updating", "class-imbalance"},
    "exploding-gradient": {"nonfinite-loss", "nonfinite-gradient", "diverging-loss", "flat-loss",
                           "oscillating-loss", "lr-too-high", "dead-units", "constant-predictions"},
    "dead-units": _OUTCOMES
    | {"vanishing-gradient", "sparse-gradients", "bad-targets", "class-imbalance"},
    "saturated-activation": _OUTCOMES | {"vanishing-gradient", "bad-targets", "lr-too-high"},
    "vanishing-gradient": _OUTCOMES
    | {"bad-targets", "class-imbalance", "parameters-not-updating", "lr-too-low", "dead-units"},
    "sparse-gradients": _OUTCOMES | _DOUBTS | {"lr-too-low"},
    "nonfinite-loss": {"nonfinite-gradient", "diverging-loss", "lr-too-high", "dead-units"},
    "nonfinite-gradient": {"nonfinite-loss", "diverging-loss"},
    "plateau": {"flat-loss", "lr-too-low", "constant-predictions", "bad-targets", "underfitting"},
    "underfitting": {"constant-predictions", "flat-loss", "plateau", "vanishing-gradient",
                     "bad-targets", "dead-units", "sparse-gradients", "lr-too-low",
                     "lr-too-high"},
    "overfitting": {"bad-targets"},
    "diverging-loss": {"oscillating-loss", "overfitting", "lr-too-high", "exploding-gradient",
                       "nonfinite-loss", "nonfinite-gradient", "vanishing-gradient"},
    "flat-loss": {"underfitting"},
    "constant-predictions": {"flat-loss", "plateau", "bad-targets", "sparse-gradients"},
}  # fmt: skip
"""Cause and what it brings about: inputs that are not scaled saturate units, which lets gradients
vanish, which leaves the loss flat."""


_FACT = 0.96
"""Confidence of what was seen itself, such as rows in order of their class: nothing that is less
sure is its cause."""

_SURE = 0.94
"""Confidence from which an outcome is known not to come of something else."""

_EXPLAINS_IF_SURE: dict[str, Set[str]] = {
    "oscillating-loss": _OUTCOMES | _DOUBTS
    | {"lr-too-high", "dead-units", "vanishing-gradient", "exploding-gradient"},
    "constant-predictions": {"dead-units"},
}  # fmt: skip
"""What an outcome brings about then: a loss that was seen why it goes to and fro, or outputs that
are alike by design."""

_NOTHING: Set[str] = frozenset()
_ORDER = {code: place for place, code in enumerate(dict.fromkeys([*EXPLAINS, *_EXPLAINS_IF_SURE]))}


def rank(findings: Iterable[Finding]) -> list[Finding]:
    """Return causes by probability, each followed by the symptoms that it explains.

    A finding is a symptom of the surest finding that explains it and is at least two thirds as sure
    as it is; as sure, where the symptom is a fact. Of two that explain each other the surer one is
    the cause.
    """
    ordered = sorted(findings, key=_strength, reverse=True)
    cause_of: dict[int, int] = {}
    for place, symptom in enumerate(ordered):
        for candidate, cause in enumerate(ordered):
            if _explains(cause, symptom) and _root(candidate, cause_of) != place:
                cause_of[place] = candidate
                break
    result = []
    for place, root in enumerate(ordered):
        if place in cause_of:
            continue
        result.append(root)
        result += [
            symptom.because_of(root)
            for other, symptom in enumerate(ordered)
            if other != place and _root(other, cause_of) == place
        ]
    return result


def _strength(finding: Finding) -> tuple[bool, float]:
    return finding.severity != "info", finding.confidence


def _explains(cause: Finding, symptom: Finding) -> bool:
    if symptom.code not in _effects(cause):
        return False
    if "info" in (cause.severity, symptom.severity):
        return False
    if cause.code in _effects(symptom):
        return (cause.confidence, -_ORDER[cause.code]) > (
            symptom.confidence,
            -_ORDER[symptom.code],
        )
    if symptom.confidence >= _FACT and cause.confidence < symptom.confidence:
        return False
    return cause.confidence >= symptom.confidence * 2 / 3


def _effects(cause: Finding) -> Set[str]:
    effects = EXPLAINS.get(cause.code, _NOTHING)
    if cause.confidence < _SURE:
        return effects
    return effects | _EXPLAINS_IF_SURE.get(cause.code, _NOTHING)


def _root(place: int, cause_of: dict[int, int]) -> int:
    while place in cause_of:
        place = cause_of[place]
    return place
