"""Which finding explains which: from the findings of all rules to an order of causes."""

from __future__ import annotations

from collections.abc import Iterable

from gradstat.diagnosis.finding import Finding

_OUTCOMES = ("flat-loss", "constant-predictions", "plateau", "underfitting", "oscillating-loss",
             "diverging-loss")  # fmt: skip
_FLOW = ("vanishing-gradient", "exploding-gradient", "dead-units", "saturated-activation",
         "sparse-gradients", "nonfinite-loss", "nonfinite-gradient")  # fmt: skip

EXPLAINS: dict[str, tuple[str, ...]] = {
    "parameters-not-updating": (
        *_OUTCOMES,
        "lr-too-low",
        "vanishing-gradient",
        "class-imbalance",
        "bad-targets",
        "overfitting",
    ),
    "gradient-accumulation": (
        *_OUTCOMES,
        *_FLOW,
        "lr-too-high",
        "overfitting",
        "bad-targets",
        "class-imbalance",
    ),
    "loss-output-mismatch": (
        *_OUTCOMES,
        *_FLOW,
        "zero-loss",
        "class-imbalance",
        "overfitting",
        "bad-targets",
        "lr-too-high",
        "parameters-not-updating",
    ),
    "bad-inputs": (
        *_OUTCOMES,
        *_FLOW,
        "lr-too-high",
        "lr-too-low",
        "overfitting",
        "bad-targets",
        "class-imbalance",
        "bad-initialization",
    ),
    "zero-loss": (*_OUTCOMES, "vanishing-gradient", "dead-units", "sparse-gradients",
                  "parameters-not-updating"),
    "bad-targets": (
        *_OUTCOMES,
        *_FLOW,
        "lr-too-high",
        "overfitting",
        "class-imbalance",
        "bad-initialization",
    ),
    "bad-initialization": (
        *_OUTCOMES,
        *_FLOW,
        "lr-too-high",
        "lr-too-low",
        "bad-targets",
        "overfitting",
        "class-imbalance",
    ),
    "class-imbalance": (*_OUTCOMES, "bad-targets", "overfitting"),
    "lr-too-high": (*_OUTCOMES, *_FLOW, "overfitting"),
    "lr-too-low": (
        "parameters-not-updating",
        "flat-loss",
        "constant-predictions",
        "underfitting",
        "plateau",
        "class-imbalance",
    ),
    "exploding-gradient": (
        "nonfinite-loss",
        "nonfinite-gradient",
        "diverging-loss",
        "oscillating-loss",
        "flat-loss",
        "lr-too-high",
        "dead-units",
        "constant-predictions",
    ),
    "dead-units": ("vanishing-gradient", "sparse-gradients", *_OUTCOMES),
    "saturated-activation": ("vanishing-gradient", *_OUTCOMES),
    "vanishing-gradient": (*_OUTCOMES, "class-imbalance", "parameters-not-updating"),
    "sparse-gradients": _OUTCOMES,
    "nonfinite-loss": ("nonfinite-gradient", "diverging-loss"),
    "plateau": ("flat-loss", "constant-predictions"),
    "diverging-loss": ("oscillating-loss", "overfitting"),
    "underfitting": ("constant-predictions", "flat-loss", "plateau", "vanishing-gradient"),
    "constant-predictions": ("flat-loss",),
}
"""Cause and what it brings about, as far as a first look can tell: inputs that are not scaled
saturate units, which lets gradients vanish, which leaves the loss flat."""


for _code in ("lr-too-high", "dead-units", "saturated-activation", "vanishing-gradient", "plateau"):
    EXPLAINS[_code] = (*EXPLAINS[_code], "bad-targets")


def rank(findings: Iterable[Finding]) -> list[Finding]:
    """Return causes by probability, each followed by the symptoms that it explains.

    A finding is a symptom of the surest finding that explains it and is at least two thirds as sure
    as it is. Of two that explain each other the surer one is the cause.
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
    if symptom.code not in EXPLAINS.get(cause.code, ()):
        return False
    if "info" in (cause.severity, symptom.severity):
        return False
    mutual = cause.code in EXPLAINS.get(symptom.code, ())
    if mutual:
        return cause.confidence > symptom.confidence
    return cause.confidence >= symptom.confidence * 2 / 3


def _root(place: int, cause_of: dict[int, int]) -> int:
    while place in cause_of:
        place = cause_of[place]
    return place
