"""Healthy runs that look like what rules on data, and on the fit of loss and outputs, warn of."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diagnosed_runs import (
    ROWS,
    LossFunction,
    binary,
    classes,
    fit,
    net,
    numbers,
    train,
)
from torch import Tensor, nn
from torch.nn import functional

import gradstat

Run = Callable[[], gradstat.Monitor]
cross_entropy: LossFunction = functional.cross_entropy
mse_loss: LossFunction = functional.mse_loss
bce_logits: LossFunction = functional.binary_cross_entropy_with_logits
runs: list[tuple[str, Run]] = []


def like(rule: str) -> Callable[[Run], Run]:
    """Register a healthy run that looks like what a rule warns of."""

    def register(run: Run) -> Run:
        runs.append((rule, run))
        return run

    return register


def adam(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr)


# ---- data ----------------------------------------------------------------------------------------


@like("NonfiniteInputs")
def _() -> gradstat.Monitor:
    """Rows without a target: -100 is left out."""
    x, y = classes()
    return train(net(), (x, torch.where(torch.rand(ROWS) < 0.3, -100, y)), cross_entropy)


@like("InputScale")
def _() -> gradstat.Monitor:
    """Pixels up to 255 before a normalisation."""
    x, y = classes()
    pixels = (x * 50 + 128).clamp(0, 255)
    return train(nn.Sequential(nn.BatchNorm1d(8), *net()), (pixels, y), cross_entropy)


@like("InputScale")
def _() -> gradstat.Monitor:
    """Small inputs beside weights that make up for it."""
    x, y = classes()
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(200)  # type: ignore[operator, union-attr]
    return train(model, (x * 5e-3, y), cross_entropy)


@like("HardlyDiffer")
def _() -> gradstat.Monitor:
    """Pixels of which a few in the middle differ, beside weights that make up for it."""
    x, y = classes()
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(20)  # type: ignore[operator, union-attr]
    return train(model, (1 + 0.03 * x, y), cross_entropy, steps=400)


@like("OneToken")
def _() -> gradstat.Monitor:
    """Short words in long rows of padding, and what they say is learnt."""
    words = torch.where(torch.arange(12) < 3, torch.randint(1, 20, (ROWS, 12)), 0)
    model = nn.Sequential(nn.EmbeddingBag(20, 16, mode="sum", padding_idx=0), nn.Linear(16, 2))
    return train(model, (words, (words[:, 0] > 9).long()), cross_entropy, steps=400)


@like("WrongAxis")
def _() -> gradstat.Monitor:
    """Recordings, each standardised by itself."""
    phase = torch.rand(ROWS, 1) * math.tau
    x = torch.sin(torch.arange(24) * 0.5 * torch.randint(1, 4, (ROWS, 1)) + phase)
    y = (x[:, 0] > 0).long()
    return train(net(24, 2), ((x - x.mean(1, True)) / x.std(1, keepdim=True), y), cross_entropy)


@like("UnseenInputs")
def _() -> gradstat.Monitor:
    """A bias that the normalisation behind it leaves without a gradient."""
    body = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3))
    return train(body, classes(), cross_entropy, see=("loss", "outputs", "targets"))


@like("Unshuffled")
def _() -> gradstat.Monitor:
    """Batches of two classes of six, as for metric learning."""
    x, y = classes(6)
    by_class = [(y == i).nonzero()[:16, 0] for i in range(6)]

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rows = torch.cat([by_class[step % 6], by_class[(step * 5 + 1) % 6]])
        return x[rows], y[rows]

    return fit(net(n_out=6), cross_entropy, batch)


@like("TargetScale")
def _() -> gradstat.Monitor:
    """Targets around 30, and a last bias that is set to it."""
    x, y = numbers()
    model = net(n_out=1)
    nn.init.constant_(model[-1].bias, 30.0)  # type: ignore[arg-type]
    return train(model, (x, y + 30), mse_loss)


@like("Leak")
def _() -> gradstat.Monitor:
    """A text with a tenth of its letters hidden, which are to be found."""
    text = torch.arange(12).repeat(ROWS, 2)[:, :12] + torch.randint(4, (ROWS, 1))
    hidden = torch.where(torch.rand(text.shape) < 0.1, 19, text)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Conv1d(12, 12, 3, padding=1), nn.Linear(16, 20))
    loss_fn: LossFunction = lambda o, t: cross_entropy(o.flatten(0, 1), t.flatten())  # noqa: E731
    return train(model, (hidden, text), loss_fn)


@like("ConstantTargets")
def _() -> gradstat.Monitor:
    """A generator that is to pass for real before a critic that does not give in."""
    model = net(n_out=1)
    loss_fn: LossFunction = lambda o, t: bce_logits(o - o.mean().detach(), t)  # noqa: E731
    return train(model, (torch.randn(ROWS, 8), torch.ones(ROWS, 1)), loss_fn)


@like("Imbalance")
def _() -> gradstat.Monitor:
    """Nine of ten are of one class, and the tenth is found."""
    x = torch.randn(ROWS, 8)
    return train(net(n_out=2), (x, (x[:, 0] > 1.3).long()), cross_entropy, steps=300)


# ---- fit -----------------------------------------------------------------------------------------


@like("ProbabilitiesAsLogits")
def _() -> gradstat.Monitor:
    """A sigmoid before the loss that takes it."""
    model = nn.Sequential(*net(n_out=1), nn.Sigmoid())
    return train(model, binary(), functional.binary_cross_entropy)


@like("CutLogits")
def _() -> gradstat.Monitor:
    """Rectified features below the last layer."""
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
    return train(model, classes(), cross_entropy)


@like("Rearranged")
def _() -> gradstat.Monitor:
    """Logits of each step, transposed to what the loss takes."""
    x = torch.randn(ROWS, 4, 8)
    y = (x @ torch.randn(8, 3)).argmax(-1)
    return train(net(), (x, y), lambda o, t: cross_entropy(o.transpose(1, 2), t))


@like("TargetsBeyondProbability")
def _() -> gradstat.Monitor:
    """Targets between 0.05 and 0.95."""
    x, y = binary()
    return train(net(n_out=1), (x, 0.05 + 0.9 * y), bce_logits)


@like("ClampedProbabilities")
def _() -> gradstat.Monitor:
    """Probabilities that a loss of one's own keeps away from 0 and 1."""
    x, y = binary()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        p = outputs.clamp(1e-6, 1 - 1e-6)
        return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()

    return train(nn.Sequential(*net(n_out=1), nn.Sigmoid()), (x, y), loss_fn)


@like("LogitsAsLogProbabilities")
def _() -> gradstat.Monitor:
    return train(nn.Sequential(*net(), nn.LogSoftmax(-1)), classes(), functional.nll_loss)


@like("Maximised")
@like("HardlyBegun")
def _() -> gradstat.Monitor:
    """What is left of the loss is a constant that nothing can take away."""
    x, y = numbers()
    return train(net(n_out=1), (x, y), lambda o, t: mse_loss(o, t) + 9, val=(x, y), see=("loss",))


@like("Diverging")
def _() -> gradstat.Monitor:
    """A likelihood of numbers, whose logarithm has any sign."""
    x, y = numbers()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.gaussian_nll_loss(outputs[:, :1], targets, outputs[:, 1:].exp())

    return train(net(n_out=2), (x, y), loss_fn, steps=300)


@like("OneUnitSoftmax")
def _() -> gradstat.Monitor:
    return train(net(n_out=1), binary(), bce_logits)


@like("Broadcast")
def _() -> gradstat.Monitor:
    """Outputs (n, 1) and targets (n,) that the loss brings side by side."""
    x, y = numbers()
    return train(net(n_out=1), (x, y[:, 0]), lambda o, t: mse_loss(o[:, 0], t))


@like("OutputRange")
def _() -> gradstat.Monitor:
    """A rectified output for targets that are never negative."""
    x, y = numbers()
    return train(nn.Sequential(*net(n_out=1), nn.ReLU()), (x, y.relu() + 0.1), mse_loss)
