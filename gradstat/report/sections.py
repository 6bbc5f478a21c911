"""The sections of a run's report: what each shows, in words and in charts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstat._run_view import RunView
from gradstat.report.figure import Figure
from gradstat.report.over_layers import (
    flow_figure,
    heat_figure,
    histogram_figure,
    layer_updates,
)
from gradstat.report.over_steps import (
    activation_figures,
    is_clipped,
    loss_figure,
    norm_figure,
    site_share,
    update_course,
)
from gradstat.report.reduce import HeatMap, heat_map
from gradstat.report.text import course, listed, number, percent, plural

Floats = NDArray[np.float64]

_MAX_HISTOGRAMS = 200
"""Layers whose histograms a page holds."""

_TABLE_STEPS = 20


@dataclass(frozen=True)
class Section:
    """One section of a page."""

    id: str
    title: str
    link: str
    """The title in one word or two."""

    about: str
    """How to read the charts."""

    reading: tuple[str, ...] = ()
    """What they show, in sentences."""

    figures: tuple[Figure, ...] = ()
    missing: str = ""
    """Why there is no chart, and how to get one; empty where there are."""

    command: str = ""
    """Code that records what is missing."""

    table: Table | None = None


@dataclass(frozen=True)
class Table:
    """Numbers as rows of text; the first cell of each row is its name."""

    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""


def training(steps: dict[str, NDArray[Any]], scalars: dict[str, Any]) -> Section:
    """Return the section of losses, with a table of the steps."""
    figure = loss_figure(steps, scalars)
    reading = (f"Loss: {course(steps['loss'], steps['step'])}",) if figure else ()
    curves = {name: curve for name, curve in scalars.items() if name != "loss" and len(curve[0])}
    reading += tuple(f"{name}: {course(v, at)}" for name, (at, v) in list(curves.items())[:6])
    return Section(
        "loss",
        "Loss",
        "Loss",
        "A long curve is drawn as its running mean, with the loss of each step pale behind it.",
        reading,
        (figure,) if figure else (),
        "" if figure else "No loss was observed in this run. In the training loop, tell it:",
        "optimizer.gradstat.observe(loss=loss)",
        _steps_table(steps),
    )


def clipping(steps: dict[str, NDArray[Any]]) -> Section:
    """Return the section of total norm, clipping and skipped steps."""
    figure = norm_figure(steps)
    reading: list[str] = []
    if figure:
        step, norm, skipped = steps["step"], steps["total_norm"], steps["skipped"].astype(bool)
        finite = np.isfinite(norm)
        if finite.any():
            largest = int(np.where(finite, norm, -np.inf).argmax())
            reading.append(
                f"Median {number(float(np.median(norm[finite])))}, largest "
                f"{number(float(norm[largest]))} at step {int(step[largest]):,}."
            )
        clipped, measured = is_clipped(steps).sum(), (~np.isnan(steps["clip_coef"])).sum()
        if measured:
            reading.append(f"{percent(clipped / measured)} of the measured steps were clipped.")
        if skipped.any():
            first = int(step[skipped][0])
            reading.append(f"{plural(int(skipped.sum()), 'step')} skipped, the first {first:,}.")
    return Section(
        "norm",
        "Total norm and clipping",
        "Clipping",
        "The norm of all gradients together before clipping, and the norm that the policy allowed. "
        "The strip below marks the steps that were clipped and those that were skipped.",
        (" ".join(reading),) if reading else (),
        (figure,) if figure else (),
        "" if figure else "No total norm was recorded in this run: no step had gradients.",
    )


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
    read = [run.table(column) for column in columns]
    return Tables(read[0][0], *(values for _, values in read))


def flow(run: RunView, tables: Tables, ratio: Floats | None) -> Section:
    """Return the section of the gradient's way through the layers, with a table of them."""
    about = (
        "Each row is a parameter, the first of the model on top; the dot is the median over the "
        "newest fifth of the recorded steps. Among layers of a kind a steady fall towards the "
        "first is a vanishing gradient, a steady rise an exploding one."
    )
    rms = tables.rms
    if not rms.size:
        return Section("flow", "Gradient flow", "Gradient flow", about, missing=_NO_TABLES, command=_LOG)
    matrices = np.array([len(layer.shape) > 1 for layer in run.layers], bool)
    newest = tables.newest
    figure = flow_figure(rms[newest], tables.largest[newest], matrices)
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
        reading.append(f"No gradient other than zero in {plural(len(idle), 'layer')}: {listed(idle)}.")
    table = _layers_table(run, tables, ratio)
    return Section("flow", "Gradient flow", "Gradient flow", about, (" ".join(reading),), (figure,), table=table)


def heat(tables: Tables) -> Section:
    """Return the section of the heat map."""
    about = (
        "Each row is a layer, each column a stretch of the run; the colour is log10 of the "
        "gradient's L2 norm. Bands across all layers are events of the run, a row that fades is a "
        "layer that stops learning."
    )
    if not tables.l2.size:
        return Section("heat", "Norms over steps", "Heat map", about, missing=_NO_TABLES, command=_LOG)
    made = heat_map(tables.steps, tables.l2, tables.nonfinite > 0)
    return Section("heat", "Norms over steps", "Heat map", about, _heat_reading(made), (heat_figure(made),))


def updates(steps: NDArray[np.int64], ratio: Floats | None) -> Section:
    """Return the section of the update-to-weight ratio."""
    about = (
        "How far a step moves each layer, as a share of its weights' norm. About 1e-3, the dashed "
        "line at -3, is usual (Karpathy, cs231n); far below, a layer hardly learns, far above, it "
        "is thrown about."
    )
    title = "Update-to-weight ratio"
    if ratio is None or not np.isfinite(finite := np.where(ratio > 0, ratio, np.nan)).any():
        missing = "Updates were not recorded in this run. This records them:"
        if ratio is not None:
            missing = "No recorded step changed a weight. Updates are recorded by:"
        command = "gradstat.attach(optimizer, model, updates=True, log=...)"
        return Section("updates", title, "Updates", about, missing=missing, command=command)
    newest = np.where(np.isfinite(finite), finite, np.nan)[-max(len(steps) // 5, 1) :]
    reading: tuple[str, ...] = ()
    if np.isfinite(newest).any():
        middle = float(np.nanmedian(newest))
        reading = (f"Over the newest fifth of the steps, the median layer moved by {number(middle)}.",)
    figures = (update_course(steps, ratio), layer_updates(newest))
    return Section("updates", title, "Updates", about, reading, figures)


def activations(sites: dict[str, Any]) -> Section:
    """Return the section of dead and saturated units."""
    about = (
        "Dead units fired for no sample of a window; saturated outputs lie where the function is "
        "flat. The sites with most of each are drawn; docs/activations.md says what counts."
    )
    title = "Dead and saturated units"
    if not sites:
        missing = "Activations were not recorded in this run. This records them:"
        command = "gradstat.attach(optimizer, model, activations=True, log=...)"
        return Section("activations", title, "Activations", about, missing=missing, command=command)
    rows, dead_sites = [], []
    for name, site in sites.items():
        dead, saturated = (float(site_share(site, key)[-1]) for key in ("dead", "saturated"))
        dead_sites += [name] if dead > 0.5 else []
        units = f"{int(site['units'][-1]):,}"
        rows.append((name, units, percent(dead), percent(saturated)))
    half = (
        f"More than half of the units are dead at {plural(len(dead_sites), 'site')}: "
        f"{listed(dead_sites)}."
        if dead_sites
        else f"At none of {plural(len(sites), 'site')} are more than half of the units dead."
    )
    table = Table("Sites at the last sampled window", ("site", "units", "dead", "saturated"), rows)
    return Section("activations", title, "Activations", about, (half,), tuple(activation_figures(sites)), table=table)


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
    names = [layer.name for layer in run.layers]
    chosen = _some(names, named_first)
    read = {name: run.histograms(name)[1] for name in chosen}
    read = {name: counts for name, counts in read.items() if len(counts)}
    if not read:
        missing = "Histograms were not recorded in this run. This records them:"
        command = "gradstat.attach(optimizer, model, log=..., histograms=True)"
        return Section("histogram", title, "Histograms", about, missing=missing, command=command)
    first, last = (
        np.array([counts[place] for counts in read.values()], np.float64) for place in (0, -1)
    )
    reading: tuple[str, ...] = ()
    if len(chosen) < len(names):
        reading = (f"{len(chosen):,} of {plural(len(names), 'layer')} can be chosen here.",)
    return Section("histogram", title, "Histograms", about, reading, (histogram_figure(list(read), first, last),))


def _some(names: list[str], named_first: list[str]) -> list[str]:
    if len(names) <= _MAX_HISTOGRAMS:
        return names
    wanted = set(named_first[: _MAX_HISTOGRAMS // 2])
    spread = np.linspace(0, len(names) - 1, _MAX_HISTOGRAMS - len(wanted)).astype(int)
    wanted |= {names[place] for place in spread}
    return [name for name in names if name in wanted]


def _heat_reading(made: HeatMap) -> tuple[str, ...]:
    reading = []
    if made.step_width > 1:
        reading.append(
            f"A column stands for {plural(made.step_width, 'step')} and shows the largest norm "
            "recorded in them."
        )
    if made.nonfinite:
        layers = int((made.codes == 255).any(axis=1).sum())
        reading.append(f"NaN or Inf, drawn in red, in {plural(layers, 'layer')}.")
    return (" ".join(reading),) if reading else ()


def _steps_table(steps: dict[str, NDArray[Any]]) -> Table:
    count = len(steps["step"])
    places = np.unique(np.linspace(0, count - 1, min(count, _TABLE_STEPS)).astype(int))
    columns = ("loss", "lr", "total_norm", "clip_coef")
    rows = [
        (
            f"{int(steps['step'][place]):,}",
            *(number(float(steps[column][place])) for column in columns),
            "skipped" if steps["skipped"][place] else "",
        )
        for place in places
    ]
    note = f"{len(places)} of {count:,} steps, evenly spread" if count > len(places) else ""
    header = ("step", "loss", "learning rate", "total norm", "clip coefficient", "")
    return Table("Steps in numbers", header, rows, note)


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
                "–" if ratio is None or not len(ratio) else number(float(ratio[-1, place])),
            )
        )
    note = "At the last recorded step; NaN and Inf are counted over all recorded steps."
    if len(layers) > shown:
        note += f" {shown} of {len(layers):,} layers, those with NaN or Inf before others."
    return Table("Layers in numbers", header, rows, note)


_NO_TABLES = "No layer tables were recorded in this run. This records them:"
_LOG = 'gradstat.attach(optimizer, model, log="run.db", log_every=10)'
