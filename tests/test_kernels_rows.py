"""Rows and dead rows, and tensors in every order and spacing of memory."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from kernel_calls import DTYPES, assert_table, run_moments, sample
from torch import Tensor

import gradstat

pytestmark = pytest.mark.usefixtures("one_torch_thread")

DEAD_ROWS = reference.COLUMNS.index("dead_rows")

# Rows around a chunk of 65536 elements: many in one, one in several, and across the limits.
SHAPES = [
    (1,), (5,), (70_000,),
    (1, 1), (1, 7), (7, 1), (3, 5), (64, 64), (700, 100), (65_537, 2), (2, 65_536), (3, 65_537),
    (2, 200_000), (1, 70_000), (70_000, 1),
    (8, 4, 3, 3), (64, 32, 3, 3), (300, 16, 5, 5), (2, 3, 200, 200),
]  # fmt: skip


def with_dead_rows(tensor: Tensor) -> Tensor:
    """Kill every third row and the last one; leave others a single living element."""
    tensor[2::3] = 0
    tensor[-1] = -0.0
    if tensor.dim() > 1 and tensor.shape[0] > 4:
        tensor[1] = 0
        tensor[1].view(-1)[-1] = 1
        tensor[3] = 0
        tensor[3].view(-1)[0] = -1
    return tensor


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_dead_rows_of_contiguous_tensors(dtype, shape):
    tensor = with_dead_rows(sample(math.prod(shape), dtype).view(shape))
    tensors = [tensor, torch.zeros_like(tensor), torch.ones_like(tensor)]
    table = run_moments(tensors, threads=2).table
    assert_table(table, tensors)
    assert table[1, DEAD_ROWS] == shape[0]
    assert table[2, DEAD_ROWS] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e-45])
def test_a_row_with_one_element_that_is_not_zero_lives(cpu_variant, value):
    tensors = []
    for shape, position in [((3, 50), 75), ((3, 70_000), 139_999), ((700, 100), 65_499)]:
        tensor = torch.zeros(shape)
        tensor.view(-1)[position] = value
        tensors.append(tensor)
    table = run_moments(tensors).table
    assert_table(table, tensors)
    assert table[:, DEAD_ROWS].tolist() == [2, 2, 699, 703]


def test_rows_at_the_limit_of_a_chunk():
    # 655 rows of 100 make a chunk: the last of one and the first of the next.
    tensors = []
    for dead in ([654], [655], [654, 655], [1309, 1310], list(range(655))):
        tensor = torch.ones(2000, 100)
        tensor[dead] = 0
        tensors.append(tensor)
    table = run_moments(tensors, threads=2).table
    assert_table(table, tensors)
    assert table[:-1, DEAD_ROWS].tolist() == [1, 1, 2, 2, 655]


def test_a_long_row_whose_parts_are_not_all_dead_lives():
    tensor = torch.ones(4, 200_000)
    tensor[0, :100_000] = 0
    tensor[1, 150_000:] = 0
    tensor[2] = 0
    assert run_moments([tensor]).table[0, DEAD_ROWS] == 1


ZERO_SIZED = [(0,), (0, 0), (0, 3), (3, 0), (2, 0, 3), (2, 3, 0), (0, 3, 4), (1, 0), (5, 1, 0, 1)]


@pytest.mark.parametrize("shape", ZERO_SIZED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_dimension_of_size_zero(dtype, shape):
    tensors = [torch.ones(4, dtype=dtype), torch.empty(shape, dtype=dtype)]
    assert_table(run_moments(tensors).table, tensors)
    transposed = [tensors[1].permute(*reversed(range(len(shape))))]
    assert_table(run_moments(transposed).table, transposed)


def dense_in_any_order() -> dict[str, Tensor]:
    image = with_dead_rows(sample(6 * 4 * 5 * 7, torch.float32).view(6, 4, 5, 7))
    volume = sample(2 * 3 * 4 * 5 * 6, torch.float32).view(2, 3, 4, 5, 6)
    matrix = with_dead_rows(sample(600 * 300, torch.float32).view(600, 300))
    column_dead = matrix.clone()
    column_dead[:, 7] = 0
    column_dead[:, 299] = -0.0
    return {
        "transposed": sample(35, torch.float32).view(5, 7).t(),
        "transposed-dead": column_dead.t(),
        "transposed-tall": with_dead_rows(sample(140_000, torch.float32).view(70_000, 2)).t(),
        "channels-last": image.to(memory_format=torch.channels_last),
        "channels-last-3d": volume.to(memory_format=torch.channels_last_3d),
        "permuted-1023": image.permute(1, 0, 2, 3),
        "permuted-1032": image.permute(1, 0, 3, 2),
        "permuted-3210": image.permute(3, 2, 1, 0),
        "permuted-2031": image.permute(2, 0, 3, 1),
        "size-1-dims": matrix[:1].t().unsqueeze(1),
        "one-row-of-a-transposed": matrix.t()[:, :1],
        "zeros-transposed": torch.zeros(300, 500).t(),
    }


@pytest.mark.parametrize("tensor", dense_in_any_order().values(), ids=dense_in_any_order())
def test_dense_tensors_in_any_order(cpu_variant, tensor):
    tensors = [tensor, tensor.double(), tensor.bfloat16()]
    assert_table(gradstat.tensor_stats(tensors).data, tensors)


def views() -> dict[str, Tensor]:
    vector = sample(1000, torch.float32)
    matrix = with_dead_rows(sample(80 * 90, torch.float32).view(80, 90))
    numbers = torch.complex(sample(600, torch.float32), sample(600, torch.float32, seed=1))
    huge = torch.tensor([3e38 + 3e38j, complex(math.nan, 1), complex(math.inf, -2), 0j])
    return {
        "every-third": vector[::3],
        "columns": matrix[:, 10:20],
        "every-second-column": matrix[:, ::2],
        "rows": matrix[10:20],
        "every-second-row": matrix[::2],
        "slice-transposed": matrix[3:50, 4:60].t(),
        "diagonal": matrix.diagonal(),
        "expanded-rows": vector.expand(7, 1000),
        "expanded-columns": vector[:, None].expand(1000, 5),
        "expanded-scalar": torch.tensor(0.0).expand(4, 6),
        "overlapping": vector.as_strided((100, 20), (3, 1)),
        "unfolded": vector.unfold(0, 10, 3),
        "empty-slice": matrix[:, 5:5],
        "negative": torch._neg_view(vector),
        "negative-imaginary": numbers.conj().imag,
        "negative-one-element": numbers[:1].conj().imag,
        "real-part": numbers.real,
        "complex": numbers,
        "complex-conjugate": numbers.conj(),
        "complex-transposed": numbers.view(20, 30).t(),
        "complex-beyond-fp32": huge,
        "complex128": numbers.to(torch.complex128),
        "requires-grad": vector.clone().requires_grad_(),
        "parameter": torch.nn.Parameter(matrix.clone()),
        "not-a-leaf": vector.clone().requires_grad_() * 2,
    }


@pytest.mark.parametrize("tensor", views().values(), ids=views())
def test_views_and_what_no_kernel_reads_as_it_is(tensor):
    beside = sample(100, torch.float32)
    tensors = [beside, tensor, None, beside]
    table = gradstat.tensor_stats(tensors, histogram=True)
    assert_table(table.data, tensors)
    assert (table.histogram_data.numpy() == reference.histogram(tensors)).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_strided_views_of_every_dtype(cpu_variant, kind):
    base = sample(64 * 64, kind).view(64, 64)
    tensors = [base[::2, 1::3], base.t()[1:], base.as_strided((9, 5), (1, 9))]
    assert_table(gradstat.tensor_stats(tensors).data, tensors)
