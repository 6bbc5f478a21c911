"""`RunState`: what there is to say of a run now, read from its log once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstat.guard import GuardAction
from gradstat.report.over_steps import is_clipped
from gradstat.report.summary import Summary, Told, findings_of, flat, summarise
from gradstat.runlog import Run
from gradstat.show.layers import LayerState, layer_states, worst

WORST = 8
"""Layers that `RunState.to_dict` gives."""


@dataclass(frozen=True)
class RunState:
    """A run at one moment."""

    path: str
    id: str
    model: str
    """Class and size; empty where `attach` was not given the model."""

    optimizer: str
    summary: Summary
    steps: dict[str, NDArray[Any]]
    """As `Run.steps`."""

    steps_per_second: float
    """Over the newest 50 steps."""

    recent_clip_rate: float
    """Share of the newest 50 measured steps that were clipped."""

    scalars: dict[str, float]
    """Newest value of whatever else was observed."""

    findings: Sequence[Told]
    actions: Sequence[GuardAction]
    layers: Sequence[LayerState]
    sessions: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: the numbers, the findings, and the layers that are worst off."""
        return {
            "path": self.path,
            "id": self.id,
            "model": self.model,
            "optimizer": self.optimizer,
            **self.summary.to_dict(),
            "lr": _last(self.steps["lr"]),
            "steps_per_second": self.steps_per_second,
            "recent_clip_rate": self.recent_clip_rate,
            "sessions": self.sessions,
            "scalars": self.scalars,
            "findings": flat(list(self.findings)),
            "actions": [action.to_dict() for action in self.actions],
            "worst_layers": [layer.to_dict() for layer in worst(self.layers, WORST)],
        }


def read_state(run: Run) -> RunState:
    """Return what a run log says now.

    Raises:
        RunLogError: It cannot be read.
    """
    steps, meta = run.steps, run.meta
    summary = summarise(run, steps)
    recent = {name: values[-50:] for name, values in steps.items()}
    measured = ~np.isnan(recent["clip_coef"])
    seconds = np.diff(recent["time"])
    pace = float(np.median(seconds)) if seconds.size else math.nan
    return RunState(
        path=str(run.path),
        id=run.id,
        model=_model(meta.get("model", {})),
        optimizer=str(meta.get("optimizer", {}).get("class", "")),
        summary=summary,
        steps=steps,
        steps_per_second=1.0 / pace if pace > 0.0 else math.nan,
        recent_clip_rate=float(is_clipped(recent)[measured].mean()) if measured.any() else math.nan,
        scalars={name: _last(values) for name, (_, values) in run.scalars.items()},
        findings=findings_of(run),
        actions=run.actions,
        layers=layer_states(run, summary.steps),
        sessions=len(run.sessions),
    )


def _model(facts: dict[str, Any]) -> str:
    size = f"{facts['parameters']:,} parameters" if "parameters" in facts else ""
    return ", ".join(part for part in (str(facts.get("class", "")), size) if part)


def _last(values: NDArray[Any]) -> float:
    return float(values[-1]) if len(values) else math.nan
