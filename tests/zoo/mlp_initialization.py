"""MLPs with a start from which they do not learn, or only after a long plateau."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.optim import SGD, Adam

from zoo.data import diabetes, digits, parity, waves
from zoo.models import mlp
from zoo.program import Watch, fit, program


@program(
    "mlp/waves/zero-weights",
    causes=("bad-initialization",),
    operator="change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """All weights and biases 0: only the last bias ever has a gradient."""
    model = mlp((2, 32, 32, 1))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, mse_loss, waves(), epochs=12)


@program(
    "mlp/digits/constant-weights",
    causes=("bad-initialization",),
    operator="change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """All weights of a layer are equal, so its units stay copies of one."""
    model = mlp((64, 64, 32, 10), nn.Tanh)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.02)
    optimizer = SGD(model.parameters(), lr=0.1)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=6)


@program(
    "mlp/digits/weights-x40",
    causes=("bad-initialization", "saturated-activation"),
    operator="change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = mlp((64, 32, 32, 32, 10), nn.Tanh)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(40)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=8)


@program(
    "mlp/diabetes/weights-x20",
    causes=("bad-initialization", "exploding-gradient"),
    operator="change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = mlp((10, 32, 32, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    optimizer = Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, mse_loss, diabetes(), epochs=20)


@program(
    "mlp/digits/bias-minus-10",
    causes=("bad-initialization", "dead-units", "constant-predictions"),
    operator="change bias initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Biases of -10 in ReLU layers: no unit is ever active."""
    model = mlp((64, 64, 32, 10))
    for layer in (model[0], model[2]):
        nn.init.constant_(layer.bias, -10)
    optimizer = SGD(model.parameters(), lr=0.1)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=6)


@program(
    "mlp/waves/saddle",
    causes=("plateau", "bad-initialization"),
    operator="change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Weights of deviation 0.001: near the saddle at zero, where each layer's gradient is scaled
    by the other's weights (Saxe et al. 2014)."""
    model = mlp((2, 32, 32, 1), nn.Tanh)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=1e-3)
        else:
            nn.init.zeros_(parameter)
    optimizer = SGD(model.parameters(), lr=0.05)
    return fit(watch, model, optimizer, mse_loss, waves(), epochs=14)


@program(
    "mlp/parity/plateau",
    causes=("plateau", "flat-loss", "underfitting"),
    operator="change activation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """The parity of four of ten bits, with next to no gradient at a random start (Shalev-Shwartz
    et al. 2017, "Failures of gradient-based deep learning", section 2)."""
    model = mlp((10, 32, 1), nn.Tanh)
    optimizer = SGD(model.parameters(), lr=0.05)
    return fit(
        watch,
        model,
        optimizer,
        binary_cross_entropy_with_logits,
        parity(),
        epochs=250,
        batch_size=768,
    )
