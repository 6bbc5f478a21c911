"""Activations: one tensor against reading its bytes and against torch's ops, and whole steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bench_step import OPTIMIZERS
from models import MODELS
from pairing import Pair, Side
from torch import Tensor

import gradstat

Compare = Callable[[Pair], None]
Read = Callable[[int], Side]

SHAPES = {"128 x 64 x 56 x 56": (128, 64, 56, 56), "4096 x 4096": (4096, 4096)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def by_torch(x: Tensor) -> tuple[Tensor, ...]:
    """Return the same numbers as `gradstat.activation_stats` of a ReLU, with torch's operations."""
    others = [dim for dim in range(x.dim()) if dim != 1]
    active = (x > 0).sum(others)
    finite = x.isfinite()
    kept = torch.where(finite, x, 0).float()
    magnitude = kept.abs()
    return (
        active,
        (active == 0).sum(),
        (x == 0).sum(),
        x.isnan().sum(),
        (~finite).sum(),
        kept.sum(),
        magnitude.sum(),
        magnitude.max(),
        torch.where(magnitude > 0, magnitude, torch.inf).min(),
        torch.linalg.vector_norm(kept),
    )


def activation(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).relu_().to(dtype)


@pytest.mark.parametrize("against", ["read", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def bench_activation_stats(
    shape: str, dtype: str, against: str, compare: Compare, read: Read
) -> None:
    x = activation(SHAPES[shape], DTYPES[dtype])
    n_bytes = x.numel() * x.element_size()
    stats, torchs = gradstat.activation_stats(x), by_torch(x)
    assert stats.active_counts.tolist() == torchs[0].tolist()
    assert stats.dead_units == torchs[1]
    assert stats.moments.zeros == torchs[2]
    assert stats.moments.l2 == pytest.approx(x.double().square().sum().sqrt().item(), rel=1e-6)
    ours = Side("activation_stats", lambda: gradstat.activation_stats(x), n_bytes)
    reading = read(n_bytes)
    compare(
        Pair(
            f"activation_stats, {shape} {dtype}",
            ours=ours,
            against=reading
            if against == "read"
            else Side("the same by torch's ops", lambda: by_torch(x), n_bytes),
            read=reading,
            target=1.15 if against == "read" else 0.25,
        )
    )


@pytest.mark.benchmark(max_time=6)
@pytest.mark.parametrize("model", ["CNN, 0.3M", "GPT, 10.8M"])
def bench_step_with_activations(model: str, compare: Compare) -> None:
    """Ten steps, of which one is sampled, against ten that are not watched."""
    torch.manual_seed(0)
    network, loss_of = MODELS[model]()

    def make(activations: bool) -> Callable[[], None]:
        optimizer = OPTIMIZERS["AdamW fused"](network.parameters())
        gradstat.attach(optimizer, network)

        def steps() -> None:
            # Both sides train one model: it is watched while it is our turn.
            monitor = gradstat.ActivationMonitor(network, every=10) if activations else None
            for _ in range(10):
                optimizer.zero_grad()
                loss_of().backward()
                optimizer.step()
            if monitor is not None:
                assert monitor.steps == 10
                monitor.remove()

        return steps

    compare(
        Pair(
            f"10 steps of {model}, AdamW fused, activations at every=10",
            ours=Side("attach and ActivationMonitor", make(True), 0),
            against=Side("attach", make(False), 0),
            target=1.02,
        )
    )
