"""Steps under a real `GradScaler`, for the tests of `attach`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_training import (
    OPTIMIZERS,
    loss_of,
    poison,
)
from torch.amp import GradScaler

SCALE = 1024.0
BOTH = [OPTIMIZERS["adamw-fused"], OPTIMIZERS["adamw-loop"]]
FUSED = [make for name, make in OPTIMIZERS.items() if name.endswith("fused")]
on_both = pytest.mark.parametrize("make", BOTH, ids=["fused", "loop"])
unscale_first = pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale-step"])


def scaler_of(**options: Any) -> GradScaler:
    return GradScaler("cpu", init_scale=SCALE, **options)


def scaled_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler,
    seed: int,
    *,
    unscale: bool,
    bad: float | None = None,
    scale: float = 1.0,
) -> None:
    model.zero_grad()
    scaler.scale(loss_of(model, seed, scale)).backward()
    if bad is not None:
        poison(model, bad)
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
