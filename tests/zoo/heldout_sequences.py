"""Held out: recurrent networks that read names, load curves and long signals."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim import Optimizer

from zoo.heldout_data import ALPHABET, load_curve, names, standard
from zoo.program import Watch, program


class NameNet(nn.Module):
    def __init__(self, cell: type[nn.RNNBase], *, pack: bool, last: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(ALPHABET), 16, padding_idx=0)
        self.rnn = cell(16, 32, batch_first=True)
        self.linear = nn.Linear(32, 3)
        self.pack, self.last = pack, last

    def forward(self, letters: Tensor, sizes: Tensor) -> Tensor:
        x = self.embed(letters)
        if self.pack:
            _, h = self.rnn(pack_padded_sequence(x, sizes, batch_first=True, enforce_sorted=False))
        else:
            _, h = self.rnn(x)
        return self.last(self.linear(h[0]))


def name_tongues(
    watch: Watch,
    *,
    cell: type[nn.RNNBase] = nn.GRU,
    pack: bool = True,
    pad: int = 0,
    last: nn.Module | None = None,
    make: Callable[..., Optimizer] = lambda p: torch.optim.Adam(p, lr=5e-3),
    clear: bool = True,
    label: Callable[[Tensor], Tensor] = lambda y: y,
    batch: int = 30,
    epochs: int = 5,
) -> nn.Module:
    letters, sizes, y = names()
    letters = torch.cat([letters, torch.zeros(900, pad, dtype=torch.long)], 1)
    y = label(y)
    model = NameNet(cell, pack=pack, last=last or nn.LogSoftmax(dim=1))
    optimizer = make(model.parameters())
    watch.attach(optimizer, model)
    criterion = nn.NLLLoss()
    shuffled = torch.randperm(900)
    for _ in range(epochs):
        for rows in shuffled[:750][torch.randperm(750)].split(batch):
            output = model(letters[rows], sizes[rows])
            loss = criterion(output, y[rows])
            watch.observe(outputs=output, targets=y[rows], loss=loss)
            loss.backward()
            optimizer.step()
            if clear:
                model.zero_grad()
        with torch.no_grad():
            rows = shuffled[750:]
            watch.observe(val_loss=criterion(model(letters[rows], sizes[rows]), y[rows]))
    return model


@program("rnn/names/packed-gru", operator="packed sequences, log-probabilities", half="held-out")
def _(watch: Watch) -> nn.Module:
    return name_tongues(watch)


@program("rnn/names/one-name-at-a-time", operator="batches of one", half="held-out")
def _(watch: Watch) -> nn.Module:
    return name_tongues(
        watch,
        cell=nn.RNN,
        batch=1,
        epochs=1,
        make=lambda p: torch.optim.SGD(p, lr=0.02),
    )


@program(
    "rnn/names/nll-of-softmax",
    causes=("loss-output-mismatch",),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return name_tongues(watch, last=nn.Softmax(dim=1))


@program(
    "rnn/names/state-after-sixty-pads",
    causes=("constant-predictions", "vanishing-gradient", "bad-inputs"),
    operator="padding read as text",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return name_tongues(
        watch, cell=nn.RNN, pack=False, pad=60, make=lambda p: torch.optim.SGD(p, lr=0.05)
    )


@program(
    "rnn/names/no-zero-grad-sgd",
    causes=("gradient-accumulation",),
    operator="missing zero_grad",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return name_tongues(watch, clear=False, make=lambda p: torch.optim.SGD(p, lr=1.0))


@program(
    "rnn/names/labels-in-another-order",
    causes=("bad-targets",),
    operator="change labels",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return name_tongues(watch, label=lambda y: y[torch.randperm(len(y))], epochs=12)


@program(
    "rnn/names/adam-lr-1",
    causes=("lr-too-high", "saturated-activation"),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return name_tongues(watch, make=lambda p: torch.optim.Adam(p, lr=1.0))


# ---- forecasting --------------------------------------------------------------------------------


class Forecaster(nn.Module):
    def __init__(self, *, frozen: bool, last: nn.Module) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 24, batch_first=True)
        self.head = nn.Sequential(nn.Linear(24, 1), last)
        self.frozen = frozen

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.frozen and torch.is_grad_enabled()):
            out, _ = self.lstm(x)
        return self.head(out[:, -1])


def next_hour(
    watch: Watch,
    *,
    inputs: Callable[[Tensor], Tensor] = standard,
    targets: Callable[[Tensor], Tensor] = standard,
    make: Callable[..., Optimizer] = lambda p: torch.optim.Adam(p, lr=5e-3),
    criterion: Callable[[Tensor, Tensor], Tensor] = nn.functional.mse_loss,
    frozen: bool = False,
    last: nn.Module | None = None,
    epochs: int = 5,
) -> nn.Module:
    x, y = load_curve()
    x, y = inputs(x), targets(y)
    model = Forecaster(frozen=frozen, last=last or nn.Identity())
    optimizer = make(model.parameters())
    watch.attach(optimizer, model)
    for _ in range(epochs):
        for rows in torch.randperm(1000).split(50):
            prediction = model(x[rows])
            loss = criterion(prediction, y[rows])
            watch.observe(inputs=x[rows], outputs=prediction, targets=y[rows], loss=loss)
            optimizer.zero_grad()
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            watch.observe(val_loss=criterion(model(x[1000:]), y[1000:]))
    return model


@program("rnn/grid/lstm-adam", operator="gradient clipping", half="held-out")
def _(watch: Watch) -> nn.Module:
    return next_hour(watch)


@program("rnn/grid/absolute-error-rmsprop", operator="absolute error", half="held-out")
def _(watch: Watch) -> nn.Module:
    return next_hour(
        watch,
        make=lambda p: torch.optim.RMSprop(p, lr=3e-3),
        criterion=nn.functional.l1_loss,
    )


@program(
    "rnn/grid/targets-in-megawatts",
    causes=("bad-targets", "lr-too-low"),
    operator="targets not scaled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return next_hour(watch, targets=lambda y: y)


@program(
    "rnn/grid/inputs-in-kilowatts",
    causes=("bad-inputs", "saturated-activation"),
    operator="inputs not scaled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return next_hour(watch, inputs=lambda x: 1000 * x)


@program(
    "rnn/grid/sgd-lr-1e-5",
    causes=("lr-too-low",),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return next_hour(watch, make=lambda p: torch.optim.SGD(p, lr=1e-5, momentum=0.9))


@program(
    "rnn/grid/output-in-0-to-1",
    causes=("loss-output-mismatch",),
    operator="add activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return next_hour(watch, last=nn.Sigmoid())


@program(
    "rnn/grid/lstm-under-no-grad",
    causes=("parameters-not-updating",),
    operator="graph cut before the head",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return next_hour(watch, frozen=True)


@program(
    "rnn/grid/momentum-0.999",
    causes=("oscillating-loss", "lr-too-high"),
    operator="change optimisation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return next_hour(watch, make=lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.999), epochs=12)


# ---- long signals -------------------------------------------------------------------------------


def first_sign(
    watch: Watch, *, length: int, cell: nn.RNN, lr: float = 0.02, steps: int = 150
) -> nn.Module:
    """Say whether the first of a signal's values was positive."""
    head = nn.Linear(cell.hidden_size, 1)
    net = nn.ModuleDict({"cell": cell, "head": head})
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    watch.attach(optimizer, net)
    for _ in range(steps):
        x = 0.3 * torch.randn(32, length, 1)
        x[:, 0] = torch.sign(torch.randn(32, 1)) * 2
        target = (x[:, 0] > 0).float()
        states, _ = cell(x)
        logit = head(states[:, -1])
        loss = nn.functional.binary_cross_entropy_with_logits(logit, target)
        watch.observe(inputs=x)
        watch.observe(loss=loss, outputs=logit, targets=target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


@program("rnn/first-sign/short", operator="none", half="held-out")
def _(watch: Watch) -> nn.Module:
    return first_sign(watch, length=6, cell=nn.RNN(1, 24, batch_first=True), lr=0.2)


@program(
    "rnn/first-sign/ninety-steps-back",
    causes=("vanishing-gradient", "plateau"),
    operator="longer sequences",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return first_sign(watch, length=90, cell=nn.RNN(1, 24, batch_first=True), lr=0.2)


@program(
    "rnn/first-sign/relu-of-spectral-radius-two",
    causes=("exploding-gradient", "bad-initialization"),
    operator="change activation and weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    cell = nn.RNN(1, 24, batch_first=True, nonlinearity="relu")
    nn.init.orthogonal_(cell.weight_hh_l0, gain=2.0)
    return first_sign(watch, length=40, cell=cell)
