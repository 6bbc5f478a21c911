"""clip_grad_norm_ and get_total_norm: torch's meaning, and where ours differs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from gradients import Untouched, clones, parameter, parameters
from kernel_calls import sample
from torch import Tensor, nn

from gradstat import (
    NonFiniteNormError,
    clip_grad_norm_,
    clip_grad_value_,
    get_total_norm,
)

INF, NAN = math.inf, math.nan
ORDERS = [1.0, 2.0, INF, 3.0, 0.5, -INF, 0.0, 4.0, -1.0]

# Relative difference to torch: its sums run in the dtype of the gradients.
PEER_TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
    torch.complex64: 1e-5,
}


def gradients() -> list[Tensor]:
    """Gradients of the shapes of a small network, with norms from 0.1 to 10."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(6, 3, 3, 3), (6,), (40, 70), (70,), (5000,), (1,), ()]
    return [
        torch.randn(shape, generator=generator) * 0.3 ** (i % 4) for i, shape in enumerate(shapes)
    ]


def clip_both(grads: Sequence[Tensor], max_norm: float, **options: object) -> None:
    """Clip by torch and by gradstat, and check that norms and gradients agree."""
    ours, theirs = clones(grads), clones(grads)
    norm = clip_grad_norm_(ours, max_norm, **options)
    peer = nn.utils.clip_grad_norm_(theirs, max_norm, **options)
    widest = max(PEER_TOLERANCE[grad.dtype] for grad in grads)
    torch.testing.assert_close(norm.double(), peer.double(), rtol=widest, atol=0)
    for own, other in zip(ours, theirs, strict=True):
        info = torch.finfo(own.grad.dtype)
        smallest = info.smallest_normal * info.eps
        torch.testing.assert_close(own.grad, other.grad, rtol=widest, atol=smallest)
        assert own.grad.stride() == other.grad.stride()


# ---- torch's documented behaviour ----------------------------------------------------------------


@pytest.mark.parametrize("function", ["clip_grad_norm_", "get_total_norm", "clip_grad_value_"])
def test_signatures_are_those_of_torch(function):
    import gradstat

    ours = inspect.signature(getattr(gradstat, function))
    theirs = inspect.signature(getattr(nn.utils, function))
    assert list(ours.parameters) == list(theirs.parameters)
    assert [p.default for p in ours.parameters.values()] == [
        p.default for p in theirs.parameters.values()
    ]
    assert [p.kind for p in ours.parameters.values()] == [
        p.kind for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0.0], ids=["above", "below", "zero"])
@pytest.mark.parametrize("order", ORDERS)
def test_clipping_agrees_with_torch(order, max_norm):
    clip_both(gradients(), max_norm, norm_type=order)


@pytest.mark.parametrize("order", ORDERS)
def test_norms_agree_with_torch(order):
    grads = [grad.double() for grad in gradients()]
    norm = get_total_norm(grads, order)
    torch.testing.assert_close(norm, nn.utils.get_total_norm(grads, order), rtol=1e-13, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_norms_are_those_of_one_vector(order):
    grads = [torch.tensor([[1.0, -2.0]]), torch.tensor([3.0]), torch.tensor(-0.5)]
    one = torch.tensor([1.0, -2.0, 3.0, -0.5], dtype=torch.float64)
    expected = torch.linalg.vector_norm(one, order).item()
    if order == 0:  # torch counts the tensors that are not zero, not their elements
        expected = 3.0
    assert get_total_norm(grads, order).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("order", [1.0, 2.0, INF, 3.0])
@pytest.mark.parametrize("dtype", PEER_TOLERANCE, ids=str)
def test_dtypes_agree_with_torch(dtype, order):
    clip_both([grad.to(dtype) for grad in gradients()], 0.5, norm_type=order)


@pytest.mark.parametrize("order", [1.0, 2.0, INF, 3.0])
def test_mixed_dtypes_agree_with_torch(order):
    grads = [grad.to(dtype) for grad, dtype in zip(gradients(), PEER_TOLERANCE, strict=False)]
    clip_both(grads, 0.5, norm_type=order)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: sample(48, torch.float32).view(6, 8).t(),
    "channels_last": lambda: (
        sample(384, torch.float32).view(2, 4, 6, 8).to(memory_format=torch.channels_last)
    ),
    "every_second": lambda: sample(48, torch.float32)[::2],
    "narrowed": lambda: sample(48, torch.float32).view(6, 8)[1:4, 2:5],
    "bf16_every_second": lambda: sample(48, torch.bfloat16)[::2],
    "conjugate_view": lambda: torch.tensor([3 + 4j, 12j]).conj(),
    "negated": lambda: torch.tensor([3 + 4j, 12j]).conj().imag,
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_are_written_where_they_are(make):
    grad, beside = make(), torch.full((3,), 100.0)
    expected = make() * (50 / math.hypot(grad.abs().double().norm(), beside.norm()))
    params = parameters([grad, beside])
    clip_grad_norm_(params, 50.0)
    assert params[0].grad is grad
    torch.testing.assert_close(grad, expected, rtol=PEER_TOLERANCE.get(grad.dtype, 1e-5), atol=0)


def test_memory_beside_a_view_is_not_touched():
    storage = torch.ones(12)
    storage[1::2] = 7.0
    clip_grad_norm_([parameter(storage[::2])], 0.1)
    assert storage[1::2].tolist() == [7.0] * 6
    assert storage[::2].norm().item() == pytest.approx(0.1, rel=1e-5)


def test_max_norm_equal_to_the_norm_clips_by_the_guard_alone():
    # The coefficient is max_norm / (norm + 1e-6), so that 5 / 5.000001 remains.
    weight = parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    assert clip_grad_norm_([weight], 5.0) == 5.0
    assert weight.grad.tolist() == [3 * (5 / 5.000001), 4 * (5 / 5.000001)]


@pytest.mark.parametrize(
    "max_norm",
    [1, 1.0, True, np.float32(1), np.float64(1), np.int64(1), torch.tensor(1.0), torch.tensor([1])],
    ids=lambda value: f"{type(value).__name__}_{getattr(value, 'dtype', '')}",
)
def test_max_norm_as_any_number(max_norm):
    weight = parameter(torch.tensor([3.0, 4.0]))
    clip_grad_norm_([weight], max_norm)
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("order", [2, np.float32(2), torch.tensor(2.0), "2"], ids=repr)
def test_norm_type_as_any_number(order):
    assert get_total_norm([torch.tensor([3.0, 4.0])], order) == 5.0


def test_norm_type_inf_as_a_word():
    assert get_total_norm([torch.tensor([3.0, -4.0])], "inf") == 4.0


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_is_accepted(foreach):
    weight = parameter(torch.tensor([3.0, 4.0]))
    assert clip_grad_norm_([weight], 1.0, 2.0, False, foreach) == 5.0
    assert get_total_norm([weight.grad], foreach=foreach).item() == pytest.approx(1)
    clip_grad_value_([weight], 0.1, foreach)


ARGUMENTS: dict[str, Callable[[list[nn.Parameter]], object]] = {
    "list": lambda params: params,
    "generator": lambda params: (p for p in params),
    "pairs": lambda params: [(f"layer{i}", p) for i, p in enumerate(params)],
    "dict": lambda params: {f"layer{i}": p for i, p in enumerate(params)},
    "dict_values": lambda params: dict(enumerate(params)).values(),
}


@pytest.mark.parametrize("argument", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments(argument):
    params = [*parameters([torch.tensor([3.0]), torch.tensor([4.0])]), parameter(None)]
    assert clip_grad_norm_(argument(params), 1.0) == 5.0
    assert params[0].grad.item() == pytest.approx(0.6, rel=1e-6)
    clip_grad_value_(argument(params), 0.25)
    assert [p.grad.item() for p in params[:2]] == [0.25, 0.25]
    assert params[2].grad is None


def test_a_single_tensor():
    weight = parameter(torch.tensor([3.0, 4.0]))
    assert clip_grad_norm_(weight, 1.0) == 5.0
    assert get_total_norm(weight.grad).item() == pytest.approx(1.0)
    clip_grad_value_(weight, 0.7)
    assert weight.grad.tolist() == pytest.approx([0.6, 0.7])


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_to_clip_has_norm_zero(order):
    for params in ([], [parameter(None)], [parameter(None)] * 3):
        norm = clip_grad_norm_(params, 1.0, order)
        assert (norm.item(), norm.shape, norm.dtype) == (0.0, (), torch.float32)
        clip_grad_value_(params, 1.0)
    assert get_total_norm([], order) == 0


@pytest.mark.parametrize("order", ORDERS)
def test_tensors_without_elements_count_for_nothing(order):
    grads = [torch.zeros(0, 3), torch.tensor([3.0, 4.0]), torch.zeros(2, 0)]
    assert get_total_norm(grads, order) == get_total_norm(grads[1:2], order)
    assert get_total_norm(grads[:1], order) == 0.0


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16], torch.float32),
        ([torch.float16], torch.float32),
        ([torch.float32], torch.float32),
        ([torch.complex64], torch.float32),
        ([torch.float32, torch.float64], torch.float64),
        ([torch.complex128], torch.float64),
        ([torch.float32, torch.complex128], torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", [2.0, 3.0])
def test_dtype_and_device_of_the_norm(dtypes, expected, order):
    norm = clip_grad_norm_(parameters([torch.ones(2, dtype=dtype) for dtype in dtypes]), 1.0, order)
    assert (norm.dtype, norm.shape, norm.device.type) == (expected, (), "cpu")
    assert not norm.requires_grad


def test_a_norm_of_bf16_gradients_is_not_rounded_to_bf16():
    grads = [torch.tensor([1.0, 2.0], dtype=torch.bfloat16)]
    assert get_total_norm(grads).item() == pytest.approx(math.sqrt(5), rel=1e-7)


def test_a_repeated_parameter_counts_once_and_is_scaled_once():
    weight, other = parameters([torch.tensor([3.0]), torch.tensor([4.0])])
    assert clip_grad_norm_([weight, other, weight], 1.0) == 5.0
    assert (weight.grad.item(), other.grad.item()) == pytest.approx((0.6, 0.8), rel=1e-6)


def test_more_parameters_than_a_short_list():
    grads = [sample(1 + i % 23, torch.float32, seed=i) for i in range(700)]
    grads[5] = torch.tensor([1 + 2j]).conj().imag.clone()
    clip_both(grads, 1.0)


def test_a_model_and_its_clone_train_alike():
    def train(clip: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        data = torch.randn(20, 32, 4, dtype=torch.float64)
        for batch in data:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            clip(model.parameters(), 0.05)
            optimizer.step()
        return list(model.parameters())

    for ours, theirs in zip(train(clip_grad_norm_), train(nn.utils.clip_grad_norm_), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# ---- NaN, Inf and the ends of the range ----------------------------------------------------------

BAD = {"nan": NAN, "inf": INF, "minus_inf": -INF}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("order", [1.0, 2.0, INF, 3.0])
def test_error_if_nonfinite_changes_nothing(order, bad):
    params = parameters([torch.ones(3), torch.tensor([1.0, bad]), torch.ones(2, dtype=torch.half)])
    untouched = Untouched(params)
    with pytest.raises(NonFiniteNormError, match="order"):
        clip_grad_norm_(params, 1.0, order, error_if_nonfinite=True)
    with pytest.raises(RuntimeError):  # as torch's error
        get_total_norm([p.grad for p in params], order, error_if_nonfinite=True)
    untouched.check()


def test_error_if_nonfinite_lets_finite_gradients_pass():
    weight = parameter(torch.tensor([3.0, 4.0]))
    assert clip_grad_norm_([weight], 1.0, error_if_nonfinite=True) == 5.0
    assert weight.grad.norm().item() == pytest.approx(1.0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_norms_of_non_finite_gradients_are_torchs(order, bad):
    grads = [torch.tensor([3.0, bad]), torch.tensor([1.0, 2.0])]
    expected = nn.utils.get_total_norm(grads, order)
    torch.testing.assert_close(get_total_norm(grads, order), expected, equal_nan=True)


@pytest.mark.parametrize("order", [1.0, 2.0, INF, 3.0])
def test_a_nan_norm_leaves_the_gradients(order):
    # torch multiplies by NaN: one bad element would spoil every parameter of the model.
    params = parameters([torch.tensor([300.0, 400.0]), torch.tensor([1.0, NAN])])
    untouched = Untouched(params)
    assert clip_grad_norm_(params, 1.0, order).isnan()
    untouched.check()


@pytest.mark.parametrize("order", [1.0, 2.0, INF, 3.0])
def test_an_inf_norm_zeros_the_gradients(order):
    # torch leaves NaN where Inf was: 0 * Inf.
    grads = [
        torch.tensor([300.0, 400.0]),
        torch.tensor([1.0, -INF]),
        torch.tensor([INF, 1, 2, 3])[::2],
        torch.tensor([complex(INF, 1)]),
        torch.tensor([0.0, INF]).to_sparse(),
        torch.ones(2, dtype=torch.bfloat16),
    ]
    params = parameters(grads)
    assert clip_grad_norm_(params, 1.0, order) == INF
    for p in params:
        assert (p.grad.to_dense() == 0).all()


@pytest.mark.parametrize("values", [[3.0, 4.0], [1.0, INF], [NAN, 1.0], [1e30, 3e38]], ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_max_norm_inf_only_measures(order, values):
    # torch turns a gradient with one Inf into NaN throughout: Inf / Inf.
    params = parameters([torch.tensor(values), torch.ones(2)])
    untouched = Untouched(params)
    clip_grad_norm_(params, INF, order)
    untouched.check()


@pytest.mark.parametrize("order", [1.0, 2.0, INF, 3.0, 0.5, 4.0, -INF])
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1e-30, torch.float32),
        (1e25, torch.float32),
        (1e300, torch.float64),
        (1e-300, torch.float64),
    ],
    ids=["1e-30_fp32", "1e25_fp32", "1e300_fp64", "1e-300_fp64"],
)
def test_norms_over_the_whole_range(order, scale, dtype):
    grads = [
        torch.tensor([3.0, 2.0], dtype=dtype) * scale,
        torch.tensor([1.5], dtype=dtype) * scale,
    ]
    unscaled = torch.tensor([3.0, 2.0, 1.5], dtype=torch.float64)
    expected = torch.linalg.vector_norm(unscaled, order).item() * scale
    assert get_total_norm(grads, order).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("order", [1.0, 2.0, INF, 3.0])
@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e25, torch.float32), (1e300, torch.float64)], ids=["fp32", "fp64"]
)
def test_clipping_of_huge_gradients(order, scale, dtype):
    params = parameters([torch.tensor([3.0, 4.0], dtype=dtype) * scale])
    clip_grad_norm_(params, 1.0, order)
    expected = torch.tensor([3.0, 4.0], dtype=dtype)
    expected /= torch.linalg.vector_norm(expected, order)
    torch.testing.assert_close(params[0].grad, expected, rtol=1e-6, atol=0)


def test_tiny_gradients_are_not_scaled_up():
    weight = parameter(torch.tensor([3e-30, 4e-30]))
    untouched = Untouched([weight])
    assert clip_grad_norm_([weight], 1.0).item() == pytest.approx(5e-30)
    untouched.check()


def test_a_norm_beyond_fp32_still_clips():
    # The norm is 6e38: Inf as fp32, and finite where the coefficient is computed.
    weight = parameter(torch.full((4,), 3e38))
    assert clip_grad_norm_([weight], 1.0) == INF
    torch.testing.assert_close(weight.grad, torch.full((4,), 0.5))
