"""MLPs that are given bad targets, or hardly any of one class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, Adam, AdamW

from zoo.data import Split, cancer, diabetes_raw, digits, wine
from zoo.models import mlp
from zoo.program import Watch, fit, program


def shuffled(y: Tensor) -> Tensor:
    return y[torch.randperm(len(y))]


@program(
    "mlp/digits/random-labels",
    causes=("bad-targets", "overfitting"),
    operator="change labels",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Labels shuffled apart from their rows."""
    model = mlp((64, 64, 32, 10))
    optimizer = Adam(model.parameters(), lr=1e-3)
    data = digits().map(targets=shuffled)
    return fit(watch, model, optimizer, cross_entropy, data, epochs=10)


@program(
    "mlp/wine/labels-one-row-late",
    causes=("bad-targets", "overfitting"),
    operator="change labels",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Each row has the label of the row before it."""
    model = mlp((13, 32, 3))
    optimizer = AdamW(model.parameters(), lr=3e-3)
    data = wine().map(targets=lambda y: y.roll(1))
    return fit(watch, model, optimizer, cross_entropy, data, epochs=30, batch_size=16)


@program(
    "mlp/cancer/label-noise",
    causes=("bad-targets", "overfitting"),
    operator="change labels",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """40 % of the training labels are turned over."""
    model = mlp((30, 64, 2))
    optimizer = Adam(model.parameters(), lr=3e-3)
    data = cancer()
    noisy = data.y ^ (torch.rand(len(data.y)) < 0.4).long()
    data = Split(data.x, noisy, data.val_x, data.val_y)
    return fit(watch, model, optimizer, cross_entropy, data, epochs=30)


@program(
    "mlp/diabetes/unscaled-targets",
    causes=("bad-targets", "exploding-gradient", "diverging-loss", "nonfinite-loss"),
    operator="remove scaling of training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Targets from 25 to 346: the first errors are hundreds of times those of scaled targets."""
    model = mlp((10, 32, 32, 1))
    optimizer = SGD(model.parameters(), lr=0.05)
    return fit(watch, model, optimizer, mse_loss, diabetes_raw(), epochs=20)


@program(
    "mlp/diabetes/targets-in-millions",
    causes=("bad-targets", "lr-too-low"),
    operator="remove scaling of training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Targets near 1.5e8: Adam's steps of 0.001 never get there."""
    model = mlp((10, 32, 1))
    optimizer = Adam(model.parameters(), lr=1e-3)
    data = diabetes_raw().map(targets=lambda y: y * 1e6)
    return fit(watch, model, optimizer, mse_loss, data, epochs=20)


@program(
    "mlp/cancer/imbalance-99-to-1",
    causes=("class-imbalance", "constant-predictions"),
    operator="unbalance training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """3 malignant rows of 270: the network always answers benign."""
    model = mlp((30, 16, 2), nn.Tanh)
    optimizer = SGD(model.parameters(), lr=0.005)
    data = cancer()
    few = (data.y == 0).nonzero().flatten()[:3]
    data = data.rows(torch.cat([few, (data.y == 1).nonzero().flatten()]))
    return fit(watch, model, optimizer, cross_entropy, data, epochs=15)


@program(
    "mlp/digits/imbalance-one-class",
    causes=("class-imbalance", "constant-predictions"),
    operator="unbalance training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """All eights, and one row each of three other digits."""
    model = mlp((64, 32, 10))
    optimizer = SGD(model.parameters(), lr=0.02)
    data = digits()
    eights = (data.y == 8).nonzero().flatten()
    others = torch.stack([(data.y == digit).nonzero().flatten()[0] for digit in (3, 5, 9)])
    return fit(
        watch, model, optimizer, cross_entropy, data.rows(torch.cat([eights, others])), epochs=40
    )
