"""`ActivationMonitor` beside what torch does to a model, and what it must leave as it is."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
from small_training import same_bits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from watched_models import (
    SITES,
    batch,
    hook_state,
    make_model,
    mode_stack,
    replicate,
    samples,
    train,
)

import gradstat


@pytest.fixture(autouse=True)
def _no_mode_is_left():
    yield
    assert mode_stack() == 0


# ---- a run is not changed -----------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("attention", [False, True])
def test_a_watched_run_has_the_same_bits(every, attention):
    plain = train(make_model(), 8)
    model = make_model()
    with gradstat.ActivationMonitor(model, every=every, attention=attention) as monitor:
        watched = train(model, 8)
    assert same_bits(plain, watched)
    assert monitor.table().names == SITES


def test_a_watched_transformer_has_the_same_bits():
    def run(watches: bool) -> list[Tensor]:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        frozen = nn.TransformerEncoder(copy.deepcopy(layer), 2).requires_grad_(False).eval()
        model = nn.Sequential(nn.Linear(4, 8), frozen, layer)
        if watches:
            monitor = gradstat.ActivationMonitor(model, every=2, attention=True)
        found = train(model, 5, lambda x: model(x[None].expand(2, -1, -1)))
        if watches:
            assert set(samples(monitor)) == {"2/relu#0", "2.self_attn/softmax#0"}
        return found

    assert same_bits(run(False), run(True))


def test_inference_that_torch_fuses_stays_fused():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    model = nn.Sequential(nn.Linear(8, 8), layer)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        right = model(x)
        with gradstat.ActivationMonitor(model, every=1) as monitor:
            assert torch.equal(model(x), right)
    assert samples(monitor) == {}
    with gradstat.ActivationMonitor(model, every=1) as monitor:
        model(x)  # gradients are recorded: torch takes the long way itself
    assert samples(monitor) == {"1/relu#0": 10}
    assert vars(layer).get("_compiled_call_impl") is None


def test_a_part_that_torch_fuses_only_where_it_is_called_stays_fused():
    torch.manual_seed(0)

    class Teaches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
            self.out = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.teacher(x)
            return torch.tanh(self.out(x))

    model = Teaches()
    x = torch.randn(2, 5, 8)
    right = model(x)
    inner = gradstat.ActivationMonitor(model.teacher, every=1)
    monitor = gradstat.ActivationMonitor(model, every=1)
    assert torch.equal(model(x), right)
    assert samples(monitor) == {"tanh#0": 10}
    model.teacher(x)  # gradients are recorded
    assert samples(inner) == {"relu#0": 10}
    model.teacher.train()
    model(x)
    assert samples(inner) == {"relu#0": 20}  # within the other's watched call


# ---- modes of torch -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_evaluation(mode):
    model = make_model().eval()
    monitor = gradstat.ActivationMonitor(model, every=1)
    buffers = [b.clone() for b in model.buffers()]
    with mode():
        model(batch(0))
    model(batch(1))  # into the same windows
    assert samples(monitor) == dict.fromkeys(SITES, 20)
    assert same_bits(buffers, list(model.buffers()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    monitor = gradstat.ActivationMonitor(model, every=1)
    with torch.autocast("cpu", dtype):
        model(batch(0))
    row = monitor.table()["1/relu#0"]
    with torch.autocast("cpu", dtype):
        hidden = model[:2](batch(0))
    assert hidden.dtype is dtype
    assert row.moments.sum == hidden.double().sum().item()
    assert row.weight == "0.weight"


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_for_checkpointing_is_not_counted(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return functional.relu(checkpoint(self.body, x, use_reentrant=reentrant))

    model = Checkpointed()
    monitor = gradstat.ActivationMonitor(model, every=1)
    for step in range(2):
        model(batch(step).requires_grad_()).sum().backward()
    assert samples(monitor) == {"body.1/relu#0": 20, "body.3/tanh#0": 20, "relu#0": 20}
    assert model.body[0].weight.grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_that_is_checkpointed_as_a_whole_counts_one_step(reentrant):
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    monitor = gradstat.ActivationMonitor(model, every=1)
    checkpoint(model, batch(0).requires_grad_(), use_reentrant=reentrant).sum().backward()
    assert samples(monitor) == {"1/relu#0": 10}
    assert monitor.steps == 1


def test_gradients_that_are_taken_in_the_forward_pass():
    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = nn.Sequential(nn.Linear(4, 3), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            torch.autograd.backward(checkpoint(self.energy, x, use_reentrant=False).sum())
            return torch.relu(x.grad)

    model = Force()
    monitor = gradstat.ActivationMonitor(model, every=1)
    model(batch(0))
    assert samples(monitor) == {"energy.1/tanh#0": 10, "relu#0": 10}


def test_selective_checkpointing_sees_nothing_of_the_watching():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    called: list[str] = []

    def policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        called.append(str(op))
        return CheckpointPolicy.MUST_SAVE

    def run(watches: bool) -> list[str]:
        called.clear()
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        root = Through(body, lambda f, x: checkpoint(
            f, x, use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy)))  # fmt: skip
        if watches:
            monitor = gradstat.ActivationMonitor(root, every=1)
        root(batch(0).requires_grad_()).sum().backward()
        if watches:
            assert samples(monitor) == {"inner.1/relu#0": 10}
        return list(called)

    assert run(False) == run(True)


class Through(nn.Module):
    """Calls what is inside in some way."""

    def __init__(self, inner: nn.Module, way: Any) -> None:
        super().__init__()
        self.inner = inner
        self.way = way

    def forward(self, x: Tensor) -> Any:
        return self.way(self.inner, x)


def test_functional_call_and_what_cannot_be_read():
    inner = nn.Sequential(nn.Linear(4, 6), nn.ReLU())

    def vmapped(f: nn.Module, x: Tensor) -> Tensor:
        return f(x) + torch.func.vmap(f)(x)

    def jacobian(f: nn.Module, x: Tensor) -> Tensor:
        return torch.func.jacrev(lambda row: f(row).sum())(x)

    def with_other_weights(f: nn.Module, x: Tensor) -> Tensor:
        weights = {name: p.detach() * 2 for name, p in f.named_parameters()}
        return torch.func.functional_call(f, weights, (x,))

    for way, calls in ((vmapped, {"inner.1/relu#0": 10}), (jacobian, {}),
                       (with_other_weights, {"inner.1/relu#0": 10})):  # fmt: skip
        model = Through(inner, way)
        right = model(batch(0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            monitor = gradstat.ActivationMonitor(model, every=1)
            assert torch.equal(model(batch(0)), right)
        assert samples(monitor) == calls
        assert monitor._has_ended is False


def test_meta_and_fake_tensors_are_passed_over():
    from torch._subclasses import FakeTensorMode

    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU()).to("meta")
    monitor = gradstat.ActivationMonitor(model, every=1)
    model(batch(0).to("meta"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        model(torch.ones(2, 4, device="meta"))
    assert samples(monitor) == {}
    assert not monitor._has_ended


def test_scripted_parts_run_unseen():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model = nn.Sequential(scripted, nn.Tanh())
    monitor = gradstat.ActivationMonitor(model, every=1)
    for step in range(3):
        model(batch(step)).sum().backward()
    assert samples(monitor) == {"1/tanh#0": 30}


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_holds_nothing_of_the_watching():
    model = make_model().eval()
    plain = torch.jit.trace(model, batch(0))  # a TracerWarning would be an error
    monitor = gradstat.ActivationMonitor(model, every=1)
    watched = torch.jit.trace(model, batch(0))
    assert str(watched.inlined_graph).count("aten::") == str(plain.inlined_graph).count("aten::")
    monitor.remove()


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_passed_over(layout):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Softmax(-1))
    monitor = gradstat.ActivationMonitor(model, every=1)
    model(torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=layout))
    model(batch(0))
    assert samples(monitor) == {"1/relu#0": 10, "2/softmax#0": 10}


def test_frozen_and_tied_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    model[2].weight = model[0].weight
    model.requires_grad_(False)
    monitor = gradstat.ActivationMonitor(model, every=1)
    model(batch(0))
    assert [row.weight for row in monitor.table()] == ["0.weight", "0.weight"]


def test_a_mode_and_a_device_of_the_users():
    names: list[str] = []

    class Note(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    class Inside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.device("cpu"), Note():
                return functional.relu(x)

    model = nn.Sequential(Inside(), nn.Tanh())
    monitor = gradstat.ActivationMonitor(model, every=1)
    inputs = batch(0)
    with Note():
        model(inputs)
        assert mode_stack() == 1
    assert samples(monitor) == {"0/relu#0": 10, "1/tanh#0": 10}
    counted = {name: names.count(name) for name in names if "device" not in name}
    assert counted == {"relu": 2, "tanh": 1}  # nothing of the counting itself


def test_a_window_outlives_inference_mode():
    model = make_model().eval()
    monitor = gradstat.ActivationMonitor(model, every=1, window=2)
    with torch.inference_mode():
        model(batch(0))
    for step in range(3):
        model(batch(step))
    assert samples(monitor) == dict.fromkeys(SITES, 20)


# ---- replicas and threads -----------------------------------------------------------------------


def test_replicas_in_threads_count_under_the_names_of_the_model():
    model = make_model().eval()
    monitor = gradstat.ActivationMonitor(nn.DataParallel(model), every=1)
    monitor.count_steps()
    errors: list[Exception] = []

    def work(replica: nn.Module, x: Tensor) -> None:
        try:
            replica(x)
            assert mode_stack() == 0
        except Exception as error:
            errors.append(error)

    for _ in range(3):
        threads = [
            threading.Thread(target=work, args=(replicate(model), batch(i))) for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monitor.step()
    assert not errors
    assert samples(monitor) == dict.fromkeys(SITES, 3 * 4 * 10)
    assert monitor.table().steps == 3


def test_data_parallel_on_a_cpu():
    model = make_model()
    parallel = nn.DataParallel(model)
    monitor = gradstat.ActivationMonitor(parallel, every=1)
    parallel(batch(0))
    assert tuple(samples(monitor)) == SITES


def test_a_model_inside_of_another_is_watched_when_it_is_called():
    inner = nn.Sequential(nn.ReLU())
    outer = nn.Sequential(nn.Tanh(), inner, inner)
    monitor = gradstat.ActivationMonitor(inner, every=1)
    outer(batch(0))
    assert samples(monitor) == {"0/relu#0": 20}
    assert monitor.steps == 2


def test_a_model_that_calls_itself():
    class Tree(nn.Module):
        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            return functional.relu(x if depth == 0 else self(x - 1, depth - 1))

    model = Tree()
    monitor = gradstat.ActivationMonitor(model, every=1)
    model(batch(0))
    assert samples(monitor) == dict.fromkeys(("relu#0", "relu#1", "relu#2"), 10)
    assert monitor.steps == 1


def test_two_monitors_of_one_model():
    model = make_model()
    before = hook_state(model)
    first = gradstat.ActivationMonitor(model, every=1)
    second = gradstat.ActivationMonitor(model, every=2)
    for step in range(3):
        model(batch(step))
        assert mode_stack() == 0
    first.remove()
    model(batch(3))
    second.remove()
    assert samples(first) == dict.fromkeys(SITES, 30)
    assert samples(second) == dict.fromkeys(SITES, 20)
    assert hook_state(model) == before


def test_two_monitors_see_nothing_of_each_others_attention():
    model = nn.MultiheadAttention(8, 2)
    monitors = [gradstat.ActivationMonitor(model, every=1, attention=True) for _ in range(2)]
    model(*[torch.randn(3, 5, 8)] * 3)
    assert samples(monitors[0]) == samples(monitors[1]) == {"softmax#0": 5 * 3 * 3}
    assert vars(model).get("_compiled_call_impl") is None


# ---- copies -------------------------------------------------------------------------------------


def test_copies_of_a_watched_model_are_plain_ones():
    model = make_model().eval()
    right = model(batch(0))
    monitor = gradstat.ActivationMonitor(model, every=1)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ]
    for plain in copies:
        assert torch.equal(plain(batch(0)), right)
    assert samples(monitor) == {}
    model(batch(0))
    assert samples(monitor) == dict.fromkeys(SITES, 10)
    assert b"gradstat" not in pickle.dumps(nn.Sequential(nn.ReLU())) + stream.getvalue()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_monitor_keeps_its_table_and_watches_nothing(copied):
    model = make_model()
    monitor = gradstat.ActivationMonitor(model, every=1)
    model(batch(0))
    twin, table = copied(monitor), copied(monitor.table())
    model(batch(1))
    twin.step()
    twin.remove()
    assert samples(twin) == {row.name: row.samples for row in table} == dict.fromkeys(SITES, 10)
    assert samples(monitor) == dict.fromkeys(SITES, 20)
    assert [row.kind for row in table] == [row.kind for row in monitor.table()]


# ---- cost of other steps ------------------------------------------------------------------------


def test_other_steps_see_no_mode_and_no_change():
    stacks: list[tuple[int, bool]] = []

    class Look(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.MultiheadAttention(4, 1).eval().requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            stacks.append((mode_stack(), vars(self.part).get("_compiled_call_impl") is None))
            return x

    model = Look()
    gradstat.ActivationMonitor(model, every=3)
    for _ in range(4):
        model(batch(0))
    assert stacks == [(1, False), (0, True), (0, True), (1, False)]
