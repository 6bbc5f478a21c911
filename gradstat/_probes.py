"""What diagnosis looks at: a bounded number of steps, spread over the whole run.

On a probed step the gradients' table is kept, with one of the weights and of their change.
The first steps are all probed, then one in `FIRST_STRIDE`. Whenever `CAPACITY` probes are there,
every second one is dropped and the stride doubles: a run of any length has between half the
capacity and the capacity, and what probing costs a step falls as the run goes on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradstat import _kernels
from gradstat._optimizer_kind import as_number
from gradstat.errors import GradstatError

FIRST_STEPS = 4
FIRST_STRIDE = 8
CAPACITY = 40

MANY_ROWS = 64

SLICE_ELEMENTS = 65536
"""Of a larger parameter only the first so many elements are followed from before a step to after
it: a probe holds no copy of a large model."""


_logger = logging.getLogger("gradstat")


@dataclass
class Probe:
    """What was measured in one step."""

    step: int
    """Number of the step, the run's first being 1."""

    lrs: tuple[float | Tensor, ...]
    """Learning rate of each group of the optimizer."""

    slices: Tensor | None = None
    """Table of those slices of the gradients, (n + 1, 12), in the unit they came in; None where no
    parameter is large."""

    gradients: Tensor | None = None
    """Table of the whole gradients, (n + 1, 12), in true units; None: there were none."""

    changes: Tensor | None = None
    """Table of the parameters before the step, of large ones of their slices, and then of their
    change in it: (2 n + 1, 12). None while the step is under way."""


class Probes:
    """The probes of a run, and which step is the next; no gradient may be recorded meanwhile."""

    def __init__(self) -> None:
        self.kept: list[Probe] = []
        """Oldest first; the newest may be under way."""

        self.names: Sequence[str] = ()
        self._stride = FIRST_STRIDE
        self.under_way: Probe | None = None
        """That of the step under way, if it is probed."""

        self._before: _kernels.Copies | None = None
        self._has_large = False
        self.failure = ""
        """Why nothing is probed any more, where that is so."""

    def stop(self, why: str) -> None:
        """Probe no step from now on, and forget those that were."""
        self.failure = why
        self.under_way = None
        self.kept.clear()

    def is_due(self, step: int) -> bool:
        """Whether the step of this number is probed."""
        if self.failure:
            return False
        return step <= FIRST_STEPS or step % self._stride == 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"under_way": None, "_before": None}  # a copy is for reading

    def forget_after(self, step: int) -> None:
        """Drop the probes of later steps: the run goes back there."""
        self.kept = [probe for probe in self.kept if probe.step <= step]

    def begin(
        self,
        step: int,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        groups: list[dict[str, Any]],
    ) -> None:
        """Start to probe a step, before it can have changed the parameters.

        Probes of other parameters, from before a change of the optimizer's groups, are dropped.
        """
        if names is not self.names and tuple(names) != tuple(self.names):
            self.kept.clear()
        self.names = names
        if not parameters:
            return
        lrs = tuple([_frozen(group.get("lr", math.nan)) for group in groups])
        self._has_large = any(map(_is_large, parameters))
        try:
            self._before = _kernels.Copies(self._slices(parameters))
        except (GradstatError, RuntimeError) as error:  # NotImplementedError is one
            self._give_up(error)
        else:
            self.under_way = Probe(step, lrs)

    def put_gradients(self, table: Tensor, parameters: Sequence[Tensor]) -> None:
        """Keep the table of this step's gradients, if the step is probed."""
        probe = self.under_way
        if probe is None:
            return
        probe.gradients = _by_column(table)
        if self._has_large:
            gradients = [parameter.grad for parameter in parameters]
            probe.slices = _table([None if g is None else _slice(g) for g in gradients])

    def finish(self, parameters: Sequence[Tensor]) -> None:
        """Measure what the step did to the parameters, and keep the probe."""
        probe, self.under_way = self.under_way, None
        before, self._before = self._before, None
        if probe is None or before is None:
            return
        try:
            probe.changes = before.changes(self._slices(parameters))
        except (GradstatError, RuntimeError) as error:
            self._give_up(error)
        if probe.changes is None:
            return
        self.kept.append(probe)
        if len(self.kept) >= CAPACITY:
            self._stride *= 2
            self.kept = [p for p in self.kept if self.is_due(p.step)]

    def _slices(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        return [_slice(parameter) for parameter in parameters] if self._has_large else parameters

    def _give_up(self, error: Exception) -> None:
        """Probe no more where parameters cannot be measured: a step must not fail for it."""
        self.stop(str(error).split("\n", maxsplit=1)[0])
        _logger.warning("gradstat probes no step of this run any more: %s", self.failure)


def _is_large(tensor: Tensor) -> bool:
    return tensor.numel() > SLICE_ELEMENTS and tensor.layout is torch.strided


def _slice(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten()[:SLICE_ELEMENTS] if _is_large(tensor) else tensor


def _frozen(lr: Any) -> float | Tensor:
    if isinstance(lr, Tensor):
        return as_number(lr) if lr.device.type == "cpu" else lr.detach().clone()
    return as_number(lr)


def _table(tensors: Sequence[Tensor | None]) -> Tensor:
    return _by_column(_kernels.moments(_kernels.gather(tensors))[0])


def _by_column(table: Tensor) -> Tensor:
    """Return a copy, of many rows one whose columns lie together: diagnosis goes by columns."""
    if len(table) < MANY_ROWS:
        return table.clone()
    return table.T.clone(memory_format=torch.contiguous_format).T
