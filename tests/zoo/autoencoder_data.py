"""Autoencoders whose data, output layer or loss are at fault, with their twins."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.data import Split, digit_images
from zoo.models import Autoencoder
from zoo.program import Watch, fit, program


def copied(x: Tensor, val_x: Tensor) -> Split:
    return Split(x, x, val_x, val_x)


@functools.cache
def pixels() -> Split:
    """Digits as inputs and targets: ``[1347, 64]`` values from 0 to 1."""
    data = digit_images()
    return copied(data.x.flatten(1), data.val_x.flatten(1))


@functools.cache
def standardised() -> Split:
    """`pixels` less their mean, over their deviation: values from -0.8 to 1.9."""
    data = pixels()
    mean, deviation = data.x.mean(), data.x.std()
    return copied((data.x - mean) / deviation, (data.val_x - mean) / deviation)


def rebuild(
    watch: Watch,
    data: Split,
    model: nn.Module | None = None,
    loss_fn: nn.Module | None = None,
    *,
    epochs: int = 6,
) -> nn.Module:
    model = model or Autoencoder((64, 48, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, loss_fn or nn.MSELoss(), data, epochs=epochs)


@program("autoencoder/digits/adam", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    return rebuild(watch, standardised())


@program("autoencoder/digits/sigmoid-bce", operator="sigmoid output and BCELoss", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Targets between 0 and 1 keep the loss above 0, and many outputs rest close to 0."""
    return rebuild(watch, pixels(), Autoencoder((64, 48, 16), output=nn.Sigmoid), nn.BCELoss())


@program(
    "autoencoder/digits/relu-output",
    causes=("loss-output-mismatch",),
    operator="add activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Targets below 0 are out of reach."""
    return rebuild(watch, standardised(), Autoencoder((64, 48, 16), output=nn.ReLU))


@program(
    "autoencoder/digits/sigmoid-output-raw-pixels",
    causes=("loss-output-mismatch", "bad-targets"),
    operator="targets not scaled",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = pixels().map(targets=lambda y: 16 * y)
    return rebuild(watch, data, Autoencoder((64, 48, 16), output=nn.Sigmoid))


class CrossEntropyByHand(nn.Module):
    """Binary cross-entropy without a guard against the logarithm of 0."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -(targets * outputs.log() + (1 - targets) * (1 - outputs).log()).mean()


@program(
    "autoencoder/digits/log-of-zero",
    causes=("nonfinite-loss",),
    operator="change loss function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Outputs that reach 0 or 1 in float32 make 0 times infinity."""
    model = Autoencoder((64, 48, 16), output=nn.Hardsigmoid)
    return rebuild(watch, pixels(), model, CrossEntropyByHand())


class Root(nn.Module):
    """The square root of what is positive and 0 elsewhere; its gradient elsewhere is 0 times NaN,
    which `torch.where` lets through."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.where(inputs > 0, inputs.sqrt(), 0.0)


@program(
    "autoencoder/digits/root-behind-where",
    causes=("nonfinite-gradient",),
    operator="add activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return rebuild(watch, pixels(), Autoencoder((64, 48, 16), output=Root))


@program(
    "autoencoder/digits/two-pixels-in-the-loss",
    causes=("sparse-gradients",),
    operator="change loss function: all but two outputs cut off",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """The last layer's rows for the other 62 pixels never get a gradient."""

    class FirstTwo(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return functional.mse_loss(outputs[:, 26:28], targets[:, 26:28])

    return rebuild(watch, standardised(), loss_fn=FirstTwo())


@program(
    "autoencoder/digits/own-output-as-target",
    causes=("zero-loss",),
    operator="change loss function: outputs compared with themselves",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    class WithItself(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            del targets
            return functional.mse_loss(outputs, outputs.detach())

    return rebuild(watch, standardised(), loss_fn=WithItself())


@program(
    "autoencoder/digits/twenty-images",
    causes=("overfitting",),
    operator="delete training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = standardised()
    few = data.rows(torch.randperm(len(data.x))[:20])
    return rebuild(watch, few, Autoencoder((64, 256, 64)), epochs=200)


@program(
    "autoencoder/digits/tanh-inputs-x255",
    causes=("bad-inputs", "saturated-activation"),
    operator="inputs not scaled",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = standardised().map(inputs=lambda x: 255 * x)
    return rebuild(watch, data, Autoencoder((64, 48, 16), nn.Tanh))


@program(
    "autoencoder/digits/inputs-of-other-images",
    causes=("bad-targets", "flat-loss"),
    operator="swap training data: clean and noisy images paired wrongly",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = standardised()
    other = data.x[torch.randperm(len(data.x))]
    return rebuild(watch, Split(other, data.y, data.val_x, data.val_y))
