"""Clipping gradients of every kind: sparse, overlapping, with a graph; clip_grad_value_."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from gradients import Untouched, bytes_of, clones, parameter, parameters
from kernel_calls import DTYPES, sample
from torch import Tensor, nn

from gradstat import (
    ArgumentTypeError,
    clip_grad_norm_,
    clip_grad_value_,
    get_total_norm,
)

INF, NAN = math.inf, math.nan


# ---- sparse, overlapping, and gradients with a graph ---------------------------------------------


def test_sparse_gradients():
    model = nn.Sequential(nn.Embedding(6, 2, sparse=True), nn.Linear(2, 1))
    model(torch.tensor([[1, 1, 4]])).sum().backward()
    dense = [p.grad.to_dense().clone() for p in model.parameters()]
    norm = clip_grad_norm_(model.parameters(), 0.1)
    peer = parameters(dense)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(peer, 0.1))
    for p, expected in zip(model.parameters(), peer, strict=True):
        torch.testing.assert_close(p.grad.to_dense(), expected.grad)
    assert model[0].weight.grad.is_sparse


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_csr_gradients():
    weight = parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]]).to_sparse_csr())
    assert clip_grad_norm_([weight], 1.0) == 5.0
    torch.testing.assert_close(weight.grad.values(), torch.tensor([0.6, 0.8]))


OVERLAPPING: dict[str, Callable[[Sequence[nn.Parameter]], object]] = {
    "clip_grad_norm_": lambda params: clip_grad_norm_(params, 0.1),
    "norm_of_order_3": lambda params: clip_grad_norm_(params, 0.1, 3.0),
    "clip_grad_value_": lambda params: clip_grad_value_(params, 0.1),
}


@pytest.mark.parametrize("call", OVERLAPPING.values(), ids=OVERLAPPING)
def test_an_expanded_gradient_is_refused_before_anything_is_written(call):
    params = parameters([torch.ones(2), torch.ones(1).expand(3), torch.ones(4)[::2]])
    untouched = Untouched(params)
    with pytest.raises(ArgumentTypeError, match="expanded view of shape"):
        call(params)
    untouched.check()


def test_an_expanded_gradient_may_be_measured():
    params = parameters([torch.ones(1).expand(4)])
    assert clip_grad_norm_(params, INF) == 2.0
    assert clip_grad_norm_(params, 2.5) == 2.0
    assert get_total_norm([params[0].grad]) == 2.0


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_that_require_grad():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    weight.pow(3).sum().backward(create_graph=True)
    norm = clip_grad_norm_([weight], 1.0)
    assert not norm.requires_grad
    assert weight.grad.requires_grad
    torch.testing.assert_close(weight.grad.detach().norm(), torch.tensor(1.0))
    clip_grad_value_([weight], 0.25)
    torch.testing.assert_close(weight.grad.detach(), torch.tensor([3 / 153**0.5, 0.25]))
    weight.grad = None  # it and its graph hold each other


# ---- version counters: autograd must notice a write, and only a write ----------------------------

WRITTEN: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: torch.tensor([3.0, 4.0]),
    "strided": lambda: torch.tensor([3.0, 0.0, 4.0])[::2],
    "complex": lambda: torch.tensor([3 + 4j]),
    "conjugate_view": lambda: torch.tensor([3 + 4j]).conj(),
    "sparse": lambda: torch.tensor([3.0, 4.0]).to_sparse(),
}


@pytest.mark.parametrize("make", WRITTEN.values(), ids=WRITTEN)
def test_a_write_is_counted_and_a_look_is_not(make):
    weight = parameter(make())
    start = weight.grad._version
    clip_grad_norm_([weight], 10.0)
    get_total_norm([weight.grad])
    assert weight.grad._version == start
    clip_grad_norm_([weight], 1.0)
    assert weight.grad._version > start


def test_clamping_is_counted():
    weight = parameter(torch.tensor([3.0, 4.0]))
    clip_grad_value_([weight], INF)
    assert weight.grad._version == 0
    clip_grad_value_([weight], 1.0)
    assert weight.grad._version == 1


@pytest.mark.parametrize(
    "clip",
    [
        lambda p: clip_grad_norm_(p, 1.0),
        lambda p: nn.utils.clip_grad_norm_(p, 1.0),
        lambda p: clip_grad_value_(p, 1.0),
    ],
    ids=["clip_grad_norm_", "torch", "clip_grad_value_"],
)
def test_backward_through_a_clipped_gradient_raises(clip):
    weight = parameter(torch.tensor([3.0, 4.0]))
    scale = torch.ones(2, requires_grad=True)
    product = (scale * weight.grad).sum()  # saves the gradient
    clip([weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_backward_through_an_unclipped_gradient_works():
    weight = parameter(torch.tensor([3.0, 4.0]))
    scale = torch.ones(2, requires_grad=True)
    product = (scale * weight.grad).sum()
    clip_grad_norm_([weight], 10.0)  # torch multiplies by 1 and counts that as a write
    product.backward()
    assert scale.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_contexts(context):
    weight = parameter(torch.tensor([3.0, 4.0]))
    with context():
        assert clip_grad_norm_([weight], 1.0) == 5.0
        clip_grad_value_([weight], 0.7)
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.7]))


# ---- clip_grad_value_ ----------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.0, 0.1, 1, 1e-40, 1e4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_clamping_agrees_with_torch(dtype, limit):
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 0.1, -0.1, 1.0, 65504.0, -6e-8], dtype=dtype)
    grads = [sample(1001, dtype), special, sample(64, dtype)[::3], sample(20, dtype).view(4, 5).t()]
    ours, theirs = clones(grads), clones(grads)
    clip_grad_value_(ours, limit)
    nn.utils.clip_grad_value_(theirs, limit)
    for own, other in zip(ours, theirs, strict=True):
        assert bytes_of(own.grad.nan_to_num(77)) == bytes_of(other.grad.nan_to_num(77))
        assert torch.equal(own.grad.isnan(), other.grad.isnan())


def test_a_limit_beyond_the_dtype_changes_nothing():
    weight = parameter(torch.tensor([NAN, INF, -6e4], dtype=torch.float16))
    before = bytes_of(weight.grad)
    clip_grad_value_([weight], 1e6)  # torch raises here
    assert bytes_of(weight.grad) == before


def test_clamping_of_sparse_gradients():
    # An element is the sum of its entries: 1 + 2 is more than 2.5, though neither entry is.
    indices = torch.tensor([[0, 0, 2]])
    grad = torch.sparse_coo_tensor(
        indices, torch.tensor([1.0, 2.0, -4.0]), (3,), check_invariants=True
    )
    weight = parameter(grad)
    clip_grad_value_([weight], 2.5)
    assert weight.grad is grad
    assert grad.to_dense().tolist() == [2.5, 0.0, -2.5]


def test_clamping_of_complex_gradients_is_refused():
    params = parameters([torch.full((2,), 9.0), torch.tensor([3 + 4j])])
    untouched = Untouched(params)
    with pytest.raises(ArgumentTypeError, match="real gradients"):
        clip_grad_value_(params, 1.0)
    untouched.check()


def test_a_tensor_without_a_gradient_is_passed_over_as_in_torch():
    weights = nn.Linear(2, 2).state_dict().values()
    untouched = [bytes_of(weight) for weight in weights]
    assert clip_grad_norm_(weights, 1e-3) == 0.0
    clip_grad_value_(weights, 1e-3)
    assert [bytes_of(weight) for weight in weights] == untouched


@pytest.mark.parametrize("threads", [1, 2])
def test_a_gradient_that_two_parameters_share_is_written_once(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(50):
            shared = torch.ones(65536)
            first, second = (nn.Parameter(torch.zeros(65536)) for _ in range(2))
            first.grad = second.grad = shared
            norm = clip_grad_norm_([first, second], 1.0)
            assert norm == pytest.approx(math.sqrt(2 * 65536))  # both count, as in torch
            assert torch.equal(shared, torch.full_like(shared, shared[0].item()))
            assert shared[0] == pytest.approx(1 / (norm.item() + 1e-6))
    finally:
        torch.set_num_threads(before)
