"""Moments over the whole range of each dtype: subnormals, extremes, and the limits in between."""

from __future__ import annotations

import itertools
import math

import pytest
import reference
import torch
from kernel_calls import DTYPES, assert_table, run_moments, sample

pytestmark = pytest.mark.usefixtures("one_torch_thread")

L2 = reference.COLUMNS.index("l2")
BLOCK = 4096

RANGES = {
    "fp32-subnormals": (torch.float32, [1.5e-45, -3e-45, 1e-40, -1.17e-38, 0.0]),
    "fp32-1e-30": (torch.float32, [1e-30, -2e-30, 3e-30]),
    "fp32-smallest-normals": (torch.float32, [2.0**-126, -(2.0**-126), 2.0**-125]),
    "fp32-1e25": (torch.float32, [1e25, -2e25]),
    "fp32-largest": (torch.float32, [3e38, -3e38, 3.4028234663852886e38]),
    "fp32-all": (torch.float32, [1.5e-45, 1e-30, -1.0, 1e25, -3e38]),
    "fp64-subnormals": (torch.float64, [5e-324, -1e-323, 1e-310, 0.0]),
    "fp64-1e-300": (torch.float64, [1e-300, -2e-300]),
    "fp64-1e-160": (torch.float64, [1e-160, -2e-160]),
    "fp64-1e155": (torch.float64, [1e155, -2e155]),
    "fp64-1e300": (torch.float64, [1e300, -2e300]),
    "fp64-largest": (torch.float64, [1.7976931348623157e308, -1e308]),
    "fp64-all": (torch.float64, [5e-324, 1e-300, -1.0, 1e155, -1e300]),
    "fp64-beyond-fp32": (torch.float64, [1e-46, 1e39, -1e-39, 3.5e38]),
    "fp16-subnormals": (torch.float16, [6e-8, -1.2e-7, 6.09e-5]),
    "fp16-largest": (torch.float16, [65504.0, -65504.0]),
    "fp16-all": (torch.float16, [6e-8, -1.0, 65504.0, 0.0]),
    "bf16-subnormals": (torch.bfloat16, [9.2e-41, -1e-39]),
    "bf16-1e-30": (torch.bfloat16, [1e-30, -3e-30]),
    "bf16-1e25": (torch.bfloat16, [1e25, -3e25]),
    "bf16-largest": (torch.bfloat16, [3.39e38, -3e38]),
    "bf16-all": (torch.bfloat16, [9.2e-41, 1e-20, -1.0, 1e20, 3.39e38]),
}


@pytest.mark.parametrize(("dtype", "values"), RANGES.values(), ids=RANGES)
def test_moments_over_the_range(cpu_variant, dtype, values):
    repeated = torch.tensor(values, dtype=torch.float64).to(dtype).repeat(3000)
    tensors = [repeated[: len(values)], repeated[:1000], repeated]
    assert_table(run_moments(tensors, histogram=True).table, tensors)


EXPONENTS = {
    torch.float64: range(-1074, 1024, 5),
    torch.float32: range(-149, 128, 2),
    torch.bfloat16: range(-133, 128),
    torch.float16: range(-24, 16),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_moments_at_every_exponent(cpu_variant, dtype):
    mantissas = 1 + torch.rand(600, generator=torch.Generator().manual_seed(2)).double()
    tensors = [(mantissas * 2.0**exponent).to(dtype) for exponent in EXPONENTS[dtype]]
    assert_table(run_moments(tensors).table, tensors)


# Where the kernels change their way: the squares of a group of values (fp32 and bf16) and the range
# of a block's squares (fp64).
LIMITS = {
    "fp32-2^-44": (torch.float32, -44),
    "fp32-2^60": (torch.float32, 60),
    "bf16-2^-44": (torch.bfloat16, -44),
    "bf16-2^60": (torch.bfloat16, 60),
    "fp64-2^-450": (torch.float64, -450),
    "fp64-2^480": (torch.float64, 480),
    "fp64-2^500": (torch.float64, 500),
}


@pytest.mark.parametrize(("dtype", "exponent"), LIMITS.values(), ids=LIMITS)
def test_moments_around_a_limit(cpu_variant, dtype, exponent):
    limit = 2.0**exponent
    below = limit * (1 - 2.0**-8)
    tensors = []
    for at_most, beside in itertools.product([limit / 4, below, limit, 4 * limit], [0, 1e-3, 1]):
        values = sample(2 * BLOCK + 100, torch.float64).abs() % 1 * below * beside
        for position in (0, BLOCK - 1, BLOCK, 2 * BLOCK + 99):
            tensors.append(values.to(dtype))
            tensors[-1][position] = at_most
    assert_table(run_moments(tensors).table, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("small", [2.0**-75, 1.25 * 2.0**-64])
def test_small_squares_are_lost_only_beside_large_ones(cpu_variant, dtype, small):
    # The square of 2^-75 is no fp32 and that of 2^-64 a subnormal one, which some instructions take
    # for 0; but 4096 of them are to be seen beside a single larger one.
    tensors = []
    for exponent in range(-75, -35):
        tensors.append(torch.full((2 * BLOCK,), small, dtype=dtype))
        tensors[-1][100] = 2.0**exponent
    assert_table(run_moments(tensors).table, tensors)


@pytest.mark.parametrize(("dtype", "exponent"), LIMITS.values(), ids=LIMITS)
def test_blocks_on_both_sides_of_a_limit_add_up(cpu_variant, dtype, exponent):
    below = torch.full((3 * BLOCK,), 2.0**exponent * (1 - 2.0**-8), dtype=dtype)
    above = torch.full((BLOCK,), 2.0**exponent, dtype=dtype)
    tensors = [torch.cat([below, above]), torch.cat([above, below]), below, above]
    assert_table(run_moments(tensors).table, tensors)


def test_small_blocks_beside_large_ones(cpu_variant):
    magnitudes = [5e-324, 1e-200, 1.0, 1e160, 1e300]
    blocks = {m: sample(BLOCK, torch.float64, seed=i) / 100 * m for i, m in enumerate(magnitudes)}
    tensors = [
        torch.cat([blocks[m] for m in order]) for order in itertools.permutations(magnitudes, 3)
    ]
    assert_table(run_moments(tensors).table, tensors)


@pytest.mark.parametrize("exponent", [-451, -450, 479, 480, 499, 500])
def test_the_norm_of_many_elements_at_a_limit(cpu_variant, exponent):
    # 2^25 elements: more than a range of squares may hold if its bounds are drawn too wide.
    value = 2.0**exponent * (1 - 2.0**-20)
    tensor = torch.full((2**16,), value, dtype=torch.float64)
    totals = run_moments([tensor] * 2**9, threads=2).table[-1]
    assert totals[L2].item() == pytest.approx(value * 2**12.5, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_fp32_sums_of_neighbours_keep_the_bound(cpu_variant, dtype):
    # The worst case: after large values, small ones that a sum in fp32 loses every time. Over 16
    # neighbours they amount to less than the bound in pairs; one after the other they would not.
    tensors = []
    for small in (1.9921875 * 2.0**-15, 1.40625 * 2.0**-2):  # lost as they are; lost when squared
        for period, n_large in itertools.product([16, 32, 64, 128, 512, 2048], [2, 4, 8, 16, 32]):
            position = torch.arange(20_000) % period
            tensors.append(torch.where(position < n_large, 1024.0, small).to(dtype))
    assert_table(run_moments(tensors).table, tensors)


SPECIALS = {
    "nan": [math.nan],
    "inf": [math.inf],
    "-inf": [-math.inf],
    "nan-and-inf": [math.nan, math.inf, -math.inf],
    "nan-beside-zeros": [math.nan, 0.0, -0.0],
}
POSITIONS = (0, 1, 15, 16, 17, 63, 64, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, -1)


@pytest.mark.parametrize("special", SPECIALS.values(), ids=SPECIALS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_special_value_at_every_position(cpu_variant, dtype, special):
    tensors = []
    for length in (1, 2, 17, 200, 2 * BLOCK + 17):
        values = sample(length, dtype)
        for position in POSITIONS:
            if position >= length:
                continue
            tensors.append(values.clone())
            for step, value in enumerate(special):
                tensors[-1][(position + step) % length] = value
    assert_table(run_moments(tensors).table, tensors)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_nothing_but_special_values(cpu_variant, dtype):
    values = [math.nan, math.inf, -math.inf, 0.0, -0.0]
    tensors = [
        torch.full((length,), value, dtype=dtype)
        for value in values
        for length in (1, 17, 64, BLOCK + 5, 70_001)
    ]
    tensors.append(torch.tensor(values, dtype=dtype).repeat(2000))
    assert_table(run_moments(tensors).table, tensors)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_one_nan_in_a_long_tensor(cpu_variant, dtype):
    tensors = []
    for position in (0, 65_535, 65_536, 131_072, 199_999):
        tensors.append(sample(200_000, dtype))
        tensors[-1][position] = math.nan
    assert_table(run_moments(tensors, threads=2).table, tensors)


@pytest.mark.parametrize("exponent", [-1000, -460, 0, 490, 1000])
def test_fp64_ranges_hold_beside_nan_and_inf(cpu_variant, exponent):
    values = sample(2 * BLOCK, torch.float64) * 2.0**exponent
    tensors = [values.clone() for _ in range(3)]
    tensors[0][100] = math.nan
    tensors[1][BLOCK + 1] = -math.inf
    tensors[2][::2] = math.inf
    assert_table(run_moments(tensors).table, tensors)
