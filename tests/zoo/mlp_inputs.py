"""MLPs that are fed bad inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, Adam

from zoo.data import cancer_raw, diabetes, digits, digits_raw, iris, wine_raw
from zoo.models import mlp
from zoo.program import Watch, fit, program


@program(
    "mlp/wine/unscaled-inputs",
    causes=("bad-inputs", "saturated-activation"),
    operator="remove scaling of training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """One measurement is near 750, the others near 1: it saturates the sigmoids."""
    model = mlp((13, 32, 3), nn.Sigmoid)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return fit(watch, model, optimizer, cross_entropy, wine_raw(), epochs=30, batch_size=16)


@program(
    "mlp/cancer/unscaled-inputs",
    causes=("bad-inputs",),
    operator="remove scaling of training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Areas up to 4254: the first steps throw the ReLU network to a constant answer."""
    model = mlp((30, 32, 2))
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return fit(watch, model, optimizer, cross_entropy, cancer_raw(), epochs=15)


@program(
    "mlp/digits/inputs-to-255",
    causes=("bad-inputs", "saturated-activation"),
    operator="remove scaling of training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Grey values from 0 to 255 into tanh units."""
    model = mlp((64, 32, 32, 10), nn.Tanh)
    optimizer = SGD(model.parameters(), lr=0.05)
    images = digits_raw().map(lambda x: x / 16 * 255)
    return fit(watch, model, optimizer, cross_entropy, images, epochs=8)


@program(
    "mlp/iris/row-number-as-input",
    causes=("bad-inputs",),
    operator="noise in training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """A column of row numbers, up to 20000, came with the table."""

    def with_row_number(x: Tensor) -> Tensor:
        return torch.cat([x, torch.linspace(0, 20000, len(x))[:, None]], 1)

    model = mlp((5, 16, 3), nn.Tanh)
    optimizer = Adam(model.parameters(), lr=0.01)
    data = iris().map(with_row_number)
    return fit(watch, model, optimizer, cross_entropy, data, epochs=40, batch_size=16)


@program(
    "mlp/cancer/inputs-all-zero",
    causes=("bad-inputs", "constant-predictions"),
    operator="delete training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Scaled by an integer division: every input is 0."""
    model = mlp((30, 32, 2))
    optimizer = Adam(model.parameters(), lr=1e-3)
    data = cancer_raw().map(lambda x: (x.long() // 5000).float())
    return fit(watch, model, optimizer, cross_entropy, data, epochs=15)


@program(
    "mlp/digits/one-row-repeated",
    causes=("bad-inputs", "constant-predictions"),
    operator="repeat training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """A loader that returns the same picture for every index, with labels that change."""
    model = mlp((64, 64, 32, 10))
    optimizer = Adam(model.parameters(), lr=1e-3)
    data = digits().map(lambda x: x[:1].expand_as(x))
    return fit(watch, model, optimizer, cross_entropy, data, epochs=8)


@program(
    "mlp/digits/sorted-by-class",
    causes=("bad-inputs", "bad-targets", "class-imbalance", "oscillating-loss"),
    operator="change batching",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Sorted by class and never shuffled: each batch holds one class, and undoes the last."""
    model = mlp((64, 64, 32, 10))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = digits()
    data = data.rows(data.y.argsort(stable=True))
    return fit(watch, model, optimizer, cross_entropy, data, epochs=8, shuffle=False)


@program(
    "mlp/diabetes/nan-in-inputs",
    causes=("bad-inputs", "nonfinite-loss"),
    operator="noise in training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Three missing values were read as NaN."""

    def with_missing(x: Tensor) -> Tensor:
        x = x.clone()
        x[[17, 40, 90], [2, 5, 8]] = torch.nan
        return x

    model = mlp((10, 32, 1))
    optimizer = Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, mse_loss, diabetes().map(with_missing), epochs=20)
