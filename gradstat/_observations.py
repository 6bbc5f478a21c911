"""What a training script tells the monitor: losses, outputs, metrics."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradstat.errors import ArgumentTypeError
from gradstat.stats import tensor_stats
from gradstat.table import StatTable


@dataclass(frozen=True)
class Observation:
    """A value that the training script told the monitor."""

    step: int
    """Finished optimizer steps at that time."""

    value: float | Tensor | StatTable
    """A number, a detached tensor of one element on its device, or the table of a larger tensor."""


class Observations:
    """The last values under each name.

    Args:
        length: Values kept of each.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._by_name: dict[str, deque[Observation]] = {}

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Keep these values, or none of them where one is unfit."""
        noted = {n: _noted(n, value) for n, value in values.items() if value is not None}
        for name, value in noted.items():
            known = self._by_name.setdefault(name, deque(maxlen=self._length))
            known.append(Observation(step, value))

    def under(self, name: str) -> list[Observation]:
        """Return the values of a name, oldest first."""
        return list(self._by_name.get(name, ()))


def _noted(name: str, given: object) -> float | Tensor | StatTable:
    if isinstance(given, bool | int | float | np.number | np.bool_):
        return float(given)
    if not isinstance(given, Tensor):
        raise ArgumentTypeError(
            f"observe({name}=...) must be a number or a tensor, got {type(given).__name__}; pass "
            "for example loss=loss"
        )
    with torch.no_grad():
        if given.numel() == 1:
            return given.clone()
        is_real_or_complex = given.is_floating_point() or given.is_complex()
        measured = given if is_real_or_complex else given.to(torch.float32)
        return tensor_stats([measured], [name], kind="observation")
