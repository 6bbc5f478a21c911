"""The table of statistics: one row per tensor, kept on the device until it is first read."""

from __future__ import annotations

import difflib
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from itertools import repeat
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat import render
from gradstat._table_file import read_table, write_table
from gradstat.columns import (
    COLUMN_NAMES,
    HISTOGRAM_BINS,
    INFS,
    L2,
    NANS,
    NUM_RAW_COLUMNS,
    HostCopy,
    StatRow,
    add_raw,
    histogram_edges,
    scale_raw,
    unknown_column,
)
from gradstat.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    LayerNotFoundError,
    import_optional,
)

__all__ = ["Names", "StatRow", "StatTable"]

Names = Sequence[str] | Callable[[], Sequence[str]]

_MAX_PRINTED_ROWS = 1000
"""Rows that ``print(table)`` shows; ``render()`` shows all."""


class StatTable:
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

    __slots__ = (
        "__weakref__",
        "_averaged",
        "_data",
        "_histogram",
        "_host",
        "_index",
        "_kind",
        "_names",
        "_note",
    )

    def __init__(
        self,
        names: Names,
        data: Tensor,
        histogram: Tensor | None = None,
        *,
        kind: str = "gradient",
        averaged: bool = False,
        note: str = "",
    ) -> None:
        _check_tensor("data", data, (torch.float64,), NUM_RAW_COLUMNS)
        if histogram is not None:
            _check_tensor("histogram", histogram, (torch.int64, torch.float64), HISTOGRAM_BINS)
            if histogram.shape[0] != data.shape[0] or histogram.device != data.device:
                raise ArgumentValueError(
                    "histogram must have as many rows as data and lie on its device; got "
                    f"{histogram.shape[0]} rows on {histogram.device} for {data.shape[0]} rows on "
                    f"{data.device}"
                )
        if isinstance(names, str):
            raise ArgumentTypeError(
                f"names must be a sequence of str, got the str {names!r}; use [{names!r}]"
            )
        if not callable(names):
            names = tuple(names)
            _check_names_length(names, data.shape[0] - 1)
        self._names: Names = names
        self._data = data.detach() if data.requires_grad else data
        self._histogram = histogram
        self._kind = kind
        self._averaged = averaged
        self._note = note
        self._host: HostCopy | None = None
        self._index: dict[str, int] | None = None

    # ---- what the table is: nothing here waits for the device ----

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each row, in model order."""
        return tuple(self._positions())

    @property
    def columns(self) -> tuple[str, ...]:
        """Name of each column: the raw ones, then the derived ones."""
        return COLUMN_NAMES

    @property
    def kind(self) -> str:
        """What was measured, in the singular: ``"gradient"``."""
        return self._kind

    @property
    def note(self) -> str:
        """How the table was made, where that was not by kernels alone; else empty."""
        return self._note

    @property
    def averaged(self) -> bool:
        """True where counts are averages: they are float then, and may be fractions."""
        return self._averaged

    @property
    def device(self) -> torch.device:
        """Device that the table was computed on and stays on."""
        return self._data.device

    @property
    def data(self) -> Tensor:
        """The raw columns on the device, float64, shape (n + 1, 12), totals last. Do not write."""
        return self._data

    @property
    def histogram_data(self) -> Tensor | None:
        """The histogram on the device, shape (n + 1, 256), totals last. Do not write."""
        return self._histogram

    @property
    def bin_edges(self) -> NDArray[np.float64]:
        """Edges of the histogram's bins, shape (257,): bin b is [edges[b], edges[b + 1])."""
        return histogram_edges()

    def __len__(self) -> int:
        return int(self._data.shape[0]) - 1

    def __contains__(self, name: object) -> bool:
        return name in self._positions()

    # ---- reading: the first of these copies the table to the host ----

    @property
    def total_norm(self) -> float:
        """L2 norm over all elements in torch's sense: NaN if any is NaN, else Inf if any is Inf."""
        totals = self._read().raw[-1]
        if totals[NANS] > 0:
            return float("nan")
        return float("inf") if totals[INFS] > 0 else float(totals[L2])

    @property
    def finite_norm(self) -> float:
        """L2 norm over the finite elements; 0.0 where there are none."""
        return float(self._read().raw[-1, L2])

    @property
    def total(self) -> StatRow:
        """All tensors taken as one, as a row named ``"total"``."""
        return self._row(len(self), "total")

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of the rows without data: parameters that have no gradient."""
        present = self._read().present
        return tuple(name for name, here in zip(self.names, present, strict=False) if not here)

    @property
    def histogram(self) -> NDArray[Any] | None:
        """Histograms of log2 magnitudes, shape (n, 256), int64; float64 after division."""
        histogram = self._read().histogram
        return None if histogram is None else histogram[:-1]

    def column(self, name: str) -> NDArray[Any]:
        """Return one column, shape (n,), read-only: counts int64 (float64 after division).

        Raises:
            ArgumentValueError: There is no such column.
        """
        try:
            return self._read().columns[name][:-1]
        except KeyError:
            raise unknown_column(name) from None

    def __getitem__(self, key: str | int) -> StatRow:
        if isinstance(key, str):
            index = self._positions().get(key)
            if index is None:
                raise layer_not_found(key, self.names)
            return self._row(index, key)
        try:
            index = operator.index(key)
        except TypeError:
            raise ArgumentTypeError(
                f"a row is looked up by name or index, got {type(key).__name__}; "
                'use table["name"] or table[0].'
            ) from None
        if not -len(self) <= index < len(self):
            raise LayerNotFoundError(
                f"index must be within the table's {len(self)} rows, got {index}"
            )
        index %= len(self)
        return self._row(index, self.names[index])

    def __iter__(self) -> Iterator[StatRow]:
        return self._rows(0, self.names)

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Return ``{name: {column: number}}`` in plain Python numbers, ``has_grad`` (bool) first.

        Histograms are left out; the statistics that do not exist are ``float("nan")``.
        """
        host = self._read()
        keys = ("has_grad", *host.columns)
        lists = [host.present.tolist(), *(values.tolist() for values in host.columns.values())]
        rows = zip(self.names, zip(*lists, strict=True), strict=False)
        return {name: dict(zip(keys, row, strict=True)) for name, row in rows}

    def to_numpy(self) -> NDArray[Any]:
        """Return a structured array, shape (n,), with fields name, has_grad and each column.

        Counts are int64 (float64 after division), the others float64.
        """
        host = self._read()
        width = max(map(len, self.names), default=0) or 1
        fields = [(name, values.dtype) for name, values in host.columns.items()]
        array = np.empty(len(self), np.dtype([("name", f"U{width}"), ("has_grad", "?"), *fields]))
        array["name"] = self.names
        array["has_grad"] = host.present[:-1]
        for name, values in host.columns.items():
            array[name] = values[:-1]
        return array

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row per tensor, indexed by name.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        pandas = import_optional("pandas", purpose="to_pandas()", install="pandas")
        host = self._read()
        columns = {"has_grad": host.present[:-1].copy()}
        columns |= {name: values[:-1].copy() for name, values in host.columns.items()}
        return pandas.DataFrame(columns, index=pandas.Index(self.names, name="name", dtype=object))

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

    def _positions(self) -> dict[str, int]:
        # Names are looked at when they are first needed: a training step that only measures must
        # not pay for a thousand of them.
        if self._index is None:
            names = tuple(self._names() if callable(self._names) else self._names)
            _check_names_length(names, len(self))
            self._index = _index_of(names)
        return self._index

    def _row(self, index: int, name: str) -> StatRow:
        return next(self._rows(index, [name]))

    def _rows(self, start: int, names: Sequence[str]) -> Iterator[StatRow]:
        host, rows = self._read(), slice(start, start + len(names))
        columns = [column[rows].tolist() for column in host.columns.values()]
        histograms = repeat(None) if host.histogram is None else host.histogram[rows]
        for name, present, histogram, *values in zip(
            names, host.present[rows].tolist(), histograms, *columns, strict=False
        ):
            yield StatRow(name, present, *values, histogram=histogram)

    def _read(self) -> HostCopy:
        # Two threads that read first at once both copy and keep equal results: no lock is needed.
        if self._host is None:
            self._host = HostCopy(self._data, self._histogram, self._averaged)
        return self._host


def _check_tensor(
    argument: str, value: object, dtypes: tuple[torch.dtype, ...], columns: int
) -> None:
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        received = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentTypeError(
            f"{argument} must be a tensor of {' or '.join(map(str, dtypes))}, got {received}"
        )
    if value.dim() != 2 or value.shape[1] != columns or value.shape[0] < 1:
        raise ArgumentValueError(
            f"{argument} must have shape (n + 1, {columns}), the last row holding the totals; "
            f"got {tuple(value.shape)}"
        )


def _check_names_length(names: tuple[str, ...], count: int) -> None:
    if len(names) != count:
        raise ArgumentValueError(
            f"names must have one entry per tensor: got {len(names)} names for {count} tensors "
            "(data has one row more, the totals)"
        )


def _index_of(names: tuple[str, ...]) -> dict[str, int]:
    index: dict[str, int] = {}
    for position, name in enumerate(names):
        if not isinstance(name, str):
            raise ArgumentTypeError(f"names[{position}] must be a str, got {type(name).__name__}")
        if index.setdefault(name, position) != position:
            raise ArgumentValueError(f"names must differ from each other, got {name!r} twice")
    return index


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


def layer_not_found(name: str, names: Sequence[str]) -> LayerNotFoundError:
    """Return the error for a name that no row of a table has."""
    close = difflib.get_close_matches(name, names, n=3) or names[:3]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "the table is empty"
    return LayerNotFoundError(f"the table has no row named {name!r}; {hint}")
