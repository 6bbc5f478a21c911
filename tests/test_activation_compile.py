"""`ActivationMonitor` beside torch.compile: what is seen, and that nothing is compiled anew."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from small_training import same_bits
from torch import Tensor, nn
from torch.nn import functional
from watched_models import Block, batch, samples

import gradstat


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.body = Block()
        self.head = Block()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(torch.relu(self.first(x))))
        return out


def compiled_runs(model: nn.Module, call: Any, *, watch_it: bool) -> tuple[Any, list[Any]]:
    """Return the monitor and, after each of 7 steps, graphs, breaks and the output."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monitor = gradstat.ActivationMonitor(model, every=3) if watch_it else None
    history = []
    for step in range(7):
        out = call(batch(step))
        out.sum().backward()
        breaks = sum(counters["graph_break"].values())
        history.append((counters["stats"]["unique_graphs"], breaks, out.detach()))
    torch._dynamo.reset()
    return monitor, history


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_parts_run_compiled_and_unseen(backend):
    def make() -> Parts:
        torch.manual_seed(0)
        model = Parts()
        model.body.compile(backend=backend)
        model.head = torch.compile(model.head, backend=backend)
        return model

    model = make()
    _, plain = compiled_runs(model, model, watch_it=False)
    model = make()
    monitor, watched = compiled_runs(model, model, watch_it=True)
    assert [entry[:2] for entry in watched] == [entry[:2] for entry in plain]
    assert same_bits([entry[2] for entry in watched], [entry[2] for entry in plain])
    assert samples(monitor) == {"relu#0": 30}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["module", "in_place", "function"])
def test_a_model_compiled_as_a_whole_is_left_alone(form):
    def make() -> tuple[Parts, Any]:
        torch.manual_seed(0)
        model = Parts()
        options: Any = {"backend": "eager", "fullgraph": True}
        if form == "module":
            return model, torch.compile(model, **options)
        if form == "in_place":
            model.compile(**options)
            return model, model
        return model, torch.compile(lambda x: model(x) * 1.0, **options)

    model, call = make()
    _, plain = compiled_runs(model, call, watch_it=False)
    model, call = make()
    monitor, watched = compiled_runs(model, call, watch_it=True)
    assert [entry[:2] for entry in watched] == [entry[:2] for entry in plain]
    assert same_bits([entry[2] for entry in watched], [entry[2] for entry in plain])
    assert samples(monitor) == {}


@pytest.mark.filterwarnings("ignore")
def test_steps_of_an_optimizer_compile_nothing_anew():
    from torch._dynamo.utils import counters

    def graphs(**options: Any) -> list[int]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        counters.clear()
        model = Parts()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        gradstat.attach(optimizer, model, **options)
        call = torch.compile(lambda x: model(x) * 1.0, backend="eager", fullgraph=True)
        history = []
        for step in range(7):
            call(batch(step)).sum().backward()
            optimizer.step()
            history.append(counters["stats"]["unique_graphs"])
        torch._dynamo.reset()
        return history

    assert graphs(activations={"every": 3}) == graphs(activations=False) == [1] * 7


def test_who_watches_a_compiled_model_is_told():
    compiled = torch.compile(nn.Sequential(nn.ReLU()), backend="eager")
    with pytest.warns(RuntimeWarning, match="compiled as a whole; compile its parts instead"):
        gradstat.ActivationMonitor(compiled)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_function_is_compiled_no_more_often_on_other_steps():
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)
            self.function = torch.compile(
                lambda x: functional.gelu(x) * 2, backend="eager", fullgraph=True
            )

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.function(torch.relu(self.layer(x)))
            return out

    model = Calls()
    monitor, watched = compiled_runs(model, model, watch_it=True)
    assert [entry[:2] for entry in watched] == [(1, 0), *[(2, 0)] * 6]
    assert samples(monitor)["relu#0"] == 30


def test_watching_does_not_load_the_compiler():
    script = (
        "import sys, torch, gradstat; m = torch.nn.Sequential(torch.nn.ReLU());monitor = "
        "gradstat.ActivationMonitor(m, every=1); m(torch.ones(2, 2));assert monitor.table().names "
        "== ('0/relu#0',);print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]
