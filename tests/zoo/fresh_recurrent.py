"""Fresh: recurrent networks on a chaotic series, on gestures and on things to be remembered.

Name, accept-set:

- rnn/chaos/lstm-rmsprop: healthy
- rnn/chaos/gru-lbfgs-head: healthy
- rnn/chaos/adam-lr-3: lr-too-high, oscillating-loss, diverging-loss, saturated-activation
- rnn/chaos/logarithm-of-nothing: bad-targets, nonfinite-loss, nonfinite-gradient
- rnn/chaos/targets-x1000: bad-targets, lr-too-low
- rnn/chaos/softplus-output: loss-output-mismatch
- rnn/chaos/linear-memory-that-grows: exploding-gradient, bad-initialization
- rnn/chaos/forty-windows-with-noise: overfitting
- rnn/gestures/layer-norm-gru: healthy
- rnn/gestures/four-batches-a-step: healthy
- rnn/gestures/sigmoid-cell-two-back: healthy
- rnn/gestures/gates-of-deviation-eight: bad-initialization, saturated-activation
- rnn/gestures/one-gesture-in-fifty: class-imbalance, constant-predictions
- rnn/gestures/in-milli-g: bad-inputs, saturated-activation
- rnn/gestures/first-sample-thirty-sigmoids-ago: vanishing-gradient, saturated-activation
- rnn/gestures/old-head-in-the-optimizer: parameters-not-updating
- rnn/gestures/nll-of-scores: loss-output-mismatch, diverging-loss
- rnn/gestures/agreement-in-whole-numbers: zero-loss, bad-targets
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn, optim
from torch.nn import functional

from zoo.fresh_data import chaos, gestures
from zoo.program import Watch, program

Criterion = Callable[[Tensor, Tensor], Tensor]


class Forecaster(nn.Module):
    def __init__(self, cell: type[nn.RNNBase] = nn.LSTM, last: nn.Module | None = None) -> None:
        super().__init__()
        self.memory = cell(1, 24, batch_first=True)
        self.out = nn.Linear(24, 1)
        self.last = last or nn.Identity()

    def forward(self, window: Tensor) -> Tensor:
        states = self.memory(window)[0]
        return self.last(self.out(states[:, -1]))


class Linear(nn.Module):
    """A state that is multiplied by a matrix at each step, with nothing that squashes it."""

    def __init__(self, radius: float) -> None:
        super().__init__()
        self.a = nn.Parameter(radius * torch.linalg.qr(torch.randn(16, 16))[0])
        self.b = nn.Linear(1, 16)
        self.c = nn.Linear(16, 1)

    def forward(self, window: Tensor) -> Tensor:
        h = torch.zeros(len(window), 16)
        for x in window.unbind(1):
            h = h @ self.a.T + self.b(x)
        return self.c(h)


def foresee(
    watch: Watch,
    net: nn.Module,
    opt: optim.Optimizer,
    *,
    criterion: Criterion = functional.mse_loss,
    answer: Callable[[Tensor], Tensor] = lambda y: y,
    rows: slice = slice(0, 700),
    repeats: int = 2,
    epochs: int = 8,
) -> nn.Module:
    windows, values = chaos()
    values = answer(values)
    inside, truth = windows[rows].repeat(repeats, 1, 1), values[rows].repeat(repeats, 1)
    watch.attach(opt, net)
    for _ in range(epochs):
        for idx in torch.randperm(len(inside)).split(32):
            x, y = inside[idx], truth[idx]
            out = net(x)
            loss = criterion(out, y)
            watch.observe(inputs=x, outputs=out, targets=y, loss=loss)
            opt.zero_grad()
            loss.backward()
            opt.step()
        with torch.no_grad():
            watch.observe(val_loss=criterion(net(windows[720:]), values[720:]))
    return net


@program("rnn/chaos/lstm-rmsprop", operator="RMSprop", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = Forecaster()
    return foresee(watch, net, optim.RMSprop(net.parameters(), lr=3e-3))


@program("rnn/chaos/gru-lbfgs-head", operator="LBFGS, the body frozen", half="held-out")
def _(watch: Watch) -> nn.Module:
    """An echo state network: of a recurrent body at random only the head is fitted."""
    windows, y = chaos()
    net = Forecaster(nn.GRU)
    net.memory.requires_grad_(False)
    opt = optim.LBFGS(net.out.parameters(), max_iter=3)
    watch.attach(opt, net)

    def closure() -> Tensor:
        opt.zero_grad()
        out = net(windows[:700])
        loss = functional.mse_loss(out, y[:700])
        watch.observe(outputs=out, targets=y[:700], loss=loss)
        loss.backward()
        return loss

    for _ in range(30):
        opt.step(closure)
    return net


@program(
    "rnn/chaos/adam-lr-3",
    causes=("lr-too-high", "oscillating-loss", "diverging-loss", "saturated-activation"),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Forecaster(nn.GRU)
    return foresee(watch, net, optim.Adam(net.parameters(), lr=3.0))


@program(
    "rnn/chaos/logarithm-of-nothing",
    causes=("bad-targets", "nonfinite-loss", "nonfinite-gradient"),
    operator="logarithm of zero",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Targets are logarithms of values cut off at 0, so that some are minus infinity."""
    net = Forecaster()
    opt = optim.RMSprop(net.parameters(), lr=3e-3)
    return foresee(watch, net, opt, answer=lambda y: (y + 1).clamp(min=0).log())


@program(
    "rnn/chaos/targets-x1000",
    causes=("bad-targets", "lr-too-low"),
    operator="targets not scaled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Forecaster()
    opt = optim.RMSprop(net.parameters(), lr=3e-3)
    return foresee(watch, net, opt, answer=lambda y: 1000 * y + 4000)


@program(
    "rnn/chaos/softplus-output",
    causes=("loss-output-mismatch",),
    operator="add activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Half of the standardised values are negative."""
    net = Forecaster(last=nn.Softplus())
    return foresee(watch, net, optim.RMSprop(net.parameters(), lr=3e-3))


@program(
    "rnn/chaos/linear-memory-that-grows",
    causes=("exploding-gradient", "bad-initialization"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Linear(1.8)
    return foresee(watch, net, optim.SGD(net.parameters(), lr=0.01))


@program(
    "rnn/chaos/forty-windows-with-noise",
    causes=("overfitting",),
    operator="delete training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """What is measured is noisy, and there is little enough of it to learn the noise by heart."""
    noise = 0.8 * torch.randn(900, 1, generator=torch.Generator().manual_seed(11))
    net = Forecaster()
    return foresee(
        watch,
        net,
        optim.Adam(net.parameters(), lr=0.01),
        answer=lambda y: y + noise,
        rows=slice(0, 640, 16),
        repeats=1,
        epochs=250,
    )


# ---- gestures -----------------------------------------------------------------------------------


class Normed(nn.Module):
    """A recurrent cell of one's own: a gated update, with the state's layer normalised."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), self.cell.hidden_size)
        for moment in x.unbind(1):
            h = self.norm(self.cell(moment, h))
        return self.head(h)


class Sigmoids(nn.Module):
    """``h = sigmoid(W x + U h)``, as in Elman 1990."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(3, 24), nn.Linear(24, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 24)
        for moment in x.unbind(1):
            h = torch.sigmoid(self.w(moment) + self.u(h))
        return self.head(h)


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 20, batch_first=True)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[1][0][-1])


def recognise(
    watch: Watch,
    net: nn.Module,
    opt: optim.Optimizer,
    data: tuple[Tensor, Tensor] | None = None,
    *,
    criterion: Criterion = functional.cross_entropy,
    micro: int = 1,
    epochs: int = 8,
    batch: int = 24,
    show: bool = False,
) -> nn.Module:
    x, label = data or gestures()
    n_train = len(label) * 5 // 6
    watch.attach(opt, net)
    for _ in range(epochs):
        for idx in torch.randperm(n_train).split(batch):
            opt.zero_grad()
            for part in idx.chunk(micro):
                logits = net(x[part])
                loss = criterion(logits, label[part]) / micro
                seen = {"inputs": x[part]} if show else {}
                watch.observe(outputs=logits, targets=label[part], loss=loss, **seen)
                loss.backward()
            opt.step()
    return net


@program("rnn/gestures/layer-norm-gru", operator="layer-norm in the cell", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = Normed()
    return recognise(watch, net, optim.Adam(net.parameters(), lr=5e-3), epochs=5)


@program("rnn/gestures/four-batches-a-step", operator="gradient accumulation", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = Gates()
    opt = optim.NAdam(net.parameters(), lr=0.01)
    return recognise(watch, net, opt, micro=4, batch=96, epochs=20)


def flash(later: int) -> tuple[Tensor, Tensor]:
    """Return what is told in the first four samples, with so many of noise after them."""
    label = gestures()[1]
    noise = torch.randn(720, later, 3, generator=torch.Generator().manual_seed(7))
    told = functional.one_hot(label).float().unsqueeze(1).repeat(1, 4, 1)
    return torch.cat([told, noise], 1), label


@program("rnn/gestures/sigmoid-cell-two-back", operator="sigmoid, short memory", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = Sigmoids()
    return recognise(watch, net, optim.Adam(net.parameters(), lr=0.02), flash(2), epochs=12)


@program(
    "rnn/gestures/gates-of-deviation-eight",
    causes=("bad-initialization", "saturated-activation"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Gates()
    for weight in (net.lstm.weight_ih_l0, net.lstm.weight_hh_l0):
        nn.init.normal_(weight, std=8)
    return recognise(watch, net, optim.Adam(net.parameters(), lr=2e-3))


@program(
    "rnn/gestures/one-gesture-in-fifty",
    causes=("class-imbalance", "constant-predictions"),
    operator="unbalance training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    x, label = gestures()
    kept = torch.cat(
        [torch.arange(0, 720, 3), torch.arange(1, 720, 144), torch.arange(2, 720, 240)]
    )
    kept = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(5))]
    net = Gates()
    opt = optim.Adam(net.parameters(), lr=2e-3)
    return recognise(watch, net, opt, (x[kept], label[kept]), epochs=10)


@program(
    "rnn/gestures/in-milli-g",
    causes=("bad-inputs", "saturated-activation"),
    operator="inputs not scaled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    x, label = gestures()
    net = Gates()
    opt = optim.Adam(net.parameters(), lr=2e-3)
    return recognise(watch, net, opt, (1000 * x, label), show=True)


@program(
    "rnn/gestures/first-sample-thirty-sigmoids-ago",
    causes=("vanishing-gradient", "saturated-activation"),
    operator="change activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The gesture is seen in the first four samples; what follows is noise."""
    net = Sigmoids()
    opt = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return recognise(watch, net, opt, flash(26))


@program(
    "rnn/gestures/old-head-in-the-optimizer",
    causes=("parameters-not-updating",),
    operator="optimizer built before the model was changed",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """After the optimizer was made both layers are replaced by ones for three axes."""
    net = Gates()
    net.lstm = nn.LSTM(6, 20, batch_first=True)
    opt = optim.Adam(net.parameters(), lr=5e-3)
    net.lstm = nn.LSTM(3, 20, batch_first=True)
    net.head = nn.Linear(20, 3)
    return recognise(watch, net, opt)


@program(
    "rnn/gestures/nll-of-scores",
    causes=("loss-output-mismatch", "diverging-loss"),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Gates()
    return recognise(
        watch, net, optim.Adam(net.parameters(), lr=5e-3), criterion=functional.nll_loss
    )


@program(
    "rnn/gestures/agreement-in-whole-numbers",
    causes=("zero-loss", "bad-targets"),
    operator="loss multiplied away",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Each sample is weighted by the share of its batch that has its label, in whole numbers."""

    def criterion(logits: Tensor, y: Tensor) -> Tensor:
        weight = (y == y.unsqueeze(1)).sum(1) // (2 * len(y))
        return (weight * functional.cross_entropy(logits, y, reduction="none")).sum()

    net = Gates()
    return recognise(watch, net, optim.Adam(net.parameters(), lr=5e-3), criterion=criterion)
