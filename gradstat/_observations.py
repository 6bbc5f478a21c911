"""What a training script tells the monitor: losses, metrics, and samples of its batches."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import chain, takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradstat._batch_sample import BATCH_NAMES, BatchSample, first_tensor, readable
from gradstat.errors import ArgumentTypeError
from gradstat.stats import tensor_stats
from gradstat.table import StatTable

RECENT = 512
SPREAD = 512
"""Scalars kept of each name: so many of the last, and between half as many and as many spread
evenly over all that came before."""

MAX_SAMPLES = 40
"""Batches of which a sample is kept, spread evenly over the run."""


_NUMBERS = (bool, int, float, np.integer, np.floating, np.bool_)
_KNOWN = (Tensor, *_NUMBERS, type(None))

Scalar = float | Tensor

_logger = logging.getLogger("gradstat")


class Observation(NamedTuple):
    """A value that the training script told the monitor."""

    step: int
    """Finished optimizer steps at that time."""

    value: float | Tensor | StatTable
    """A number, a detached tensor of one element on another device, or a larger tensor's table."""


class Series:
    """The scalars of one name: the last ones, and some of all those before."""

    def __init__(self) -> None:
        self._spread: list[Observation] = []
        self._recent: deque[Observation] = deque()
        self._stride = 1
        self._left = 0

    def __iter__(self) -> Iterator[Observation]:
        return chain(self._spread, self._recent)

    def __len__(self) -> int:
        return len(self._spread) + len(self._recent)

    def add(self, observation: Observation) -> None:
        """Keep a value, for now or for good."""
        self._recent.append(observation)
        if len(self._recent) <= RECENT:
            return
        oldest = self._recent.popleft()
        if self._left % self._stride == 0:
            self._spread.append(oldest)
            if len(self._spread) == SPREAD:
                self._spread = self._spread[::2]
                self._stride *= 2
        self._left += 1

    @property
    def newest(self) -> Observation | None:
        """The last one told."""
        return self._recent[-1] if self._recent else None

    def after(self, known: Observation | None) -> list[Observation]:
        """Return those of the last `RECENT` that came after this one, oldest first."""
        newest_first = takewhile(lambda seen: seen is not known, reversed(self._recent))
        return list(newest_first)[::-1]

    def forget_since(self, step: int) -> None:
        """Drop those told after so many finished steps or more."""
        self._spread = [seen for seen in self._spread if seen.step < step]
        self._recent = deque(seen for seen in self._recent if seen.step < step)


class Observations:
    """The values under each name.

    Args:
        length: Tables kept of each larger tensor.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._series: dict[str, Series] = {}
        self._tables: dict[str, deque[Observation]] = {}
        self._unread: set[str] = set()
        self.samples: list[BatchSample] = []
        """Samples of batches, oldest first."""

    def add(self, step: int, values: Mapping[str, Any], *, is_probed: bool) -> None:
        """Keep these values, or none of them where one has the wrong type.

        What cannot be read, such as a tensor without memory, is passed over and logged once.

        Args:
            step: Finished optimizer steps.
            values: Numbers and tensors by name.
            is_probed: Whether larger tensors are looked at.

        Raises:
            ArgumentTypeError: A value that is not of a batch is neither a number nor a tensor.
        """
        scalars: dict[str, Scalar] = {}
        batch: dict[str, Tensor] = {}
        tables: dict[str, StatTable] = {}
        for name, given in values.items():
            of_batch = name in BATCH_NAMES
            if of_batch and not is_probed and type(given) is Tensor:
                continue
            if not (of_batch or isinstance(given, _KNOWN)):
                raise ArgumentTypeError(
                    f"observe({name}=...) must be a number or a tensor, got "
                    f"{type(given).__name__}; pass for example loss=loss"
                )
            try:
                value = first_tensor(given) if of_batch else given
                if isinstance(value, Tensor) and not of_batch and value.numel() == 1:
                    scalars[name] = _scalar(value)
                elif not isinstance(value, Tensor) and isinstance(value, _NUMBERS):
                    scalars[name] = float(value)
                elif value is None or not is_probed:
                    continue
                elif of_batch:
                    tensor = readable(value)
                    if tensor.numel():
                        batch[name] = tensor
                else:
                    tables[name] = _table(name, value)
            except Exception as error:  # a run that is only watched must go on
                self._pass_over(name, error)
        for name, scalar in scalars.items():
            series = self._series.get(name)
            if series is None:
                self._series[name] = series = Series()
            series.add(Observation(step, scalar))
        for name, table in tables.items():
            kept = self._tables.setdefault(name, deque(maxlen=self._length))
            kept.append(Observation(step, table))
        if batch:
            try:
                self._sample(step, batch, scalars.get("loss"))
            except Exception as error:
                self._pass_over(", ".join(batch), error)

    def _pass_over(self, name: str, error: Exception) -> None:
        """Say once for each name that its values are left out."""
        if name not in self._unread:
            self._unread.add(name)
            _logger.warning("gradstat passes over observe(%s=...): %s", name, error)

    def _sample(self, step: int, batch: dict[str, Tensor], loss: Scalar | None) -> None:
        if self.samples and self.samples[-1].step == step:
            self.samples[-1] = self.samples[-1].extended(batch, loss)
            return
        self.samples.append(BatchSample(step, batch, loss))
        if len(self.samples) >= MAX_SAMPLES:
            self.samples = self.samples[:2] + self.samples[2::2]

    @property
    def scalar_names(self) -> tuple[str, ...]:
        """Names under which numbers were told."""
        return tuple(self._series)

    def scalars(self, name: str) -> Series:
        """Return the numbers of a name, oldest first; nothing under an unknown one."""
        return self._series.get(name, Series())

    def after(self, name: str, known: Observation | None) -> list[Observation]:
        """Return the last numbers of a name, oldest first: those that came after this one."""
        return self.scalars(name).after(known)

    def newest(self, step: int) -> dict[str, Scalar]:
        """Return the newest number of each name that was told after so many finished steps."""
        newest = {name: series.newest for name, series in self._series.items()}
        return {
            name: seen.value
            for name, seen in newest.items()
            if seen is not None and seen.step == step and not isinstance(seen.value, StatTable)
        }

    def forget_since(self, step: int) -> None:
        """Drop what was told after so many finished steps or more: the run goes back there."""
        for series in self._series.values():
            series.forget_since(step)
        for name, tables in self._tables.items():
            kept = (seen for seen in tables if seen.step < step)
            self._tables[name] = deque(kept, maxlen=tables.maxlen)
        self.samples = [sample for sample in self.samples if sample.step < step]

    def under(self, name: str) -> list[Observation]:
        """Return the values of a name, oldest first; of a batch the tables of its samples."""
        sampled = [
            Observation(sample.step, _table(name, sample.tensors[name].rows))
            for sample in self.samples
            if name in sample.tensors
        ]
        return [*self.scalars(name), *self._tables.get(name, ()), *sampled]


def _scalar(value: Tensor) -> Scalar:
    if type(value) is Tensor and value.is_cpu and not value.is_complex():
        return float(value.item())
    return value.detach().clone()


def _table(name: str, given: Tensor) -> StatTable:
    with torch.no_grad():
        is_integer = not (given.is_floating_point() or given.is_complex())
        is_small = is_integer or given.dtype.itemsize == 1
        measured = given.to(torch.float32) if is_small else given
        return tensor_stats([measured], [name], kind="observation")
