"""Figures for papers, drawn with matplotlib: gradient flow, heat map, updates, clipping.

Each function draws a run log, open or by its path, or a monitor into an ``Axes`` and returns it.
Styles, sizes and file types are matplotlib's: ``plot_clip(run).figure.savefig("clip.pdf")``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstat._run_view import RunSource, viewed
from gradstat.errors import ArgumentValueError, import_optional
from gradstat.render import elide_all, printable

_BLUE, _ORANGE, _RED, _GREEN, _GREY = "#2563c9", "#c2600c", "#cc2936", "#1a7f4b", "#8a8f98"
_MAX_LABELS = 40


def plot_grad_flow(source: RunSource, ax: Any = None) -> Any:
    """Draw typical (rms) and largest gradient of each layer, in the order of the model.

    Bars are medians over the newest fifth of the recorded steps. Synchronises with a CUDA device
    where ``source`` is a monitor.

    Args:
        source: A run log, open or by its path, or a monitor.
        ax: matplotlib ``Axes`` to draw into; None makes a new figure.

    Returns:
        The ``Axes``.

    Raises:
        ArgumentValueError: No gradients were recorded.
        MissingPackageError: matplotlib is not installed.
    """
    with viewed(source) as run:
        steps, found = run.tables(("rms", "abs_max"))
        names = [layer.name for layer in run.layers]
    _need(steps, "gradients of layers", "attach(..., log=path) records them")
    newest = slice(-max(len(steps) // 5, 1), None)
    ax = _axes(ax)
    place = np.arange(len(names))
    ax.bar(
        place, _median(found["abs_max"][newest]), color=_GREY, alpha=0.45, label="largest element"
    )
    ax.bar(place, _median(found["rms"][newest]), color=_BLUE, width=0.5, label="rms")
    if (found["abs_max"][newest] > 0).any():
        ax.set_yscale("log", nonpositive="mask")
    ax.set_ylabel("gradient")
    _label_layers(ax.xaxis, names, rotation=90)
    ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    return ax


def plot_heatmap(source: RunSource, ax: Any = None, *, column: str = "l2") -> Any:
    """Draw a column of the gradients' table as colour, layers by steps, in log10.

    Cells without a finite value above 0 stay empty. Synchronises with a CUDA device where
    ``source`` is a monitor.

    Args:
        source: A run log, open or by its path, or a monitor.
        ax: matplotlib ``Axes`` to draw into; None makes a new figure.
        column: Any of docs/statistics.md.

    Returns:
        The ``Axes``; its figure has a colour bar.

    Raises:
        ArgumentValueError: There is no such column, or no gradients were recorded.
        MissingPackageError: matplotlib is not installed.
    """
    with viewed(source) as run:
        steps, found = run.tables((column,))
        names = [layer.name for layer in run.layers]
    _need(steps, "gradients of layers", "attach(..., log=path) records them")
    ax = _axes(ax)
    edges = np.append(steps, steps[-1] + (np.median(np.diff(steps)) if len(steps) > 1 else 1))
    rows = np.arange(len(names) + 1) - 0.5
    mesh = ax.pcolormesh(edges, rows, _log10(found[column]).T, cmap="viridis", rasterized=True)
    ax.figure.colorbar(mesh, ax=ax, label=f"log10 of {column}")
    ax.invert_yaxis()
    ax.set_xlabel("step")
    _label_layers(ax.yaxis, names)
    return ax


def plot_update_ratio(source: RunSource, ax: Any = None) -> Any:
    """Draw log10 of the update-to-weight ratio over steps: median layer, middle 80 %, line at -3.

    About 1e-3 is usual (Karpathy, cs231n, "Ratio of weights:updates"). Synchronises with a CUDA
    device where ``source`` is a monitor.

    Args:
        source: A run log, open or by its path, or a monitor.
        ax: matplotlib ``Axes`` to draw into; None makes a new figure.

    Returns:
        The ``Axes``.

    Raises:
        ArgumentValueError: No updates were recorded.
        MissingPackageError: matplotlib is not installed.
    """
    with viewed(source) as run:
        found = run.update_ratio()
    steps, logs = (found[0], _log10(found[1])) if found is not None else (np.zeros(0), np.zeros(0))
    known = np.isfinite(logs).any(axis=1) if steps.size else np.zeros(0, bool)
    _need(steps[known], "updates", "attach(..., updates=True) records them")
    low, middle, high = np.nanquantile(logs[known], [0.1, 0.5, 0.9], axis=1)
    ax = _axes(ax)
    label = "middle 80 % of the layers"
    ax.fill_between(steps[known], low, high, color=_BLUE, alpha=0.2, linewidth=0, label=label)
    ax.plot(steps[known], middle, color=_BLUE, label="median layer")
    ax.axhline(-3, color=_GREEN, linestyle="--", linewidth=1)
    ax.set_xlabel("step")
    ax.set_ylabel("log10 of update / weight")
    ax.legend(frameon=False)
    return ax


def plot_clip(source: RunSource, ax: Any = None) -> Any:
    """Draw the total norm over steps with the norm allowed; clipped and skipped steps marked.

    Clipped steps are dots on the line, skipped ones ticks at the foot. Synchronises with a CUDA
    device where ``source`` is a monitor.

    Args:
        source: A run log, open or by its path, or a monitor.
        ax: matplotlib ``Axes`` to draw into; None makes a new figure.

    Returns:
        The ``Axes``.

    Raises:
        ArgumentValueError: No step was recorded.
        MissingPackageError: matplotlib is not installed.
    """
    with viewed(source) as run:
        steps = run.steps
    step, norm, skipped = steps["step"], steps["total_norm"], steps["skipped"].astype(bool)
    _need(step, "steps", "attach(..., log=path) records them")
    norm = np.where(np.isfinite(norm), norm, np.nan)
    allowed = np.where(np.isfinite(steps["clip_threshold"]), steps["clip_threshold"], np.nan)
    clipped = (steps["clip_coef"] < 1.0) & ~skipped
    ax = _axes(ax)
    ax.plot(step, norm, color=_BLUE, linewidth=1, label="total norm")
    if not np.isnan(allowed).all():
        ax.plot(step, allowed, color=_ORANGE, linestyle="--", drawstyle="steps", label="threshold")
    if clipped.any():
        ax.plot(step[clipped], norm[clipped], ".", color=_ORANGE, markersize=4, label="clipped")
    if skipped.any():
        foot = ax.get_xaxis_transform()
        marks = np.full(int(skipped.sum()), 0.02)
        ax.plot(step[skipped], marks, "|", color=_RED, transform=foot, label="skipped")
    if (norm > 0).any():
        ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("total norm")
    ax.legend(frameon=False)
    return ax


PLOTS = {
    "grad_flow": plot_grad_flow,
    "heatmap": plot_heatmap,
    "update_ratio": plot_update_ratio,
    "clip": plot_clip,
}
"""All of them, by the names of the command line."""


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    pyplot = import_optional("matplotlib.pyplot", purpose="a plot", install="'gradstat[plots]'")
    return pyplot.subplots(layout="constrained")[1]


def _need(steps: NDArray[Any], what: str, remedy: str) -> None:
    if not len(steps):
        raise ArgumentValueError(f"the run must hold {what} to be drawn, got none; {remedy}")


def _label_layers(axis: Any, names: Sequence[str], **text: Any) -> None:
    labels = elide_all([printable(name).replace("$", r"\$") for name in names], 32)
    every = -(-len(names) // _MAX_LABELS)
    axis.set_ticks(range(0, len(names), every), labels[::every], fontsize=7, **text)


def _log10(values: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(values)
    return np.where(np.isfinite(logs), logs, np.nan)


def _median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    known = np.isfinite(values).any(axis=0)
    result = np.full(values.shape[1], np.nan)
    result[known] = np.nanmedian(np.where(np.isfinite(values), values, np.nan)[:, known], axis=0)
    return result
