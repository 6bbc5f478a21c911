"""The run log on a CUDA device: nothing waits for it on the step path, and values are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import monitor_of, same_bits, weights
from test_cuda_streams import no_synchronisation
from torch import nn

import gradstat

pytestmark = pytest.mark.needs_cuda


def trained(log: Path | None, steps: int = 120, **options: Any) -> tuple[nn.Module, Any]:
    """Train on a side stream, with the loss told to the monitor from the device."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3)).cuda()
    inputs, targets = torch.randn(64, 6).cuda(), torch.randint(0, 3, (64,)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    gradstat.attach(optimizer, model, clip=gradstat.GlobalNorm(0.1), log=log, **options)
    losses = []
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        for step in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            losses.append(loss.detach())
            monitor_of(optimizer).observe(loss=loss)
            if step < 2:
                optimizer.step()
                continue
            with no_synchronisation():
                optimizer.step()
        torch.cuda.synchronize()
    return model, (optimizer, torch.stack(losses).tolist())


def test_no_step_waits_and_values_are_right(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    _, (optimizer, losses) = trained(path, log_every=2)
    monitor = monitor_of(optimizer)
    window, decisions = monitor.window, monitor.decisions
    gradstat.detach(optimizer)
    with gradstat.open_run(path) as run:
        np.testing.assert_array_equal(run.steps["loss"], losses)
        np.testing.assert_array_equal(run.steps["total_norm"][20:], decisions[:, 0])
        steps, norms = run.table("l2")
        np.testing.assert_array_equal(norms[steps > 20], window[::2, :, -1])
        assert run.histograms("0.weight")[1].sum(1).max() <= 32 * 6
        assert run.activations["1/relu#0"]["units"].tolist() == [32] * 6


def test_a_log_changes_no_bit_of_the_training(tmp_path: Path) -> None:
    first, _ = trained(None)
    second, (optimizer, _) = trained(tmp_path / "run.db")
    gradstat.detach(optimizer)
    assert same_bits(weights(first), weights(second))
