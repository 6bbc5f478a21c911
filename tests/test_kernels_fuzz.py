"""Hypothesis draws shapes, strides, dtypes and values; every variant is held to the oracle."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_calls import (
    CPU_VARIANTS,
    DTYPES,
    assert_same_values,
    assert_table,
    clamp_in_place,
    run_moments,
    scale_in_place,
)
from torch import Tensor

import gradstat
from gradstat import _native

pytestmark = pytest.mark.usefixtures("one_torch_thread")

RUNNABLE = [name for name, runs_here in CPU_VARIANTS.items() if runs_here]

# The same examples each time: a failure is one of the code, not of the day.
thorough = settings(max_examples=150, deadline=None, derandomize=True)

dtypes = st.sampled_from(list(DTYPES.values()))
specials = st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1.0, 1e-45, 5e-324, 3e38])
numbers = st.one_of(specials, st.floats(width=64), st.floats(-10, 10))


@st.composite
def contents(draw: st.DrawFn, n: int) -> Tensor:
    """Draw n fp64 values: anything, over a wide or narrow range, or mostly zeros."""
    if n == 0 or draw(st.booleans()):
        few = draw(st.lists(numbers, min_size=1, max_size=12))
        return torch.tensor(few, dtype=torch.float64).repeat(n // len(few) + 1)[:n]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    low, span = draw(st.integers(-330, 300)), draw(st.integers(0, 60))
    uniform = torch.rand(2, n, generator=generator, dtype=torch.float64)
    values = 10 ** (low + uniform[0] * span) * (uniform[1] - 0.5).sign()
    zeros = draw(st.sampled_from([0.0, 0.1, 0.9]))
    values[torch.rand(n, generator=generator) < zeros] = 0
    for position in draw(st.lists(st.integers(0, n - 1), max_size=3)):
        values[position] = draw(specials)
    return values


@st.composite
def flat_tensors(draw: st.DrawFn) -> Tensor:
    """Draw a one-dimensional tensor of any length, alignment and dtype."""
    near = st.sampled_from([0, 16, 64, 128, 512, 4096, 8192])
    n = max(0, draw(st.one_of(st.integers(0, 300), near)) + draw(st.integers(-2, 2)))
    offset = draw(st.integers(0, 9))
    return draw(contents(n + offset)).to(draw(dtypes))[offset:]


@st.composite
def strided_tensors(draw: st.DrawFn) -> Tensor:
    """Draw a tensor of up to four dimensions in any order, with steps, slices and expansions."""
    shape = draw(st.lists(st.integers(0, 9), max_size=4))
    tensor = draw(contents(math.prod(shape))).to(draw(dtypes)).reshape(shape)
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    for dim, size in enumerate(tensor.shape):
        action = draw(st.sampled_from(["keep", "keep", "step", "slice", "expand", "flip-sign"]))
        if action == "step":
            tensor = tensor[(slice(None),) * dim + (slice(None, None, draw(st.integers(1, 3))),)]
        elif action == "slice":
            begin = draw(st.integers(0, size))
            tensor = tensor.narrow(dim, begin, draw(st.integers(0, size - begin)))
        elif action == "expand":
            tensor = tensor.narrow(dim, 0, min(size, 1))
            if size > 0:
                tensor = tensor.expand([7 if d == dim else -1 for d in range(tensor.dim())])
        elif action == "flip-sign":
            tensor = torch._neg_view(tensor)
    return tensor


@thorough
@given(tensors=st.lists(st.one_of(st.none(), flat_tensors()), max_size=5))
def test_moments_of_anything(tensors):
    expected = reference.moments(tensors)
    histogram = reference.histogram(tensors)
    for name in RUNNABLE:
        _native.use_cpu_variant(name)
        result = run_moments(tensors, histogram=True, threads=2)
        assert_table(result.table, tensors, expected)
        assert (result.histogram.numpy() == histogram).all()
    _native.use_cpu_variant("")


@thorough
@given(tensors=st.lists(st.one_of(st.none(), strided_tensors()), max_size=4))
def test_stats_of_any_strides(tensors):
    expected = reference.moments(tensors)
    histogram = reference.histogram(tensors)
    for name in RUNNABLE:
        _native.use_cpu_variant(name)
        table = gradstat.tensor_stats(tensors, histogram=True)
        assert_table(table.data, tensors, expected)
        assert (table.histogram_data.numpy() == histogram).all()
    _native.use_cpu_variant("")


@thorough
@given(
    tensors=st.lists(flat_tensors(), max_size=4),
    coefficient=st.one_of(specials, st.floats(0, 1), st.floats(0, 1e-300)),
    limit=st.floats(0, allow_nan=False),
)
def test_scale_and_clamp_of_anything(tensors, coefficient, limit):
    if math.isinf(coefficient):
        coefficient = 0.5
    for name in RUNNABLE:
        _native.use_cpu_variant(name)
        scaled = [tensor.clone() for tensor in tensors]
        clamped = [tensor.clone() for tensor in tensors]
        scale_in_place(scaled, coefficient)
        clamp_in_place(clamped, limit)
        for original, product, cut in zip(tensors, scaled, clamped, strict=True):
            assert_same_values(product, reference.scale(original, coefficient))
            assert_same_values(cut, reference.clamp(original, limit))
    _native.use_cpu_variant("")
