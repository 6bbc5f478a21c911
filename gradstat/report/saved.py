"""`Report`: a page with what it is made from."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from gradstat._json import json_values
from gradstat.errors import ArgumentValueError


class Report:
    """One HTML file that needs no network; made by `make_report` and `compare_runs`.

    ``print(report)`` gives its key numbers and findings; in a notebook it shows itself.

    Args:
        build: Makes the page, when it is first asked for.
        values: Key numbers and findings, plain.
        text: The same for a terminal.
        sources: Files that must not be written over.
    """

    def __init__(
        self,
        build: Callable[[], str],
        values: dict[str, Any],
        text: str,
        sources: Sequence[Path | None],
    ) -> None:
        self._build = build
        self._values = json_values(values)
        self._text = text
        self._sources = [source.resolve() for source in sources if source is not None]

    @cached_property
    def html(self) -> str:
        """The page.

        Raises:
            MissingPackageError: jinja2 or plotly is not installed.
        """
        return self._build()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, whole or not at all, and return its path.

        Raises:
            ArgumentValueError: The file is a run log that is reported.
            MissingPackageError: jinja2 or plotly is not installed.
            OSError: It cannot be written.
        """
        target = Path(path)
        if target.resolve() in self._sources:
            raise ArgumentValueError(
                f"path must not be the run log that is reported, got {str(path)!r}; use for "
                f"example {str(target.with_suffix('.html'))!r}"
            )
        _write_whole(target, self.html)
        return target

    def to_dict(self) -> dict[str, Any]:
        """Return key numbers and findings as plain values, fit for JSON; None is NaN or Inf."""
        return dict(self._values)

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" title="gradstat report" '
            'style="width:100%;height:80vh;border:0"></iframe>'
        )

    def __str__(self) -> str:
        return self._text


def _write_whole(target: Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all."""
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
