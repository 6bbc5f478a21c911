"""Counts of units by the CUDA kernel's own source, run on the CPU by `cuda_emulation`."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_emulation.emulator import EmulationError, Emulator, load_emulator, with_specials
from kernel_calls import DTYPES, guarded
from test_kernels_units import RULES, activation, assert_counts
from torch import Tensor

from gradstat import _native
from gradstat._units import ActiveRule, UnitCounts, UnitRule

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
SEEDS = (0, 1, 2)

# Around the vectors, a block's turn of them, the rows of 4096 elements, long runs (512), the warps
# that two runs share, and the chunks (65536).
SHAPES = [
    (7, 1), (9, 2), (5, 3), (300, 64), (33, 1000), (3, 4095), (21, 4096), (18, 4099), (2, 9001),
    (6, 5, 3), (64, 64, 1), (9, 64, 17), (8, 64, 49), (20, 2, 511), (20, 3, 512), (70, 2, 513),
    (4, 7, 3136), (2, 3, 70_001), (1, 1, 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def cuda() -> Emulator:
    return load_emulator()


def counted(cuda: Emulator, tensor: Tensor, rule: UnitRule, *, seed: int = 0) -> UnitCounts:
    """Count in a new window, with dimension 1 as the units."""
    window = UnitCounts(
        torch.zeros(3, tensor.shape[1], dtype=torch.int64),
        torch.zeros(_native.NUM_COLUMNS, dtype=torch.float64),
    )
    cuda.units(tensor.movedim(1, 0), rule, window, seed=seed)
    return window


@DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(cuda, dtype, shape):
    tensor = activation(shape, dtype)
    for seed, rule in enumerate((RULES["relu"], RULES["sigmoid"], RULES["tanh"])):
        assert_counts(counted(cuda, tensor, rule, seed=seed), rule, [tensor])


@DTYPE
@pytest.mark.parametrize("shape", [(33, 70), (18, 4099), (8, 5, 3136), (20, 3, 511)], ids=str)
def test_alignment_changes_no_bit(cuda, dtype, shape):
    values = with_specials(activation(shape, dtype).flatten(), (0, 5, 2047, 2048, 8191))
    windows = []
    for offset in range(16 // dtype.itemsize):
        tensor = guarded(values, offset)[1].view(shape)
        windows.append(counted(cuda, tensor, RULES["sigmoid"], seed=offset % 3))
        assert_counts(windows[-1], RULES["sigmoid"], [tensor])
    assert all(window.row.tolist() == windows[0].row.tolist() for window in windows)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(cuda, memory_format):
    tensor = activation((6, 40, 33, 17), torch.float32).to(memory_format=memory_format)
    for rule in RULES.values():
        assert_counts(counted(cuda, tensor, rule), rule, [tensor])


@DTYPE
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_special_values(cuda, dtype, rule):
    info = torch.finfo(dtype)
    special = torch.tensor(
        [math.nan, math.inf, -math.inf, 0.0, -0.0, info.tiny, -info.tiny, 6.0, 0.99, 0.01, -0.99],
        dtype=torch.float64,
    )
    for shape in ((70, 3), (9, 64, 49), (3, 2, 5000)):
        tensor = activation(shape, dtype)
        count = tensor.view(-1)[::5].numel()
        tensor.view(-1)[::5] = special.repeat(count // len(special) + 1)[:count].to(dtype)
        assert_counts(counted(cuda, tensor, rule), rule, [tensor])


@DTYPE
def test_a_window_of_several_batches_in_any_order_of_threads(cuda, dtype):
    tensor = activation((90, 30, 49), dtype)
    windows = []
    for seed in SEEDS:
        window = counted(cuda, tensor[:40], RULES["relu6"], seed=seed)
        for batch in (tensor[40:40], tensor[40:]):
            cuda.units(batch.movedim(1, 0), RULES["relu6"], window, seed=seed)
        assert_counts(window, RULES["relu6"], [tensor])
        windows.append(window)
    assert all(window.row.tolist() == windows[0].row.tolist() for window in windows)


@DTYPE
def test_bounds_next_to_zero_hold_where_the_host_flushes_to_zero(cuda, dtype):
    tensor = torch.tensor([[0.0, -0.0, 1.0, -1.0]], dtype=dtype).repeat(9, 1)
    below_zero = UnitRule(ActiveRule.NONZERO, -math.inf, math.nextafter(0.0, -1.0))
    flushes = torch.set_flush_denormal(True)
    try:
        windows = [counted(cuda, tensor, rule) for rule in (RULES["relu"], below_zero)]
    finally:
        torch.set_flush_denormal(False)
    assert flushes
    assert windows[0].counts[0].tolist() == [0, 0, 9, 0]
    assert windows[1].counts.tolist() == [[0, 0, 9, 9], [0, 0, 0, 9], [0, 0, 0, 0]]


def test_the_current_device_stays(cuda):
    window = counted(cuda, torch.ones(2, 3), RULES["relu"])
    cuda.history()
    cuda.units(torch.ones(3, 2), RULES["relu"], window, device=1)
    history = cuda.history()
    assert (history["launches"], history["launch_device"], history["current_device"]) == (1, 1, 0)
    with pytest.raises(EmulationError, match="CUDA must not fail in cudaSetDevice"):
        cuda.units(torch.ones(3, 2), RULES["relu"], window, device=7)
