"""Recurrent networks whose weights, optimizer, learning rate or loop are at fault."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler

from zoo.data import VOCABULARY, adding, text
from zoo.models import Recurrent
from zoo.program import Watch, batches, fit, program, validate
from zoo.rnn_data import next_character, rows


def language_model(hidden: int = 32) -> Recurrent:
    size = len(VOCABULARY)
    return Recurrent(nn.LSTM, size, hidden, size, tokens=True, every_step=True)


def write(watch: Watch, lr: float, hidden: int = 32) -> nn.Module:
    model = language_model(hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    return fit(watch, model, optimizer, next_character, text(), epochs=6)


@program("rnn/text/lstm-adam", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    return write(watch, 1e-2)


@program(
    "rnn/text/adam-lr-10",
    causes=("lr-too-high", "oscillating-loss"),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return write(watch, 10.0)


@program(
    "rnn/text/adam-lr-1e-6",
    causes=("lr-too-low",),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return write(watch, 1e-6)


@program(
    "rnn/text/state-of-two",
    causes=("underfitting",),
    operator="model too small",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return write(watch, 1e-2, hidden=2)


@program(
    "rnn/text/schedule-ran-out",
    causes=("lr-too-low", "parameters-not-updating"),
    operator="scheduler decays per batch as if per epoch",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    def decay(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return ExponentialLR(optimizer, gamma=0.3)

    model = language_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return fit(watch, model, optimizer, next_character, text(), epochs=6, schedule=decay)


@program(
    "rnn/rows/no-zero-grad",
    causes=("gradient-accumulation",),
    operator="zero_grad removed",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model, data, loss_fn = Recurrent(nn.RNN, 8, 32, 10), rows(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch.attach(optimizer, model)
    for _ in range(6):
        for inputs, targets in batches(data, 32):
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            loss.backward()
            optimizer.step()
        validate(watch, model, loss_fn, data)
    return model


@program(
    "rnn/text/frozen-by-mistake",
    causes=("parameters-not-updating",),
    operator="requires_grad left off",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Everything but the head's bias was frozen, and nothing was pretrained."""
    model = language_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "head.bias")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return fit(watch, model, optimizer, next_character, text(), epochs=6)


class ReluRecurrent(nn.Module):
    """A ReLU network with recurrent weights of a given spectral gain."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.recurrent = nn.RNN(2, 32, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(32, 1)
        nn.init.orthogonal_(self.recurrent.weight_hh_l0, gain)

    def forward(self, inputs: Tensor) -> Tensor:
        states, _ = self.recurrent(inputs)
        return self.head(states[:, -1])


@program("rnn/adding/relu-clipped", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    model = ReluRecurrent(1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, nn.MSELoss(), adding(24), epochs=8, max_norm=1.0)


@program(
    "rnn/adding/relu-gain-2",
    causes=("exploding-gradient", "bad-initialization"),
    operator="change weights initialisation, remove clipping",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = ReluRecurrent(2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    return fit(watch, model, optimizer, nn.MSELoss(), adding(24), epochs=3)


@program(
    "rnn/rows/lstm-gates-shut",
    causes=("bad-initialization", "saturated-activation", "vanishing-gradient"),
    operator="change bias initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Input, forget and output gates start shut."""
    model = Recurrent(nn.LSTM, 8, 32, 10)
    nn.init.constant_(model.recurrent.bias_ih_l0, -10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), rows(), epochs=6)


@program("rnn/rows/lstm-momentum", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    model = Recurrent(nn.LSTM, 8, 32, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), rows(), epochs=6)


@program(
    "rnn/adding/eighty-steps",
    causes=("plateau", "vanishing-gradient", "flat-loss"),
    operator="longer sequences than a plain network remembers",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """The loss stays at 0.17, the variance of the targets: the mean is all that is learnt."""
    model = Recurrent(nn.RNN, 2, 24, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    return fit(watch, model, optimizer, nn.MSELoss(), adding(80), epochs=4)


@program(
    "rnn/rows/recurrent-weights-x30",
    causes=("saturated-activation", "bad-initialization"),
    operator="change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = Recurrent(nn.RNN, 8, 32, 10)
    with torch.no_grad():
        model.recurrent.weight_hh_l0.mul_(30)
        model.recurrent.weight_ih_l0.mul_(30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), rows(), epochs=6)


@program(
    "rnn/rows/loss-maximised",
    causes=("diverging-loss",),
    operator="change optimisation function: it climbs",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = Recurrent(nn.GRU, 8, 32, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, maximize=True)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), rows(), epochs=6)


@program(
    "rnn/rows/eight-layers-small-weights",
    causes=("vanishing-gradient", "bad-initialization"),
    operator="add layers",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = Recurrent(nn.RNN, 8, 24, 10, layers=8)
    with torch.no_grad():
        for parameter in model.recurrent.parameters():
            parameter.mul_(0.4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), rows(), epochs=5)


@program(
    "rnn/adding/sgd-lr-x100",
    causes=("lr-too-high",),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = Recurrent(nn.GRU, 2, 24, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    return fit(watch, model, optimizer, nn.MSELoss(), adding(), epochs=4)


@program(
    "rnn/text/batches-of-one",
    causes=("oscillating-loss", "lr-too-high"),
    operator="change batch size",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = language_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0, momentum=0.9)
    data = text().rows(slice(0, 400))
    return fit(watch, model, optimizer, next_character, data, epochs=1, batch_size=1)
