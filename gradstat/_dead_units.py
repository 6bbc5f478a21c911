"""Dead units, by two witnesses: the activations, and the gradients of the rows that make them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from gradstat.activations import ActivationTable


class DeadUnits(NamedTuple):
    """Units of one layer that are dead, by two witnesses that know nothing of each other."""

    site: str
    """Where the activation was seen."""

    units: int
    dead_units: int
    """Units that no sample of the activations' window has activated."""

    weight: str | None
    """The weight whose rows make these units, where it is known."""

    dead_rows: int | None
    """Upper bound on its rows whose gradient was zero throughout the gradients' window."""


def dead_units_of(sites: ActivationTable, dead_rows: Mapping[str, float]) -> list[DeadUnits]:
    """Return the dead units of each activation. Synchronises.

    Args:
        sites: Table of the activations.
        dead_rows: Dead rows of each parameter's gradients, NaN where unknown.
    """
    found = []
    for site in sites:
        rows = dead_rows.get(site.weight or "", math.nan)
        found.append(
            DeadUnits(
                site.name,
                site.units,
                site.dead_units,
                site.weight,
                None if math.isnan(rows) else int(rows),
            )
        )
    return found
