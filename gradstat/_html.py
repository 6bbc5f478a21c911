"""Small pieces of HTML that a notebook shows in place of a repr."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_CELL = "padding:.15em .7em;text-align:right;white-space:nowrap"
_NAME = "padding:.15em .7em;text-align:left;max-width:28em;overflow:hidden;text-overflow:ellipsis"


def html_table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "") -> str:
    """Return rows of text as a table; the first cell of each names it, in full on hover."""
    names = "".join(
        f'<th scope="col" style="{_CELL if place else _NAME}">{escape(title)}</th>'
        for place, title in enumerate(header)
    )
    lines = []
    for name, *cells in rows:
        named = f'<th scope="row" style="{_NAME}" title="{escape(name)}">{escape(name)}</th>'
        others = "".join(f'<td style="{_CELL}">{escape(cell)}</td>' for cell in cells)
        lines.append(f"<tr>{named}{others}</tr>")
    said = f'<caption style="text-align:left">{escape(caption)}</caption>' if caption else ""
    body = "\n".join(lines)
    return f"<table>{said}<thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"
