"""MLPs with a learning rate that is too high or too low, or a clip that makes it so."""

from __future__ import annotations

from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from zoo.data import cancer, diabetes, digits, waves, wine
from zoo.models import mlp
from zoo.program import Watch, fit, program


@program(
    "mlp/digits/sgd-lr-x200",
    causes=("lr-too-high", "diverging-loss", "exploding-gradient"),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = mlp((64, 64, 32, 10))
    optimizer = SGD(model.parameters(), lr=20, momentum=0.9)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=5)


@program(
    "mlp/diabetes/sgd-lr-x40",
    causes=("lr-too-high", "diverging-loss", "nonfinite-loss", "exploding-gradient"),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = mlp((10, 32, 1), nn.Softplus)
    optimizer = SGD(model.parameters(), lr=2)
    return fit(watch, model, optimizer, mse_loss, diabetes(), epochs=20)


@program(
    "mlp/waves/adam-lr-x600",
    causes=("lr-too-high", "oscillating-loss", "saturated-activation"),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Every step moves every weight by about 3: the tanh units saturate as a consequence."""
    model = mlp((2, 32, 32, 1), nn.Tanh)
    optimizer = Adam(model.parameters(), lr=3)
    return fit(watch, model, optimizer, mse_loss, waves(), epochs=12)


@program(
    "mlp/digits/adamw-lr-x1000",
    causes=("lr-too-high", "diverging-loss", "dead-units"),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = mlp((64, 64, 64, 10))
    optimizer = AdamW(model.parameters(), lr=1)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=6)


@program(
    "mlp/waves/sgd-clipped-oscillates",
    causes=("oscillating-loss", "lr-too-high"),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Steps of length 3 at most, which a clip bounds: the loss cannot diverge, but swings."""
    model = mlp((2, 32, 32, 1), nn.Tanh)
    optimizer = SGD(model.parameters(), lr=3)
    return fit(watch, model, optimizer, mse_loss, waves(), epochs=15, max_norm=1)


@program(
    "mlp/digits/restarts-too-high",
    causes=("oscillating-loss", "lr-too-high"),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Every 40 steps the schedule goes back to a rate that throws away what was learnt."""
    model = mlp((64, 32, 32, 10), nn.Tanh)
    optimizer = SGD(model.parameters(), lr=3)
    return fit(
        watch,
        model,
        optimizer,
        cross_entropy,
        digits(),
        epochs=8,
        schedule=lambda optimizer: CosineAnnealingWarmRestarts(optimizer, 40),
    )


@program(
    "mlp/digits/sgd-lr-over-100000",
    causes=("lr-too-low", "flat-loss"),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = mlp((64, 64, 32, 10))
    optimizer = SGD(model.parameters(), lr=1e-6, momentum=0.9)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=6)


@program(
    "mlp/cancer/adam-lr-over-1000",
    causes=("lr-too-low", "flat-loss"),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = mlp((30, 32, 2))
    optimizer = Adam(model.parameters(), lr=1e-6)
    return fit(watch, model, optimizer, cross_entropy, cancer(), epochs=15)


@program(
    "mlp/wine/clip-too-tight",
    causes=("lr-too-low", "flat-loss", "parameters-not-updating"),
    operator="change gradient clip",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """A gradient of norm 1 is clipped to 1e-5: SGD then steps as with a rate 100000 times less."""
    model = mlp((13, 32, 3))
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return fit(
        watch,
        model,
        optimizer,
        cross_entropy,
        wine(),
        epochs=30,
        batch_size=16,
        max_norm=1e-5,
    )


@program(
    "mlp/digits/batch-of-all",
    causes=("lr-too-low", "underfitting"),
    operator="change batch size",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """A rate fit for batches of 32, with one step an epoch."""
    model = mlp((64, 64, 32, 10))
    optimizer = SGD(model.parameters(), lr=0.02)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=80, batch_size=1347)
