"""grad_stats and tensor_stats through the public API: what they accept, what the rows say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from gradients import parameter, parameters
from kernel_calls import DTYPES, assert_table, sample
from stats_models import Network, assert_model_table, names_of, row_of, trained
from torch import Tensor, nn

from gradstat import grad_stats, tensor_stats

INF, NAN = math.inf, math.nan


@pytest.fixture
def model() -> Network:
    return trained()


# ---- what is accepted ----------------------------------------------------------------------------

NAMED_SOURCES: dict[str, Callable[[nn.Module], Any]] = {
    "module": lambda model: model,
    "pairs": lambda model: list(model.named_parameters()),
    "generator_of_pairs": lambda model: model.named_parameters(),
    "dict_of_parameters": lambda model: dict(model.named_parameters()),
    "dict_of_gradients": lambda model: {n: p.grad for n, p in model.named_parameters()},
}
BARE_SOURCES: dict[str, Callable[[nn.Module], Any]] = {
    "list": lambda model: list(model.parameters()),
    "tuple": lambda model: tuple(model.parameters()),
    "generator": lambda model: model.parameters(),
    "filter": lambda model: filter(torch.is_tensor, model.parameters()),
    "dict_values": lambda model: dict(model.named_parameters()).values(),
    "list_of_gradients": lambda model: [p.grad for p in model.parameters()],
}


@pytest.mark.parametrize("source", NAMED_SOURCES.values(), ids=NAMED_SOURCES)
def test_sources_with_names(model, source):
    table = grad_stats(source(model))
    assert table.names == names_of(model)
    assert_model_table(table, model)


@pytest.mark.parametrize("source", BARE_SOURCES.values(), ids=BARE_SOURCES)
def test_sources_without_names(model, source):
    table = grad_stats(source(model))
    assert table.names == tuple(f"param{i}" for i in range(len(names_of(model))))
    assert_model_table(table, model)


@pytest.mark.parametrize("container", [nn.ParameterList, lambda ps: nn.ParameterDict({"w": ps[0]})])
def test_parameter_containers_are_modules(container):
    table = grad_stats(container([parameter(torch.tensor([3.0, 4.0]))]))
    assert [row.l2 for row in table] == [5.0]


def test_a_single_parameter():
    table = grad_stats(parameter(torch.tensor([3.0, 4.0])))
    assert table.names == ("param0",)
    assert table.total_norm == 5.0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_models_of_every_dtype(dtype):
    model = trained(dtype)
    assert_model_table(grad_stats(model), model)


def test_dtypes_may_be_mixed():
    grads = [sample(50 + i, dtype, seed=i) for i, dtype in enumerate(DTYPES.values())]
    grads += [torch.tensor([3 + 4j]), torch.ones(3, dtype=torch.complex128)]
    assert_table(grad_stats(parameters(grads)).data, grads)


def test_fp64_statistics_are_those_of_torch():
    tensor = torch.randn(37, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    row = row_of(tensor)
    expected = {
        "sum": tensor.sum(), "l1": tensor.abs().sum(), "sq_sum": tensor.square().sum(),
        "l2": torch.linalg.vector_norm(tensor), "rms": tensor.square().mean().sqrt(),
        "mean": tensor.mean(), "std": tensor.std(correction=0), "max": tensor.abs().max(),
        "abs_min": tensor.abs().min(), "dynamic_range": tensor.abs().max() / tensor.abs().min(),
    }  # fmt: skip
    assert {name: getattr(row, name) for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-13
    )


@pytest.mark.parametrize("count", [255, 256, 257, 1500])
def test_long_lists(count):
    # Beyond 256 tensors only those that can be a lazy negation are asked whether they are one.
    grads: list[Tensor | None] = [sample(i % 19, torch.float32, seed=i) for i in range(count)]
    grads[3] = torch.tensor([1 + 2j]).conj().imag
    grads[77] = None
    grads[100] = torch.arange(24.0).view(4, 6).t()
    grads[-1] = torch.arange(20.0)[::2]
    table = grad_stats(parameters(grads))
    assert table["param3"].sum == -2.0
    assert table.missing == ("param77",)
    assert_table(table.data, [torch.zeros(2) if g is None else g for g in grads][:77] + grads[77:])


# ---- parameters without a gradient, empty and repeated ones --------------------------------------


def test_missing_gradients_are_listed(model):
    table = grad_stats(model)
    assert table.names == names_of(model)
    assert table.missing == ("unused.weight", "unused.bias")
    assert not table["unused.weight"].has_grad
    assert table["unused.weight"].numel == 0
    assert math.isnan(table["unused.weight"].l2)


def test_frozen_parameters_are_listed_as_missing():
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    model(torch.ones(1, 3)).sum().backward()
    assert grad_stats(model).missing == ("weight",)


def test_a_dict_may_hold_none():
    table = grad_stats({"a": None, "b": torch.ones(4)})
    assert table.missing == ("a",)
    assert table.total_norm == 2.0


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (nn.Linear(2, 2), ("weight", "bias")),
        (nn.ReLU(), ()),
        ([], ()),
        ({}, ()),
        ([None, None], ("param0", "param1")),
    ],
    ids=["no_backward_yet", "module_without_parameters", "list", "dict", "none"],
)
def test_nothing_to_measure(source, names):
    table = grad_stats(source, histogram=True)
    assert table.names == table.missing == names
    assert table.total_norm == table.finite_norm == 0.0
    assert (table.total.numel, table.total.l2) == (0, 0.0)
    assert table.histogram is not None
    assert table.histogram.sum() == 0


def test_uninitialised_parameters_have_no_gradient():
    assert grad_stats(nn.LazyLinear(3)).missing == ("weight", "bias")


SHAPES = [(0,), (0, 3), (3, 0), (2, 0, 3), (1,), (), (1, 1, 1), (5, 1), (1, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_with_few_elements(shape):
    assert_table(grad_stats([parameter(torch.ones(shape))]).data, [torch.ones(shape)])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.words.weight


def tied_sources() -> dict[str, Callable[[nn.Module], Any]]:
    return {
        "module": lambda model: model,
        "list_with_repeats": lambda model: [model.words.weight, model.out.weight],
        "pairs": lambda model: list(model.named_parameters(remove_duplicate=False)),
        "dict": lambda model: dict(model.named_parameters(remove_duplicate=False)),
    }


@pytest.mark.parametrize("source", tied_sources().values(), ids=tied_sources())
def test_tied_parameters_count_once(source):
    model = Tied()
    model.words.weight.grad = torch.ones(5, 3)
    table = grad_stats(source(model))
    assert table.names in (("words.weight",), ("param0",))
    assert table.total.numel == 15
    assert table.total_norm == pytest.approx(math.sqrt(15))


def test_names_stay_with_their_rows_when_a_repeat_is_dropped():
    first, second, third = parameters([torch.ones(1), torch.ones(4), torch.ones(9)])
    table = grad_stats([("a", first), ("b", second), ("again", first), ("c", third)])
    assert {row.name: row.l2 for row in table} == {"a": 1.0, "b": 2.0, "c": 3.0}


def test_equal_tensors_are_not_repeats():
    grad = torch.ones(4)
    assert grad_stats(parameters([grad, grad])).total_norm == math.sqrt(8)
    assert tensor_stats([grad, grad]).total_norm == math.sqrt(8)


# ---- NaN, Inf and totals -------------------------------------------------------------------------


def test_one_nan_does_not_hide_a_layer():
    table = grad_stats({"a": torch.tensor([3.0, NAN, 4.0]), "b": torch.tensor([12.0])})
    assert math.isnan(table.total_norm)
    assert table.finite_norm == 13.0
    assert (table["a"].l2, table["a"].nans, table["a"].mean) == (5.0, 1, 3.5)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e25])
def test_the_whole_range_of_fp32(scale):
    grad = torch.tensor([3.0, 4.0]) * scale
    assert row_of(grad).l2 == pytest.approx(math.hypot(*grad.tolist()), rel=1e-12)
    assert row_of(grad).l2 > 0


@pytest.mark.parametrize("scale", [1e-310, 1e-200, 1e300])
def test_the_whole_range_of_fp64(scale):
    grad = torch.tensor([3.0, 4.0], dtype=torch.float64) * scale
    assert row_of(grad).l2 == pytest.approx(5 * scale, rel=1e-12)


def test_histogram_is_optional(model):
    assert grad_stats(model).histogram is None
    table = grad_stats(model, histogram=True)
    counts = reference.histogram([p.grad for p in model.parameters()])
    assert (table.histogram_data.numpy() == counts).all()
    assert table["head.bias"].histogram.sum() == 4


# ---- tensor_stats --------------------------------------------------------------------------------


def test_weights_of_a_module(model):
    table = tensor_stats(model)
    assert table.kind == "tensor"
    assert table.names == names_of(model)
    assert_table(table.data, list(model.parameters()))


@pytest.mark.parametrize(
    ("tensors", "names", "expected"),
    [
        ([torch.ones(1), torch.ones(4)], None, ("tensor0", "tensor1")),
        ([torch.ones(1), torch.ones(4)], ["a", "b"], ("a", "b")),
        ((t for t in [torch.ones(1), torch.ones(4)]), ("a", "b"), ("a", "b")),
        ([torch.ones(1), torch.ones(4)], (n for n in "ab"), ("a", "b")),
        ({"a": torch.ones(1), "b": torch.ones(4)}, None, ("a", "b")),
        ([("a", torch.ones(1)), ("b", torch.ones(4))], None, ("a", "b")),
    ],
    ids=["unnamed", "names", "generator", "generator_of_names", "dict", "pairs"],
)
def test_names(tensors, names, expected):
    table = tensor_stats(tensors, names)
    assert table.names == expected
    assert [row.l2 for row in table] == [1.0, 2.0]


def test_parameters_are_measured_themselves_by_tensor_stats():
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad = torch.ones(2)
    assert tensor_stats([weight])[0].l2 == 5.0
    assert grad_stats([weight])[0].l2 == pytest.approx(math.sqrt(2))


def test_kind_and_missing_tensors():
    table = tensor_stats([None, torch.ones(4)], ["a", "b"], kind="activation")
    assert table.kind == "activation"
    assert table.missing == ("a",)
    assert "no activation" in str(table)
