"""`lr_range_test`: the loss while the learning rate rises from far too low to far too high."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from gradstat._trial import (
    LossFn,
    Program,
    Step,
    fresh,
    inner_model,
    kept_randomness,
    private,
    whole_number,
)
from gradstat.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    import_optional,
)
from gradstat.wrapper import GradStatOptimizer

STOP = 4.0
"""Times the lowest smoothed loss at which the test stops, as in fast.ai's ``lr_find``."""

SMOOTHED = 5
"""Losses that are averaged: the place's own and two on each side, so that nothing is shifted."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LrRangeResult:
    """The loss at each learning rate, and what follows from it.

    Of an optimizer with several groups the rates are those of the group with the highest; the
    others keep their ratios to it.
    """

    lrs: Floats
    """Learning rates, rising geometrically: (n,)."""

    losses: Floats
    """Loss at each, before the step: (n,). The last may be NaN or Inf."""

    smoothed: Floats
    """Losses averaged over five: (n,); without the values that are not finite."""

    suggestion: float | None
    """Rate of the steepest descent, by the logarithm of the rate. None where the loss does not fall
    by more than it varies from batch to batch."""

    largest: float | None
    """Largest rate that works: where the smoothed loss is lowest. It rises beyond."""

    def plot(self, ax: Any = None) -> Any:
        """Draw losses over rates, the suggestion marked; return matplotlib's axes.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        if ax is None:
            pyplot = import_optional(
                "matplotlib.pyplot", purpose="LrRangeResult.plot()", install="matplotlib"
            )
            ax = pyplot.subplots()[1]
        ax.plot(self.lrs, self.losses, alpha=0.3, label="loss")
        ax.plot(self.lrs, self.smoothed, label="smoothed")
        for name, lr in (("suggestion", self.suggestion), ("largest", self.largest)):
            if lr is not None:
                ax.axvline(
                    lr, linestyle="--" if name == "largest" else "-", label=f"{name} {lr:.2g}"
                )
        ax.set(xscale="log", xlabel="learning rate", ylabel="loss")
        ax.legend()
        return ax

    def __str__(self) -> str:
        tried = f"{len(self.lrs)} rates from {self.lrs[0]:.3g} to {self.lrs[-1]:.3g}"
        if self.suggestion is None or self.largest is None:
            return f"lr_range_test: no rate lowers the loss clearly ({tried})"
        return (
            f"lr_range_test: try lr={self.suggestion:.2g}; the largest that works is "
            f"{self.largest:.2g} ({tried})"
        )


def lr_range_test(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn | None = None,
    loader: Iterable[Any] | None = None,
    *,
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = 100,
    step: Step | None = None,
    scaler: Any = None,
) -> LrRangeResult:
    """Return the loss while the learning rate rises, and the rates that it speaks for.

    Trains a copy of the model with a copy of the optimizer: model, optimizer (attached to gradstat
    or not, with its history), ``scaler`` and the random number generators are left as they are,
    also after an exception. Policies that clip, and hooks on the step, are not part of the copy. A
    scheduler does not matter. Stops at a loss that is not finite, or is 4 times the lowest.

    Synchronises with a CUDA device once a step. Takes the memory of another model and optimizer.

    Args:
        model: The model; best before training, or where training is to go on. A copy of one in
            evaluation mode is set to training mode.
        optimizer: Its optimizer, whose rates do not matter, but for their ratios.
        loss_fn: ``loss_fn(outputs, targets)``; see `check`.
        loader: Gives the batches, ``(inputs, targets)`` for ``loss_fn``; gone through again where
            it is short. An iterator is used up as far as it is needed.
        start: First learning rate.
        end: Last learning rate.
        steps: Rates to try.
        step: In place of ``loss_fn``, a function of ``(model, batch)`` that returns the loss. A
            forward pass with autocast goes here.
        scaler: A `torch.amp.GradScaler`, of which a copy is used.

    Raises:
        ArgumentTypeError: An argument has the wrong type, or cannot be copied.
        ArgumentValueError: An argument has a value that does not fit.

    Example:
        >>> found = gradstat.lr_range_test(model, optimizer, loss_fn, loader)
        >>> print(found)
        >>> found.plot()

    Reference:
        Smith 2015, 1506.01186, section 3.3; fast.ai's ``lr_find`` for range, steps and stop.
    """
    program = Program(loss_fn, step)
    whole_number("steps", steps, 10)
    own = inner_model(model)
    _check_arguments(optimizer, loader, start, end)
    assert loader is not None
    if isinstance(optimizer, GradStatOptimizer):
        optimizer = optimizer.inner
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(map(id, own.parameters())):
        raise ArgumentValueError(
            f"optimizer must hold parameters of model, got a {type(optimizer).__name__} with none; "
            "make it after the model is final: torch.optim.AdamW(model.parameters())"
        )
    losses: list[float] = []
    samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    inner_sampler = getattr(samplers[1], "sampler", None)
    with kept_randomness(loader, *samplers, inner_sampler), torch.enable_grad():
        program, trained, rising, scaler = private(program, own, optimizer, scaler)
        if not trained.training:
            trained.train()
        ratios = _ratios(rising)
        lrs = np.geomspace(start, end, steps)
        for lr, batch in zip(lrs, _endless(loader), strict=False):
            _set_lr(rising, [lr * ratio for ratio in ratios])
            rising.zero_grad()
            loss = program(trained, fresh(batch, trained)).loss
            losses.append(loss.item())
            if not math.isfinite(losses[-1]) or _has_burst(losses):
                break
            (loss if scaler is None else scaler.scale(loss)).backward()
            if scaler is None:
                rising.step()
            else:
                scaler.step(rising)
                scaler.update()
    if not losses:
        raise ArgumentValueError(
            "loader must give batches, got none; check the size of the data set"
        )
    return _result(lrs[: len(losses)], np.array(losses))


def _check_arguments(optimizer: Any, loader: Any, start: float, end: float) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ArgumentTypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; pass for "
            "example torch.optim.AdamW(model.parameters())"
        )
    if not isinstance(loader, Iterable) or isinstance(loader, Tensor):
        raise ArgumentTypeError(
            f"loader must give batches, got {type(loader).__name__}; pass a DataLoader, or a list "
            "of (inputs, targets)"
        )
    for name, value in (("start", start), ("end", end)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ArgumentTypeError(
                f"{name} must be a number, got {type(value).__name__}; leave it out for the "
                "usual one"
            )
    if not 0 < start < end < math.inf:
        raise ArgumentValueError(
            f"start must be positive and less than end, got start={start} and end={end}; use for "
            "example start=1e-7 and end=10"
        )


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        is_empty = True
        for batch in loader:
            is_empty = False
            yield batch
        if is_empty:
            return


def _ratios(optimizer: Optimizer) -> list[float]:
    """Return each group's rate over the highest; where there is a schedule, what it began with."""
    lrs = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    highest = max(lrs)
    return [lr / highest if highest > 0 else 1.0 for lr in lrs]


def _set_lr(optimizer: Optimizer, lrs: list[float]) -> None:
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def _has_burst(losses: list[float]) -> bool:
    """Whether the mean of the last losses is far above the lowest such mean."""
    if len(losses) < SMOOTHED:
        return False
    means = np.convolve(losses, np.full(SMOOTHED, 1 / SMOOTHED), "valid")
    lowest = float(means.min())
    return bool(means[-1] - lowest > (STOP - 1) * abs(lowest))


def _result(lrs: Floats, losses: Floats) -> LrRangeResult:
    finite = np.isfinite(losses)
    weights = np.convolve(finite, np.ones(SMOOTHED), "same")
    sums = np.convolve(np.where(finite, losses, 0.0), np.ones(SMOOTHED), "same")
    with np.errstate(invalid="ignore", divide="ignore"):
        smoothed: Floats = sums / weights
    suggestion = largest = None
    n = int(finite.sum())
    if n >= 2 * SMOOTHED:
        known = smoothed[:n]
        place = int(known.argmin())
        # At the lowest rates nothing is learnt: what differs there is the batches.
        noise = float(np.abs(np.diff(losses[: max(4, n // 4)])).mean())
        if place > 1 and float(known[:SMOOTHED].mean() - known[place]) > 2 * noise / SMOOTHED**0.5:
            slopes = np.gradient(known[: place + 1], np.log(lrs[: place + 1]))
            suggestion = float(lrs[int(slopes.argmin())])
            largest = float(lrs[place])
    return LrRangeResult(lrs, losses, smoothed, suggestion, largest)
