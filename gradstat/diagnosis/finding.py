"""`Finding`: one thing that is wrong with a run, with what shows it and what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Literal

from gradstat._json import json_values

Severity = Literal["info", "warning", "error"]
Side = Literal["above", "below", "at"]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")


@dataclass(frozen=True)
class Measure:
    """A number that a finding rests on, and what it was compared with."""

    name: str
    value: float
    unit: str = ""
    threshold: float | None = None
    """The value it crossed; None where the number only illustrates."""

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        crossed = f" ({self.side} {self.threshold:.3g})" if self.side else ""
        return f"{self.name} {self.value:.3g}{unit}{crossed}"

    @property
    def side(self) -> Side | None:
        """Where the value lies from its threshold; None without one."""
        if self.threshold is None or math.isnan(self.value):
            return None
        difference = self.value - self.threshold
        return "above" if difference > 0 else "below" if difference < 0 else "at"

    def only(self, side: Side) -> Measure:
        """Return it without its threshold unless the value lies on that side.

        A number that did not decide then only illustrates.
        """
        return self if self.side == side else replace(self, threshold=None)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a run.

    ``print(finding)`` gives it in a few lines; `to_dict` gives plain values.
    """

    code: str
    """What it is, such as ``"vanishing-gradient"``; all codes stand in docs/diagnosis.md."""

    severity: Severity
    """``"error"``: the run is lost without a change; ``"warning"``: it suffers; ``"info"``."""

    confidence: float
    """How sure the rule is, from 0 to 1. A judgement that ranks findings, not a frequency."""

    explanation: str
    """What was seen and why it matters, in one sentence."""

    remedy: tuple[str, ...]
    """What to do, the likeliest help first."""

    evidence: tuple[Measure, ...] = ()
    source: str = ""
    """Where the rule or its threshold comes from."""

    layers: tuple[str, ...] = ()
    """Parameters or activations concerned; empty where it is the whole run."""

    steps: tuple[int, ...] = ()
    """Optimizer steps concerned, or the first of them."""

    caused_by: str | None = None
    """Code of the finding that explains this one."""

    def because_of(self, cause: Finding) -> Finding:
        """Return this finding as a symptom of another."""
        return replace(self, caused_by=cause.code)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, fit for strict JSON; None is also NaN or Inf."""
        plain: dict[str, Any] = json_values(
            vars(self) | {"evidence": [vars(measure) for measure in self.evidence]}
        )
        return plain

    def _repr_html_(self) -> str:
        head = f"<b>{escape(self.code)}</b> ({self.severity}, confidence {self.confidence:.2f})"
        parts = [f"<details><summary>{head}: {escape(self.explanation)}</summary>"]
        actions = "".join(f"<li>{escape(action)}</li>" for action in self.remedy)
        parts.append(f"<ol>{actions}</ol>")
        seen = [*map(str, self.evidence), *self.layers, self.source]
        parts += [f"<div>{escape(text)}</div>" for text in seen if text]
        parts.append("</details>")
        return "".join(parts)

    def __str__(self) -> str:
        indent = "  " if self.caused_by else ""
        origin = f", because of {self.caused_by}" if self.caused_by else ""
        head = f"{self.code} ({self.severity}, confidence {self.confidence:.2f}{origin})"
        lines = [f"{head}: {self.explanation}"]
        if self.evidence:
            lines.append("  seen: " + "; ".join(str(measure) for measure in self.evidence))
        if self.layers:
            more = f" and {len(self.layers) - 4} more" if len(self.layers) > 4 else ""
            lines.append("  where: " + ", ".join(self.layers[:4]) + more)
        if self.steps:
            lines.append("  from step: " + str(self.steps[0]))
        lines += [f"  {number}. {action}" for number, action in enumerate(self.remedy, 1)]
        if self.source:
            lines.append(f"  source: {self.source}")
        return "\n".join(indent + line for line in lines)
