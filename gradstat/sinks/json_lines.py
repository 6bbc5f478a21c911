"""`JsonLines`: every record is one JSON object on one line of a file."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from gradstat.columns import RAW_COLUMNS
from gradstat.records import HistogramRecord, Record, RunStart, Sink, TableRecord

FORMAT = 1
"""Of the lines; stands in every ``run_start``."""


class JsonLines(Sink):
    """Appends each record to a file as one JSON object on one line; docs/sinks.md lists the fields.

    It is strict JSON: NaN and the infinities are the strings ``"NaN"``, ``"Infinity"`` and
    ``"-Infinity"``, as in the JSON form of protocol buffers; Python's ``float()`` reads them. A
    line that a killed process left unfinished stays, on a line of its own.

    Args:
        path: The file; it and its folder are made where they are missing.

    Raises:
        OSError: It cannot be opened for appending.

    Example:
        >>> gradstat.attach(optimizer, model, log=gradstat.sinks.JsonLines("runs/exp1.jsonl"))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        if self._file.tell() and not self._ends_a_line():
            self._file.write(b"\n")

    def _ends_a_line(self) -> bool:
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) == b"\n"

    def write(self, record: Record) -> None:
        """Append one line; it is in the file after `flush`."""
        self._file.write(json.dumps(as_plain(record), allow_nan=False).encode() + b"\n")

    def flush(self) -> None:
        """Hand all lines so far to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def as_plain(record: Record) -> dict[str, Any]:
    """Return a record as values that strict JSON holds, its kind first, under ``"record"``."""
    kind = re.sub(r"(?<!^)(?=[A-Z])", "_", type(record).__name__.removesuffix("Record")).lower()
    plain: dict[str, Any] = {"record": kind}
    if isinstance(record, RunStart):
        plain["format"] = FORMAT
    values: dict[str, Any] = {each.name: getattr(record, each.name) for each in fields(record)}
    if isinstance(record, TableRecord):
        names = (column.name for column in RAW_COLUMNS)
        values["data"] = dict(zip(names, record.data.T, strict=True))
    elif isinstance(record, HistogramRecord):
        values |= _without_empty_ends(record.counts)
    plain |= _plain(values)
    return plain


def _without_empty_ends(counts: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return the columns from the first to the last in which any layer has a count."""
    filled = np.flatnonzero(counts.any(axis=0))
    first, end = (int(filled[0]), int(filled[-1]) + 1) if filled.size else (0, 0)
    return {"first_bin": first, "counts": counts[:, first:end]}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "__dataclass_fields__"):
        return _plain(vars(value))
    return str(value)
