"""A run in a few numbers, and its findings in the order of causes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstat._run_view import RunView
from gradstat.diagnosis import Finding
from gradstat.diagnosis.finding import SEVERITIES
from gradstat.report.over_steps import is_clipped


@dataclass(frozen=True)
class Summary:
    """A run in a few numbers; those that are not known are NaN."""

    name: str
    status: str
    steps: int
    """Number of the last step."""

    final_loss: float
    """Of the last step; NaN where it was not told, too."""

    lowest_loss: float
    final_norm: float
    clip_rate: float
    """Share of the measured steps that were clipped."""

    skipped: int
    dropped: int
    """Steps of which nothing was kept."""

    layers: int
    parameters: int
    started: float
    seconds: float
    """From the first step to the last, pauses between sessions included."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, fit for JSON."""
        return dict(vars(self))


def summarise(run: RunView, steps: dict[str, NDArray[Any]]) -> Summary:
    """Return a run in a few numbers.

    Args:
        run: The run.
        steps: ``run.steps``, read once.
    """
    loss, norm, time = steps["loss"], steps["total_norm"], steps["time"]
    finite_loss = loss[np.isfinite(loss)]
    measured = ~np.isnan(steps["clip_coef"])
    layers = run.layers
    return Summary(
        name=run_name(run),
        status=run.status,
        steps=int(steps["step"][-1]) if len(steps["step"]) else 0,
        final_loss=float(loss[-1]) if len(loss) else math.nan,
        lowest_loss=float(finite_loss.min()) if len(finite_loss) else math.nan,
        final_norm=float(norm[-1]) if len(norm) else math.nan,
        clip_rate=float(is_clipped(steps).sum() / measured.sum()) if measured.any() else math.nan,
        skipped=int(steps["skipped"].astype(bool).sum()),
        dropped=run.dropped,
        layers=len(layers),
        parameters=sum(int(layer.numel) for layer in layers),
        started=float(time[0]) if len(time) else math.nan,
        seconds=float(time[-1] - time[0]) if len(time) else math.nan,
    )


def run_name(run: RunView) -> str:
    """Return what a run is called: its file, or its model."""
    return run.path.name if run.path is not None else str(run.meta["model"].get("class", "run"))


@dataclass(frozen=True)
class Told:
    """A finding of a run with the step at which it was first told of, and its symptoms."""

    step: int
    finding: Finding
    symptoms: tuple[Told, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, fit for JSON."""
        return {"told_at": self.step} | self.finding.to_dict()


def findings_of(run: RunView) -> list[Told]:
    """Return the causes, the gravest and surest first, each with the symptoms that it explains.

    Of a finding that was told of several times the newest is taken.
    """
    first: dict[str, int] = {}
    newest: dict[str, Finding] = {}
    for step, finding in run.findings:
        first.setdefault(finding.code, step)
        newest[finding.code] = finding
    told = sorted((Told(first[code], finding) for code, finding in newest.items()), key=_gravity)
    roots = [item for item in told if _cause(item.finding, newest) is None]
    return [
        Told(
            root.step,
            root.finding,
            tuple(item for item in told if _cause(item.finding, newest) == root.finding.code),
        )
        for root in roots
    ]


def flat(findings: list[Told]) -> list[dict[str, Any]]:
    """Return findings as plain values, each cause before its symptoms."""
    return [told.to_dict() for root in findings for told in (root, *root.symptoms)]


def _cause(finding: Finding, newest: dict[str, Finding]) -> str | None:
    """Return the code of the root of a finding among those told; None where it is one itself.

    Findings that were told of at different times may explain each other: each is a root then.
    """
    chain = [finding.code]
    while (cause := newest[chain[-1]].caused_by) in newest:
        if cause in chain:
            return None
        chain.append(str(cause))
    return chain[-1] if len(chain) > 1 else None


def _gravity(told: Told) -> tuple[int, float, int]:
    finding = told.finding
    return -SEVERITIES.index(finding.severity), -finding.confidence, told.step
