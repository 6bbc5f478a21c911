"""What was counted of activations: one entry a site, on the device until it is first looked at."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat import _fallback, _kernels
from gradstat._html import html_table
from gradstat._table_rows import layer_not_found
from gradstat._units import UnitCounts
from gradstat.activations.kinds import Kind
from gradstat.errors import ArgumentTypeError, LayerNotFoundError
from gradstat.render import printable
from gradstat.table import StatRow, StatTable

_HEADER = ("site", "units", "dead", "low", "high", "zeros", "mean", "std")
Floats = NDArray[np.float64]


class Measured(NamedTuple):
    """A site, and what is counted of it."""

    name: str
    kind: Kind
    units: int
    weight: str | None = None
    """Name of the weight whose rows are the units, where it is known."""


def packed(counts: UnitCounts) -> Tensor:
    """Return the row and then the counts of one site as one tensor: int64 (12 + 3 units,)."""
    return torch.cat([counts.row.view(torch.int64), counts.counts.view(-1)])


class Layout:
    """What the numbers in a table's memory are of; the same for every table of the same sites.

    Args:
        sites: In the order in which they were called.
        parts: On each device, the sites by name whose numbers lie there one after the other, in the
            form of `packed`. Those of a site that is named several times are to be added.
    """

    def __init__(
        self, sites: Sequence[Measured], parts: Mapping[torch.device, Sequence[str]]
    ) -> None:
        self.sites = tuple(sites)
        self.parts = parts
        self.index = {site.name: place for place, site in enumerate(sites)}
        self.kinds = tuple([site.kind.name for site in sites])
        self.units = np.array([site.units for site in sites], np.int64)
        self.starts: NDArray[np.int64] = np.concatenate([[0], self.units.cumsum()])
        """Place of each site's first unit, and of the end: (sites + 1,)."""

        self.by_position = np.array([site.kind.by_position for site in sites], bool)
        self.site_of_part = np.array(
            [self.index[name] for names in parts.values() for name in names], np.int64
        )

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Places of each part's row in the memory of all devices: (parts, 12)."""
        sizes = _kernels.NUM_COLUMNS + 3 * self.units[self.site_of_part]
        first: NDArray[np.int64] = sizes.cumsum() - sizes
        return first[:, None] + np.arange(_kernels.NUM_COLUMNS)

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """Place of each count of the parts in those of all sites, which are (3, units)."""
        units = self.units[self.site_of_part]
        within = np.concatenate([np.arange(3 * n) for n in units] or [np.zeros(0, np.int64)])
        units, first = (
            np.repeat(of_part, 3 * units) for of_part in (units, self.starts[self.site_of_part])
        )
        targets: NDArray[np.int64] = within // units * self.starts[-1] + first + within % units
        return targets


class _Host(NamedTuple):
    """What was counted of all sites, on the host."""

    counts: NDArray[np.int64]
    """Elements of each unit that are active, low and high: (3, units of all sites)."""

    starts: NDArray[np.int64]
    """Place of each site's first unit, and of the end: (sites + 1,)."""

    rows: Floats
    """Moments of the parts that the sites were counted in: (parts, 12)."""

    sites: NDArray[np.int64]
    """Site of each part: (parts,)."""

    numel: Floats
    """Elements of each site: (sites,)."""

    def by_site(self, of_units: NDArray[Any]) -> NDArray[np.int64]:
        """Return the sums over the units of each site: (..., sites)."""
        until = np.zeros((*of_units.shape[:-1], self.starts[-1] + 1), np.int64)
        of_units.cumsum(-1, out=until[..., 1:])
        at: NDArray[np.int64] = until[..., self.starts]
        return at[..., 1:] - at[..., :-1]

    def parts(self, site: int) -> Floats:
        """Return the rows of one site: the first, and of the others those that counted."""
        rows: Floats = self.rows[self.sites == site]
        is_kept = rows[:, _fallback.NUMEL] > 0
        is_kept[0] = True
        return rows[is_kept]


class ActivationTable:
    """What was counted of activations, one row a site, in the order in which they were called.

    Making a table does not synchronise; the first number that is read waits once for each device
    and brings everything to the host. A table does not change afterwards.

    Example:
        >>> table = monitor.table()
        >>> [(row.name, row.dead_units) for row in table if row.dead_units]
        >>> table["encoder.2/relu#0"].saturated_fraction
    """

    def __init__(
        self,
        layout: Layout,
        memory: Mapping[torch.device, Tensor],
        positions: Sequence[int],
        *,
        steps: int,
    ) -> None:
        self._layout = layout
        self._memory = dict(memory)
        self._positions = positions
        self._steps = steps

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each site: the module that called, the function, and which call of it."""
        return tuple(self._layout.index)

    @property
    def steps(self) -> int:
        """Sampled steps that the table covers."""
        return self._steps

    def copy_by(self, copy: Callable[[Tensor], Tensor]) -> None:
        """Bring the counts to the host by this function, which need not wait for the device.

        Nothing may be read of the table until the copies have arrived.
        """
        self._memory = {device: copy(tensor) for device, tensor in self._memory.items()}

    @cached_property
    def moments(self) -> StatTable:
        """The moments of all sites, as a table of kind ``"activation"`` on the CPU."""
        rows = []
        for site, (n_units, dead) in enumerate(zip(self.units, self.dead_units, strict=True)):
            parts = self._host.parts(site)
            row = torch.from_numpy(parts[0].copy())
            if len(parts) > 1:
                row = _fallback.merge_totals(torch.from_numpy(parts))
            row[_fallback.ROWS] = int(n_units)
            row[_fallback.DEAD_ROWS] = int(dead)
            rows.append(row)
        empty = torch.from_numpy(np.zeros((0, 12)))
        totals = _fallback.merge_totals(torch.stack(rows) if rows else empty)
        return StatTable(self.names, torch.stack([*rows, totals]), kind="activation")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each site."""
        return self._layout.kinds

    @property
    def units(self) -> NDArray[np.int64]:
        """Units of each site, shape (sites,)."""
        return self._layout.units

    @cached_property
    def dead_units(self) -> NDArray[np.int64]:
        """Units of each site that no sample has activated, shape (sites,)."""
        host = self._host
        dead = host.by_site(host.counts[0] == 0)
        dead[host.numel == 0] = 0  # nothing was counted
        return dead

    @cached_property
    def saturated_fractions(self) -> Floats:
        """`ActivationStats.saturated_fraction` of each site, shape (sites,)."""
        low, high = self._host.by_site(self._host.counts[1:])
        by_position = self._layout.by_position
        of = np.where(by_position, self._positions, self._host.numel)
        seen = np.where(by_position, high, low + high)
        fractions: Floats = np.divide(seen, of, out=np.full(len(of), np.nan), where=of > 0)
        return fractions

    @cached_property
    def _host(self) -> _Host:
        """What was counted, on the host, the parts of each site added."""
        layout = self._layout
        parts = [np.zeros(0, np.int64), *(t.cpu().numpy() for t in self._memory.values())]
        memory = np.concatenate(parts)
        rows = memory[layout.rows].view(np.float64)
        is_count = np.ones(len(memory), bool)
        is_count[layout.rows] = False
        n_counts = 3 * layout.starts[-1]
        summed = np.bincount(layout.targets, memory[is_count], n_counts)  # exact below 2^53
        return _Host(
            summed.astype(np.int64).reshape(3, -1),
            layout.starts,
            rows,
            layout.site_of_part,
            np.bincount(layout.site_of_part, rows[:, _fallback.NUMEL], len(layout.sites)).astype(
                float
            ),
        )

    def __len__(self) -> int:
        return len(self._layout.sites)

    def __contains__(self, name: object) -> bool:
        return name in self._layout.index

    def __iter__(self) -> Iterator[ActivationStats]:
        return (ActivationStats(self, place) for place in range(len(self)))

    def __getitem__(self, key: str | int) -> ActivationStats:
        if isinstance(key, str):
            if key not in self._layout.index:
                raise layer_not_found(key, self.names)
            return ActivationStats(self, self._layout.index[key])
        try:
            place = operator.index(key)
        except TypeError:
            raise ArgumentTypeError(
                f"a row is looked up by name or index, got {type(key).__name__}; "
                'use table["name"] or table[0].'
            ) from None
        if not -len(self) <= place < len(self):
            raise LayerNotFoundError(
                f"index must be within the table's {len(self)} rows, got {place}"
            )
        return ActivationStats(self, place % len(self))

    def _repr_html_(self) -> str:
        return html_table(_HEADER, map(_cells, self), f"over {self._steps} sampled steps")

    def __str__(self) -> str:
        lines = [_HEADER, *(_cells(row) for row in self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines
        ]
        return "\n".join([text[0], "-" * len(text[0]), *text[1:]])

    def __repr__(self) -> str:
        return f"ActivationTable({len(self)} sites over {self._steps} sampled steps)"


class ActivationStats:
    """What was counted of one activation, or of one site over a window. Made by `activation_stats`.

    Numbers are read from the device where they are first looked at. NaN is in no count; where
    ``moments.nans`` is not 0, ``dead_units`` is therefore an upper bound.
    """

    def __init__(self, table: ActivationTable, place: int) -> None:
        self._table = table
        self._place = place

    @property
    def _entry(self) -> Measured:
        return self._table._layout.sites[self._place]

    @property
    def _counts(self) -> NDArray[np.int64]:
        host = self._table._host
        return host.counts[:, host.starts[self._place] : host.starts[self._place + 1]]

    @property
    def _numel(self) -> int:
        return int(self._table._host.numel[self._place])

    # ---- what it is: nothing here waits for the device ----

    @property
    def name(self) -> str:
        """Name of the site; that of the kind where it came from `activation_stats`."""
        return self._entry.name

    @property
    def kind(self) -> str:
        """Kind of the activation, a row of the table in docs/activations.md."""
        return self._entry.kind.name

    @property
    def weight(self) -> str | None:
        """Name of the weight whose rows are the units, where the monitor has seen it used."""
        return self._entry.weight

    @property
    def units(self) -> int:
        """Channels or features: the length of ``unit_dim``."""
        return self._entry.units

    # ---- counts: the first of these waits for the device ----

    @property
    def samples(self) -> int:
        """Elements of each unit."""
        return int(self.moments.numel) // max(self.units, 1)

    @property
    def active_counts(self) -> NDArray[np.int64]:
        """Active elements of each unit, shape (units,)."""
        counts: NDArray[np.int64] = self._counts[0]
        return counts

    @property
    def low_counts(self) -> NDArray[np.int64]:
        """Elements of each unit that are saturated low, shape (units,)."""
        counts: NDArray[np.int64] = self._counts[1]
        return counts

    @property
    def high_counts(self) -> NDArray[np.int64]:
        """Elements of each unit that are saturated high, shape (units,)."""
        counts: NDArray[np.int64] = self._counts[2]
        return counts

    @property
    def dead_units(self) -> int:
        """Units that no sample has activated: dead if this covers what the network is given."""
        return int(self._table.dead_units[self._place])

    @property
    def dead_fraction(self) -> float:
        """Share of units that are dead; NaN where there is none."""
        return self.moments.dead_row_fraction

    @property
    def stuck_units(self) -> int:
        """Units that were saturated, low or high, in every sample."""
        stuck = self.low_counts + self.high_counts >= self.samples
        return int(stuck.sum()) if self.samples else 0

    @property
    def saturated_low(self) -> int:
        """Elements that are saturated low."""
        return int(self.low_counts.sum())

    @property
    def saturated_high(self) -> int:
        """Elements that are saturated high."""
        return int(self.high_counts.sum())

    @property
    def saturated_fraction(self) -> float:
        """Share of elements that are saturated; of softmax, share of positions. NaN if empty."""
        return float(self._table.saturated_fractions[self._place])

    @property
    def low_fraction(self) -> float:
        """Share of elements that are saturated low; NaN where there is none."""
        return self.saturated_low / self._numel if self._numel else float("nan")

    @property
    def high_fraction(self) -> float:
        """Share of elements that are saturated high; of softmax, share of positions."""
        by_position = self._entry.kind.by_position
        of = self._table._positions[self._place] if by_position else self._numel
        return self.saturated_high / of if of else float("nan")

    @property
    def zero_fraction(self) -> float:
        """Share of elements that are exactly zero; NaN where there is none."""
        return self.moments.zero_fraction

    @property
    def moments(self) -> StatRow:
        """The columns of docs/statistics.md; its rows are the units, its dead rows the dead."""
        return self._table.moments[self._place]

    def to_dict(self) -> dict[str, Any]:
        """Return name, kind, counts and fractions in plain Python values."""
        keys = (
            "name", "kind", "weight", "units", "samples", "dead_units", "stuck_units",
            "saturated_low", "saturated_high", "saturated_fraction", "zero_fraction",
        )  # fmt: skip
        return {key: getattr(self, key) for key in keys}

    def __repr__(self) -> str:
        if "_host" not in vars(self._table) and any(
            device.type != "cpu" for device in self._table._memory
        ):
            return f"ActivationStats({self.name!r}, {self.units} units, not read yet)"
        return (
            f"ActivationStats({self.name!r}, {self.dead_units} of {self.units} units dead, "
            f"{self.saturated_fraction:.1%} saturated, {self.zero_fraction:.1%} zero)"
        )


def _cells(row: ActivationStats) -> tuple[str, ...]:
    numel = max(row.moments.numel, 1)
    return (
        printable(row.name),
        str(row.units),
        str(row.dead_units),
        f"{row.saturated_low / numel:.1%}",
        f"{row.saturated_high / numel:.1%}",
        f"{row.zero_fraction:.1%}",
        f"{row.moments.mean:.2e}",
        f"{row.moments.std:.2e}",
    )
