"""MLPs whose output does not fit their loss, or whose loss says nothing, or is not finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    cross_entropy,
    mse_loss,
    nll_loss,
)
from torch.optim import SGD, Adam

from zoo.data import cancer, diabetes, diabetes_raw, digits, digits_raw, waves, wine
from zoo.models import mlp
from zoo.program import Watch, fit, program


@program(
    "mlp/digits/double-softmax",
    causes=("loss-output-mismatch",),
    operator="add activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Probabilities into a cross entropy that takes logits: it cannot fall below 1.46."""
    model = nn.Sequential(mlp((64, 64, 32, 10)), nn.Softmax(dim=1))
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=8)


@program(
    "mlp/cancer/sigmoid-into-logits-loss",
    causes=("loss-output-mismatch",),
    operator="add activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Probabilities as logits: a certain "no" counts as one half."""
    model = nn.Sequential(mlp((30, 32, 1)), nn.Sigmoid())
    optimizer = Adam(model.parameters(), lr=3e-3)
    data = cancer().map(targets=lambda y: y[:, None].float())
    return fit(watch, model, optimizer, binary_cross_entropy_with_logits, data, epochs=15)


@program(
    "mlp/diabetes/relu-output",
    causes=("loss-output-mismatch", "dead-units"),
    operator="add activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Half of the targets are negative; the output cannot be."""
    model = nn.Sequential(mlp((10, 32, 1)), nn.ReLU())
    optimizer = Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, mse_loss, diabetes(), epochs=25)


@program(
    "mlp/waves/sigmoid-output",
    causes=("loss-output-mismatch",),
    operator="add activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Targets from -2 to 2, outputs from 0 to 1."""
    model = nn.Sequential(mlp((2, 32, 32, 1), nn.Tanh), nn.Sigmoid())
    optimizer = Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, mse_loss, waves(), epochs=15)


@program(
    "mlp/cancer/softmax-over-one-unit",
    causes=("loss-output-mismatch", "constant-predictions"),
    operator="change activation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """A softmax over a single unit is 1 whatever the input."""
    model = nn.Sequential(mlp((30, 32, 1)), nn.Softmax(dim=1))
    optimizer = Adam(model.parameters(), lr=3e-3)
    data = cancer().map(targets=lambda y: y[:, None].float())
    return fit(watch, model, optimizer, binary_cross_entropy, data, epochs=10)


@program(
    "mlp/diabetes/broadcast-targets",
    causes=("loss-output-mismatch", "constant-predictions"),
    operator="change loss function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Outputs ``[n, 1]`` against targets ``[n]``: each output is compared with every target."""
    model = mlp((10, 32, 1))
    optimizer = Adam(model.parameters(), lr=3e-3)
    data = diabetes().map(targets=lambda y: y[:, 0])
    return fit(watch, model, optimizer, mse_loss, data, epochs=25)


@program(
    "mlp/wine/all-weights-zero",
    causes=("zero-loss",),
    operator="change loss function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Class weights from an integer division are all 0, and so are loss and gradient."""
    model = mlp((13, 32, 3))
    optimizer = Adam(model.parameters(), lr=3e-3)
    counts = torch.bincount(wine().y)
    weights = (1 // counts).float()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = cross_entropy(outputs, targets, reduction="none")
        return (weights[targets] * losses).mean()

    return fit(watch, model, optimizer, loss_fn, wine(), epochs=20, batch_size=16)


@program(
    "mlp/diabetes/everything-masked",
    causes=("zero-loss",),
    operator="change loss function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """The mask of valid rows was made with the comparison turned round."""
    model = mlp((10, 32, 1))
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        valid = targets.abs() > 100
        return ((outputs - targets).square() * valid).sum() / valid.sum().clamp(min=1)

    return fit(watch, model, optimizer, loss_fn, diabetes(), epochs=15)


@program(
    "mlp/digits/log-of-zero",
    causes=("nonfinite-loss", "nonfinite-gradient"),
    operator="change loss function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """The logarithm of a probability that has been rounded to 0."""
    model = nn.Sequential(mlp((64, 64, 10)), nn.Softmax(dim=1))
    optimizer = Adam(model.parameters(), lr=0.2)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return -outputs.gather(1, targets[:, None]).log().mean()

    return fit(watch, model, optimizer, loss_fn, digits_raw(), epochs=8)


@program(
    "mlp/waves/root-of-zero",
    causes=("nonfinite-gradient", "nonfinite-loss"),
    operator="change loss function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """A penalty on the norm of a bias that starts at 0: itself 0, but its gradient is 0/0."""
    model = mlp((2, 32, 32, 1), nn.Tanh)
    nn.init.zeros_(model[-1].bias)
    optimizer = Adam(model.parameters(), lr=3e-3)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(outputs, targets) + 1e-3 * model[-1].bias.square().sum().sqrt()

    return fit(watch, model, optimizer, loss_fn, waves(), epochs=6)


@program(
    "mlp/cancer/empty-mask",
    causes=("nonfinite-loss",),
    operator="change loss function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """The mean over the rows of the rarer class in batches of four: now and then there are none,
    and the loss is 0/0, though its gradient stays finite."""
    model = mlp((30, 32, 2))
    optimizer = Adam(model.parameters(), lr=1e-3)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = cross_entropy(outputs, targets, reduction="none")
        rare = targets == 0
        return losses[rare].sum() / rare.sum() + losses[~rare].mean()

    return fit(watch, model, optimizer, loss_fn, cancer(), epochs=3, batch_size=4)


@program(
    "mlp/diabetes/exponential-overflow",
    causes=("nonfinite-loss", "nonfinite-gradient", "diverging-loss", "exploding-gradient"),
    operator="change loss function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """A Poisson rate is the exponential of the output, which a rate fit for the loss of scaled
    targets throws past 88."""
    model = mlp((10, 32, 1))
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.exp() - targets * outputs).mean()

    return fit(watch, model, optimizer, loss_fn, diabetes_raw(), epochs=15)


@program(
    "mlp/digits/half-overflow",
    causes=("nonfinite-loss", "nonfinite-gradient", "bad-inputs"),
    operator="change data type",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """All in float16, with a sum of squares over a batch that passes its largest number, 65504."""
    model = mlp((64, 64, 32, 10)).half()
    optimizer = SGD(model.parameters(), lr=0.05)
    data = digits().map(lambda x: x.half())

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        scores = 40 * outputs
        return cross_entropy(scores, targets) + 1e-4 * scores.square().sum()

    return fit(watch, model, optimizer, loss_fn, data, epochs=5)


@program(
    "mlp/wine/softmax-over-batch",
    causes=("loss-output-mismatch",),
    operator="change dimension of reduction",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """The softmax runs over the rows of the batch instead of over the classes."""
    model = nn.Sequential(mlp((13, 32, 3)), nn.LogSoftmax(dim=0))
    optimizer = Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, nll_loss, wine(), epochs=25, batch_size=16)


@program(
    "mlp/diabetes/tanh-output",
    causes=("loss-output-mismatch", "bad-targets", "saturated-activation"),
    operator="add activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Targets from 25 to 346, outputs from -1 to 1."""
    model = nn.Sequential(mlp((10, 32, 1)), nn.Tanh())
    optimizer = Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, mse_loss, diabetes_raw(), epochs=20)
