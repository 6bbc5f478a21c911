"""`Figure`: a chart as plain values for plotly.js, and the parts that charts share.

Colours are names of variables in style.css (``"--blue"``), so that a page can be dark or light. An
axis of layers counts them from 0, the first on top; page.js labels it with the layers' names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstat.report.reduce import packed

Trace = dict[str, Any]

_FEW = 30


@dataclass(frozen=True)
class Figure:
    """A chart of a page."""

    id: str
    label: str
    """What it shows, for those who cannot see it."""

    data: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 360
    """Pixels."""

    extra: dict[str, Any] = field(default_factory=dict)
    """What page.js makes the rest of: ``heat``, ``histograms``."""

    def to_dict(self) -> dict[str, Any]:
        """Return what page.js draws it from."""
        return {
            "id": self.id,
            "height": self.height,
            "data": self.data,
            "layout": self.layout,
            **self.extra,
        }


def line(
    name: str,
    steps: NDArray[np.int64],
    values: NDArray[Any],
    color: str,
    *,
    width: float = 1.6,
) -> Trace:
    """Return a line over steps, with its points where they are few."""
    return {
        "type": "scatter",
        "mode": "lines" if len(steps) > _FEW else "lines+markers",
        "name": name,
        "x": packed(steps, "int32"),
        "y": packed(values),
        "line": {"color": color, "width": width},
        "marker": {"color": color, "size": 5},
        "hovertemplate": "%{y:.4~g}",
    }


def value_axis(title: str, *values: NDArray[Any]) -> dict[str, Any]:
    """Return an axis of values, in powers of ten where those above 0 span a factor of 30."""
    axis: dict[str, Any] = {"title": {"text": title}}
    positive = [array[np.isfinite(array) & (array > 0)] for array in values]
    seen = np.concatenate(positive) if positive else np.zeros(0)
    if seen.size and seen.max() > 30 * seen.min():
        axis |= {"type": "log", "exponentformat": "power"}
        decades = np.log10(seen.max()) - np.log10(seen.min())
        if decades > 1.9:
            axis["dtick"] = int(np.ceil(decades / 7))
    return axis


def layer_axis(count: int) -> dict[str, Any]:
    """Return the vertical axis on which layers stand in the order of the model."""
    return {
        "layers": True,
        "range": [count - 0.5, -0.5],
        "zeroline": False,
        "showgrid": False,
        "ticks": "",
    }


def layer_height(count: int) -> int:
    """Return how tall a chart with a row for each layer should be."""
    return int(np.clip(110 + 18 * count, 240, 680))


def step_axis(*steps: NDArray[np.int64], **more: Any) -> dict[str, Any]:
    """Return the horizontal axis of all these steps."""
    seen = np.concatenate(steps) if steps else np.zeros(0)
    ends = (int(seen.min()), int(seen.max())) if seen.size else (0, 1)
    margin = max(0.01 * (ends[1] - ends[0]), 0.5)
    spread = [ends[0] - margin, ends[1] + margin]
    return {
        "title": {"text": "step"},
        "tickformat": ",d",
        "range": spread,
        "zeroline": False,
        **more,
    }
