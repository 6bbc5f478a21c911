"""Moments by the CUDA kernels' own sources, run on the CPU by `cuda_emulation`."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from cuda_emulation.emulator import Emulator, load_emulator, with_specials
from kernel_calls import (
    DTYPES,
    assert_table,
    guarded,
    run_moments,
    sample,
)
from torch import Tensor

TOLERANCE = 1e-6  # the contract's
DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
SEEDS = (0, 1, 2)
CHUNK = 65536

# Around a 16-byte vector, a block's turn of vectors, four turns, and a chunk.
LENGTHS = (
    0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 511, 513, 1023, 1025, 2047, 2048, 2049, 4099,
    8191, 8193, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77,
)  # fmt: skip


@pytest.fixture(scope="module")
def cuda() -> Emulator:
    return load_emulator()


def same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.int64), second.view(torch.int64))


# ---- moments -------------------------------------------------------------------------------------


@DTYPE
def test_lengths(cuda, dtype):
    tensors = [sample(length, dtype, seed=length) for length in LENGTHS]
    assert_table(cuda.moments(tensors).table, tensors, tolerance=TOLERANCE)


@DTYPE
@pytest.mark.parametrize("special", [False, True], ids=["finite", "special"])
def test_alignment_changes_no_bit(cuda, dtype, special):
    tables = []
    positions = (0, 5, 2047, 2048, 8000, 8191, 8192) if special else ()
    for offset in range(16 // dtype.itemsize):
        tensors = []
        for length in (1, 7, 8, 9, 100, 2048, 8200, CHUNK + 33):
            values = with_specials(sample(length, dtype, seed=length), positions)
            tensors.append(guarded(values, offset)[1])
        tables.append(cuda.moments(tensors).table)
        assert_table(tables[-1], tensors, tolerance=TOLERANCE)
    assert all(same_bits(table, tables[0]) for table in tables)


@DTYPE
def test_order_of_blocks_and_threads_changes_no_bit(cuda, dtype):
    tensors: list[Tensor | None] = [sample(n, dtype, seed=n) for n in (3, 1000, 5 * CHUNK + 5)]
    tensors += [None, sample(200_000, dtype).view(2, -1), torch.zeros(3, 70_000, dtype=dtype)]
    tensors += [torch.zeros(400, 200, dtype=dtype), torch.zeros(30, 40, dtype=dtype).t()]
    results = [cuda.moments(tensors, histogram=True, seed=seed) for seed in SEEDS]
    assert_table(results[0].table, tensors, tolerance=TOLERANCE)
    for result in results[1:]:
        assert same_bits(result.table, results[0].table)
        assert torch.equal(result.histogram, results[0].histogram)


RANGES = {
    "fp32-subnormals": (torch.float32, [1.5e-45, -3e-45, 1e-40, -1.17e-38, 0.0]),
    "fp32-1e-30": (torch.float32, [1e-30, -2e-30]),
    "fp32-1e30": (torch.float32, [1e30, -2e30]),
    "fp32-largest": (torch.float32, [3e38, -3.4028234663852886e38]),
    "fp32-group-limits": (torch.float32, [2.0**-54, 0.0, 2.0**-54 * (1 - 2.0**-24)]),
    "fp32-upper-group-limits": (torch.float32, [2.0**60, 1.0, 2.0**60 * (1 - 2.0**-24)]),
    "fp32-all": (torch.float32, [1.5e-45, 1e-30, -1.0, 1e25, -3e38]),
    "fp64-subnormals": (torch.float64, [5e-324, -1e-323, 1e-310, 0.0]),
    "fp64-1e-300": (torch.float64, [1e-300, -2e-300]),
    "fp64-1e300": (torch.float64, [1e300, -2e300]),
    "fp64-range-limits": (torch.float64, [2.0**-450, 2.0**-450 * (1 - 2.0**-50), 0.0]),
    "fp64-upper-range-limits": (torch.float64, [2.0**480, 2.0**480 * (1 - 2.0**-50), 0.0]),
    "fp64-largest": (torch.float64, [1.7976931348623157e308, -1e308]),
    "fp64-all": (torch.float64, [5e-324, 1e-300, -1.0, 1e155, -1e300]),
    "fp64-beyond-fp32": (torch.float64, [1e-46, 1e39, -1e-39, 3.5e38]),
    "fp16-subnormals": (torch.float16, [6e-8, -1.2e-7, 6.09e-5]),
    "fp16-all": (torch.float16, [6e-8, -1.0, 65504.0, 0.0]),
    "bf16-subnormals": (torch.bfloat16, [9.2e-41, -1e-39]),
    "bf16-group-limits": (torch.bfloat16, [2.0**-54, 0.0, 2.0**-54 * (1 - 2.0**-8)]),
    "bf16-upper-group-limits": (torch.bfloat16, [2.0**60, 1.0, 2.0**60 * (1 - 2.0**-8)]),
    "bf16-largest": (torch.bfloat16, [3.39e38, -3e38]),
    "bf16-all": (torch.bfloat16, [9.2e-41, 1e-20, -1.0, 1e20, 3.39e38]),
}


@pytest.mark.parametrize(("dtype", "values"), RANGES.values(), ids=RANGES)
def test_range(cuda, dtype, values):
    repeated = torch.tensor(values, dtype=torch.float64).to(dtype).repeat(3000)
    tensors = [repeated[: len(values)], repeated[:1000], repeated, repeated[:8192].sort()[0]]
    result = cuda.moments(tensors, histogram=True)
    assert_table(result.table, tensors, tolerance=TOLERANCE)
    assert (result.histogram.numpy() == reference.histogram(tensors)).all()


@DTYPE
def test_special_values_at_every_position(cuda, dtype):
    tensors = []
    for length in (1, 9, 40, 2048 + 5, CHUNK + 9):
        for position in (0, 1, 7, 8, 39, 2047, 2048, 2052, CHUNK - 1, CHUNK, CHUNK + 8):
            if position < length:
                tensors.append(with_specials(sample(length, dtype), (position,)))
    tensors += [torch.full((n,), v, dtype=dtype) for n in (3, 99) for v in (math.nan, -math.inf)]
    result = cuda.moments(tensors, histogram=True)
    assert_table(result.table, tensors, tolerance=TOLERANCE)
    assert (result.histogram.numpy() == reference.histogram(tensors)).all()


@DTYPE
def test_fp32_sums_of_neighbours_keep_the_bound(cuda, dtype):
    # The worst case: values of all significant bits whose partial sums round each time.
    generator = torch.Generator().manual_seed(1)
    values = (1 + torch.rand(100_000, generator=generator, dtype=torch.float64)).to(dtype)
    tensors = [values, -values, (values * 1.99), torch.cat([values, -values]).sort()[0]]
    assert_table(cuda.moments(tensors).table, tensors, tolerance=TOLERANCE)


def test_counts_and_extremes_equal_the_cpu_kernels(cuda):
    tensors = [sample(n, dtype, seed=n) for dtype in DTYPES.values() for n in (50, 9000, 140_000)]
    ours = cuda.moments(tensors, histogram=True)
    theirs = run_moments(tensors, histogram=True)
    exact = [reference.COLUMNS.index(c) for c in ("zeros", "abs_max", "abs_min", "dead_rows")]
    assert torch.equal(ours.table[:, exact], theirs.table[:, exact])
    assert torch.equal(ours.histogram, theirs.histogram)


# ---- rows ----------------------------------------------------------------------------------------

# Rows around a thread's probe of 32 elements, a chunk, and a row of several chunks.
SHAPES = [
    (1,), (5,), (70_000,), (1, 1), (7, 1), (70_000, 1), (3000, 2), (40, 8), (99, 31), (99, 32),
    (99, 33), (64, 1000), (700, 100), (2, 65_536), (3, 65_537), (2, 200_000), (9, 70_001),
    (64, 32, 3, 3), (300, 768),
]  # fmt: skip


def with_dead_rows(tensor: Tensor) -> Tensor:
    """Kill every third row and the last one; leave others a single living element."""
    tensor[2::3] = 0
    tensor[-1] = -0.0
    if tensor.dim() > 1 and tensor.shape[0] > 4:
        tensor[1] = 0
        tensor[1].view(-1)[-1] = 1
        tensor[3] = 0
        tensor[3].view(-1)[tensor[3].numel() // 2] = -1
        tensor[4].view(-1)[0] = 0
    return tensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dead_rows(cuda, dtype, shape):
    for offset, seed in ((0, 0), (3, 2)):
        tensor = guarded(sample(math.prod(shape), dtype), offset)[1].view(shape)
        tensors = [with_dead_rows(tensor), torch.zeros_like(tensor), torch.ones_like(tensor)]
        assert_table(cuda.moments(tensors, seed=seed).table, tensors, tolerance=TOLERANCE)


def interleaved() -> dict[str, Tensor]:
    image = with_dead_rows(sample(6 * 4 * 5 * 7, torch.float32).view(6, 4, 5, 7))
    matrix = sample(600 * 300, torch.float32).view(600, 300)
    matrix[:, 7] = 0
    matrix[:, 299] = -0.0
    tall = torch.zeros(3, 900)
    tall[2, 899] = math.nan
    return {
        "transposed": sample(35, torch.float32).view(5, 7).t(),
        "transposed-dead": matrix.t(),
        "transposed-tall": tall.t(),
        "long-rows": tall.t().contiguous().t(),
        "channels-last": image.to(memory_format=torch.channels_last),
        "permuted-1023": image.permute(1, 0, 2, 3),
        "permuted-3210": image.permute(3, 2, 1, 0),
        "permuted-2031": image.permute(2, 0, 3, 1),
        "zeros-transposed": torch.zeros(300, 500).t(),
    }


@pytest.mark.parametrize("tensor", interleaved().values(), ids=interleaved())
def test_interleaved_rows(cuda, tensor):
    beside = torch.zeros(3, 4)
    tensors = [tensor, beside, tensor.double(), tensor.bfloat16(), tensor.half(), None]
    for seed in SEEDS:
        table = cuda.moments(tensors, seed=seed).table
        assert_table(table, tensors, tolerance=TOLERANCE)
