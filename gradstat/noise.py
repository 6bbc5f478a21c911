"""The gradient noise scale: how many rows a batch needs for its gradient to be more than noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gradstat._trial import (
    LossFn,
    Program,
    Step,
    fresh,
    inner_model,
    kept_randomness,
    private,
    rows_of,
    whole_number,
)
from gradstat.diagnosis.finding import Finding
from gradstat.diagnosis.noise import BatchSize
from gradstat.errors import ArgumentValueError


@dataclass(frozen=True)
class NoiseScale:
    """An estimate of the true gradient's size and of the noise around it.

    A single one is noisy. Average ``signal`` and ``noise`` of several apart, and divide then; a
    monitor does so::

        estimate = gradstat.noise_scale(model, loss_fn, batch)
        monitor.observe(**estimate.observed)
    """

    signal: float
    """Estimate of the squared norm of the true gradient. May be negative where noise prevails."""

    noise: float
    """Estimate of the trace of the covariance of single rows' gradients."""

    batch_size: int
    """Rows of the large batch."""

    @classmethod
    def from_norms(
        cls, small_norm: float, big_norm: float, small_size: int, big_size: int
    ) -> NoiseScale:
        """Return the estimate from gradient norms at two batch sizes, as training gives them.

        With data parallelism they are a rank's norm before and after the gradients are averaged;
        with accumulation that of a micro-batch and that of the step. Of several small batches take
        the root of the mean square of their norms. Does not synchronise.

        Args:
            small_norm: Norm of the mean gradient over ``small_size`` rows.
            big_norm: Norm of the mean gradient over ``big_size`` rows.
            small_size: Rows.
            big_size: Rows, more than ``small_size``.

        Raises:
            ArgumentValueError: The sizes are no two different ones.

        Reference:
            McCandlish et al. 2018, 1812.06162, appendix A.1.
        """
        if not 0 < small_size < big_size:
            raise ArgumentValueError(
                "small_size must be positive and less than big_size, got "
                f"{small_size} and {big_size}; use for example 32 and 256"
            )
        small, big = small_norm**2, big_norm**2
        return cls(
            signal=(big_size * big - small_size * small) / (big_size - small_size),
            noise=(small - big) / (1 / small_size - 1 / big_size),
            batch_size=big_size,
        )

    @property
    def scale(self) -> float:
        """Noise over signal, in rows; Inf where the signal is lost in the noise."""
        return self.noise / self.signal if self.signal > 0 else math.inf

    @property
    def observed(self) -> dict[str, float]:
        """What `Monitor.observe` is to be told, for advice by `Monitor.diagnose`."""
        return {
            "gradient_signal": self.signal,
            "gradient_noise": self.noise,
            "batch_size": float(self.batch_size),
        }

    @property
    def finding(self) -> Finding | None:
        """Advice on the batch size; `None` where it is within a factor of 4 of the scale."""
        return next(BatchSize().advise(self.signal, self.noise, self.batch_size), None)


def noise_scale(
    model: nn.Module,
    loss_fn: LossFn | None = None,
    batch: Any = None,
    *,
    splits: int = 8,
    step: Step | None = None,
) -> NoiseScale:
    """Return the gradient noise scale, estimated from one batch and its parts.

    With the mean squared norm s of the gradients of parts of b rows and the squared norm S of the
    gradient of all B rows, signal is (B S - b s) / (B - b) and noise is (s - S) / (1/b - 1/B).

    The loss has to be a mean over rows. A copy of the model is used: weights, gradients, buffers
    and random numbers stay as they are. Synchronises with a CUDA device.

    Args:
        model: The model.
        loss_fn: ``loss_fn(outputs, targets)``; see `check`.
        batch: As large a batch as there is room for. Its tensors share their first dimension; rows
            beyond a multiple of ``splits`` are left out.
        splits: Parts.
        step: In place of ``loss_fn``; see `check`.

    Raises:
        ArgumentTypeError: An argument has the wrong type.
        ArgumentValueError: An argument has a value that does not fit.

    Example:
        >>> gradstat.noise_scale(model, loss_fn, next(iter(loader))).scale

    Reference:
        McCandlish et al. 2018, 1812.06162, appendix A.1.
    """
    program, model = private(Program(loss_fn, step), inner_model(model))
    splits = whole_number("splits", splits, 2)
    rows = rows_of(batch)
    size = rows // splits
    if size == 0:
        raise ArgumentValueError(
            f"batch must hold tensors with at least splits={splits} rows each, as many in all, got "
            f"{rows or 'different numbers of'} rows; pass a larger batch or fewer splits"
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ArgumentValueError(
            "model must have parameters that require a gradient, got none; set "
            "requires_grad=True on what is trained"
        )
    mean: list[Tensor] = [torch.zeros_like(parameter) for parameter in parameters]
    squares = []
    with kept_randomness(), torch.enable_grad():
        for part in range(splits):
            own = fresh(_part(batch, slice(part * size, (part + 1) * size)), model)
            loss = program(model, own).loss
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients = [
                torch.zeros_like(p) if g is None else g.to_dense()
                for p, g in zip(parameters, found, strict=True)
            ]
            squares.append(_square(gradients))
            torch._foreach_add_(mean, gradients, alpha=1 / splits)
    small = math.sqrt(sum(squares) / splits)
    return NoiseScale.from_norms(small, math.sqrt(_square(mean)), size, size * splits)


def _part(batch: Any, rows: slice) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor[rows], batch)


def _square(gradients: list[Tensor]) -> float:
    return sum(float(gradient.double().square().sum()) for gradient in gradients)
