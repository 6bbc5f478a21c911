"""What the CUDA kernels give on a real device, against the oracles and the CPU."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from cuda_calls import CUDA, TOLERANCE, assert_near, on_device, parameters
from kernel_calls import DTYPES, assert_same_values, assert_table, bits_of, sample
from torch import Tensor

import gradstat
from gradstat import _native

pytestmark = pytest.mark.needs_cuda

DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
LENGTHS = (0, 1, 7, 8, 9, 255, 2047, 2048, 2049, 8193, 65_535, 65_536, 65_537, 1_000_003)


def assert_right(tensors: list[Tensor | None], device_tensors: list[Tensor | None]) -> None:
    """Check the whole table and the histogram of tensors whose values lie on the CPU too."""
    table = gradstat.tensor_stats(device_tensors, histogram=True)
    assert table.data.device.type == "cuda"
    assert_table(table.data.cpu(), tensors, tolerance=TOLERANCE)
    assert (table.histogram_data.cpu().numpy() == reference.histogram(tensors)).all()


# ---- values --------------------------------------------------------------------------------------


@DTYPE
def test_lengths(dtype):
    tensors: list[Tensor | None] = [sample(n, dtype, seed=n) for n in LENGTHS]
    assert_right(tensors, on_device(tensors))


@DTYPE
def test_special_values_and_extremes(dtype):
    info = torch.finfo(dtype)
    tensors: list[Tensor | None] = []
    for n in (3, 100, 70_000):
        for value in (math.nan, math.inf, -math.inf, 0.0, info.max, info.tiny, info.tiny / 4):
            tensors.append(torch.full((n,), value, dtype=dtype))
            tensors.append(sample(n, dtype))
            tensors[-1][n // 2] = value
    finite: list[Tensor | None] = [t for t in tensors if t is not None and t.isfinite().all()]
    assert_right(tensors, on_device(tensors))
    assert_right(finite, on_device(finite))


@DTYPE
def test_alignment_changes_no_bit(dtype):
    values = sample(200_003, dtype)
    values[77] = math.nan
    tables = []
    for offset in range(16 // dtype.itemsize):
        buffer = torch.zeros(len(values) + 16, dtype=dtype, device=CUDA)
        view = buffer[offset : offset + len(values)]
        view.copy_(values)
        tables.append(gradstat.tensor_stats([view, view[:100]]).data)
    assert_table(tables[0].cpu(), [values, values[:100]], tolerance=TOLERANCE)
    assert all(torch.equal(bits_of(table), bits_of(tables[0])) for table in tables)


@DTYPE
def test_dead_rows(dtype):
    tensors: list[Tensor | None] = []
    for shape in [(7,), (99, 31), (99, 33), (3000, 2), (700, 100), (2, 200_000), (5000, 768)]:
        tensor = sample(math.prod(shape), dtype).view(shape)
        tensor[1::3] = 0
        tensor[-1] = -0.0
        tensors += [tensor, torch.zeros(shape, dtype=dtype)]
    assert_right(tensors, on_device(tensors))


def test_interleaved_rows():
    matrix = sample(1000 * 300, torch.float32).view(1000, 300)
    matrix[:, 7] = 0
    image = sample(6 * 4 * 5 * 7, torch.float16).view(6, 4, 5, 7)
    image[:, 2] = 0
    tensors: list[Tensor | None] = [
        matrix.t(),
        matrix.bfloat16().t(),
        image.permute(1, 0, 2, 3),
        image.to(memory_format=torch.channels_last),
        torch.zeros(70_000, 3).t(),
        torch.ones(3, 70_000).t(),
    ]
    device_tensors = on_device(tensors)
    assert device_tensors[0].stride() == (1, 300)
    assert_right(tensors, device_tensors)


def test_missing_and_empty_tensors():
    tensors: list[Tensor | None] = [None, torch.ones(3), torch.empty(0, 4), None, torch.empty(4, 0)]
    assert_right(tensors, on_device(tensors))
    assert_right([torch.empty(0)], on_device([torch.empty(0)]))


def test_more_tensors_than_one_launch_takes():
    pool = [sample(i % 40, list(DTYPES.values())[i % 4], seed=i) for i in range(120)]
    pool += [sample(70_000, torch.float32), torch.zeros(4, 6).t()]
    device_pool = on_device(pool)
    tensors = [pool[i % len(pool)] for i in range(5000)]
    assert_right(tensors, [device_pool[i % len(pool)] for i in range(5000)])


@DTYPE
@pytest.mark.parametrize("coefficient", [0.3, 1e-40, 0.0, 1.0, math.nan, -2.0])
def test_scale_and_clamp_equal_the_oracle(dtype, coefficient):
    source = sample(200_003, dtype)
    source[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    buffer = torch.zeros(len(source) + 9, dtype=dtype, device=CUDA)
    view = buffer[3 : 3 + len(source)]
    view.copy_(source)
    whole = source.to(CUDA, copy=True)
    factors = torch.tensor([coefficient], dtype=torch.float64, device=CUDA)
    _native.scale(_native.TensorList([view, whole], False), factors, False)
    for scaled in (view, whole):
        assert_same_values(scaled.cpu(), reference.scale(source, coefficient))
    assert buffer[:3].count_nonzero() == buffer[3 + len(source) :].count_nonzero() == 0
    view.copy_(source)
    _native.clamp(_native.TensorList([view, None], False), 0.3)
    assert_same_values(view.cpu(), reference.clamp(source, 0.3))


def test_scale_with_one_coefficient_a_tensor():
    coefficients = [(0.25, 1.0, 0.0, math.nan, 3.0)[i % 5] for i in range(4000)]
    sources = [sample(i % 30, list(DTYPES.values())[i % 4], seed=i) for i in range(4000)]
    device_tensors = on_device(sources)
    factors = torch.tensor(coefficients, dtype=torch.float64, device=CUDA)
    _native.scale(_native.TensorList(device_tensors, False), factors, True)
    for source, scaled, coefficient in zip(sources, device_tensors, coefficients, strict=True):
        assert_same_values(scaled.cpu(), reference.scale(source, coefficient))


@pytest.mark.parametrize("max_norm", [0.1, 1e9, math.inf])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_clipping_equals_the_cpu(max_norm, norm_type):
    on_cpu, on_cuda = parameters(torch.device("cpu")), parameters()
    expected = gradstat.clip_grad_norm_(on_cpu, max_norm, norm_type)
    norm = gradstat.clip_grad_norm_(on_cuda, max_norm, norm_type)
    assert norm.device.type == "cuda"
    assert norm.item() == pytest.approx(expected.item(), rel=2 * TOLERANCE)
    for theirs, ours in zip(on_cpu, on_cuda, strict=True):
        if theirs.grad is not None:
            assert_near(ours.grad, theirs.grad)


def test_a_norm_of_inf_zeros_and_a_norm_of_nan_leaves():
    for value, factor in ((math.inf, 0.0), (math.nan, 1.0)):
        listed = parameters()
        listed[1].grad[5] = value
        before = [p.grad.clone() for p in listed if p.grad is not None]
        gradstat.clip_grad_norm_(listed, 1.0)
        for p, kept in zip(listed, before, strict=False):
            assert_same_values(p.grad.cpu(), reference.scale(kept.cpu(), factor))
