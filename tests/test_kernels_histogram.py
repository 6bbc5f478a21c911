"""The histogram by binary exponent."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from kernel_calls import DTYPES, assert_table, guarded, run_moments, sample
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def assert_histogram(tensors: list[Tensor | None], threads: int = 1) -> Tensor:
    result = run_moments(tensors, histogram=True, threads=threads)
    wrong = (result.histogram.numpy() != reference.histogram(tensors)).nonzero()
    assert not len(wrong[0]), f"rows {wrong[0]}, bins {wrong[1]}"
    # Nothing is in a bin that is zero, NaN or Inf, and everything else is.
    table = dict(zip(reference.COLUMNS, result.table.T.nan_to_num(), strict=True))
    counted = table["numel"] - table["zeros"] - table["nans"] - table["infs"]
    assert result.histogram.sum(1).tolist() == counted.tolist()
    return result.table


def powers(low: int, high: int, dtype: torch.dtype, n: int) -> Tensor:
    """Make n values whose exponents reach from low to high, evenly."""
    generator = torch.Generator().manual_seed(low + 2000 * high)
    draws = torch.rand(2, n, generator=generator, dtype=torch.float64)
    exponents = (low + draws[0] * (high + 1 - low)).floor()
    # In two steps: 2^-1074 itself would round to zero.
    values = (1 + draws[1]) * 2 ** (exponents / 2).floor() * 2 ** (exponents / 2).ceil()
    values[::7] *= -1
    return values.to(dtype)


SPANS = {
    "one-bin": (-10, -10),
    "a-few": (-20, -5),
    "47-bins": (-46, 0),
    "48-bins": (-47, 0),
    "49-bins": (-48, 0),
    "50-bins": (-49, 0),
    "from-subnormals": (-149, -100),
    "near-underflow": (-130, -120),
    "to-the-top": (90, 127),
    "near-overflow": (120, 130),
    "all-of-fp32": (-149, 127),
    "all-of-fp64": (-1074, 1023),
    "below-fp32": (-1074, -140),
    "above-fp32": (128, 1023),
}


@pytest.mark.parametrize(("low", "high"), SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_histogram_over_a_span(cpu_variant, dtype, low, high):
    # What is beyond a dtype becomes zero or Inf there, and belongs in no bin.
    tensors = [powers(low, high, dtype, n) for n in (1, 5, 63, 64, 65, 1000, 4096, 9000)]
    for tensor in list(tensors):
        with_zeros = tensor.clone()
        with_zeros[::3] = 0.0
        with_zeros[1::5] = -0.0
        with_specials = with_zeros.clone()
        with_specials[::11] = math.nan
        with_specials[3::50] = math.inf
        tensors += [with_zeros, with_specials]
    assert_histogram(tensors)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 65_537])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_histogram_of_every_length_and_alignment(cpu_variant, dtype, length):
    tensors = [guarded(sample(length, dtype), offset)[1] for offset in (0, 1, 3)]
    assert_histogram(tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_histogram_of_every_16_bit_value(cpu_variant, dtype):
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_histogram([*bits.split(128), bits])


def test_bins_begin_at_powers_of_two():
    exponents = torch.arange(-150, 140, dtype=torch.float64)
    edges = torch.exp2(exponents)
    smaller = torch.nextafter(edges, torch.zeros_like(edges))
    result = run_moments([edges, smaller], histogram=True).histogram
    bins = (exponents + 127).clamp(0, 255).long()
    one_lower = (exponents + 126).clamp(0, 255).long()
    assert torch.equal(result[0], bins.bincount(minlength=256))
    assert torch.equal(result[1], one_lower.bincount(minlength=256))


def test_histogram_with_missing_and_empty_tensors(cpu_variant):
    assert_histogram([None, sample(100, torch.float32), torch.zeros(0), torch.zeros(50), None])
    assert_histogram([])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_histogram_totals_from_several_threads(threads):
    tensors = [sample(100_000, dtype, seed=i) for i, dtype in enumerate(DTYPES.values())]
    tensors += [sample(i, torch.float32, seed=i) for i in range(500)]
    assert_histogram(tensors, threads)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_table_is_the_same_with_a_histogram(cpu_variant, dtype):
    tensors = [sample(n, dtype) for n in (1, 100, 70_000)]
    with_histogram = assert_histogram(tensors)
    assert torch.equal(with_histogram, run_moments(tensors).table)
    assert_table(with_histogram, tensors)
