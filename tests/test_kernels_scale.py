"""Scale and clamp: exact rounding, the rules for 0, 1 and NaN, and nothing written beside."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from kernel_calls import (
    DTYPES,
    assert_same_values,
    bits_of,
    clamp_in_place,
    guarded,
    sample,
    scale_in_place,
)
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_torch_thread")

LENGTHS = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 257, 4097, 65_537, 150_000]
OFFSETS = (0, 1, 3)
COEFFICIENTS = [0.5, 0.1, 1.0000001, 3.7, 1e-3, 1e-30, 1e-42, 1e30, 5e-324, 1e300]
LIMITS = [0.0, 1e-50, 1e-40, 1e-7, 0.1, 1.0, 1.0009765, 65_519.0, 65_520.0, 3.4e38, 1e300]


def every_16_bit_value(dtype: torch.dtype) -> Tensor:
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)


def special_values(dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).tiny
    values = [0.0, -0.0, math.nan, math.inf, -math.inf, largest, -largest, tiny, -tiny, tiny / 64]
    return torch.cat([torch.tensor(values, dtype=dtype), sample(70, dtype)])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_scale_and_clamp_of_every_length_and_alignment(cpu_variant, dtype, length):
    values = sample(length, dtype)
    expected = reference.scale(values, 0.3), reference.clamp(values, 0.01)
    for offset in OFFSETS:
        buffer, view = guarded(values, offset)
        around = bits_of(buffer).clone()
        scale_in_place([view], 0.3)
        assert_same_values(view, expected[0])
        view.copy_(values)
        clamp_in_place([view], 0.01)
        assert_same_values(view, expected[1])
        view.copy_(values)
        assert torch.equal(bits_of(buffer), around), "written beside the tensor"


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_scale_rounds_once_from_the_product(cpu_variant, dtype, coefficient):
    for values in (special_values(dtype), sample(10_000, dtype)):
        scaled = values.clone()
        scale_in_place([scaled], coefficient)
        assert_same_values(scaled, reference.scale(values, coefficient))


def nearest(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return the values rounded to nearest, ties to even, by counting in last places."""
    significant_bits = {torch.float16: 11, torch.bfloat16: 8}[dtype]
    lowest_exponent = np.frexp(torch.finfo(dtype).tiny)[1]
    exponent = np.maximum(np.frexp(values)[1], lowest_exponent)
    last_place = np.ldexp(1.0, exponent - significant_bits)
    rounded = np.rint(values / last_place) * last_place
    too_large = np.abs(rounded) > torch.finfo(dtype).max
    return torch.from_numpy(np.where(too_large, np.copysign(np.inf, rounded), rounded)).to(dtype)


# With these few bits the product of a 16-bit value is exact in fp32, so that it is rounded once.
SHORT = [2.0, 1.5, 1.25, 1.0009765625, 0.75, 0.5, 0.375, 2.0**-5, 3 * 2.0**-14, 2.0**-24, 2.0**-25]


@pytest.mark.parametrize("coefficient", SHORT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_scale_rounds_every_16_bit_value_to_nearest_even(cpu_variant, dtype, coefficient):
    values = every_16_bit_value(dtype)
    # Below 2^-149 fp32 itself rounds, to what may be a tie for bfloat16.
    values = values[~(values.double() * coefficient % 2.0**-149).bool()]
    scaled = values.clone()
    scale_in_place([scaled], coefficient)
    assert_same_values(scaled, nearest(values.double().numpy() * coefficient, dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bit_values_come_back_as_they_were(cpu_variant, dtype):
    values = every_16_bit_value(dtype)
    scaled = values.clone()
    scale_in_place([scaled], 1 - 2.0**-30)
    assert_same_values(scaled, values)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("coefficient", [1.0, math.nan])
def test_scale_by_1_or_nan_writes_nothing(cpu_variant, dtype, coefficient):
    raw = torch.randint(0, 256, (8 * 1000,), dtype=torch.uint8)
    values = raw.view(dtype)
    before = bits_of(values).clone()
    scale_in_place([values], coefficient)
    scale_in_place([values, values[:0]], [coefficient, 0.0])
    assert torch.equal(bits_of(values), before)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("coefficient", [0.0, -0.0])
def test_scale_by_0_writes_zeros_over_nan_and_inf(cpu_variant, dtype, coefficient):
    values = special_values(dtype)
    buffer, view = guarded(values, 1)
    scale_in_place([view], coefficient)
    assert not bits_of(view).any()
    assert buffer[0].isnan()
    assert buffer[1 + len(values) :].isnan().all()


def test_scale_takes_one_coefficient_per_tensor(cpu_variant):
    coefficients = [1.0, 0.5, math.nan, 0.0, 1e-42, 3.0, 0.25, 0.125]
    tensors = [special_values(dtype) for dtype in DTYPES.values()]
    tensors += [sample(70_000, dtype) for dtype in DTYPES.values()]
    before = [tensor.clone() for tensor in tensors]
    scale_in_place([tensors[0], None, *tensors[1:]], [1.0, 9.0, *coefficients[1:]], threads=2)
    for tensor, original, coefficient in zip(tensors, before, coefficients, strict=True):
        assert_same_values(tensor, reference.scale(original, coefficient))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_clamp_rounds_the_limit_and_keeps_nan(cpu_variant, dtype, limit):
    for values in (special_values(dtype), sample(5000, dtype)):
        clamped = values.clone()
        clamp_in_place([clamped], limit)
        assert_same_values(clamped, reference.clamp(values, limit))
        assert torch.equal(clamped.isnan(), values.isnan())


@pytest.mark.parametrize("limit", [0.0, 6e-8, 1.0, 65_504.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_clamp_of_every_16_bit_value(cpu_variant, dtype, limit):
    values = every_16_bit_value(dtype)
    clamped = values.clone()
    clamp_in_place([clamped], limit)
    assert_same_values(clamped, reference.clamp(values, limit))


def test_dense_tensors_of_any_order_are_written_in_place(cpu_variant):
    image = sample(6 * 4 * 5 * 7, torch.float32).view(6, 4, 5, 7)
    tensors = [
        image.to(memory_format=torch.channels_last),
        sample(600, torch.half).view(20, 30).t(),
    ]
    before = [tensor.clone() for tensor in tensors]
    scale_in_place(tensors, 0.7)
    for tensor, original in zip(tensors, before, strict=True):
        assert_same_values(tensor, reference.scale(original, 0.7))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_writing(threads):
    tensors = [sample(n, dtype) for dtype in DTYPES.values() for n in (0, 5, 70_000, 200_000)]
    before = [tensor.clone() for tensor in tensors]
    scale_in_place(tensors, 0.7, threads)
    clamp_in_place(tensors, 0.5, threads)
    for tensor, original in zip(tensors, before, strict=True):
        assert_same_values(tensor, reference.clamp(reference.scale(original, 0.7), 0.5))
