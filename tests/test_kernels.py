"""Moments of every dtype, length and alignment, by every CPU variant."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import reference
import torch
from kernel_calls import DTYPES, assert_table, bits_of, guarded, run_moments, sample

pytestmark = pytest.mark.usefixtures("one_torch_thread")

# Around the lanes, groups, blocks (4096) and chunks (65536) of the variants.
LENGTHS = [
    0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257,
    511, 512, 513, 4095, 4096, 4097, 65535, 65536, 65537, 200000,
]  # fmt: skip
OFFSETS = (0, 1, 2, 3, 5)


@functools.cache
def expected_row(dtype: torch.dtype, length: int) -> np.ndarray:
    return reference.moments([sample(length, dtype)])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_moments_of_every_length_and_alignment(cpu_variant, dtype, length):
    values = sample(length, dtype)
    for offset in OFFSETS:
        _, view = guarded(values, offset)
        assert_table(run_moments([view]).table, [view], expected_row(dtype, length))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_moments_of_every_16_bit_value(cpu_variant, dtype):
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    # One tensor for each sign and exponent, and one of them all.
    tensors = [*bits.view(dtype).split(128), bits.view(dtype)]
    assert_table(run_moments(tensors).table, tensors)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("signs", ["positive", "any"])
def test_the_first_negative_value_or_zero_may_come_late(cpu_variant, dtype, signs):
    values = sample(9000, dtype)
    values[values == 0] = 1.0
    if signs == "positive":
        values = values.abs()
    tensors = [values]
    for place in (0, 17, 300, 4095, 4096, 8191, 8999):
        for special in (-3.0, 0.0, -0.0, -math.inf, math.copysign(math.nan, -1)):
            tensors.append(values.clone())
            tensors[-1][place] = special
    assert_table(run_moments(tensors).table, tensors)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("first", [-2.0, 0.0, -0.0])
def test_a_negative_value_and_a_zero_may_follow_each_other(cpu_variant, dtype, first):
    values = sample(5 * 4096 + 77, dtype).abs() + 0.5
    values[4096 + 500] = first
    for place in (4096 + 700, 2 * 4096, 5 * 4096 + 70):
        for second in (-2.0, 0.0, -0.0):
            values[place] = second
            assert_table(run_moments([values]).table, [values])


def mixed_list() -> list[torch.Tensor | None]:
    tensors: list[torch.Tensor | None] = []
    for index in range(3000):
        dtype = list(DTYPES.values())[index % 4]
        missing = index % 11 == 5
        tensors.append(None if missing else sample(index % 71, dtype, seed=index))
    tensors[1000] = sample(150_001, torch.bfloat16)
    tensors[2000] = sample(70_000, torch.float64).view(700, 100)
    return tensors


@functools.cache
def expected_of_mixed_list() -> np.ndarray:
    return reference.moments(mixed_list())


@pytest.mark.parametrize("threads", [1, 2])
def test_moments_of_many_tensors_of_mixed_dtypes(cpu_variant, threads):
    tensors = mixed_list()
    table = run_moments(tensors, threads=threads).table
    assert_table(table, tensors, expected_of_mixed_list())


@pytest.mark.parametrize(
    "tensors",
    [
        pytest.param([], id="no-tensors"),
        pytest.param([None], id="one-missing"),
        pytest.param([None, None], id="all-missing"),
        pytest.param([torch.zeros(0)], id="empty"),
        pytest.param([torch.zeros(0), torch.ones(1), torch.zeros(0, 5)], id="empty-beside-one"),
        pytest.param([None, torch.ones(3), None], id="missing-beside-one"),
    ],
)
def test_moments_of_next_to_nothing(cpu_variant, tensors):
    assert_table(run_moments(tensors).table, tensors)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("value", [1.5, -0.0, 0.0, float("nan"), float("-inf")])
def test_moments_of_a_scalar(cpu_variant, dtype, value):
    tensors = [torch.tensor(value, dtype=dtype)]
    assert_table(run_moments(tensors).table, tensors)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_moments_write_nothing(cpu_variant, dtype):
    # Random bits: NaN payloads and signalling NaN must survive too.
    generator = torch.Generator().manual_seed(3)
    raw = torch.randint(0, 256, (8 * 9001,), dtype=torch.uint8, generator=generator)
    tensor = raw.view(dtype)
    before = tensor.clone()
    version = tensor._version
    run_moments([tensor, tensor[1:]], histogram=True, threads=2)
    assert torch.equal(bits_of(tensor), bits_of(before))
    assert tensor._version == version


def test_moments_of_one_tensor_listed_twice(cpu_variant):
    tensor = sample(5000, torch.float32)
    assert_table(run_moments([tensor, tensor]).table, [tensor, tensor])
