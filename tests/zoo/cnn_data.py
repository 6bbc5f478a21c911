"""Convolutional networks whose data are at fault, with their twin."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.data import Split, digit_images
from zoo.models import cnn
from zoo.program import Watch, fit, program


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def classify(watch: Watch, data: Split, *, shuffle: bool = True) -> nn.Module:
    model = cnn()
    return fit(watch, model, sgd(model), nn.CrossEntropyLoss(), data, epochs=6, shuffle=shuffle)


@program("cnn/digits/sgd", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    return classify(watch, digit_images())


@program(
    "cnn/digits/inputs-0-255",
    causes=("bad-inputs",),
    operator="inputs not scaled",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return classify(watch, digit_images().map(lambda x: x * 255))


@program(
    "cnn/digits/nan-pixels", causes=("bad-inputs",), operator="NaN in training data", half="tuning"
)
def _(watch: Watch) -> nn.Module:
    data = digit_images()
    x = data.x.clone()
    x[torch.randperm(len(x))[:20], 0, 3, 3] = torch.nan
    return classify(watch, Split(x, data.y, data.val_x, data.val_y))


@program(
    "cnn/digits/integer-division",
    causes=("bad-inputs",),
    operator="inputs constant: uint8 // 255",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = digit_images()
    return classify(watch, data.map(lambda x: (x * 254).byte() // 255).map(Tensor.float))


@program(
    "cnn/digits/sorted-by-class",
    causes=("class-imbalance", "bad-inputs", "oscillating-loss"),
    operator="training data not shuffled",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = digit_images()
    return classify(watch, data.rows(data.y.argsort()), shuffle=False)


@program(
    "cnn/digits/random-labels", causes=("bad-targets",), operator="change labels", half="tuning"
)
def _(watch: Watch) -> nn.Module:
    data = digit_images()
    y = torch.randint(0, 10, data.y.shape)
    return classify(watch, Split(data.x, y, data.val_x, data.val_y))


def is_one(targets: Tensor) -> Tensor:
    return (targets == 1).long()


@program(
    "cnn/digits/one-in-a-hundred",
    causes=("class-imbalance",),
    operator="unbalance training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = digit_images().map(targets=is_one)
    ones = data.y.nonzero().flatten()[:10]
    rows = torch.cat([(data.y == 0).nonzero().flatten(), ones])
    model = cnn(outputs=2)
    return fit(watch, model, sgd(model, 0.002), nn.CrossEntropyLoss(), data.rows(rows), epochs=5)


@program(
    "cnn/digits/twenty-images",
    causes=("overfitting",),
    operator="delete training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = digit_images()
    few = data.rows(torch.randperm(len(data.x))[:20])
    model = cnn((16, 32))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), few, epochs=80, batch_size=20)


def ink(scale: float) -> Split:
    """Predict how much ink the rows' weighted sum of an image has, in units of ``1 / scale``."""
    rows = torch.linspace(-1, 1, 8).reshape(1, 1, 8, 1)
    data = digit_images()
    return Split(
        data.x,
        scale * (data.x * rows).sum((1, 2, 3)).unsqueeze(1),
        data.val_x,
        scale * (data.val_x * rows).sum((1, 2, 3)).unsqueeze(1),
    )


def weigh(watch: Watch, data: Split) -> nn.Module:
    model = cnn(outputs=1)
    return fit(watch, model, sgd(model, 0.005), functional.mse_loss, data, epochs=6)


@program("cnn/ink/sgd", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    return weigh(watch, ink(1.0))


class Rounded(nn.Module):
    """Answers whole numbers: no gradient passes the rounding."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.round()


@program(
    "cnn/ink/rounded-output",
    causes=("flat-loss", "vanishing-gradient", "parameters-not-updating"),
    operator="add activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = nn.Sequential(cnn(outputs=1), Rounded())
    return fit(watch, model, sgd(model, 0.005), functional.mse_loss, ink(1.0), epochs=6)


@program(
    "cnn/ink/targets-unscaled",
    causes=("bad-targets", "exploding-gradient"),
    operator="regression targets not scaled",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return weigh(watch, ink(1000.0).map(targets=lambda y: y + 5000))
