"""grad_stats and tensor_stats through the public API: what they accept, what the rows say."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import reference
import torch
from gradients import Untouched, parameter, parameters
from kernel_calls import DTYPES, assert_table, sample
from torch import Tensor, nn

import gradstat
from gradstat import grad_stats, tensor_stats

INF, NAN = math.inf, math.nan


class Network(nn.Module):
    """A convolution, a norm, a word table and two heads, the last of which is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.words = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 4)
        self.unused = nn.Linear(6, 2)

    def forward(self, image: Tensor, word: Tensor) -> Tensor:
        seen = torch.relu(self.norm(self.conv(image))).mean((2, 3))
        return self.head(seen + self.words(word))


def trained(dtype: torch.dtype = torch.float32) -> Network:
    """Return a network after one backward pass."""
    torch.manual_seed(0)
    model = Network().to(dtype)
    image, word = torch.randn(5, 3, 8, 8, dtype=dtype), torch.tensor([1, 1, 2, 7, 10])
    model(image, word).square().sum().backward()
    return model


@pytest.fixture
def model() -> Network:
    return trained()


def names_of(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, _ in model.named_parameters())


def row_of(tensor: Tensor) -> gradstat.StatRow:
    return tensor_stats([tensor])[0]


# ---- what is accepted ---------------------------------------------------------------------------

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


def assert_model_table(table: gradstat.StatTable, model: nn.Module) -> None:
    grads = [p.grad for p in model.parameters()]
    assert_table(table.data, grads)
    assert table.kind == "gradient"
    expected = nn.utils.get_total_norm([grad.double() for grad in grads if grad is not None])
    assert table.total_norm == pytest.approx(expected.item(), rel=1e-6)


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


# ---- gradients that no kernel reads as they are -------------------------------------------------


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


# ---- NaN, Inf and totals ------------------------------------------------------------------------


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


# ---- what measuring leaves alone, and where it can be called ------------------------------------


def test_nothing_is_written(model):
    model.conv.weight.grad[0, 0, 0, 0] = NAN
    untouched = Untouched(model.parameters())
    rng = torch.get_rng_state()
    weights = copy.deepcopy(model.state_dict())
    grad_stats(model, histogram=True)
    tensor_stats(model, histogram=True)
    untouched.check()
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_no_autograd_graph():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    weight.pow(3).sum().backward(create_graph=True)
    untouched = Untouched([weight])
    table = grad_stats([weight])
    untouched.check()
    assert weight.grad.requires_grad
    assert not table.data.requires_grad
    assert table.total_norm == pytest.approx(math.hypot(3, 12))
    weight.grad.sum().backward()
    weight.grad = None  # it and its graph hold each other


def test_a_gradient_that_requires_grad_as_a_tensor():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    (grad,) = torch.autograd.grad(weight.pow(3).sum(), weight, create_graph=True)
    table = tensor_stats([grad], kind="gradient")
    assert table.total_norm == pytest.approx(math.hypot(3, 12))
    assert not table.data.requires_grad


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default_device_meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_contexts(model, context):
    untouched = Untouched(model.parameters())
    with context():
        table = grad_stats(model)
        total = (table + table).finite_norm
    assert_model_table(table, model)
    assert total == pytest.approx(math.sqrt(2) * table.finite_norm)
    untouched.check()


def test_default_dtype_changes_nothing(model):
    before = grad_stats(model)
    torch.set_default_dtype(torch.float64)
    try:
        after = grad_stats(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(before.data.nan_to_num(), after.data.nan_to_num())


def test_tensors_of_inference_mode():
    with torch.inference_mode():
        values = torch.tensor([3.0, 4.0])
    assert row_of(values).l2 == 5.0


def test_inside_of_a_hook():
    seen = []
    model = nn.Linear(3, 2)
    model.weight.register_post_accumulate_grad_hook(lambda p: seen.append(grad_stats(p).total_norm))
    model(torch.ones(1, 3)).sum().backward()
    assert seen == [pytest.approx(math.sqrt(6))]


def test_gradients_of_a_compiled_model():
    model = trained()
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    compiled(torch.ones(2, 3, 8, 8), torch.tensor([0, 3])).square().sum().backward()
    assert_model_table(grad_stats(compiled), model)


def test_gradients_under_autocast():
    model = nn.Linear(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.ones(4, 8)).square().sum().backward()
    assert_model_table(grad_stats(model), model)


def test_many_threads_at_once():
    models = [trained() for _ in range(4)]
    expected = grad_stats(models[0]).data.nan_to_num()
    with ThreadPoolExecutor(4) as pool:
        tables = list(pool.map(grad_stats, models * 25))
    assert all(torch.equal(table.data.nan_to_num(), expected) for table in tables)


@pytest.mark.parametrize("threads", [1, 2])
def test_equal_bits_for_any_number_of_threads(threads):
    grads = [sample(n, torch.float32, seed=n) for n in (200_000, 17, 70_001)]
    before = torch.get_num_threads()
    expected = tensor_stats(grads)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(tensor_stats(grads).data, expected.data)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))]
)
def test_tables_can_be_copied_and_pickled(model, duplicate):
    table = grad_stats(model, histogram=True)
    other = duplicate(table)
    assert other.names == table.names
    assert torch.equal(other.data.nan_to_num(), table.data.nan_to_num())
    assert torch.equal(other.histogram_data, table.histogram_data)


def test_a_table_is_of_its_time():
    weight = parameter(torch.ones(4))
    table = grad_stats([weight])
    weight.grad.mul_(3)
    assert table.total_norm == 2.0


# ---- tensor_stats -------------------------------------------------------------------------------


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
