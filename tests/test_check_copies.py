"""`check` and the other probes change nothing of model, loss, batch and random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from probe_models import classes, everything, mlp, same, state_of
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import gradstat

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CE = F.cross_entropy


@pytest.mark.parametrize("fails", [False, True])
def test_model_batch_and_random_numbers_stay_as_they_are(fails):
    model, (inputs, targets) = everything(), classes()
    kept, calls = inputs.detach().clone(), model.calls
    passes = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        passes.append(None)
        if fails and len(passes) == 3:
            raise RuntimeError("out of luck")
        return CE(outputs, targets)

    before = state_of(model)
    gradients = [parameter.grad for parameter in model.parameters()]
    with torch.no_grad():
        if fails:
            with pytest.raises(RuntimeError, match="out of luck"):
                gradstat.check(model, loss_fn, (inputs, targets))
        else:
            gradstat.check(model, loss_fn, (inputs, targets), overfit_steps=5)
    assert len(passes) >= 3
    assert same(before, state_of(model))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert model.calls == calls
    assert torch.equal(inputs, kept)


def test_a_model_in_evaluation_mode_stays_so():
    model = everything().eval()
    before = state_of(model)
    gradstat.check(model, CE, classes(), overfit_steps=3)
    assert same(before, state_of(model))


def test_inputs_that_require_a_gradient_get_none():
    inputs, targets = classes()
    inputs.requires_grad_()

    def penalised(model: nn.Module, batch: Any) -> Tensor:
        loss = CE(model(batch[0]), batch[1])
        (slope,) = torch.autograd.grad(loss, batch[0], create_graph=True)
        return loss + slope.square().sum()

    gradstat.check(mlp(), batch=(inputs, targets), step=penalised, overfit_steps=3)
    assert inputs.grad is None


class Proxies(nn.Module):
    """A loss with parameters, and a buffer that it counts in."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return CE(outputs @ self.centres, targets)


def all_probes(model: nn.Module, loss_fn: nn.Module) -> None:
    gradstat.check(model, loss_fn, classes(), overfit_steps=3)
    gradstat.noise_scale(model, loss_fn, classes(), splits=2)
    optimizer = torch.optim.SGD([*model.parameters(), *loss_fn.parameters()], lr=0.1)
    gradstat.lr_range_test(model, optimizer, loss_fn, [classes()], steps=10)


def test_a_loss_with_a_state_of_its_own_stays_as_it_is():
    model, loss_fn = mlp(), Proxies()
    before = loss_fn.centres.detach().clone()
    all_probes(model, loss_fn)
    assert loss_fn.centres.grad is None
    assert torch.equal(loss_fn.centres, before)
    assert loss_fn.calls == 0


def test_the_rate_of_a_loss_with_parameters_is_tried_too():
    model, loss_fn = mlp(), Proxies()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD([*model.parameters(), *loss_fn.parameters()], lr=0.1)
    found = gradstat.lr_range_test(model, optimizer, loss_fn, [classes()])
    assert found.losses.min() < found.losses[0] - 0.01


def test_a_change_would_be_seen():
    model = everything()
    before = state_of(model)
    assert same(before, state_of(model))
    model.body[1].running_mean.add_(1e-6)
    assert not same(before, state_of(model))
