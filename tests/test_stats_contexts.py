"""What measuring leaves alone, and where it can be called."""

from __future__ import annotations

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from gradients import Untouched, parameter
from kernel_calls import sample
from stats_models import Network, assert_model_table, row_of, trained
from torch import nn

from gradstat import grad_stats, tensor_stats


@pytest.fixture
def model() -> Network:
    return trained()


def test_nothing_is_written(model):
    model.conv.weight.grad[0, 0, 0, 0] = math.nan
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
