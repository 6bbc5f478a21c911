"""The plain torch operations that stand in for the kernels, held against the kernels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import reference
import torch
from gradients import Untouched, bytes_of, parameter, parameters
from kernel_calls import DTYPES, assert_table, sample
from torch import Tensor, nn

import gradstat
from gradstat import _fallback, _kernels, _native, clip_grad_norm_, clip_grad_value_, get_total_norm

INF, NAN = math.inf, math.nan


def with_fp64(values: Sequence[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype)


TENSORS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "plain": lambda dtype: sample(1000, dtype).view(50, 20),
    "all_zero": lambda dtype: torch.zeros(4, 3, dtype=dtype),
    "dead_rows": lambda dtype: torch.tensor([[0.0, 0], [1, 0], [-0.0, 0]], dtype=dtype),
    "nan_and_inf": lambda dtype: torch.tensor([[NAN, 1, INF], [-INF, 0, -2]], dtype=dtype),
    "nan_alone": lambda dtype: torch.tensor([NAN], dtype=dtype),
    "scalar": lambda dtype: torch.tensor(-3.0, dtype=dtype),
    "scalar_zero": lambda dtype: torch.tensor(0.0, dtype=dtype),
    "empty": lambda dtype: torch.zeros(0, dtype=dtype),
    "no_columns": lambda dtype: torch.zeros(3, 0, dtype=dtype),
    "no_rows": lambda dtype: torch.zeros(0, 3, dtype=dtype),
    "tiny": lambda dtype: torch.full((3,), torch.finfo(dtype).smallest_normal, dtype=dtype) / 4,
    "huge": lambda dtype: torch.full((3, 2), torch.finfo(dtype).max, dtype=dtype),
    "every_exponent": lambda dtype: with_fp64([2.0**e for e in range(-160, 161)], dtype),
    "transposed": lambda dtype: sample(60, dtype).view(6, 10).t(),
}


def native_moments(tensors: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    table, bins = _kernels.moments(_kernels.gather(tensors), histogram=True)
    assert bins is not None
    return table, bins


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
def test_moments_equal_those_of_the_kernels(make, dtype):
    tensors = [make(dtype), None, sample(33, dtype, seed=1)]
    table, bins = _fallback.moments(tensors, True)
    assert_table(table, tensors)
    native_table, native_bins = native_moments(tensors)
    assert_table(table, tensors, native_table.numpy(), tolerance=1e-6)
    assert bins is not None
    assert torch.equal(bins, native_bins)


def test_nothing_at_all():
    for tensors in ([], [None], [None, None]):
        table, bins = _fallback.moments(tensors, False)
        assert bins is None
        assert_table(table, tensors)


# ---- joining several devices --------------------------------------------------------------------


def split_by(tensors: Sequence[Tensor | None], owner: Sequence[int]) -> list[list[Tensor | None]]:
    """Return one list for each owner, with the tensors of the others missing."""
    return [
        [tensor if own == part else None for tensor, own in zip(tensors, owner, strict=True)]
        for part in sorted(set(owner))
    ]


def mixture() -> list[Tensor | None]:
    return [
        sample(100, torch.float32),
        torch.tensor([[NAN, 0.0], [0.0, 0.0]]),
        None,
        torch.tensor([1e300, -1e-300], dtype=torch.float64),
        torch.zeros(0),
        sample(40, torch.bfloat16),
    ]


@pytest.mark.parametrize(
    "owner", [[0, 0, 0, 0, 0, 0], [0, 1, 0, 1, 2, 2], [1, 0, 0, 0, 0, 0]], ids=str
)
def test_tables_of_several_devices_join_to_one(owner):
    tensors = mixture()
    parts = [_fallback.moments(part, True) for part in split_by(tensors, owner)]
    table, bins = _fallback.merge(parts)
    assert_table(table, tensors)
    assert (bins.numpy() == reference.histogram(tensors)).all()


def test_joining_without_histograms():
    parts = [_fallback.moments(part, False) for part in split_by(mixture(), [0, 1, 0, 1, 0, 1])]
    table, bins = _fallback.merge(parts)
    assert bins is None
    assert_table(table, mixture())


VECTORS = {
    "plain": [[3.0, -4.0], [12.0]],
    "zero": [[0.0], [0.0, 0.0]],
    "nan": [[3.0, NAN], [INF]],
    "inf": [[3.0], [-INF, 2.0]],
    "huge": [[3e300, 4e300], [1e300]],
    "tiny": [[3e-300, 4e-300], [1e-300]],
}


def wide(vectors: Sequence[Sequence[float]]) -> list[Tensor]:
    return [torch.tensor(vector, dtype=torch.float64) for vector in vectors]


@pytest.mark.parametrize("order", [1.0, 2.0, INF])
@pytest.mark.parametrize("vectors", VECTORS.values(), ids=VECTORS)
def test_norms_of_several_devices_join_to_one(vectors, order):
    totals = [_fallback.moments([vector], False)[0][-1] for vector in wide(vectors)]
    norm = _fallback.combined_norm(totals, _kernels.NORM_KINDS[order]).item()
    assert norm == pytest.approx(reference.norm(wide(vectors), order), rel=1e-14, nan_ok=True)


@pytest.mark.parametrize("order", [3.0, 0.5, 4.0, -INF, 0.0, -1.0])
@pytest.mark.parametrize("vectors", [VECTORS["plain"], VECTORS["nan"], VECTORS["inf"]], ids=str)
def test_general_norms_are_torchs(vectors, order):
    tensors: list[Tensor | None] = [wide(vectors)[0], None, torch.zeros(0), wide(vectors)[1]]
    table, _ = _fallback.moments(tensors, False)
    norms = _fallback.power_norms(tensors, table, order)
    assert len(norms) == 2
    expected = nn.utils.get_total_norm(wide(vectors), order)
    torch.testing.assert_close(_fallback.norm_of_norms(norms, order), expected, equal_nan=True)


@pytest.mark.parametrize("order", [3.0, 0.5, 4.0, -INF, -1.0])
@pytest.mark.parametrize("name", ["huge", "tiny"])
def test_general_norms_keep_the_range(name, order):
    exponent = {"huge": 1e300, "tiny": 1e-300}[name]
    unscaled = torch.tensor([3.0, 4.0, 1.0], dtype=torch.float64)
    expected = torch.linalg.vector_norm(unscaled, order).item() * exponent
    assert get_total_norm(wide(VECTORS[name]), order).item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("max_norm", [0.0, 1.0, 13.0, 100.0, INF], ids=str)
@pytest.mark.parametrize("norm", [0.0, 1e-300, 1.0, 13.0, 1e300, INF, NAN], ids=str)
def test_clip_coefficient(norm, max_norm):
    coefficient = _fallback.clip_coefficient(torch.tensor(norm, dtype=torch.float64), max_norm)
    assert coefficient.shape == (1,)
    expected = reference.clip_coefficient(norm, max_norm)
    assert coefficient.item() == pytest.approx(expected, rel=1e-15)


# ---- writing ------------------------------------------------------------------------------------


def as_strided_copy(tensor: Tensor) -> Tensor:
    """Return the values with a gap behind each: what no kernel writes."""
    return torch.stack([tensor, torch.full_like(tensor, 7.0)], dim=-1)[..., 0]


@pytest.mark.parametrize("coefficient", [0.25, 1.0, 1e-41, 1e-300, 0.0, NAN, 1 / 3])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_scaling_gives_the_bits_of_the_kernels(dtype, coefficient):
    tensor = torch.cat([sample(200, dtype), torch.tensor([1e30, 65504, -0.0, INF], dtype=dtype)])
    ours = as_strided_copy(tensor)
    _fallback.scale_(ours, torch.tensor(coefficient, dtype=torch.float64))
    native = tensor.clone()
    wanted = torch.tensor([coefficient], dtype=torch.float64)
    _kernels.scale(_kernels.gather([native]), wanted)
    assert bytes_of(ours) == bytes_of(native)


@pytest.mark.parametrize("limit", [0.0, 0.1, 1.0, 1e-30], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_clamping_gives_the_bits_of_the_kernels(dtype, limit):
    tensor = torch.cat([sample(200, dtype), torch.tensor([-0.0, INF, -INF], dtype=dtype)])
    ours, native = as_strided_copy(tensor), tensor.clone()
    _fallback.clamp_(ours, limit)
    _kernels.clamp(_kernels.gather([native]), limit)
    assert bytes_of(ours) == bytes_of(native)


COMPLEX: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: torch.tensor([3 + 4j, complex(1e38, -1)]),
    "conjugate_view": lambda: torch.tensor([3 + 4j, complex(1e38, -1)]).conj(),
    "non_finite": lambda: torch.tensor([complex(INF, 2), complex(NAN, 2)]),
    "conjugate_view_non_finite": lambda: torch.tensor([complex(INF, 2), complex(NAN, 2)]).conj(),
}


@pytest.mark.parametrize("coefficient", [0.5, 1.0, NAN, 0.0])
@pytest.mark.parametrize("make", COMPLEX.values(), ids=COMPLEX)
def test_scaling_takes_the_parts_of_complex_numbers_apart(make, coefficient):
    # Complex multiplication would make NaN of Inf: (Inf + 2i)(c + 0i) holds Inf * 0.
    tensor = make()
    factor = 1.0 if math.isnan(coefficient) else coefficient
    expected = [
        torch.zeros(2) if factor == 0 else part.resolve_neg() * factor
        for part in (make().real, make().imag)
    ]
    _fallback.scale_(tensor, torch.tensor(coefficient, dtype=torch.float64))
    for part, wanted in zip((tensor.real, tensor.imag), expected, strict=True):
        torch.testing.assert_close(part.resolve_neg(), wanted, equal_nan=True)


# ---- a device without a kernel ------------------------------------------------------------------


@pytest.fixture
def no_kernel(monkeypatch):
    """Treat the CPU as a device that has no kernel."""
    monkeypatch.setattr(_kernels.batch, "_kernel_device", lambda device: False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "gradstat has no kernel")
        yield


def all_kinds() -> list[Tensor | None]:
    return [
        sample(300, torch.float32).view(30, 10),
        None,
        sample(50, torch.bfloat16),
        torch.tensor([3e20, 4e20], dtype=torch.float64),
        torch.tensor([3 + 4j, 1j]),
        torch.arange(20.0).view(4, 5).t(),
        torch.zeros(0, 2),
        torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 0.0]]).to_sparse(1),
    ]


def outcome(call: Callable[[list[nn.Parameter]], Any]) -> tuple[Any, list[Tensor]]:
    params = parameters(all_kinds())
    result = call(params)
    return result, [p.grad.to_dense() for p in params if p.grad is not None]


def test_grad_stats_without_a_kernel(no_kernel, monkeypatch):
    params = parameters(all_kinds())
    untouched = Untouched(params)
    table = gradstat.grad_stats(params, histogram=True)
    untouched.check()
    monkeypatch.undo()
    expected = gradstat.grad_stats(params, histogram=True)
    assert_table(table.data, all_kinds(), expected.data.numpy(), tolerance=5e-7)
    assert torch.equal(table.histogram_data, expected.histogram_data)
    assert (table["param7"].rows, table["param7"].dead_rows) == (3, 2)


CALLS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    **{
        f"clip_norm_{order}": lambda params, order=order: clip_grad_norm_(params, 0.5, order)
        for order in (1.0, 2.0, INF, 3.0)
    },
    "clip_nothing": lambda params: clip_grad_norm_(params, INF),
    "clip_value": lambda params: clip_grad_value_(params[:4] + params[5:], 0.5),
    "total_norm": lambda params: get_total_norm([p.grad for p in params if p.grad is not None]),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_clipping_without_a_kernel(no_kernel, monkeypatch, call):
    result, grads = outcome(call)
    monkeypatch.undo()
    expected, expected_grads = outcome(call)
    if expected is not None:
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=0)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("order", [1.0, 2.0, INF, 3.0])
def test_non_finite_gradients_without_a_kernel(no_kernel, order, bad):
    params = parameters([torch.ones(2), torch.tensor([bad, 1.0])])
    untouched = Untouched(params)
    with pytest.raises(gradstat.NonFiniteNormError):
        clip_grad_norm_(params, 0.1, order, error_if_nonfinite=True)
    clip_grad_norm_(params, INF, order)
    untouched.check()
    clip_grad_norm_(params, 0.1, order)
    if math.isnan(bad):
        untouched.check()
    else:
        assert all((p.grad == 0).all() for p in params)


def test_an_expanded_gradient_is_refused_without_a_kernel(no_kernel):
    params = parameters([torch.ones(2), torch.ones(1).expand(3)])
    untouched = Untouched(params)
    with pytest.raises(gradstat.ArgumentTypeError, match=r"expanded view of shape \(3,\)"):
        clip_grad_norm_(params, 0.1)
    untouched.check()


def test_a_write_without_a_kernel_is_counted(no_kernel):
    weight = parameter(torch.tensor([3.0, 4.0]))
    clip_grad_norm_([weight], 10.0)
    assert weight.grad._version == 0
    clip_grad_norm_([weight], 1.0)
    assert weight.grad._version > 0


# ---- copies, and what has changed since ----------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("in_torch", [False, True])
def test_changes_are_the_differences_to_the_copies(monkeypatch, dtype, in_torch):
    if in_torch:
        monkeypatch.setattr(_native, "copies", lambda _: None)
    tensors = [
        sample(1000, dtype).view(50, 20),
        sample(6 * 5 * 4 * 4, dtype).view(6, 5, 4, 4).to(memory_format=torch.channels_last),
        torch.zeros(3, 0, dtype=dtype),
        torch.tensor([INF, NAN, 0.0, 1.0], dtype=dtype),
    ]
    before = [tensor.clone() for tensor in tensors]
    copies = _kernels.Copies(tensors)
    for tensor in tensors:
        tensor.mul_(1.25)
    changes = [new - old for new, old in zip(tensors, before, strict=True)]
    expected = _kernels.moments(_kernels.gather([*before, *changes]))[0]
    assert bytes_of(copies.changes(tensors)) == bytes_of(expected)


def test_tensors_of_other_shapes_have_no_changes():
    copies = _kernels.Copies([torch.zeros(2, 3)])
    assert copies.changes([torch.zeros(3, 2)]) is None
    assert copies.changes([torch.zeros(2, 3)] * 2) is None


# ---- several devices at once --------------------------------------------------------------------


@pytest.fixture
def two_devices(monkeypatch):
    """Part every batch as if half of its tensors lay on a device without a kernel."""
    gather = _kernels.gather

    def parted(items, **options):
        batch = gather(items, **options)
        (part,) = batch.parts
        batch.originals = batch.originals or list(part.objects)
        halves = split_by(part.objects, [index % 2 for index in range(batch.size)])
        sides = [{i: r for i, r in part.readable.items() if i % 2 == side} for side in (0, 1)]
        native = _native.TensorList(halves[0], False)
        batch.parts = [
            _kernels.Part(part.device, native, sides[0]),
            _kernels.Part(torch.device("cpu"), halves[1], sides[1]),
        ]
        return batch

    monkeypatch.setattr(_kernels, "gather", parted)


def test_grad_stats_over_two_devices(two_devices, monkeypatch):
    params = parameters(all_kinds())
    table = gradstat.grad_stats(params, histogram=True)
    monkeypatch.undo()
    expected = gradstat.grad_stats(params, histogram=True)
    assert table.device.type == "cpu"
    assert_table(table.data, all_kinds(), expected.data.numpy(), tolerance=1e-12)
    assert torch.equal(table.histogram_data, expected.histogram_data)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_clipping_over_two_devices(two_devices, monkeypatch, call):
    result, grads = outcome(call)
    monkeypatch.undo()
    expected, expected_grads = outcome(call)
    if expected is not None:
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=0)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=0)


# ---- the warning --------------------------------------------------------------------------------


def test_the_warning_says_what_happens_and_how_to_silence_it(monkeypatch):
    monkeypatch.setattr(_kernels.batch, "_kernel_device", lambda device: False)
    with pytest.warns(RuntimeWarning) as caught:
        gradstat.grad_stats([torch.ones(2)])
    text = str(caught[0].message)
    for words in ("no kernel for cpu tensors", "show_config()", 'message="gradstat has no kernel"'):
        assert words in text
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="gradstat has no kernel")
        gradstat.grad_stats([torch.ones(2)])


WARNING_CALLS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "grad_stats": lambda params: gradstat.grad_stats(params, histogram=True),
    "grad_stats_of_tied": lambda params: gradstat.grad_stats([*params, *params]),
    "tensor_stats": lambda params: gradstat.tensor_stats(params, kind="weight"),
    "clip_grad_norm_": lambda params: clip_grad_norm_(params, 1.0),
    "clip_grad_norm_of_tied": lambda params: clip_grad_norm_([*params, *params], 1.0),
    "clip_grad_value_": lambda params: clip_grad_value_(params, 1.0),
    "get_total_norm": lambda params: get_total_norm([p.grad for p in params]),
}


@pytest.mark.parametrize("call", WARNING_CALLS.values(), ids=WARNING_CALLS)
def test_the_warning_points_at_the_caller_once(monkeypatch, call):
    monkeypatch.setattr(_kernels.batch, "_kernel_device", lambda device: False)
    params = parameters([torch.ones(2), torch.ones(3)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")  # once for each place in the code
        for _ in range(3):
            call(params)
    (warning,) = caught
    assert warning.category is RuntimeWarning
    assert warning.filename == __file__
    assert warning.lineno == call.__code__.co_firstlineno


def test_the_table_says_that_no_kernel_made_it(no_kernel, tmp_path):
    table = gradstat.tensor_stats([torch.ones(3)], ["a"])
    words = "cpu tensors by plain torch operations"
    assert table.note == words
    assert words in str(table)
    assert words in repr(table)
    assert (table + table).note == words
    table.save(tmp_path / "t.npz")
    assert gradstat.StatTable.load(tmp_path / "t.npz").note == words


def test_a_table_of_the_kernels_says_nothing():
    assert gradstat.tensor_stats([torch.ones(3)]).note == ""
