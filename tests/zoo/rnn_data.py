"""Recurrent networks whose data or loss are at fault, with their twins."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.cnn_data import Rounded
from zoo.data import VOCABULARY, Split, adding, digit_images, text
from zoo.models import Recurrent
from zoo.program import Watch, fit, program


@functools.cache
def rows() -> Split:
    """Digits as sequences of eight rows: ``[1347, 8, 8]`` values from -1 to 1, ten classes."""
    return digit_images().map(lambda x: 2 * x.squeeze(1) - 1)


def next_character(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of ``[N, T, V]`` logits at ``[N, T]`` characters."""
    return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def classify(watch: Watch, data: Split, *, epochs: int = 6) -> nn.Module:
    model = Recurrent(nn.GRU, 8, 32, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), data, epochs=epochs)


@program("rnn/rows/gru-adam", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    return classify(watch, rows())


@program(
    "rnn/rows/labels-of-other-images",
    causes=("bad-targets",),
    operator="swap training data: inputs shuffled without their labels",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = rows()
    return classify(
        watch, Split(data.x[torch.randperm(len(data.x))], data.y, data.val_x, data.val_y)
    )


@program(
    "rnn/rows/thirty-images",
    causes=("overfitting",),
    operator="delete training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = rows()
    return classify(watch, data.rows(torch.randperm(len(data.x))[:30]), epochs=150)


@program(
    "rnn/rows/one-in-a-hundred",
    causes=("class-imbalance",),
    operator="unbalance training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = rows()
    rare = (data.y == 8).nonzero().flatten()[:10]
    kept = torch.cat([(data.y != 8).nonzero().flatten(), rare])
    data = data.rows(kept).map(targets=lambda y: (y == 8).float().unsqueeze(1))
    model = Recurrent(nn.LSTM, 8, 16, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return fit(watch, model, optimizer, nn.BCEWithLogitsLoss(), data, epochs=5)


@program(
    "rnn/rows/tanh-inputs-x200",
    causes=("bad-inputs", "saturated-activation"),
    operator="inputs not scaled",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = rows().map(lambda x: 200 * (x + 1))
    model = Recurrent(nn.RNN, 8, 32, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), data, epochs=6)


@program("rnn/rows/tanh-sgd", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    model = Recurrent(nn.RNN, 8, 32, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), rows(), epochs=10)


@functools.cache
def forecast() -> Split:
    """Sines of unlike pitch and phase with noise: twelve values in, ``[N, 12, 1]``, and the one
    three steps on, ``[N, 1]``."""
    random = torch.Generator().manual_seed(3)
    pitch = 0.2 + 0.4 * torch.rand(1024, 1, generator=random)
    phase = 2 * math.pi * torch.rand(1024, 1, generator=random)
    series = torch.sin(pitch * torch.arange(15) + phase)
    series = series + 0.05 * torch.randn(series.shape, generator=random)
    x, y = series[:, :12].unsqueeze(2), series[:, 14:]
    return Split(x[:768], y[:768], x[768:], y[768:])


def regress(watch: Watch, data: Split, loss_fn: nn.Module | None = None) -> nn.Module:
    model = Recurrent(nn.GRU, 1, 16, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    return fit(watch, model, optimizer, loss_fn or nn.MSELoss(), data, epochs=8)


@program("rnn/forecast/gru-adam", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    return regress(watch, forecast())


@program(
    "rnn/forecast/targets-of-shape-n",
    causes=("loss-output-mismatch",),
    operator="targets [N] against outputs [N, 1]",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return regress(watch, forecast().map(targets=lambda y: y.squeeze(1)))


@program(
    "rnn/forecast/rounded-output",
    causes=("flat-loss", "vanishing-gradient", "parameters-not-updating"),
    operator="add activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = nn.Sequential(Recurrent(nn.GRU, 1, 16, 1), Rounded())
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    return fit(watch, model, optimizer, nn.MSELoss(), forecast(), epochs=8)


@program(
    "rnn/forecast/targets-in-thousands",
    causes=("bad-targets",),
    operator="regression targets not scaled",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return regress(watch, forecast().map(targets=lambda y: 50_000 + 10_000 * y))


@program(
    "rnn/forecast/gap-of-nan",
    causes=("bad-inputs",),
    operator="NaN in training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = forecast()
    x = data.x.clone()
    x[torch.randperm(len(x))[:5], 7] = torch.nan
    return regress(watch, Split(x, data.y, data.val_x, data.val_y))


class SquareRootLoss(nn.Module):
    """The mean distance between outputs and targets: its gradient is 0 / 0 where they agree."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return torch.sqrt((outputs - targets).square().sum(dim=1)).mean()


@program(
    "rnn/forecast/square-root-at-zero",
    causes=("nonfinite-gradient",),
    operator="change loss function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Padding targets are 0, and so is the output at first: the head starts from zero."""
    data = forecast()
    y = data.y.clone()
    y[torch.randperm(len(y))[:100]] = 0
    model = Recurrent(nn.GRU, 1, 16, 1)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    padded = Split(data.x, y, data.val_x, data.val_y)
    return fit(watch, model, optimizer, SquareRootLoss(), padded, epochs=8)


class MaskedMean(nn.Module):
    """A recurrent network whose states are averaged over the steps that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        states, _ = self.recurrent(inputs)
        mask = (inputs > -1).any(dim=2, keepdim=True)
        return self.head((states * mask).sum(dim=1) / mask.sum(dim=1))


@program("rnn/rows/masked-mean", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    model = MaskedMean()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), rows(), epochs=6)


@program(
    "rnn/rows/mean-of-nothing",
    causes=("nonfinite-loss", "bad-inputs"),
    operator="0 / 0 of an empty sequence",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = rows()
    x = data.x.clone()
    x[torch.randperm(len(x))[:5]] = -1
    model = MaskedMean()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    empty = Split(x, data.y, data.val_x, data.val_y)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), empty, epochs=6)


class PoissonLoss(nn.Module):
    """The negative log-likelihood of counts at log-rates, ``exp`` and all."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.exp() - targets * outputs).mean()


@program(
    "rnn/counts/exp-overflow",
    causes=("nonfinite-loss", "lr-too-high", "bad-targets"),
    operator="exp overflow in the loss",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = adding().map(targets=lambda y: (500 * y).round())
    model = Recurrent(nn.GRU, 2, 16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    return fit(watch, model, optimizer, PoissonLoss(), data, epochs=3)


@program(
    "rnn/text/tokens-hashed-anew",
    causes=("bad-inputs", "sparse-gradients"),
    operator="tokens hashed with another salt each time",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Rows of the embedding are hardly seen twice, so nothing is learnt from them."""
    data = text().map(lambda x: torch.randint(0, 20_000, x.shape))
    model = Recurrent(nn.GRU, 20_000, 16, len(VOCABULARY), tokens=True, every_step=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, next_character, data, epochs=3)
