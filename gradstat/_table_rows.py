"""Rows of statistics: what a table is, and how it is read."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat.columns import (
    COLUMN_NAMES,
    HISTOGRAM_BINS,
    INFS,
    L2,
    NANS,
    NUM_RAW_COLUMNS,
    HostCopy,
    StatRow,
    histogram_edges,
    unknown_column,
)
from gradstat.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    LayerNotFoundError,
    import_optional,
)

Names = Sequence[str] | Callable[[], Sequence[str]]


class TableRows:
    """One row per tensor and their totals, read from the device at the first look.

    Arguments, errors and what synchronises: see `StatTable`.
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

    # ---- inside ----

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


def layer_not_found(name: str, names: Sequence[str]) -> LayerNotFoundError:
    """Return the error for a name that no row of a table has."""
    close = difflib.get_close_matches(name, names, n=3) or names[:3]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "the table is empty"
    return LayerNotFoundError(f"the table has no row named {name!r}; {hint}")
