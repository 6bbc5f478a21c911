"""Policies of units and elements, and policies of one's own: what the kernel does not do itself."""

from __future__ import annotations

import math

import numpy as np
import policy_reference as plain
import pytest
import torch
from policy_calls import CPU, Halving
from torch import Tensor, nn

import gradstat
from gradstat import _kernels
from gradstat.clipping.clipper import Clipper
from gradstat.clipping.policy import Policy
from gradstat.columns import L2


def stepped(policy: Policy, gradients: list[Tensor], weights: list[Tensor]) -> Clipper:
    """Run a policy on gradients in place; return the clipper."""
    return stepped_scaled(policy, gradients, weights, None)


def stepped_scaled(
    policy: Policy, gradients: list[Tensor], weights: list[Tensor], grad_scale: float | None
) -> Clipper:
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    names = [f"p{index}" for index in range(len(parameters))]
    clipper = Clipper(policy, _kernels.Nonfinite.KEEP)
    clipper.bind(names, CPU)
    batch = _kernels.gather(gradients)
    table = torch.empty((len(names) + 1, _kernels.NUM_COLUMNS), dtype=torch.float64)
    out = torch.empty(_kernels.NUM_CLIP_OUT, dtype=torch.float64)
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    clipper.measure(batch, table, out, grad_scale=scale)
    if grad_scale is not None:
        table[:, 4:] /= grad_scale  # true units; what the seam does, near enough for these tests
    clipper.apply(batch, out, str)
    clipper.apply_rest(batch, table, parameters, str, scale)
    return clipper


def clipped_steps(clipper: Clipper) -> int:
    assert clipper.state is not None
    return int(clipper.state[_kernels.COUNTER_CLIPPED])


SHAPES = {"matrix": (5, 7), "convolution": (4, 3, 2, 2), "vector": (6,), "scalar": ()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_agc_follows_the_paper(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, dtype=dtype, generator=generator)
    if len(shape) > 1:
        weight[0] = 0  # a unit that starts at 0 moves by eps
    gradient = torch.randn(shape, dtype=dtype, generator=generator)
    if len(shape) > 1:
        gradient[1] *= 1e-4  # one that is small enough
    want = plain.agc(weight.double().numpy(), gradient.double().numpy(), 0.02, 1e-3)
    clipper = stepped(gradstat.AGC(0.02), [gradient], [weight])
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(gradient.double().numpy(), want, rtol=rtol)
    assert clipped_steps(clipper) == 1


def test_agc_leaves_excluded_and_spoilt_units_alone() -> None:
    weights = [torch.ones(2, 3), torch.ones(2, 3)]
    gradients = [torch.ones(2, 3), torch.ones(2, 3)]
    gradients[1][0, 0] = math.nan
    spoilt = gradients[1][0].clone()
    clipper = stepped(gradstat.AGC(exclude=("p0",)), gradients, weights)
    assert torch.equal(gradients[0], torch.ones(2, 3))
    torch.testing.assert_close(gradients[1][0], spoilt, equal_nan=True)
    assert gradients[1][1].norm().item() == pytest.approx(0.01 * math.sqrt(3))
    assert clipped_steps(clipper) == 1


def test_agc_holds_a_gradient_whose_squares_overflow() -> None:
    gradient = torch.full((2, 3), 1e30)
    stepped(gradstat.AGC(), [gradient], [torch.ones(2, 3)])
    assert gradient.norm(dim=1).tolist() == pytest.approx([0.01 * math.sqrt(3)] * 2)


def test_agc_of_complex_parameters() -> None:
    gradient = torch.full((2, 2), 3 + 4j)
    stepped(gradstat.AGC(), [gradient], [torch.full((2, 2), 1 + 0j)])
    assert gradient.abs().flatten().tolist() == pytest.approx([0.01] * 4)


def test_agc_prefix_excludes_a_whole_module() -> None:
    policy = gradstat.AGC(exclude=("head", "body.0.bias"))
    names = ["head.weight", "head", "header.weight", "body.0.bias", "body.0.weight"]
    assert [policy.excludes(name) for name in names] == [True, True, False, True, False]


@pytest.mark.parametrize("scale", [None, 2.0**14])
def test_elements_and_units_are_limited_in_true_units(scale: float | None) -> None:
    factor = 1.0 if scale is None else scale
    for policy, want in (
        (gradstat.Value(0.5), [0.25, -0.5, 0.5]),
        (gradstat.AGC(0.1), None),
        (PerTensor(), [0.25 * 0.5, -2 * 0.5, 3 * 0.5]),
    ):
        gradient = torch.tensor([0.25, -2.0, 3.0], dtype=torch.float64) * factor
        weight = torch.full_like(gradient, 0.1)
        clipper = stepped_scaled(policy, [gradient], [weight], scale)
        if want is None:
            assert gradient.norm().item() / factor == pytest.approx(0.1 * 0.1 * math.sqrt(3))
        else:
            assert (gradient / factor).tolist() == pytest.approx(want)
        assert clipped_steps(clipper) == 1


class PerTensor(gradstat.Policy):
    """Halves each gradient whose own norm is above 1."""

    def coefficient(self, table: Tensor) -> Tensor:
        return torch.where(table[:-1, L2] > 1, 0.5, 1.0)


def test_own_policy_may_answer_for_each_parameter() -> None:
    gradients = [torch.tensor([0.5]), torch.tensor([2.0]), torch.tensor([math.nan])]
    clipper = stepped(PerTensor(), gradients, [torch.ones(1)] * 3)
    assert [gradient.item() for gradient in gradients[:2]] == [0.5, 1.0]
    assert clipped_steps(clipper) == 1


def test_step_clipped_twice_counts_once() -> None:
    gradients = [torch.tensor([8.0])]
    policy = gradstat.GlobalNorm(4.0) | Halving() | gradstat.Value(1.0)
    clipper = stepped(policy, gradients, [torch.ones(1)])
    assert gradients[0].item() == 1
    assert clipped_steps(clipper) == 1


@pytest.mark.parametrize("policy", [gradstat.Value(9.0), gradstat.AGC(9.0), Halving()], ids=repr)
def test_step_that_needs_no_clipping_is_not_counted(policy: Policy) -> None:
    gradients = [torch.tensor([0.25])]
    assert clipped_steps(stepped(policy, gradients, [torch.ones(1)])) == 0
    assert gradients[0].item() == 0.25


def test_wrong_answers_of_own_policies() -> None:
    class Wrong(gradstat.Policy):
        def coefficient(self, table: Tensor) -> Tensor:
            return table.new_ones(3)

    message = "Wrong.coefficient must return one number or one for each of the 2 parameters, got 3"
    with pytest.raises(gradstat.ArgumentValueError, match=message):
        stepped(Wrong(), [torch.ones(1)] * 2, [torch.ones(1)] * 2)

    class Forgetful(gradstat.Policy):
        def coefficient(self, table: Tensor) -> Tensor:
            return None  # type: ignore[return-value]

    message = "Forgetful.coefficient must return a tensor or a number, got NoneType; return 1.0"
    with pytest.raises(gradstat.ArgumentTypeError, match=message):
        stepped(Forgetful(), [torch.ones(1)], [torch.ones(1)])
    with pytest.raises(TypeError, match=r"^Policy must override coefficient\(table\)$"):
        stepped(gradstat.Policy(), [torch.ones(1)], [torch.ones(1)])
