"""The state of each layer of a run, from the newest tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstat.runlog import Run

RECENT = 20
"""Kept tables that a layer's state is the median of."""

FAR = 1e3
"""Distance of a layer's size from the middle one from which it is remarked on: the factor per layer
that Glorot and Bengio (2010) see vanish, over a few layers."""

MANY = 0.5
"""Share of zeros or dead rows from which they are remarked on."""

_COLUMNS = ("rms", "l2", "zero_fraction", "dead_rows", "rows", "nans", "infs")


@dataclass(frozen=True)
class LayerState:
    """One layer over the newest tables; what is not known is NaN."""

    name: str
    rms: float
    """Median root mean square of the gradient's elements."""

    times_middle: float
    """``rms`` over that of the middle layer."""

    share: float
    """Of the squared total norm."""

    zeros: float
    """Median share of elements that are zero."""

    dead_rows: float
    """Median share of rows that are all zero."""

    nonfinite: int
    """NaN and Inf in all these tables."""

    update_ratio: float
    """Median norm of a step's change over the layer's norm."""

    @property
    def distance(self) -> float:
        """How badly off it is: Inf with NaN, Inf or nothing, else orders of magnitude."""
        if self.nonfinite or not self.rms > 0.0:
            return math.inf
        return abs(math.log10(self.times_middle))

    @property
    def remark(self) -> str:
        """What stands out, in a few words; nothing where nothing does."""
        if self.nonfinite:
            return "NaN or Inf"
        if math.isnan(self.rms):
            return "no gradient"
        if self.rms == 0.0:
            return "all zero"
        remarks = []
        if not 1.0 / FAR < self.times_middle < FAR:
            remarks.append("far below" if self.times_middle < 1.0 else "far above")
        if self.dead_rows >= MANY:
            remarks.append("dead rows")
        elif self.zeros >= MANY:
            remarks.append("sparse")
        return ", ".join(remarks)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {**vars(self), "remark": self.remark}


def layer_states(run: Run, last_step: int) -> list[LayerState]:
    """Return the state of every layer, in the model's order; none before the first table.

    Args:
        run: The run.
        last_step: Its last step.
    """
    config = run.meta.get("config", {})
    interval = int(config.get("every", 1)) * int(config.get("log_every", 1))
    since = max(last_step - RECENT * interval, 0)
    steps, tables = run.tables(_COLUMNS, since=since)
    if not steps.size:
        steps, tables = run.tables(_COLUMNS)
    if not steps.size:
        return []
    newest = {name: values[-RECENT:] for name, values in tables.items()}
    rms = _median(newest["rms"])
    usable = rms[np.isfinite(rms) & (rms > 0.0)]
    middle = float(np.median(usable)) if usable.size else math.nan
    norms = _median(newest["l2"])
    largest = float(np.nanmax(norms, initial=0.0)) or 1.0
    squares = (norms / largest) ** 2  # 1e-30 and 1e25 have no squares
    rows = np.where(newest["rows"] > 0, newest["rows"], np.nan)
    columns = {
        "rms": rms,
        "times_middle": rms / middle,
        "share": squares / max(float(np.nansum(squares)), 1.0),
        "zeros": _median(newest["zero_fraction"]),
        "dead_rows": _median(newest["dead_rows"] / rows),
        "nonfinite": np.nansum(newest["nans"] + newest["infs"], axis=0).astype(np.int64),
        "update_ratio": _update_ratios(run, since, len(rms)),
    }
    plain = {column: values.tolist() for column, values in columns.items()}
    return [
        LayerState(name, **{column: values[place] for column, values in plain.items()})
        for place, name in enumerate(run.names)
    ]


def worst(layers: Sequence[LayerState], count: int) -> list[LayerState]:
    """Return the layers that are worst off, the worst first."""
    return sorted(layers, key=lambda layer: -layer.distance)[:count]


def _update_ratios(run: Run, since: int, n_layers: int) -> NDArray[np.float64]:
    found = run.update_ratio(since=since) or run.update_ratio()
    return _median(found[1][-RECENT:]) if found else np.full(n_layers, np.nan)


def _median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median over the tables of each layer, NaN where all are."""
    known = ~np.isnan(values)
    result = np.full(values.shape[1], np.nan)
    some = known.any(axis=0)
    result[some] = np.nanmedian(values[:, some], axis=0)
    return result
