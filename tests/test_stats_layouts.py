"""Statistics of gradients that no kernel reads as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from gradients import Untouched, parameter
from kernel_calls import assert_table, sample
from stats_models import row_of
from torch import Tensor, nn

from gradstat import grad_stats, tensor_stats

INF, NAN = math.inf, math.nan


def base() -> Tensor:
    return sample(2 * 4 * 6 * 8, torch.float32).view(2, 4, 6, 8)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: base().view(32, 12).t(),
    "permuted": lambda: base().permute(2, 0, 3, 1),
    "channels_last": lambda: base().to(memory_format=torch.channels_last),
    "every_second": lambda: base().flatten()[::2],
    "column": lambda: base().view(32, 12)[:, 3],
    "narrowed": lambda: base()[:, 1:3, :, 2:5],
    "expanded": lambda: torch.tensor([[1.5], [0.0], [-2.0]]).expand(3, 7),
    "expanded_scalar": lambda: torch.tensor(2.0).expand(4, 5),
    "windows_that_overlap": lambda: torch.arange(9.0).unfold(0, 4, 1),
    "offset_in_storage": lambda: base().flatten()[3:],
    "bf16_column": lambda: base().bfloat16().view(32, 12)[:, 3],
    "negated_imag": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "negated_scalar": lambda: torch.tensor(1 + 2j).conj().imag,
    "negated_dense": lambda: torch._neg_view(base()),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(make):
    tensor = make()
    params = [parameter(torch.ones(3)), parameter(tensor)]
    untouched = Untouched(params)
    table = grad_stats(params, histogram=True)
    untouched.check()
    assert_table(table.data, [torch.ones(3), tensor])
    assert (table.histogram_data.numpy() == reference.histogram([torch.ones(3), tensor])).all()


COMPLEX: dict[str, Callable[[], Tensor]] = {
    "complex64": lambda: torch.tensor([[3 + 4j, 0j], [0j, 0j]]),
    "beyond_the_range_of_fp32": lambda: torch.tensor([3e38 + 3e38j, 1e-45 + 0j]),
    "complex128": lambda: torch.tensor([1e200 + 1e200j, -1j], dtype=torch.complex128),
    "conjugate_view": lambda: torch.tensor([[1 + 2j, 3j], [0j, 5 + 0j]]).conj(),
    "conjugate_transpose": lambda: torch.tensor([[1 + 2j, 3j, 1j], [0j, 5 + 0j, 0j]]).mH,
    "non_finite": lambda: torch.tensor([complex(NAN, 1), complex(INF, 1), 1 + 1j]),
}


@pytest.mark.parametrize("make", COMPLEX.values(), ids=COMPLEX)
def test_complex_gradients_by_magnitude(make):
    params = [parameter(make())]
    untouched = Untouched(params)
    assert_table(grad_stats(params).data, [make()])
    untouched.check()


def coo(indices: list[list[int]], values: list[Any], size: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor(indices), torch.tensor(values), size, check_invariants=True
    )


# Sparse tensor; its coalesced values; its rows, and how many of them are dead.
SPARSE: dict[str, tuple[Callable[[], Tensor], list[float], int, int]] = {
    "rows_of_a_word_table": (
        lambda: coo([[4, 1]], [[1.0, 2.0], [0.0, -3.0]], (6, 2)), [0.0, -3.0, 1.0, 2.0], 6, 4),
    "uncoalesced": (lambda: coo([[1, 1, 3]], [1.0, 2.0, 4.0], (5,)), [3.0, 4.0], 5, 3),
    "sums_to_zero": (lambda: coo([[1, 1, 3]], [1.0, -1.0, 4.0], (5,)), [0.0, 4.0], 5, 4),
    "two_sparse_dims": (
        lambda: coo([[0, 0, 2], [1, 2, 0]], [1.0, 2.0, 4.0], (4, 3)), [1.0, 2.0, 4.0], 4, 2),
    "stored_row_of_zeros": (lambda: coo([[0, 2]], [[0.0, 0.0], [1.0, 0.0]], (3, 2)), [0, 0, 1, 0],
                            3, 2),
    "nan_is_not_dead": (lambda: coo([[0, 2]], [[NAN], [0.0]], (4, 1)), [NAN, 0.0], 4, 3),
    "nothing_stored": (
        lambda: torch.zeros(4, 3).to_sparse(1), [], 4, 4),
    "no_sparse_dim": (
        lambda: torch.sparse_coo_tensor(torch.zeros(0, 1, dtype=torch.long),
                                        torch.tensor([[1.0, 0.0, 2.0]]), (3,),
                                        check_invariants=True), [1.0, 0.0, 2.0], 3, 1),
    "complex": (lambda: coo([[1]], [3 + 4j], (4,)), [5.0], 4, 3),
    "csr": (lambda: torch.tensor([[0.0, 2, 0], [0, 0, 0], [1, 0, 3]]).to_sparse_csr(), [2, 1, 3], 3,
            1),
    "csc": (lambda: torch.tensor([[0.0, 2, 0], [0, 0, 0], [1, 0, 3]]).to_sparse_csc(), [1, 2, 3], 3,
            1),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta")
@pytest.mark.parametrize(("make", "values", "rows", "dead"), SPARSE.values(), ids=SPARSE)
def test_sparse_tensors(make, values, rows, dead):
    tensor, dense = make(), torch.ones(2, 2)
    expected = reference.moments([dense, torch.tensor(values, dtype=torch.float64)])
    expected[1, 9:11] = rows, dead
    expected[2, 9:11] = 2 + rows, dead
    table = tensor_stats([dense, tensor], histogram=True)
    assert_table(table.data, [dense, tensor], expected, tolerance=1e-12)
    counts = reference.histogram([dense, torch.tensor(values, dtype=torch.float64)])
    assert (table.histogram_data.numpy() == counts).all()


def test_sparse_embedding_in_a_module():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
    model(torch.tensor([[2, 2, 5]])).sum().backward()
    untouched = Untouched(model.parameters())
    assert not model[0].weight.grad.is_coalesced()
    row = grad_stats(model)["0.weight"]
    untouched.check()
    assert (row.rows, row.dead_rows, row.numel) == (10, 8, 8)
    assert row.dead_row_fraction == 0.8
    assert row.l2 == pytest.approx(model[0].weight.grad.to_dense().norm().item(), rel=1e-6)


class Marked(Tensor):
    """A subclass that has memory of its own and changes nothing."""


def test_subclasses_with_plain_memory():
    grad = torch.tensor([3.0, 4.0])
    assert row_of(grad.as_subclass(Marked)).l2 == 5.0
    assert row_of(nn.Buffer(grad)).l2 == 5.0
    assert grad_stats([type("Own", (nn.Parameter,), {})(grad)]).missing == ("param0",)
