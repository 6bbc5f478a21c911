"""A table as text: the same lines everywhere, with colours where a terminal and rich allow them."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradstat._html import html_table
from gradstat.errors import ArgumentValueError, import_optional

if TYPE_CHECKING:
    from gradstat.columns import StatRow
    from gradstat.table import StatTable

_WIDTH_WITHOUT_TERMINAL = 120
_MIN_WIDTH = 24
_COMFORTABLE_NAME = 24
_MIN_NAME = 8
_GAP = "  "

_STYLES = {"header": "bold", "bad": "bold red", "missing": "dim", "total": "bold", "note": "dim"}


@dataclass(frozen=True)
class _Column:
    title: str
    text: Callable[[StatRow], str]


@dataclass(frozen=True)
class _Line:
    text: str
    style: str = ""


def render(
    table: StatTable,
    *,
    width: int | None = None,
    max_rows: int | None = None,
    plain: bool | None = None,
) -> str:
    """Return the table as text without a final line break; see ``StatTable.render``."""
    lines = _lines(table, width, max_rows)
    if plain is None:
        plain = not terminal_has_colours()
    if plain:
        return "\n".join(line.text for line in lines)
    rich_console = import_optional("rich.console", purpose="render(plain=False)", install="rich")
    console = rich_console.Console(force_terminal=True)
    with console.capture() as capture:
        console.print(_as_rich_text(lines), soft_wrap=True, end="")
    return str(capture.get())


def rich_text(table: StatTable, *, width: int | None = None, max_rows: int | None = None) -> Any:
    """Return the table as a ``rich.text.Text``, for a live display or ``rich.print``.

    Raises:
        MissingPackageError: rich is not installed.
    """
    return _as_rich_text(_lines(table, width, max_rows))


def render_html(table: StatTable, max_rows: int) -> str:
    """Return the table as HTML, of at most so many layers; a notebook shows it."""
    first, last = _visible(len(table), max_rows)
    shown = [table[index] for index in (*range(first), *range(len(table) - last, len(table)))]
    rows = [
        (printable(row.name), *(column.text(row) if row.has_grad else "" for column in _COLUMNS))
        for row in (*shown, table.total)
    ]
    if hidden := len(table) - len(shown):
        rows.insert(first, (_hidden_note(table, first, hidden), *("" for _ in _COLUMNS)))
    header = ("layer", *(column.title for column in _COLUMNS))
    return html_table(header, rows, _summary(table))


def terminal_has_colours() -> bool:
    """Return whether rich is installed and stdout is a terminal that takes colours."""
    if sys.stdout is None or not sys.stdout.isatty():
        return False
    # https://no-color.org: any non-empty value asks for no colours.
    if os.environ.get("TERM") == "dumb" or os.environ.get("NO_COLOR"):
        return False
    return importlib.util.find_spec("rich") is not None


def _as_rich_text(lines: list[_Line]) -> Any:
    text = import_optional("rich.text", purpose="a coloured table", install="rich").Text
    styled = [text(line.text, style=_STYLES.get(line.style, "")) for line in lines]
    return text("\n", no_wrap=True).join(styled)


# ---- layout -------------------------------------------------------------------------------------


def _lines(table: StatTable, width: int | None, max_rows: int | None) -> list[_Line]:
    if width is None:
        width = shutil.get_terminal_size((_WIDTH_WITHOUT_TERMINAL, 0)).columns
    width = max(width, _MIN_WIDTH)
    first, last = _visible(len(table), max_rows)
    shown = [table[index] for index in (*range(first), *range(len(table) - last, len(table)))]
    total = table.total
    bad = [
        name for name, count in zip(table.names, table.column("nonfinite"), strict=True) if count
    ]

    gutter = 2 if bad else 0
    names = [printable(row.name) for row in shown]
    name_width = max(map(len, [*names, "total"]))
    columns, name_width = _fit([*shown, total], name_width, width - gutter, bad=bool(bad))
    cell_widths = [_cell_width(column, [*shown, total]) for column in columns]

    labels = dict(zip((row.name for row in shown), elide_all(names, name_width), strict=True))

    def line(mark: str, label: str, cells: list[str]) -> str:
        padded = [cell.rjust(size) for cell, size in zip(cells, cell_widths, strict=True)]
        return mark.ljust(gutter) + _GAP.join([label.ljust(name_width), *padded])

    def row_line(row: StatRow) -> _Line:
        label = labels[row.name]
        if not row.has_grad:
            text = f"{'':{gutter}}{label:{name_width}}{_GAP}no {table.kind}"
            return _Line(text[:width], "missing")
        mark, style = ("!", "bad") if row.nonfinite else ("", "")
        return _Line(line(mark, label, [column.text(row) for column in columns]), style)

    header = line("", "layer", [column.title for column in columns])
    lines = [_Line(header, "header"), _Line("-" * len(header), "note")]
    lines += [row_line(row) for row in shown[:first]]
    if hidden := len(table) - len(shown):
        lines.append(_Line(_hidden_note(table, first, hidden)[:width], "note"))
    lines += [row_line(row) for row in shown[first:]]
    lines.append(_Line("-" * len(header), "note"))
    lines.append(_Line(line("", "total", [column.text(total) for column in columns]), "total"))
    lines += [_Line(text, "note") for text in textwrap.wrap(_summary(table), width)]
    lines += [_Line(text, "bad") for text in textwrap.wrap(_bad_note(bad), width)]
    return lines


def _visible(count: int, max_rows: int | None) -> tuple[int, int]:
    """Return how many rows to show from the start and from the end."""
    if max_rows is None or count <= max_rows:
        return count, 0
    if max_rows < 1:
        raise ArgumentValueError(f"max_rows must be at least 1, got {max_rows}; use None for all")
    return max_rows - max_rows // 2, max_rows // 2


def _fit(
    rows: list[StatRow], name_width: int, width: int, *, bad: bool
) -> tuple[list[_Column], int]:
    """Return the columns that fit into the width beside the names, and the width of the names."""
    columns = list(_COLUMNS)
    wanted = min(name_width, _COMFORTABLE_NAME)
    # Counts of NaN and Inf go first where there is none, and last where there is one.
    for titles in (*_DROP_ORDER, _NONFINITE) if bad else (_NONFINITE, *_DROP_ORDER):
        if _cells_width(columns, rows) + wanted <= width:
            break
        columns = [column for column in columns if column.title not in titles]
    return columns, max(min(name_width, width - _cells_width(columns, rows)), _MIN_NAME)


def _cells_width(columns: list[_Column], rows: list[StatRow]) -> int:
    return sum(len(_GAP) + _cell_width(column, rows) for column in columns)


def _cell_width(column: _Column, rows: list[StatRow]) -> int:
    texts = [column.text(row) for row in rows if row.has_grad]
    return max(map(len, [column.title, *texts]))


def _hidden_note(table: StatTable, first: int, hidden: int) -> str:
    bad = int((table.column("nonfinite")[first : first + hidden] > 0).sum())
    return f"... {_plural(hidden, 'more layer')}" + (f", {bad} with NaN or Inf" if bad else "")


def _bad_note(bad: list[str]) -> str:
    if not bad:
        return ""
    names = ", ".join(elide(printable(name), 40) for name in bad[:3])
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"! NaN or Inf in {_plural(len(bad), 'layer')}: {names}{more}"


def _summary(table: StatTable) -> str:
    norm, finite = table.total_norm, table.finite_norm
    text = f"total norm {norm:.4g}"
    text += "" if math.isfinite(norm) else f" (finite part {finite:.4g})"
    text += f" over {_plural(len(table), 'layer')}"
    if missing := len(table.missing):
        text += f", {missing} without {table.kind}"
    text += "" if table.total.nonfinite else ", no NaN or Inf"
    return text + (f"; {table.note}" if table.note else "")


# ---- cells --------------------------------------------------------------------------------------


def _count(value: float) -> str:
    if value < 1e5:
        return str(int(value)) if value == int(value) else f"{value:.3g}"
    for unit in ("k", "M", "G"):
        value /= 1e3
        if value < 999.5:
            return f"{value:.3g}{unit}"
    return f"{value / 1e3:.3g}T"


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "0" if value == 0.0 else f"{value:.2e}"


def _percent(fraction: float) -> str:
    if math.isnan(fraction):
        return "-"
    if fraction in (0.0, 1.0):
        return f"{fraction:.0%}"
    # The ends are kept for "none" and "all".
    return f"{min(max(fraction, 0.001), 0.999):.1%}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def printable(name: str) -> str:
    """Return a name with a question mark for each character that is not to be printed."""
    # A line break or an escape sequence in a name must not reach the terminal.
    return "".join(character if character.isprintable() else "?" for character in name)


def elide(name: str, width: int, head: int | None = None) -> str:
    """Return a name cut in the middle to a width."""
    if len(name) <= width:
        return name
    head = (width - 3) // 2 if head is None else head
    return f"{name[:head]}...{name[head + 3 - width :]}"


def elide_all(names: list[str], width: int) -> list[str]:
    """Return the names cut to a width, at the place near the middle that tells most of them apart.

    "encoder.layers.11.attention.weight" differs from its neighbours in the number alone.
    """
    prefix = _common_parents([name for name in names if len(name) > width])
    if len(prefix) <= width // 3:
        return _cut_all(names, width)
    # Where a long prefix pushes the difference out of sight it goes first.
    short = [name.removeprefix(prefix) if len(name) > width else name for name in names]
    whole, shortened = _cut_all(names, width), _cut_all(short, width - 3)
    if len(set(whole)) >= len(set(shortened)):
        return whole
    pairs = zip(names, shortened, strict=True)
    return [f"...{label}" if len(name) > width else name for name, label in pairs]


def _common_parents(names: list[str]) -> str:
    """Return what all names begin with, up to a dot: the modules that all of them lie in."""
    if not names:
        return ""
    parts = [name.split(".")[:-1] for name in (min(names), max(names))]
    pairs = enumerate(zip(*parts, strict=False))
    shared = next((i for i, (low, high) in pairs if low != high), min(map(len, parts)))
    return "".join(f"{part}." for part in parts[0][:shared])


def _cut_all(names: list[str], width: int) -> list[str]:
    middle = (width - 3) // 2
    best: list[str] = []
    for head in sorted(range(1, width - 3), key=lambda head: abs(head - middle)):
        labels = [elide(name, width, head) for name in names]
        if len(set(labels)) > len(set(best)):
            best = labels
        if len(set(best)) == len(set(names)):
            break
    return best


_COLUMNS: tuple[_Column, ...] = (
    _Column("numel", lambda row: _count(row.numel)),
    _Column("l2", lambda row: _number(row.l2)),
    _Column("rms", lambda row: _number(row.rms)),
    _Column("mean", lambda row: _number(row.mean)),
    _Column("std", lambda row: _number(row.std)),
    _Column("max", lambda row: _number(row.max)),
    _Column("zeros", lambda row: _percent(row.zero_fraction)),
    _Column("dead rows", lambda row: f"{_count(row.dead_rows)}/{_count(row.rows)}"),
    _Column("nan", lambda row: _count(row.nans)),
    _Column("inf", lambda row: _count(row.infs)),
)
_NONFINITE = ("nan", "inf")
_DROP_ORDER = (("mean",), ("std",), ("numel",), ("rms",), ("dead rows",), ("max",), ("zeros",))
