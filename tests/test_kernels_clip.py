"""The norm and the clip coefficient that moments leaves for scale."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from kernel_calls import clip_to, run_moments, sample

from gradstat import _native

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ORDERS = {1: 1.0, 2: 2.0, 3: math.inf}  # NormKind of csrc/kernels.h
MAX_NORMS = [0.0, 1e-300, 0.1, 1.0, 1e6, 1e300, math.inf]

TENSORS = {
    "usual": [sample(5000, torch.float32), sample(100, torch.bfloat16), sample(9, torch.float64)],
    "none": [],
    "missing": [None, None],
    "zeros": [torch.zeros(10), torch.zeros(0)],
    "one": [torch.tensor([3.0, -4.0], dtype=torch.float64)],
    "tiny": [torch.full((10,), 1e-30)],
    "huge": [torch.full((10,), 1e300, dtype=torch.float64)],
    "nan": [sample(100, torch.float32), torch.tensor([math.nan]), torch.ones(3)],
    "inf": [sample(100, torch.float32), torch.tensor([-math.inf]), torch.ones(3)],
    "nan-and-inf": [torch.tensor([math.inf]), torch.tensor([math.nan])],
}


@pytest.mark.parametrize("max_norm", MAX_NORMS)
@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("tensors", TENSORS.values(), ids=TENSORS)
def test_norm_and_coefficient(tensors, kind, max_norm):
    result = run_moments(tensors, max_norm=max_norm, norm_kind=kind)
    norm = reference.norm(tensors, ORDERS[kind])
    assert result.norm == pytest.approx(norm, rel=1e-6, nan_ok=True)
    # From the kernel's own norm: to the last bit.
    assert result.coefficient == reference.clip_coefficient(result.norm, max_norm)


def test_coefficient_of_a_norm_that_is_known():
    result = run_moments([torch.tensor([3.0, 4.0])], max_norm=1.0)
    assert result.norm == 5.0
    assert result.coefficient == 1 / (5 + 1e-6)


@pytest.mark.parametrize(
    ("value", "max_norm", "norm", "coefficient"),
    [
        pytest.param(math.nan, 1.0, math.nan, 1.0, id="nan-cannot-be-mended"),
        pytest.param(math.inf, 1.0, math.inf, 0.0, id="inf-gives-zero"),
        pytest.param(math.inf, math.inf, math.inf, 1.0, id="inf-without-a-limit-is-left"),
        pytest.param(0.0, 1.0, 0.0, 1.0, id="zero-needs-no-clipping"),
        pytest.param(0.0, 0.0, 0.0, 0.0, id="zero-to-zero"),
        pytest.param(1.0, 0.0, 1.0, 0.0, id="a-limit-of-zero"),
        pytest.param(1.0, math.inf, 1.0, 1.0, id="no-limit"),
        pytest.param(1.0, 1.0, 1.0, 1 / (1 + 1e-6), id="at-the-limit"),
        pytest.param(0.5, 1.0, 0.5, 1.0, id="below-the-limit"),
    ],
)
def test_rules_of_the_coefficient(cpu_variant, value, max_norm, norm, coefficient):
    result = run_moments([torch.tensor([value])], max_norm=max_norm)
    assert result.norm == pytest.approx(norm, abs=0, nan_ok=True)
    assert result.coefficient == coefficient


def test_a_measurer_writes_one_row_of_a_window_or_nothing() -> None:
    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (3, 5)]
    for parameter in parameters:
        parameter.grad = 2 * torch.ones_like(parameter)
    tables = torch.full((4, 3, _native.NUM_COLUMNS), -7.0, dtype=torch.float64)
    decisions = torch.full((4, _native.NUM_CLIP_OUT), -7.0, dtype=torch.float64)
    measure = _native.measurer(tables, decisions, clip_to(math.inf, 2))
    untouched = tables.clone()
    gradient, parameters[1].grad = parameters[1].grad, torch.ones(10)[::2]
    assert not measure(parameters, 2, 1)  # no kernel reads one with gaps
    parameters[1].grad = gradient
    assert not measure(parameters[:1], 2, 1)
    assert not measure([parameters[0]] * 2, 2, 1)
    for place in (-1, 4):
        with pytest.raises(RuntimeError, match="no such row"):
            measure(parameters, place, 1)
    with pytest.raises(RuntimeError, match="parameters, place and threads"):
        measure(parameters)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        measure(None, 2, 1)  # type: ignore[arg-type]
    assert torch.equal(tables, untouched)
    assert measure(parameters, 2, 1)
    assert torch.equal(tables[2], run_moments([p.grad for p in parameters]).table)
    assert decisions[2, 0] == pytest.approx(math.sqrt(32))
    assert torch.equal(tables[[0, 1, 3]], untouched[[0, 1, 3]])
