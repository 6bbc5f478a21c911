"""Healthy MLPs on plain data: the twins of the faulty ones, and usual losses and schedules."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    mse_loss,
    nll_loss,
)
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LambdaLR

from zoo.data import Split, cancer, diabetes, diabetes_raw, digit_images, digits, iris, waves, wine
from zoo.models import mlp
from zoo.program import Watch, fit, program


@program("mlp/digits/healthy-sgd", operator="none", half="tuning")
def _(watch: Watch) -> nn.Module:
    model = mlp((64, 64, 32, 10))
    optimizer = SGD(model.parameters(), lr=0.05)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=12)


@program("mlp/digits/healthy-adam-dropout", operator="dropout", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Dropout makes the training loss noisy and higher than that of validation."""
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 32), nn.ReLU(),
        nn.Dropout(0.3), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = Adam(model.parameters(), lr=1e-3)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=10)


@program("mlp/wine/healthy-label-smoothing", operator="label smoothing", half="tuning")
def _(watch: Watch) -> nn.Module:
    """With smoothing of 0.1 the loss of a perfect answer is about 0.37."""
    model = mlp((13, 32, 3))
    optimizer = AdamW(model.parameters(), lr=3e-3)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    return fit(watch, model, optimizer, loss_fn, wine(), epochs=25, batch_size=16)


@program("mlp/cancer/healthy-70-to-30", operator="imbalance that is learnt", half="tuning")
def _(watch: Watch) -> nn.Module:
    data = cancer()
    benign, malignant = (data.y == 1).nonzero().flatten(), (data.y == 0).nonzero().flatten()
    data = data.rows(torch.cat([benign, malignant[: len(benign) * 3 // 7]]))
    data = data.map(targets=lambda y: y[:, None].float())
    model = mlp((30, 32, 1))
    optimizer = Adam(model.parameters(), lr=2e-3)
    return fit(watch, model, optimizer, binary_cross_entropy_with_logits, data, epochs=12)


@program("mlp/cancer/healthy-90-to-10", operator="imbalance that is learnt", half="tuning")
def _(watch: Watch) -> nn.Module:
    data = cancer()
    benign, malignant = (data.y == 1).nonzero().flatten(), (data.y == 0).nonzero().flatten()
    data = data.rows(torch.cat([benign, malignant[: len(benign) // 9]]))
    model = mlp((30, 32, 2))
    optimizer = Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, cross_entropy, data, epochs=10)


@program("mlp/iris/healthy-nll", operator="loss of log-probabilities", half="tuning")
def _(watch: Watch) -> nn.Module:
    model = nn.Sequential(mlp((4, 16, 3), nn.Tanh), nn.LogSoftmax(dim=1))
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    return fit(watch, model, optimizer, nll_loss, iris(), epochs=25, batch_size=16)


@program("mlp/diabetes/healthy", operator="noise that nothing explains", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Half of the targets' variance is noise: the loss settles near 0.45, as it should."""
    model = mlp((10, 16, 1))
    optimizer = SGD(model.parameters(), lr=0.05)
    return fit(watch, model, optimizer, mse_loss, diabetes(), epochs=20)


@program("mlp/waves/healthy-tanh", operator="none", half="tuning")
def _(watch: Watch) -> nn.Module:
    model = mlp((2, 32, 32, 1), nn.Tanh)
    optimizer = Adam(model.parameters(), lr=5e-3)
    return fit(watch, model, optimizer, mse_loss, waves(), epochs=15)


@program("mlp/diabetes/healthy-sum-of-squares", operator="huge loss", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Raw targets and a sum over the batch: a loss in the hundred thousands that falls, since the
    last bias starts at the targets' mean and Adam does not see the scale."""
    model = mlp((10, 32, 1))
    nn.init.constant_(model[-1].bias, diabetes_raw().y.mean().item())
    optimizer = Adam(model.parameters(), lr=0.03)
    loss_fn = nn.MSELoss(reduction="sum")
    return fit(watch, model, optimizer, loss_fn, diabetes_raw(), epochs=15)


@program("mlp/digits/healthy-warm-up", operator="warm-up from 0", half="tuning")
def _(watch: Watch) -> nn.Module:
    """The rate is 0 in the first step and small in the next hundred."""
    model = mlp((64, 64, 32, 10))
    optimizer = AdamW(model.parameters(), lr=5e-3)
    return fit(
        watch, model, optimizer, cross_entropy, digits(), epochs=8,
        schedule=lambda optimizer: LambdaLR(optimizer, lambda step: min(1, step / 100)),
    )  # fmt: skip


@program("mlp/digits/healthy-cosine-to-zero", operator="rate that ends at 0", half="tuning")
def _(watch: Watch) -> nn.Module:
    model = mlp((64, 64, 32, 10), nn.GELU)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return fit(
        watch, model, optimizer, cross_entropy, digits(), epochs=8,
        schedule=lambda optimizer: CosineAnnealingLR(optimizer, 8 * 43),
    )  # fmt: skip


@program("mlp/digits/healthy-edge-of-stability", operator="edge of stability", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Gradient descent on the whole set at a rate at which sharpness rises to 2/lr and stays there:
    the loss falls in swings (Cohen et al. 2021)."""
    model = mlp((64, 32, 32, 10), nn.Tanh)
    optimizer = SGD(model.parameters(), lr=1.0)
    data = digits().rows(slice(512))
    return fit(watch, model, optimizer, cross_entropy, data, epochs=200, batch_size=512)


@program("mlp/digits/healthy-pixels-0-to-1", operator="inputs that are not centred", half="tuning")
def _(watch: Watch) -> nn.Module:
    model = mlp((64, 64, 10))
    optimizer = SGD(model.parameters(), lr=0.03, momentum=0.9)
    data = digit_images().map(lambda x: x.flatten(1))
    return fit(watch, model, optimizer, cross_entropy, data, epochs=8)


@program("mlp/waves/healthy-huber", operator="outliers under a robust loss", half="tuning")
def _(watch: Watch) -> nn.Module:
    """One target in fifty is off by ten deviations, which Huber's loss bears."""
    data = waves()
    outliers = 10 * (torch.rand(data.y.shape) < 0.02)
    data = Split(data.x, data.y + outliers, data.val_x, data.val_y)
    model = mlp((2, 32, 32, 1), nn.SiLU)
    optimizer = Adam(model.parameters(), lr=5e-3)
    return fit(watch, model, optimizer, huber_loss, data, epochs=15)


@program("mlp/digits/healthy-multi-label", operator="several labels a row", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Even, prime, above five: each output is a logit of its own."""

    def properties(y: Tensor) -> Tensor:
        prime = (y == 2) | (y == 3) | (y == 5) | (y == 7)
        return torch.stack([y % 2 == 0, prime, y > 5], 1).float()

    model = mlp((64, 64, 3))
    optimizer = AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    data = digits().map(targets=properties)
    return fit(watch, model, optimizer, binary_cross_entropy_with_logits, data, epochs=8)


@program("mlp/digits/healthy-restarts", operator="rate that starts again", half="tuning")
def _(watch: Watch) -> nn.Module:
    model = mlp((64, 32, 32, 10), nn.Tanh)
    optimizer = Adam(model.parameters(), lr=0.005)
    return fit(
        watch, model, optimizer, cross_entropy, digits(), epochs=8,
        schedule=lambda optimizer: CosineAnnealingWarmRestarts(optimizer, 40),
    )  # fmt: skip
