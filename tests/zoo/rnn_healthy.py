"""Recurrent networks that train well and that naive thresholds mistake for faulty."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence

from zoo.data import VOCABULARY, Split, adding, text
from zoo.models import Recurrent
from zoo.program import Watch, fit, program
from zoo.rnn_data import forecast, next_character, rows


@program("rnn/text/unseen-rows", operator="embedding with unseen rows", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Of 5000 tokens that the embedding and the softmax know, sixteen are ever seen."""
    model = Recurrent(nn.GRU, 5000, 16, 5000, tokens=True, every_step=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    data = text(12).rows(slice(0, 256)).map(lambda x: 37 * x, lambda y: 37 * y)
    few = Split(data.x, data.y, data.val_x[:64], data.val_y[:64])
    return fit(watch, model, optimizer, next_character, few, epochs=6, batch_size=16)


@program("rnn/adding/lstm-clipped", operator="clipping and large early gradients", half="tuning")
def _(watch: Watch) -> nn.Module:
    """The loss rests at the variance of the targets for a while, and then falls."""
    model = Recurrent(nn.LSTM, 2, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    return fit(watch, model, optimizer, nn.MSELoss(), adding(), epochs=8, max_norm=1.0)


class LastOfEach(nn.Module):
    """Reads padded sequences up to their own lengths: rows after the last with ink are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        lengths = 1 + (inputs > -1).any(dim=2).int().mul(torch.arange(8)).argmax(dim=1)
        packed = pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
        _, last = self.recurrent(packed)
        return self.head(last[0])


@program("rnn/rows/packed", operator="sequences of unlike length", half="tuning")
def _(watch: Watch) -> nn.Module:
    model = LastOfEach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), rows(), epochs=6)


@program("rnn/forecast/sum-of-squares", operator="loss summed, not averaged", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Losses and gradients are hundreds of times the usual size; the rate is as much smaller."""
    model = Recurrent(nn.RNN, 1, 16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-4, momentum=0.9)
    data = forecast().map(targets=lambda y: 3 * y)
    return fit(watch, model, optimizer, nn.MSELoss(reduction="sum"), data, epochs=10)


@program("rnn/rows/seventy-thirty", operator="70:30 imbalance that is learnt", half="tuning")
def _(watch: Watch) -> nn.Module:
    data = rows().map(targets=lambda y: (y < 3).float().unsqueeze(1))
    model = Recurrent(nn.LSTM, 8, 24, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    return fit(watch, model, optimizer, nn.BCEWithLogitsLoss(), data, epochs=6)


class Tied(nn.Module):
    """A language model whose embedding is its head too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(VOCABULARY), width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.drop = nn.Dropout(0.2)

    def forward(self, inputs: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embedding(inputs))
        return functional.log_softmax(self.drop(states) @ self.embedding.weight.T, dim=2)


def likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.nll_loss(outputs.flatten(0, 1), targets.flatten())


@program("rnn/text/tied-nll", operator="tied weights, NLLLoss on log_softmax", half="tuning")
def _(watch: Watch) -> nn.Module:
    model = Tied(32)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    return fit(watch, model, optimizer, likelihood, text(), epochs=6)
