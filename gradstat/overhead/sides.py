"""What is compared: nothing, torch's clipping, and gradstat with ever more of its parts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradstat._trial import kept_randomness
from gradstat.optimizer import attach, detach
from gradstat.overhead.blocks import Side, Work
from gradstat.overhead.kept import Kept

NOTHING = "nothing"
TORCH = "clip_grad_norm_"

NEVER_REACHED = 1e30
"""A limit of the norm. Where a norm stays below it torch multiplies every gradient all the same."""


@dataclass(frozen=True)
class Training:
    """What is measured: a user's step, and what it changes."""

    step_fn: Callable[[], Any]
    optimizer: Optimizer
    model: nn.Module | None
    kept: Kept

    @contextmanager
    def again(self) -> Iterator[None]:
        """Start from where the training stood in the beginning, random numbers included."""
        self.kept.restore()
        with kept_randomness():
            yield


def plain_side(training: Training) -> Side:
    """Return the side without gradstat."""

    @contextmanager
    def installed() -> Iterator[Work]:
        with training.again():
            yield Work(training.step_fn)

    return Side(NOTHING, installed)


def torch_side(training: Training) -> Side:
    """Return the side with `torch.nn.utils.clip_grad_norm_` before each step of the optimizer."""

    def clip(optimizer: Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, NEVER_REACHED)

    @contextmanager
    def installed() -> Iterator[Work]:
        with training.again():
            handle = training.optimizer.register_step_pre_hook(clip)
            try:
                yield Work(training.step_fn)
            finally:
                handle.remove()

    return Side(TORCH, installed)


def our_sides(training: Training, options: Mapping[str, Any], *, log: bool) -> Sequence[Side]:
    """Return the sides with gradstat, named by the part that each adds to the one before.

    Args:
        training: What is measured.
        options: Of `attach`.
        log: Whether a log of the run is part of it.
    """
    lean = {**options, "activations": False}
    found = [
        Side("statistics and clipping", partial(_attached, training, lean, probes=False)),
        Side("probes of the diagnosis", partial(_attached, training, lean)),
    ]
    if training.model is not None and options.get("activations") is not False:
        found.append(Side("activations", partial(_attached, training, options)))
        lean = dict(options)
    if log:
        found.append(Side("logging", partial(_attached, training, lean, log=True)))
    return found


@contextmanager
def _attached(
    training: Training, options: Mapping[str, Any], *, probes: bool = True, log: bool = False
) -> Iterator[Work]:
    optimizer = training.optimizer
    with tempfile.TemporaryDirectory(prefix="gradstat-") as folder, training.again():
        # Looks of the diagnosis come too seldom for a block, and are timed apart.
        asked = {**options, "diagnose": False}
        if log:
            asked["log"] = Path(folder) / "run.db"
        attach(optimizer, training.model, **asked)
        if not probes:
            optimizer._gradstat_seam.stop_probing()  # type: ignore[attr-defined]
        observe = optimizer.gradstat.observe  # type: ignore[attr-defined]

        def step() -> None:
            loss = training.step_fn()
            if isinstance(loss, Tensor | float) and (isinstance(loss, float) or loss.numel() == 1):
                observe(loss=loss)

        written = optimizer.gradstat.log  # type: ignore[attr-defined]
        try:
            yield Work(step) if written is None else Work(step, written.flush)
        finally:
            detach(optimizer)
