"""MLPs whose units die, saturate, or pass on next to no gradient, or far too much."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR

from zoo.data import digits, ids, waves, wine
from zoo.models import mlp
from zoo.program import Watch, fit, program


@program(
    "mlp/digits/born-dead",
    causes=("dead-units", "bad-initialization"),
    operator="remove layer width",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Forty ReLU layers of two units: dead for every input from the start (Lu et al. 2019,
    "Dying ReLU and initialization", section 3)."""
    model = mlp((64, *[2] * 40, 10))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            nn.init.zeros_(parameter)
    optimizer = SGD(model.parameters(), lr=0.1)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=5)


@program(
    "mlp/wine/killed-by-lr-spike",
    causes=("dead-units", "lr-too-high"),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Three steps at 100 times the rate push all units below zero for every input."""
    model = mlp((13, 16, 16, 16, 3))
    optimizer = SGD(model.parameters(), lr=0.1)
    return fit(
        watch,
        model,
        optimizer,
        cross_entropy,
        wine(),
        epochs=30,
        batch_size=16,
        schedule=lambda optimizer: LambdaLR(optimizer, lambda step: 100 if 30 <= step < 33 else 1),
    )


class Shifted(nn.Module):
    """ReLU of the inputs less 20, as an off-by-much threshold makes it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x - 20)


@program(
    "mlp/waves/threshold-too-high",
    causes=("dead-units", "constant-predictions"),
    operator="change activation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = mlp((2, 32, 32, 1), Shifted)
    optimizer = Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, mse_loss, waves(), epochs=12)


@program(
    "mlp/digits/deep-sigmoid",
    causes=("vanishing-gradient",),
    operator="change activation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = mlp((64, *[32] * 9, 10), nn.Sigmoid)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=6)


@program(
    "mlp/waves/deep-tanh",
    causes=("vanishing-gradient", "bad-initialization"),
    operator="change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Fourteen tanh layers whose weights shrink a signal about tenfold each."""
    model = mlp((2, *[32] * 14, 1), nn.Tanh)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
    optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
    return fit(watch, model, optimizer, mse_loss, waves(), epochs=10)


class Steep(nn.Module):
    """tanh of a hundred times the inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(100 * x)


@program(
    "mlp/waves/steep-tanh",
    causes=("saturated-activation", "vanishing-gradient"),
    operator="change activation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = mlp((2, 16, 16, 16, 1), Steep)
    optimizer = SGD(model.parameters(), lr=0.05)
    return fit(watch, model, optimizer, mse_loss, waves(), epochs=14)


@program(
    "mlp/digits/saturated-sigmoid",
    causes=("saturated-activation", "bad-initialization", "vanishing-gradient"),
    operator="change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Weights of deviation 10 hold the sigmoids of both hidden layers at 0 or 1."""
    model = mlp((64, 32, 32, 10), nn.Sigmoid)
    for parameter in model[:-1].parameters():
        nn.init.normal_(parameter, std=10)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=8)


@program(
    "mlp/waves/deep-linear-gain",
    causes=("exploding-gradient", "bad-initialization", "diverging-loss", "nonfinite-loss"),
    operator="remove activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Sixteen linear layers, each of which doubles its input."""
    model = mlp((2, *[32] * 16, 1), nn.Identity)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.orthogonal_(parameter, gain=2)
    optimizer = SGD(model.parameters(), lr=0.01)
    return fit(watch, model, optimizer, mse_loss, waves(), epochs=8)


@program(
    "mlp/wine/deep-relu-gain",
    causes=("exploding-gradient", "bad-initialization", "diverging-loss"),
    operator="change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Twelve ReLU layers with five times the deviation that keeps a signal's scale."""
    model = mlp((13, *[32] * 12, 3))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=5 * (2 / parameter.shape[1]) ** 0.5)
    optimizer = SGD(model.parameters(), lr=0.01)
    return fit(watch, model, optimizer, cross_entropy, wine(), epochs=20, batch_size=16)


@program(
    "mlp/waves/one-hot-cells",
    causes=("sparse-gradients", "lr-too-low", "underfitting"),
    operator="change optimizer",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Two variables coded as one of 400 cells: in a batch of eight rows, one column of fifty has a
    gradient, and SGD leaves it nearly where it was."""

    def cells(x: Tensor) -> Tensor:
        cell = ((x + 1) * 10).long().clamp(max=19)
        return one_hot(20 * cell[:, 0] + cell[:, 1], 400).float()

    model = mlp((400, 16, 1), nn.Tanh)
    optimizer = SGD(model.parameters(), lr=0.02)
    return fit(watch, model, optimizer, mse_loss, waves().map(cells), epochs=5, batch_size=8)


@program(
    "mlp/ids/rare-rows",
    causes=("sparse-gradients", "lr-too-low", "underfitting"),
    operator="change optimizer",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Each of 1000 ids occurs six times an epoch: an embedding's row has no gradient in seven
    batches of eight, and SGD leaves it nearly where it was."""
    model = nn.Sequential(nn.EmbeddingBag(20000, 16), nn.Linear(16, 2))
    optimizer = SGD(model.parameters(), lr=0.1)
    return fit(watch, model, optimizer, cross_entropy, ids(), epochs=6)
