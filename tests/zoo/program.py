"""What a program of the zoo is, how it is registered and run, and the loop most of them share."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from zoo.data import Split

CODES = frozenset(
    {
        "bad-initialization",
        "bad-inputs",
        "bad-targets",
        "class-imbalance",
        "constant-predictions",
        "dead-units",
        "diverging-loss",
        "exploding-gradient",
        "flat-loss",
        "gradient-accumulation",
        "loss-output-mismatch",
        "lr-too-high",
        "lr-too-low",
        "nonfinite-gradient",
        "nonfinite-loss",
        "oscillating-loss",
        "overfitting",
        "parameters-not-updating",
        "plateau",
        "saturated-activation",
        "sparse-gradients",
        "underfitting",
        "vanishing-gradient",
        "zero-loss",
    }
)
ARCHITECTURES = ("autoencoder", "cnn", "mlp", "rnn", "transformer")

Half = Literal["tuning", "held-out"]
LossFunction = Callable[[Tensor, Tensor], Tensor]


class Watch(Protocol):
    """What a program tells whoever watches it train."""

    def attach(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Called once, right after the optimizer is made and before any scheduler is."""

    def observe(self, **values: Any) -> None:
        """Called with ``inputs, outputs, targets, loss`` before each backward pass, and with
        ``val_loss`` after each validation pass."""


class NoWatch:
    """Sees nothing."""

    def attach(self, optimizer: Optimizer, model: nn.Module) -> None:
        pass

    def observe(self, **values: Any) -> None:
        pass


@dataclass(frozen=True)
class Program:
    """One training program.

    Attributes:
        name: Architecture, data set and what is particular, as ``mlp/digits/sgd-lr-x1000``.
        causes: The codes that are right as the first cause, best first; none if it is healthy.
        operator: The mutation operator that made the fault, or the healthy trap.
        half: Whether rules may be developed on it, or it is kept for the final count.
        train: Trains under a watch and returns the model; `run` seeds it.
    """

    name: str
    causes: tuple[str, ...]
    operator: str
    half: Half
    train: Callable[[Watch], nn.Module]

    @property
    def architecture(self) -> str:
        return self.name.split("/", maxsplit=1)[0]

    @property
    def healthy(self) -> bool:
        return not self.causes


_registered: dict[str, Program] = {}


def program(
    name: str, *, causes: tuple[str, ...] = (), operator: str, half: Half
) -> Callable[[Callable[[Watch], nn.Module]], Callable[[Watch], nn.Module]]:
    """Register the decorated training function as a program; see `Program` for the arguments."""

    def register(train: Callable[[Watch], nn.Module]) -> Callable[[Watch], nn.Module]:
        if name in _registered:
            raise ValueError(f"a program's name must be unique, but {name!r} was given twice")
        _registered[name] = Program(name, causes, operator, half, train)
        return train

    return register


def registered() -> list[Program]:
    """Return the programs whose modules have been imported, sorted by name."""
    return [_registered[name] for name in sorted(_registered)]


def run(program: Program, seed: int, watch: Watch | None = None) -> nn.Module:
    """Train a program from a seed, under a watch if one is given, and return its model."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what a user's script would draw from
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch itself warns of some of the faults
        return program.train(NoWatch() if watch is None else watch)


def fit(
    watch: Watch,
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFunction,
    data: Split,
    *,
    epochs: int,
    batch_size: int = 32,
    shuffle: bool = True,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    max_norm: float | None = None,
) -> nn.Module:
    """Train as most scripts do, with a validation pass after each epoch, and return the model.

    Args:
        watch: Told of the optimizer, of every batch and of every validation loss.
        model: Maps a batch of inputs to what ``loss_fn`` takes.
        optimizer: Steps once per batch.
        loss_fn: Takes outputs and targets, returns a scalar.
        data: What to train and validate on; without validation rows, no validation is run.
        epochs: Passes over the training rows.
        batch_size: Rows in a batch; the last batch of an epoch may have fewer.
        shuffle: Whether each epoch draws a new order.
        schedule: Makes a learning rate scheduler, which steps once per batch.
        max_norm: Clips the gradient's total norm.
    """
    watch.attach(optimizer, model)
    scheduler = schedule(optimizer) if schedule is not None else None
    for _ in range(epochs):
        for inputs, targets in batches(data, batch_size, shuffle=shuffle):
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            optimizer.zero_grad()
            loss.backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        validate(watch, model, loss_fn, data)
    return model


def batches(data: Split, batch_size: int, *, shuffle: bool = True) -> list[tuple[Tensor, Tensor]]:
    """Return one epoch of batches of training inputs and targets."""
    rows = torch.randperm(len(data.x)) if shuffle else torch.arange(len(data.x))
    return [(data.x[some], data.y[some]) for some in rows.split(batch_size)]


def validate(watch: Watch, model: nn.Module, loss_fn: LossFunction, data: Split) -> None:
    """Tell the watch the loss over the validation rows, where there are any."""
    if len(data.val_x) == 0:
        return
    model.eval()
    with torch.no_grad():
        watch.observe(val_loss=loss_fn(model(data.val_x), data.val_y))
    model.train()
