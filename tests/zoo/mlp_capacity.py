"""MLPs that fit too much or too little."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, Adam, AdamW

from zoo.data import diabetes, digits, waves, wine
from zoo.models import mlp
from zoo.program import Watch, fit, program


@program(
    "mlp/diabetes/overfit-40-rows",
    causes=("overfitting",),
    operator="delete training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = mlp((10, 128, 128, 1))
    optimizer = Adam(model.parameters(), lr=3e-3)
    data = diabetes().rows(slice(40))
    return fit(watch, model, optimizer, mse_loss, data, epochs=100, batch_size=10)


@program(
    "mlp/diabetes/overfit-too-long",
    causes=("overfitting",),
    operator="change number of epochs",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """All rows, but many times what they are good for."""
    model = mlp((10, 256, 256, 1))
    optimizer = AdamW(model.parameters(), lr=2e-3)
    return fit(watch, model, optimizer, mse_loss, diabetes(), epochs=60)


@program(
    "mlp/digits/weight-decay-too-strong",
    causes=("underfitting", "constant-predictions"),
    operator="change weights regularisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """A decay that shrinks the weights by 10 % a step holds them near 0."""
    model = mlp((64, 64, 32, 10))
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=1)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=8)


@program(
    "mlp/waves/no-activation",
    causes=("underfitting",),
    operator="remove activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Without activations the network is a plane, and the waves are not."""
    model = mlp((2, 32, 32, 1), nn.Identity)
    optimizer = Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, mse_loss, waves(), epochs=15)


@program(
    "mlp/digits/one-hidden-unit",
    causes=("underfitting",),
    operator="remove layer width",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Ten digits through one number."""
    model = mlp((64, 1, 32, 10), nn.Tanh)
    optimizer = Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=8)


@program(
    "mlp/wine/dropout-too-strong",
    causes=("underfitting",),
    operator="change dropout rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """97 % of the inputs and hidden units are dropped."""
    model = nn.Sequential(
        nn.Dropout(0.97), nn.Linear(13, 32), nn.ReLU(), nn.Dropout(0.97), nn.Linear(32, 3)
    )
    optimizer = Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, cross_entropy, wine(), epochs=30, batch_size=16)


@program(
    "mlp/digits/everything-dropped",
    causes=("constant-predictions", "underfitting", "dead-units"),
    operator="change dropout rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Dropout of 1, meant as the share to keep: the output is the last bias."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(1.0), nn.Linear(64, 10))
    optimizer = Adam(model.parameters(), lr=1e-3)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=6)


class Pooled(nn.Module):
    """Averages over the batch instead of over the features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp((64, 64, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.body(x)).mean(0, keepdim=True)
        return self.head(features).expand(len(x), -1)


@program(
    "mlp/digits/mean-over-batch",
    causes=("constant-predictions", "underfitting"),
    operator="change dimension of reduction",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Every row of a batch gets the same answer."""
    model = Pooled()
    optimizer = Adam(model.parameters(), lr=1e-3)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=8)
