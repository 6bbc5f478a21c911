"""The table of statistics: one row per tensor, kept on the device until it is first read."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator
from functools import reduce
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat import render
from gradstat._table_file import read_table, write_table
from gradstat._table_rows import Names, TableRows
from gradstat.columns import StatRow, add_raw, scale_raw
from gradstat.errors import ArgumentTypeError, ArgumentValueError

__all__ = ["StatRow", "StatTable"]

_MAX_PRINTED_ROWS = 1000
"""Rows that ``print(table)`` shows; ``render()`` shows all."""


class StatTable(TableRows):
    """Statistics of a list of tensors, one row each, in model order, and their totals.

    Making a table, adding tables and dividing them neither synchronises with the device nor
    evaluates names. The first read (any row, column, norm or conversion) copies everything to the
    host at once, waits for that copy on the current stream, and keeps it.

    A table is immutable: the sums, means and copies are new tables.

    Args:
        names: Name of each row, or a function that returns the names, called when first needed.
        data: float64, shape (n + 1, 12): the raw columns of docs/statistics.md in their order, the
            last row holding the totals. A row of NaN is a tensor that is missing.
        histogram: int64, shape (n + 1, 256), same device; None where it was not asked for.
        kind: What was measured, in the singular: ``"gradient"``, ``"weight"``, ``"update"``.
        averaged: True where counts are averages and may be fractions.
        note: What the printed table says of how it was made.

    Raises:
        ArgumentTypeError: ``data`` or ``histogram`` is no tensor of that dtype.
        ArgumentValueError: Shapes, devices or the number of names do not fit each other.

    Example:
        >>> table = gradstat.grad_stats(model)
        >>> table.total_norm, table["layers.0.weight"].l2
        >>> dead = [row.name for row in table if row.dead_row_fraction > 0.5]
        >>> window = StatTable.mean([table_1, table_2, table_3])
    """

    __slots__ = ()

    # ---- files ----

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table to a file that ``load`` reads back exactly.

        Args:
            path: Ends in ``.npz`` (numpy) or ``.safetensors`` (needs that package).

        Raises:
            ArgumentValueError: Another suffix.
            MissingPackageError: ``.safetensors`` without the package.
        """
        host = self._read()
        arrays: dict[str, NDArray[Any]] = {"data": host.raw}
        if host.histogram is not None:
            arrays["histogram"] = host.histogram
        header = {
            "kind": self._kind,
            "averaged": self._averaged,
            "note": self._note,
            "names": self.names,
        }
        write_table(path, header, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StatTable:
        """Return the table that ``save`` wrote, on the CPU. Never unpickles anything.

        Raises:
            ArgumentValueError: Another suffix, or no file of ours.
            FileNotFoundError: There is no such file.
            MissingPackageError: ``.safetensors`` without the package.
        """

        def build(header: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> StatTable:
            histogram = arrays.get("histogram")
            kind, averaged, note = header["kind"], header["averaged"], header.get("note", "")
            return cls._from_host(header["names"], arrays["data"], histogram, kind, averaged, note)

        return read_table(path, build)

    # ---- arithmetic ----

    @classmethod
    def mean(cls, tables: Iterable[StatTable]) -> StatTable:
        """Return the average over a window of tables with the same names and kind.

        Raw columns are averaged, with one exception: ``l2`` is the root of the mean square, so that
        ``l2**2`` stays equal to ``sq_sum``. Ratios derive from the averages, hence pool the whole
        window: ``rms``, ``mean``, ``std`` and the fractions are those of all elements seen.
        ``abs_max`` and ``abs_min`` are averages too, not the extremes of the window; a 0 that
        stands for "no non-zero element" counts as 0. A row that is missing in some tables counts as
        zero there, and is missing in the average where it is missing in all.

        Stays on the device and does not synchronise.

        Raises:
            ArgumentTypeError: Something in ``tables`` is no table.
            ArgumentValueError: No table at all, or names or kinds differ.
        """
        window = list(tables)
        if not window:
            raise ArgumentValueError("tables must hold at least one table, got none")
        for position, table in enumerate(window):
            if not isinstance(table, StatTable):
                raise ArgumentTypeError(
                    f"tables[{position}] must be a StatTable, got {type(table).__name__}"
                )
        return reduce(operator.add, window) / len(window)

    def __add__(self, other: StatTable) -> StatTable:
        """Take two measurements together: all raw columns add, ``l2`` as a root of squares."""
        if not isinstance(other, StatTable):
            return NotImplemented
        _check_same_rows(self, other)
        first, second = (self, other) if self.device == other.device else (self.cpu(), other.cpu())
        histogram = None
        if first._histogram is not None and second._histogram is not None:
            histogram = first._histogram + second._histogram
        averaged = self._averaged or other._averaged
        return self._derived(add_raw(first._data, second._data), histogram, averaged)

    def __radd__(self, other: object) -> StatTable:
        # sum() starts from 0.
        return self if type(other) is int and other == 0 else NotImplemented

    def __mul__(self, factor: float) -> StatTable:
        """Weigh the table: that of ``factor`` equal measurements, ``l2`` times its root."""
        return self._scaled(factor, divide=False)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> StatTable:
        """Divide a sum of ``divisor`` tables to their average; ``l2`` by the root."""
        return self._scaled(divisor, divide=True)

    def _scaled(self, factor: Any, *, divide: bool) -> StatTable:
        if not isinstance(factor, Real):
            raise ArgumentTypeError(
                f"a table is weighted with a number, got {type(factor).__name__}"
            )
        factor = float(factor)
        whole = not divide and factor.is_integer()
        if not 0.0 < factor < float("inf"):
            raise ArgumentValueError(
                f"a table is weighted with a positive finite number, got {factor}"
            )
        histogram = self._histogram
        if histogram is not None and whole:
            histogram = histogram * int(factor)
        elif histogram is not None:
            histogram = histogram.double()
            histogram = histogram / factor if divide else histogram * factor
        data = scale_raw(self._data, factor, divide=divide)
        return self._derived(data, histogram, self._averaged or not whole)

    # ---- copies and text ----

    def cpu(self) -> StatTable:
        """Return the table on the CPU: itself if it is there, else a copy that was read."""
        if self.device.type == "cpu":
            return self
        host = self._read()
        return self._from_host(
            self._names, host.raw, host.histogram, self._kind, self._averaged, self._note
        )

    def render(
        self, *, width: int | None = None, max_rows: int | None = None, plain: bool | None = None
    ) -> str:
        """Return the table as text; ``print(table)`` shows the same, of at most 1000 layers.

        Args:
            width: Characters a line; columns that do not fit are dropped, least important first.
                None: the terminal's, or 120 where there is none.
            max_rows: Show at most this many layers, the first and the last ones. None: all.
            plain: True: no colours. None: colours where rich is installed and stdout is a terminal.
        """
        return render.render(self, width=width, max_rows=max_rows, plain=plain)

    def __str__(self) -> str:
        return self.render(max_rows=_MAX_PRINTED_ROWS)

    def __repr__(self) -> str:
        rows = "1 row" if len(self) == 1 else f"{len(self)} rows"
        parts = [f"{rows} of kind {self._kind!r}", str(self.device)]
        if self._host is None and self.device.type != "cpu":
            return f"StatTable({', '.join(parts)}, not read yet)"  # repr must not wait for a device
        if self._note:
            parts.append(self._note)
        if missing := len(self.missing):
            parts.append(f"{missing} missing")
        return f"StatTable({', '.join(parts)}, total_norm={self.total_norm:.4g})"

    def _repr_html_(self) -> str:
        return render.render_html(self, _MAX_PRINTED_ROWS)

    def __rich_console__(self, _console: Any, options: Any) -> Iterator[Any]:
        yield render.rich_text(self, width=options.max_width)

    def __reduce__(self) -> tuple[Any, ...]:
        # Through the host, so that a table from a GPU opens on a machine without one.
        host = self._read()
        arguments = (
            self.names,
            host.raw,
            host.histogram,
            self._kind,
            self._averaged,
            self._note,
        )
        return StatTable._from_host, arguments

    def __copy__(self) -> StatTable:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> StatTable:
        histogram = None if self._histogram is None else self._histogram.clone()
        return self._derived(self._data.clone(), histogram, self._averaged)

    # ---- inside ----

    @classmethod
    def _from_host(
        cls,
        names: Names,
        data: NDArray[np.float64],
        histogram: NDArray[Any] | None,
        kind: str,
        averaged: bool,
        note: str,
    ) -> StatTable:
        counts = None if histogram is None else torch.from_numpy(histogram.copy())
        return cls(
            names,
            torch.from_numpy(data.copy()),
            counts,
            kind=kind,
            averaged=averaged,
            note=note,
        )

    def _derived(self, data: Tensor, histogram: Tensor | None, averaged: bool) -> StatTable:
        return StatTable(
            self._names, data, histogram, kind=self._kind, averaged=averaged, note=self._note
        )


def _check_same_rows(first: StatTable, second: StatTable) -> None:
    remedy = "only tables of the same tensors can be added"
    if first.kind != second.kind:
        raise ArgumentValueError(
            f"kinds must be equal: got {first.kind!r} and {second.kind!r}; {remedy}"
        )
    if (first.histogram_data is None) != (second.histogram_data is None):
        raise ArgumentValueError(
            "either both tables or none must have a histogram; measure both with histogram=True"
        )
    if first._names is second._names or first.names == second.names:
        return
    if len(first) != len(second):
        detail = f"got {len(first)} and {len(second)} rows"
    else:
        pairs = enumerate(zip(first.names, second.names, strict=True))
        position, (left, right) = next(item for item in pairs if item[1][0] != item[1][1])
        detail = f"row {position} is {left!r} in one and {right!r} in the other"
    raise ArgumentValueError(f"names must be equal, in the same order: {detail}; {remedy}")
