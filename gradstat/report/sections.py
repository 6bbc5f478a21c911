"""The sections of a report that go by steps: losses, clipping, activations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstat.report.figure import Figure
from gradstat.report.over_steps import (
    activation_figures,
    is_clipped,
    loss_figure,
    norm_figure,
    site_share,
)
from gradstat.report.text import course, listed, number, percent, plural

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
    reading: tuple[str, ...] = (f"Loss: {course(steps['loss'], steps['step'])}",) if figure else ()
    curves = {name: curve for name, curve in scalars.items() if name != "loss" and len(curve[0])}
    reading += tuple(f"{name}: {course(v, at)}" for name, (at, v) in list(curves.items())[:6])
    return Section(
        "loss",
        "Loss",
        "Loss",
        "A long curve is drawn as its running mean, with the loss of each step pale behind it.",
        reading,
        (figure,) if figure else (),
        "" if figure else "No finite loss was observed in this run. In the training loop, tell it:",
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
    rows: list[tuple[str, ...]] = []
    dead_sites: list[str] = []
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
    return Section(
        "activations",
        title,
        "Activations",
        about,
        (half,),
        tuple(activation_figures(sites)),
        table=table,
    )


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
