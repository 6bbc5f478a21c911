"""Multiplies the learning rates of an optimizer, and those that its schedulers will still set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

IN_GROUPS = ("lr", "initial_lr", "max_lr", "min_lr")
"""What schedulers keep in the groups: ``OneCycleLR`` all of them."""

IN_SCHEDULERS = ("base_lrs", "max_lrs", "min_lrs", "eta_min", "_last_lr", "default_min_lr")
"""What torch's schedulers keep of learning rates; ``min_lrs`` is `ReduceLROnPlateau`'s."""


def scale_rates(optimizer: Optimizer, schedulers: Iterable[Any], factor: float) -> None:
    """Multiply the whole schedule by a factor, from now on. Does not synchronise.

    Schedulers inside of `SequentialLR` and `ChainedScheduler` are reached.
    """
    for group in optimizer.param_groups:
        for name in IN_GROUPS:
            if name in group:
                group[name] = _scaled(group[name], factor, in_place=True)
    for scheduler in _with_inner(schedulers):
        for name in IN_SCHEDULERS:
            values = getattr(scheduler, name, None)
            if isinstance(values, list):
                setattr(scheduler, name, [_scaled(value, factor) for value in values])
            elif values is not None:
                setattr(scheduler, name, _scaled(values, factor))


def rates_of(optimizer: Optimizer) -> list[float]:
    """Return the learning rate of each group. Synchronises where one is a tensor on a device."""
    return [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]


def _scaled(value: Any, factor: float, *, in_place: bool = False) -> Any:
    if in_place and isinstance(value, Tensor):  # a captured or compiled step reads this tensor
        return value.mul_(factor)
    return value * factor


def _with_inner(schedulers: Iterable[Any]) -> Iterable[Any]:
    for scheduler in schedulers:
        yield scheduler
        yield from _with_inner(getattr(scheduler, "_schedulers", ()))
