"""Losses of one's own: what does not fit the outputs, and what only looks so."""

from __future__ import annotations

import pytest
import torch
from diagnosed_runs import ROWS, binary, fit, named, net, numbers, raised, told, train
from torch import Tensor, nn
from torch.nn import functional


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("least", [1e-7, 1e-3])
def test_logits_that_a_loss_clamps_to_probabilities_do_not_fit_it(least: float) -> None:
    x, y = binary()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        p = outputs.clamp(least, 1 - least)
        return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()

    (found,) = named(train(net(n_out=1), (x, y), loss_fn), "loss-output-mismatch")
    assert "clamps" in found.explanation


def test_a_loss_that_is_nan_before_any_step_does_not_come_of_large_gradients() -> None:
    x, y = numbers()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        deviation = outputs[:, 1:]  # of either sign
        return (deviation.log() + ((targets - outputs[:, :1]) / deviation) ** 2).mean()

    assert raised(train(net(n_out=2), (x, y), loss_fn))[0] == "nonfinite-loss"


def test_a_likelihood_that_is_minimised_falls_faster_and_faster() -> None:
    x, y = numbers()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        error = (targets - outputs[:, :1]) / outputs[:, 1:].exp()
        return (-outputs[:, 1:] - 0.5 * error**2).mean()

    model = net(n_out=2)
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    monitor = train(model, (x, y), loss_fn, optimizer=adam, steps=150, see=("loss",))
    assert raised(monitor)[0] == "diverging-loss"


def test_outputs_that_a_loss_only_pulls_together_collapse() -> None:
    x, _ = numbers()

    def together(outputs: Tensor, _: Tensor) -> Tensor:
        return functional.mse_loss(outputs, outputs.roll(1, 0))

    see = ("inputs", "outputs", "loss")
    monitor = train(net(), (x, x), together, steps=500, see=see)
    assert raised(monitor) == ["constant-predictions"]


@pytest.mark.parametrize("see", [("loss",), ()])
def test_gradients_that_grow_into_nan_come_of_the_learning_rate(see: tuple[str, ...]) -> None:
    sgd = torch.optim.SGD((model := net(n_out=1)).parameters(), 5.0)
    monitor = train(model, numbers(), functional.mse_loss, optimizer=sgd, see=see)
    assert raised(monitor)[0] == "lr-too-high"
    said = " ".join(finding.explanation for finding in monitor.diagnose())
    assert "the loss is finite" not in said


def test_probabilities_that_round_to_0_and_1_are_no_logits() -> None:
    x, y = binary()
    y = torch.where(torch.rand(ROWS, 1) < 0.03, 1 - y, y)  # some are told wrong

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        p = outputs.clamp(1e-4, 1 - 1e-4)
        return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()

    model = nn.Sequential(*net(n_out=1), nn.Hardsigmoid())
    assert not named(train(model, (x, y), loss_fn, steps=300), "loss-output-mismatch")


def test_outputs_far_from_0_that_learn_to_differ_do_not_collapse() -> None:
    x, y = numbers()
    model = net(n_out=1)
    adam = torch.optim.Adam(model.parameters(), 0.1)
    see = ("inputs", "outputs", "loss")
    monitor = train(model, (x, 30 + y), functional.mse_loss, optimizer=adam, steps=400, see=see)
    said = " ".join(finding.explanation for finding in monitor.diagnose())
    assert "nothing keeps them apart" not in said


def test_outputs_may_change_their_width_from_batch_to_batch() -> None:
    def batch(step: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(16, 10 + step % 5, 1)
        return x, x[..., 0]

    model = nn.Sequential(nn.Linear(1, 1), nn.Flatten())
    monitor = fit(model, lambda o, t: (o - t).abs().pow(1.5).mean(), batch, steps=60)
    monitor.diagnose()
    assert len({batch.shapes["outputs"] for batch in monitor.evidence().batches}) > 1


@pytest.mark.parametrize("depth", [3.0, 0.9])
@pytest.mark.parametrize("warms_up", [True, False])
def test_a_loss_may_fall_faster_while_the_learning_rate_warms_up(
    depth: float, warms_up: bool
) -> None:
    steps = range(1, 101)
    losses = [-depth * (step / 90) ** 2 for step in steps]
    monitor = told(losses, lrs=[1e-4 * (step if warms_up else 100) for step in steps])
    assert bool(named(monitor, "diverging-loss")) == (depth > 1 and not warms_up)
