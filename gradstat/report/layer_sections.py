"""The sections of a report that go by layers: flow, heat map, updates, histograms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradstat._run_view import RunView
from gradstat.report.over_layers import (
    flow_figure,
    heat_figure,
    histogram_figure,
    layer_updates,
)
from gradstat.report.over_steps import update_course
from gradstat.report.reduce import NONFINITE, HeatMap, heat_map
from gradstat.report.sections import Section, Table
from gradstat.report.text import listed, number, percent, plural

Floats = NDArray[np.float64]

_MAX_HISTOGRAMS = 500
"""Layers whose histograms a page holds."""

_NO_TABLES = "No layer tables were recorded in this run. This records them:"
_LOG = 'gradstat.attach(optimizer, model, log="run.db", log_every=10)'


@dataclass(frozen=True)
class Tables:
    """The gradients' tables of a run, each (s, layers), read once."""

    steps: NDArray[np.int64]
    l2: Floats
    rms: Floats
    largest: Floats
    zero_fraction: Floats
    nonfinite: Floats

    @property
    def newest(self) -> slice:
        """The last fifth of the recorded steps, one at least."""
        return slice(-max(len(self.steps) // 5, 1), None)


def read_tables(run: RunView) -> Tables:
    """Return the tables of a run."""
    columns = ("l2", "rms", "abs_max", "zero_fraction", "nonfinite")
    steps, found = run.tables(columns)
    return Tables(steps, *(found[column] for column in columns))


def flow(run: RunView, tables: Tables, ratio: Floats | None) -> Section:
    """Return the section of the gradient's way through the layers, with a table of them."""
    about = (
        "Each row is a parameter, the first of the model on top; the dot is the median over the "
        "newest fifth of the recorded steps. Among layers of a kind a steady fall towards the "
        "first is a vanishing gradient, a steady rise an exploding one."
    )
    rms = tables.rms
    if not rms.size:
        return Section(
            "flow", "Gradient flow", "Gradient flow", about, missing=_NO_TABLES, command=_LOG
        )
    matrices = np.array([len(layer.shape) > 1 for layer in run.layers], bool)
    newest = tables.newest
    names = [layer.name for layer in run.layers]
    last = np.where(np.isfinite(rms[newest]), rms[newest], np.nan)
    known = np.flatnonzero((last > 0).any(axis=0))
    reading: list[str] = []
    if known.size:
        typical = np.nanmedian(last[:, known], axis=0)
        low, high = known[typical.argmin()], known[typical.argmax()]
        reading.append(
            f"Smallest rms {number(float(typical.min()))} in {listed([names[low]])}, largest "
            f"{number(float(typical.max()))} in {listed([names[high]])}."
        )
    idle = [name for name, column in zip(names, last.T, strict=True) if not (column > 0).any()]
    if idle:
        reading.append(
            f"No gradient other than zero in {plural(len(idle), 'layer')}: {listed(idle)}."
        )
    figures = (flow_figure(rms[newest], tables.largest[newest], matrices),) if known.size else ()
    return Section(
        "flow",
        "Gradient flow",
        "Gradient flow",
        about,
        (" ".join(reading),),
        figures,
        "" if figures else "No gradient of these steps was finite and other than zero.",
        table=_layers_table(run, tables, ratio),
    )


def heat(tables: Tables) -> Section:
    """Return the section of the heat map."""
    about = (
        "Each row is a layer, each column a stretch of the run; the colour is log10 of the "
        "gradient's L2 norm. Bands across all layers are events of the run, a row that fades is a "
        "layer that stops learning."
    )
    if not tables.l2.size:
        return Section(
            "heat", "Norms over steps", "Heat map", about, missing=_NO_TABLES, command=_LOG
        )
    made = heat_map(tables.steps, tables.l2, tables.nonfinite > 0)
    return Section(
        "heat", "Norms over steps", "Heat map", about, _heat_reading(made), (heat_figure(made),)
    )


def updates(steps: NDArray[np.int64], ratio: Floats | None) -> Section:
    """Return the section of the update-to-weight ratio."""
    about = (
        "How far a step moves each layer, as a share of its weights' norm. About 1e-3, the dashed "
        "line at -3, is usual (Karpathy, cs231n); far below, a layer hardly learns, far above, it "
        "is thrown about."
    )
    title = "Update-to-weight ratio"
    if ratio is None or not np.isfinite(finite := np.where(ratio > 0, ratio, np.nan)).any():
        missing = "Updates were not recorded in this run. A run log holds them:"
        if ratio is not None:
            missing = "No recorded step changed a weight. Updates are recorded by:"
        command = "gradstat.attach(optimizer, model, log=...)"
        return Section("updates", title, "Updates", about, missing=missing, command=command)
    newest = np.where(np.isfinite(finite), finite, np.nan)[-max(len(steps) // 5, 1) :]
    reading: tuple[str, ...] = ()
    if np.isfinite(newest).any():
        middle = float(np.nanmedian(newest))
        reading = (
            f"Over the newest fifth of the steps, the median layer moved by {number(middle)}.",
        )
    figures = (update_course(steps, ratio), layer_updates(newest))
    return Section("updates", title, "Updates", about, reading, figures)


def histograms(run: RunView, named_first: list[str]) -> Section:
    """Return the section of histograms.

    Args:
        run: The run.
        named_first: Layers that are to be among those shown.
    """
    title = "Magnitudes by layer"
    about = (
        "Elements of one layer's gradient by binary exponent: one bar is a factor of two. Those "
        "left of -24 would be lost in fp16 without loss scaling."
    )
    steps = run.histogram_steps
    if not steps.size:
        missing = "No histogram was recorded in this run. A run log has one with every tenth table:"
        return Section("histogram", title, "Histograms", about, missing=missing, command=_LOG)
    names = [layer.name for layer in run.layers]
    chosen = _some(names, named_first)
    first, last = (
        run.histogram_table(step)[chosen].astype(np.float64) for step in (steps[0], steps[-1])
    )
    reading = f"At step {int(steps[-1]):,}, and at step {int(steps[0]):,} for comparison."
    if len(chosen) < len(names):
        reading += f" {len(chosen):,} of {plural(len(names), 'layer')} can be chosen."
    figure = histogram_figure([names[place] for place in chosen], first, last)
    return Section("histogram", title, "Histograms", about, (reading,), (figure,))


def _some(names: list[str], named_first: list[str]) -> list[int]:
    if len(names) <= _MAX_HISTOGRAMS:
        return list(range(len(names)))
    wanted = {names.index(name) for name in named_first[:_MAX_HISTOGRAMS] if name in names}
    spread = np.linspace(0, len(names) - 1, _MAX_HISTOGRAMS).astype(int)
    return sorted(wanted | set(spread.tolist()))


def _heat_reading(made: HeatMap) -> tuple[str, ...]:
    reading = []
    if made.step_width > 1:
        reading.append(
            f"A column stands for {plural(made.step_width, 'step')} and shows the largest norm "
            "recorded in them."
        )
    if made.nonfinite:
        layers = int((made.codes == NONFINITE).any(axis=1).sum())
        reading.append(f"NaN or Inf, drawn in red, in {plural(layers, 'layer')}.")
    return (" ".join(reading),) if reading else ()


def _layers_table(run: RunView, tables: Tables, ratio: Floats | None, shown: int = 500) -> Table:
    header = ("layer", "shape", "L2 norm", "rms", "largest", "zeros", "NaN, Inf", "update / weight")
    layers = run.layers
    nonfinite = np.nansum(tables.nonfinite, axis=0)
    order = np.sort(np.argsort(-nonfinite, kind="stable")[:shown])
    rows = []
    for place in order:
        last = [
            number(float(values[-1, place])) for values in (tables.l2, tables.rms, tables.largest)
        ]
        rows.append(
            (
                layers[place].name,
                " x ".join(map(str, layers[place].shape)) or "scalar",
                *last,
                percent(float(tables.zero_fraction[-1, place])),
                f"{int(nonfinite[place]):,}",
                "-" if ratio is None or not len(ratio) else number(float(ratio[-1, place])),
            )
        )
    note = "At the last recorded step; NaN and Inf are counted over all recorded steps."
    if len(layers) > shown:
        note += f" {shown} of {len(layers):,} layers, those with NaN or Inf before others."
    return Table("Layers in numbers", header, rows, note)
