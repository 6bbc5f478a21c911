"""A run's state as lines for a terminal of any width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gradstat.diagnosis.finding import Severity
from gradstat.render import elide_all, printable
from gradstat.report.summary import Told
from gradstat.report.text import duration, number, percent, plural
from gradstat.show.layers import LayerState, worst
from gradstat.show.state import RunState

_STATUS = {"running": "green", "finished": "cyan", "interrupted": "red"}
_SEVERITY: dict[Severity, str] = {"error": "bold red", "warning": "yellow", "info": "cyan"}
_SPARKS, _PLAIN_SPARKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_GAP = "!"
"""In a sparkline: a part with NaN or Inf."""

_BAR_RANGE = (-10.0, 2.0)
"""log10 of the sizes from an empty bar to a full one."""

_EDGE_ROWS = 4
"""Lines of a screen that are left to headings and to the shell."""


def show(state: RunState, *, n_layers: int) -> None:
    """Print a run's state.

    Args:
        state: The run.
        n_layers: Layers to show: those that are worst off.
    """
    console = Console()
    console.print(view(state, console, n_layers=n_layers, live=False))


def watch(states: Iterable[RunState | None], path: Path) -> RunState | None:
    """Show states in place of each other; return the last one.

    Args:
        states: As `gradstat.show.watch.states` gives them.
        path: The run log, to be named while there is no state.
    """
    console = Console()
    state = None
    with Live(console=console, auto_refresh=False) as live:
        for state in states:
            if state is None:
                live.update(Text(f"waiting for {path}", "dim"), refresh=True)
                continue
            n_layers = max(0, console.height - fixed_lines(state, console))
            live.update(view(state, console, n_layers=n_layers, live=True), refresh=True)
    return state


def view(state: RunState, console: Console, *, n_layers: int, live: bool) -> RenderableType:
    """Return the whole view.

    Args:
        state: The run.
        console: Where it will stand; its width and characters are kept to.
        n_layers: Layers to show: those that are worst off.
        live: Show layers in the model's order with bars, and findings by their first line.
    """
    parts: list[RenderableType] = [_headline(state), *_numbers(state, console)]
    if state.findings:
        parts += [Text(), *(_finding(told, brief=live) for told in state.findings)]
    elif state.summary.steps:
        parts += [Text(), Text("nothing found wrong so far", "green")]
    if state.layers and n_layers > 0:
        parts += [Text(), _layer_table(state.layers, console, n_layers, live)]
    if state.actions:
        parts += [Text(), Text("guard", "bold")]
        parts += [
            Text(printable(str(action)), overflow="ellipsis") for action in state.actions[-5:]
        ]
    return Group(*parts)


def fixed_lines(state: RunState, console: Console) -> int:
    """Return how many lines of a live view are not layers."""
    shown = view(state, console, n_layers=0, live=True)
    return len(console.render_lines(shown, pad=False)) + _EDGE_ROWS


# ---- the run as a whole -------------------------------------------------------------------------


def _headline(state: RunState) -> Text:
    summary = state.summary
    text = Text(printable(summary.name), "bold")
    text.append("  ").append(summary.status, _STATUS.get(summary.status, ""))
    if not summary.steps:
        return text.append(", no step yet", "default")
    text.append(f", step {summary.steps:,}, {duration(summary.seconds)}", "not bold")
    if summary.status == "running" and math.isfinite(state.steps_per_second):
        text.append(f", {number(state.steps_per_second)} steps/s", "not bold")
    if state.sessions > 1:
        text.append(f", {state.sessions} sessions", "not bold")
    if summary.dropped:
        text.append(f", {plural(summary.dropped, 'step')} not kept", "red not bold")
    return text


def _numbers(state: RunState, console: Console) -> list[RenderableType]:
    about = ", ".join(part for part in (state.model, state.optimizer) if part)
    lines: list[RenderableType] = [Text(printable(about), "dim")] if about else []
    if not state.summary.steps:
        return lines
    grid = Table.grid(padding=(0, 2), expand=False)
    for _ in range(3):
        grid.add_column(no_wrap=True)
    summary, steps = state.summary, state.steps
    width = max(8, console.width - 60)
    if np.isfinite(summary.final_loss) or np.isfinite(summary.lowest_loss):
        told = f"{number(summary.final_loss)}, lowest {number(summary.lowest_loss)}"
        grid.add_row("loss", told, sparkline(steps["loss"], width, console))
    allowed = steps["clip_threshold"][-1]
    limit = f", allowed {number(allowed)}" if math.isfinite(allowed) else ""
    norm = f"{number(summary.final_norm)}{limit}"
    grid.add_row("total norm", norm, sparkline(steps["total_norm"], width, console, is_log=True))
    grid.add_row("learning rate", number(steps["lr"][-1]), sparkline(steps["lr"], width, console))
    clipped = f"{percent(summary.clip_rate)}, lately {percent(state.recent_clip_rate)}"
    grid.add_row("clipped", clipped, f"skipped {plural(summary.skipped, 'step')}")
    for name, value in list(state.scalars.items())[:4]:
        grid.add_row(Text(printable(name)[:20]), number(value), "")
    return [*lines, grid]


def sparkline(values: NDArray[Any], width: int, console: Console, *, is_log: bool = False) -> Text:
    """Return a series as a line of blocks: the mean of each part, ``!`` where one is not finite."""
    if len(values) < 2:
        return Text()
    sparks = _SPARKS if console.encoding.lower().startswith("utf") else _PLAIN_SPARKS
    with np.errstate(divide="ignore", invalid="ignore"):
        series = np.log10(values) if is_log else np.asarray(values, dtype=np.float64)
    parts = np.array_split(series, min(width, len(series)))
    means = [
        float(np.mean(part[np.isfinite(part)])) if np.isfinite(part).any() else math.nan
        for part in parts
    ]
    known = [mean for mean in means if math.isfinite(mean)]
    if not known:
        return Text(_GAP * len(parts), "red")
    low, high = min(known), max(known)
    scale = (len(sparks) - 1) / (high - low) if high > low else 0.0
    text = Text()
    for part, mean in zip(parts, means, strict=True):
        if np.isnan(part).any() or np.isposinf(part).any() or math.isnan(mean):
            text.append(_GAP, "red")
        else:
            text.append(sparks[round((mean - low) * scale)])
    return text


# ---- findings -----------------------------------------------------------------------------------


def _finding(told: Told, *, brief: bool) -> RenderableType:
    finding = told.finding
    head = Text(f"{finding.severity:7} ", _SEVERITY[finding.severity])
    head.append(finding.code, "bold")
    head.append(f" ({finding.confidence:.2f}, since step {told.step:,})", "dim not bold")
    lines = [Text(printable(finding.explanation))]
    remedies = finding.remedy[: 1 if brief else None]
    lines += [Text(f"{n}. {printable(remedy)}", "green") for n, remedy in enumerate(remedies, 1)]
    if told.symptoms:
        codes = ", ".join(symptom.finding.code for symptom in told.symptoms)
        lines.append(Text(f"explains {codes}", "dim"))
    return Group(head, *(Padding(line, (0, 0, 0, 8)) for line in lines))


# ---- layers -------------------------------------------------------------------------------------


def _layer_table(
    layers: Sequence[LayerState], console: Console, count: int, live: bool
) -> RenderableType:
    chosen = worst(layers, count)
    if live:
        names = {layer.name for layer in chosen}
        chosen = [layer for layer in layers if layer.name in names]
    is_wide = console.width >= 100
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    label = (
        f"{len(chosen)} of {plural(len(layers), 'layer')}"
        if len(chosen) < len(layers)
        else (plural(len(layers), "layer"))
    )
    table.add_column(label if live else f"{label}, the worst off first", no_wrap=True)
    for heading in ("rms", "x middle", "share", "zeros", "update/w"):
        if is_wide or heading not in ("share", "zeros"):
            table.add_column(heading, justify="right", no_wrap=True)
    bar_width = max(6, min(24, console.width - 68))
    if live:
        table.add_column("log10 rms", no_wrap=True, width=max(bar_width, 9))
    table.add_column("", no_wrap=True)
    used = 46 + (14 if is_wide else 0) + (bar_width + 1 if live else 0)
    cut = elide_all([printable(layer.name) for layer in chosen], max(12, console.width - used))
    for layer, name in zip(chosen, cut, strict=True):
        cells: list[RenderableType] = [Text(name), _size(layer.rms), _size(layer.times_middle)]
        if is_wide:
            cells += [percent(layer.share), percent(layer.zeros)]
        cells.append(_size(layer.update_ratio))
        if live:
            cells.append(_bar(layer, bar_width, console))
        cells.append(Text(layer.remark, "red"))
        table.add_row(*cells)
    return table


def _size(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1e}"


def _bar(layer: LayerState, width: int, console: Console) -> Text:
    if layer.nonfinite:
        return Text(_GAP * width, "red")
    if not layer.rms > 0.0:
        return Text()
    low, high = _BAR_RANGE
    share = (math.log10(layer.rms) - low) / (high - low)
    block = "█" if console.encoding.lower().startswith("utf") else "#"
    style = "red" if layer.remark else "green"
    return Text(block * max(1, min(width, round(share * width))), style)
