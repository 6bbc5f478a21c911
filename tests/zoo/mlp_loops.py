"""MLPs whose training loop is at fault: nothing is updated, or gradients pile up."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, Adam

from zoo.data import cancer, diabetes, digits, waves, wine
from zoo.models import mlp
from zoo.program import Watch, batches, fit, program, validate


@program(
    "mlp/digits/stale-optimizer",
    causes=("parameters-not-updating",),
    operator="swap order of calls",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """The model is replaced by a copy after the optimizer was made."""
    model = mlp((64, 64, 32, 10))
    optimizer = Adam(model.parameters(), lr=1e-3)
    model = copy.deepcopy(model)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=6)


@program(
    "mlp/diabetes/lr-zero",
    causes=("parameters-not-updating", "lr-too-low"),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """The rate of a schedule that had already ended."""
    model = mlp((10, 32, 1))
    optimizer = Adam(model.parameters(), lr=0)
    return fit(watch, model, optimizer, mse_loss, diabetes(), epochs=15)


@program(
    "mlp/waves/bfloat16-updates-lost",
    causes=("parameters-not-updating", "lr-too-low"),
    operator="change data type",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Weights near 1 in bfloat16, whose next number is 0.008 away, with updates of 0.0001: each
    is rounded off."""
    model = mlp((2, 32, 32, 1), nn.Tanh)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * parameter.sign() + 0.5 * parameter)
    model = model.bfloat16()
    optimizer = SGD(model.parameters(), lr=1e-4)
    data = waves().map(Tensor.bfloat16, Tensor.bfloat16)
    return fit(watch, model, optimizer, mse_loss, data, epochs=10)


class Detached(nn.Module):
    """A bottleneck whose output goes through numpy-like code that loses the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp((64, 32, 3), nn.Tanh)
        self.head = mlp((3, 16, 10), nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x).detach()
        return self.head(features - features.mean(0))


@program(
    "mlp/digits/detached-body",
    causes=("parameters-not-updating",),
    operator="remove gradient path",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = Detached()
    optimizer = Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=8)


@program(
    "mlp/cancer/zero-grad-before-step",
    causes=("parameters-not-updating",),
    operator="swap order of calls",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = mlp((30, 32, 2))
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch.attach(optimizer, model)
    data = cancer()
    for _ in range(15):
        for inputs, targets in batches(data, 32):
            outputs = model(inputs)
            loss = cross_entropy(outputs, targets)
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            loss.backward()
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()
        validate(watch, model, cross_entropy, data)
    return model


@program(
    "mlp/wine/frozen-by-mistake",
    causes=("parameters-not-updating",),
    operator="remove gradient path",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Frozen for a validation pass and never thawed, but for the last bias, which was new."""
    model = mlp((13, 32, 3))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model[-1].bias.requires_grad_(True)
    optimizer = Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, cross_entropy, wine(), epochs=20, batch_size=16)


@program(
    "mlp/digits/missing-zero-grad",
    causes=("gradient-accumulation",),
    operator="remove zeroing of gradients",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = mlp((64, 64, 32, 10))
    optimizer = SGD(model.parameters(), lr=0.1)
    watch.attach(optimizer, model)
    data = digits()
    for _ in range(8):
        for inputs, targets in batches(data, 32):
            outputs = model(inputs)
            loss = cross_entropy(outputs, targets)
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            loss.backward()
            optimizer.step()
        validate(watch, model, cross_entropy, data)
    return model


@program(
    "mlp/diabetes/zero-grad-of-another",
    causes=("gradient-accumulation",),
    operator="remove zeroing of gradients",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """The loop zeroes the gradients of the model it was copied from."""
    template = mlp((10, 32, 1), nn.Tanh)
    model = copy.deepcopy(template)
    optimizer = Adam(model.parameters(), lr=0.03)
    watch.attach(optimizer, model)
    data = diabetes()
    for _ in range(25):
        for inputs, targets in batches(data, 32):
            template.zero_grad()
            outputs = model(inputs)
            loss = mse_loss(outputs, targets)
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            loss.backward()
            optimizer.step()
        validate(watch, model, mse_loss, data)
    return model


@program(
    "mlp/waves/loss-rebuilt",
    causes=("parameters-not-updating",),
    operator="remove gradient path",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """A complaint that the loss needs no gradient was silenced by making a new tensor of it: the
    backward pass ends there, and no parameter has a gradient."""
    model = mlp((2, 32, 32, 1), nn.Tanh)
    optimizer = Adam(model.parameters(), lr=5e-3)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(outputs, targets).detach().requires_grad_()

    return fit(watch, model, optimizer, loss_fn, waves(), epochs=10)
