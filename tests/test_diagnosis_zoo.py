"""The diagnosis on a few programs of the zoo: the whole way from a training loop to a first cause.

`make diagnosis-bench` runs all programs and counts; here are one or two of each family of rules,
and healthy ones.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import gradstat

pytest.importorskip("sklearn")

from zoo import programs, run

FAULTY = (
    "autoencoder/digits/twenty-images",
    "cnn/digits/nan-pixels",
    "cnn/digits/no-zero-grad",
    "cnn/digits/one-in-a-hundred",
    "cnn/digits/softmax-of-one-unit",
    "cnn/digits/sorted-by-class",
    "mlp/digits/born-dead",
    "mlp/digits/deep-sigmoid",
    "mlp/digits/double-softmax",
    "mlp/digits/random-labels",
    "mlp/digits/sgd-lr-over-100000",
    "mlp/digits/sgd-lr-x200",
    "mlp/digits/stale-optimizer",
    "mlp/digits/weight-decay-too-strong",
    "mlp/diabetes/relu-output",
    "mlp/diabetes/unscaled-targets",
    "mlp/waves/bfloat16-updates-lost",
    "mlp/waves/zero-weights",
    "mlp/wine/frozen-by-mistake",
    "mlp/wine/unscaled-inputs",
    "rnn/forecast/square-root-at-zero",
)
HEALTHY = (
    "cnn/digits/converged",
    "cnn/digits/frozen-in-the-optimizer",
    "cnn/digits/sparse-relu",
    "mlp/iris/generator-of-a-gan",
    "rnn/text/unseen-rows",
)
ZOO = {program.name: program for program in programs()}


class Watch:
    """Attaches gradstat and tells it everything."""

    def attach(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        self.optimizer = gradstat.attach(optimizer, model)
        self.monitor: gradstat.Monitor = self.optimizer.gradstat  # type: ignore[attr-defined]

    def observe(self, **values: Any) -> None:
        self.monitor.observe(**values)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable()
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


def bits(model: nn.Module) -> list[bytes]:
    return [
        tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for tensor in model.state_dict().values()
    ]


@pytest.mark.parametrize("name", [*FAULTY, *HEALTHY])
def test_first_cause(name: str) -> None:
    program = ZOO[name]
    watch = Watch()
    watched = run(program, 0, watch)
    findings = [f for f in watch.monitor.diagnose() if f.severity != "info"]
    if program.causes:
        assert findings
        assert findings[0].code in program.causes
        assert findings[0].caused_by is None
    else:
        assert findings == []
    assert bits(watched) == bits(run(program, 0))
