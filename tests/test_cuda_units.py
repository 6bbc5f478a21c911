"""Counts of units on a real device: against the oracle, without a wait, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from cuda_calls import CUDA
from kernel_calls import DTYPES
from test_kernels_units import RULES, activation, assert_counts

from gradstat._kernels import units
from gradstat._units import UnitCounts

pytestmark = pytest.mark.needs_cuda


def on_host(window: UnitCounts) -> UnitCounts:
    assert window.counts.device.type == window.row.device.type == "cuda"
    return UnitCounts(window.counts.cpu(), window.row.cpu())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(7, 1), (300, 64), (33, 1000), (40, 4099), (9, 64, 17), (20, 3, 511), (70, 2, 513),
     (40, 64, 3136), (2, 3, 70_001), (500, 4096), (0, 3)],
    ids=str,
)  # fmt: skip
def test_windows(dtype, shape):
    tensor = activation(shape, dtype)
    for rule in RULES.values():
        window = units(tensor.to(CUDA), rule, 1)
        units(tensor.to(CUDA), rule, 1, window)
        assert_counts(on_host(window), rule, [tensor, tensor])


def test_channels_last():
    tensor = activation((6, 40, 33, 17), torch.float32).to(memory_format=torch.channels_last)
    window = units(tensor.to(CUDA), RULES["relu6"], 1)
    assert_counts(on_host(window), RULES["relu6"], [tensor])


def test_no_wait_and_replay_in_a_graph():
    rule = RULES["sigmoid"]
    tensor = activation((90, 70), torch.float32)
    on_device = tensor.to(CUDA)
    window = units(on_device, rule, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        units(on_device, rule, 1, window)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        units(on_device, rule, 1, window)
    for _ in range(2):
        graph.replay()
    assert_counts(on_host(window), rule, [tensor] * 4)
