"""A page of one file: templates filled, figures and plotly.js packed into it."""

from __future__ import annotations

import base64
import gzip
import json
import textwrap
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from gradstat.errors import import_optional
from gradstat.render import elide_all, printable
from gradstat.report.figure import Figure
from gradstat.report.text import NARROW, WIDE, moment, number, plain, short

_FOLDER = Path(__file__).with_name("templates")


def fill(template: str, names: Sequence[str], figures: Iterable[Figure], **values: Any) -> str:
    """Return the HTML of a page.

    Args:
        template: File of the templates' folder.
        names: Layers of the charts that have an axis of layers.
        figures: The charts.
        **values: What the template shows.

    Raises:
        MissingPackageError: jinja2 or plotly is not installed.
    """
    jinja2 = import_optional("jinja2", purpose="a report", install="'gradstat[report]'")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printed,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "facts": lambda given: ", ".join(f"{key} {value}" for key, value in given.items()) or "-",
        "number": number,
        "short": short,
        "words": lambda code: code.replace("-", " ").capitalize(),
    }
    html: str = environment.get_template(template).render(
        version=metadata.version("gradstat"),
        made=moment(time.time()),
        style=(_FOLDER / "style.css").read_text("utf-8"),
        script=(_FOLDER / "page.js").read_text("utf-8"),
        figures=_packed(_figures_json(names, figures), level=6),
        plotly=_plotly(),
        **values,
    )
    return html


def _printed(value: Any) -> Any:
    """Return text without what would turn or hide the rest of the page; markup as it is."""
    return printable(" ".join(value.split())) if type(value) is str else value


def _figures_json(names: Sequence[str], figures: Iterable[Figure]) -> bytes:
    printed = [printable(name) for name in names]
    content = {
        "wide": [plain(label) for label in elide_all(printed, WIDE)],
        "narrow": [plain(label) for label in elide_all(printed, NARROW)],
        "hover": ["<br>".join(map(plain, textwrap.wrap(name, 60) or [""])) for name in printed],
        "figures": [figure.to_dict() for figure in figures],
    }
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


def _packed(content: bytes, level: int) -> str:
    return base64.b64encode(gzip.compress(content, level, mtime=0)).decode()


@lru_cache(maxsize=1)
def _plotly() -> str:
    import_optional("plotly", purpose="a report", install="'gradstat[report]'")
    source = resources.files("plotly").joinpath("package_data", "plotly.min.js").read_bytes()
    return _packed(source, level=6)
