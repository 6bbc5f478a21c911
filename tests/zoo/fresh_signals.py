"""Fresh: convolutions over sequences, of strands of bases and of recorded tones.

Name, accept-set:

- cnn/strands/one-hot-adamw: healthy
- cnn/strands/group-norm-nesterov: healthy
- cnn/strands/dilated-accumulated: healthy
- cnn/strands/rectified-logit: loss-output-mismatch, dead-units, constant-predictions
- cnn/strands/motif-filters-shut: dead-units, bad-initialization
- cnn/strands/sums-of-gradients: gradient-accumulation
- cnn/strands/only-biases-thawed: parameters-not-updating
- cnn/strands/sixty-strands-by-place: overfitting
- cnn/strands/bases-not-known: bad-inputs, nonfinite-loss, nonfinite-gradient
- cnn/strands/positives-first: bad-inputs, oscillating-loss
- cnn/tones/residual-one-cycle: healthy
- cnn/tones/bfloat16-autocast: healthy
- cnn/tones/early-stopped-weight-norm: healthy
- cnn/tones/sixteen-bit-integers: bad-inputs
- cnn/tones/in-microvolts: bad-inputs
- cnn/tones/blocks-that-triple: exploding-gradient, bad-initialization
- cnn/tones/halved-each-batch: lr-too-low, parameters-not-updating
- cnn/tones/order-of-another-shuffle: bad-targets
- cnn/tones/tanh-at-its-end: saturated-activation, bad-initialization
- cnn/tones/loss-scale-left-in: exploding-gradient, lr-too-high, diverging-loss
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn, optim
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler, OneCycleLR

from zoo.fresh_data import strands, tones
from zoo.program import Watch, program

Make = Callable[[Iterable[nn.Parameter]], optim.Optimizer]
binary = functional.binary_cross_entropy_with_logits


def scanner(*, groups: int = 0, dilation: int = 1, last: nn.Module | None = None) -> nn.Sequential:
    """Return a network that looks for motifs in ``[N, 4, 40]`` and takes the best match."""
    layers: list[nn.Module] = [nn.Conv1d(4, 24, 7, padding=3)]
    if groups:
        layers.append(nn.GroupNorm(groups, 24))
    layers += [nn.ReLU(), nn.Conv1d(24, 24, 3, padding=dilation, dilation=dilation), nn.ReLU()]
    layers += [nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(24, 1)]
    return nn.Sequential(*layers, *([last] if last else []))


def search(
    watch: Watch,
    net: nn.Module,
    make: Make,
    *,
    spoil: Callable[[Tensor], Tensor] = lambda x: x,
    rows: int = 800,
    epochs: int = 8,
    micro: int = 1,
    clear: bool = True,
    order: Callable[[Tensor], Tensor] = lambda y: torch.randperm(len(y)),
) -> nn.Module:
    """Train with a step per ``micro`` batches of 32."""
    x, found = strands()
    x = spoil(x)
    optimizer = make(p for p in net.parameters() if p.requires_grad)
    watch.attach(optimizer, net)
    for _ in range(epochs):
        net.train()
        for count, idx in enumerate(order(found[:rows]).split(32), 1):
            logits = net(x[idx])
            loss = binary(logits, found[idx])
            watch.observe(inputs=x[idx], outputs=logits, targets=found[idx], loss=loss)
            (loss / micro).backward()
            if count % micro == 0:
                optimizer.step()
                if clear:
                    optimizer.zero_grad()
        net.eval()
        with torch.no_grad():
            watch.observe(val_loss=binary(net(x[800:]), found[800:]))
    return net


def adamw(parameters: Iterable[nn.Parameter]) -> optim.Optimizer:
    return optim.AdamW(parameters, lr=3e-3)


@program("cnn/strands/one-hot-adamw", operator="inputs mostly zero", half="held-out")
def _(watch: Watch) -> nn.Module:
    return search(watch, scanner(), adamw)


@program("cnn/strands/group-norm-nesterov", operator="group-norm, Nesterov", half="held-out")
def _(watch: Watch) -> nn.Module:
    return search(
        watch,
        scanner(groups=4),
        lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
        epochs=10,
    )


@program("cnn/strands/dilated-accumulated", operator="gradients of 2 batches", half="held-out")
def _(watch: Watch) -> nn.Module:
    """The gradients of two batches are added on purpose, and halved."""
    return search(watch, scanner(dilation=4), adamw, micro=2, epochs=16)


@program(
    "cnn/strands/rectified-logit",
    causes=("loss-output-mismatch", "dead-units", "constant-predictions"),
    operator="add activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """A logit that is never negative means a probability of at least a half."""
    return search(watch, scanner(last=nn.ReLU()), adamw)


@program(
    "cnn/strands/motif-filters-shut",
    causes=("dead-units", "bad-initialization"),
    operator="change bias initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = scanner()
    nn.init.constant_(net[0].bias, -8)
    return search(watch, net, adamw)


@program(
    "cnn/strands/sums-of-gradients",
    causes=("gradient-accumulation",),
    operator="missing zero_grad",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return search(
        watch, scanner(groups=4), lambda p: optim.SGD(p, lr=0.05, momentum=0.9), clear=False
    )


@program(
    "cnn/strands/only-biases-thawed",
    causes=("parameters-not-updating",),
    operator="frozen by mistake",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The weights of a network that was never trained are frozen; its biases are not."""
    net = scanner()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("bias" in name)
    return search(watch, net, adamw)


@program(
    "cnn/strands/sixty-strands-by-place",
    causes=("overfitting",),
    operator="delete training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Without a maximum over the strand each place has weights of its own."""
    net = nn.Sequential(nn.Conv1d(4, 24, 7, padding=3), nn.ReLU(), nn.Flatten(), nn.Linear(960, 1))
    return search(watch, net, adamw, rows=60, epochs=120)


@program(
    "cnn/strands/bases-not-known",
    causes=("bad-inputs", "nonfinite-loss", "nonfinite-gradient"),
    operator="NaN in training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Where the sequencer was not sure, all four shares of a base are 0, and 0 is divided by 0."""

    def spoil(x: Tensor) -> Tensor:
        unsure = torch.rand(len(x), 1, 40, generator=torch.Generator().manual_seed(4)) < 0.001
        x = x.masked_fill(unsure, 0)
        return x / x.sum(1, keepdim=True)

    return search(watch, scanner(), adamw, spoil=spoil)


@program(
    "cnn/strands/positives-first",
    causes=("bad-inputs", "oscillating-loss"),
    operator="training data not shuffled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return search(
        watch, scanner(), adamw, order=lambda y: y.flatten().argsort(descending=True, stable=True)
    )


# ---- tones --------------------------------------------------------------------------------------


class Dilated(nn.Module):
    """A residual block; ``gain`` times its input is added to what it makes of it."""

    def __init__(self, width: int, dilation: int, *, norm: bool, gain: float) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x + functional.silu(self.norm(self.conv(x)))


class Hearing(nn.Module):
    def __init__(
        self, blocks: int = 4, width: int = 12, *, norm: bool = True, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 5, stride=2, padding=2)
        self.blocks = nn.Sequential(
            *(Dilated(width, 2 ** (i % 4), norm=norm, gain=gain) for i in range(blocks))
        )
        self.head = nn.Linear(2 * width, 4)

    def forward(self, sound: Tensor) -> Tensor:
        heard = self.blocks(self.stem(sound))
        return self.head(torch.cat([heard.mean(2), heard.amax(2)], dim=1))


def hear(
    watch: Watch,
    net: nn.Module,
    optimizer: optim.Optimizer,
    *,
    prepare: Callable[[Tensor], Tensor] = lambda x: x,
    relabel: Callable[[Tensor], Tensor] = lambda y: y,
    schedule: Callable[[optim.Optimizer], LRScheduler] | None = None,
    autocast: bool = False,
    scale: float = 1.0,
    patience: int = 0,
    epochs: int = 10,
) -> nn.Module:
    sound, shape = tones()
    x, y = prepare(sound), relabel(shape)
    watch.attach(optimizer, net)
    scheduler = None if schedule is None else schedule(optimizer)
    best, since = float("inf"), 0
    for _ in range(epochs):
        net.train()
        for batch in torch.randperm(640).split(32):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                outputs = net(x[batch])
                loss = functional.cross_entropy(outputs, y[batch])
            watch.observe(inputs=x[batch], outputs=outputs, targets=y[batch], loss=loss)
            optimizer.zero_grad()
            (scale * loss).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        net.eval()
        with torch.no_grad():
            val_loss = functional.cross_entropy(net(x[640:]), y[640:])
        watch.observe(val_loss=val_loss)
        since = 0 if val_loss < best else since + 1
        best = min(best, val_loss.item())
        if patience and since >= patience:
            break
    return net


def momentum(net: nn.Module, lr: float = 0.02) -> optim.Optimizer:
    return optim.SGD(net.parameters(), lr=lr, momentum=0.9)


@program("cnn/tones/residual-one-cycle", operator="one-cycle schedule", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = Hearing()
    optimizer = optim.AdamW(net.parameters(), lr=1e-3)
    return hear(
        watch, net, optimizer, schedule=lambda o: OneCycleLR(o, max_lr=0.02, total_steps=200)
    )


@program("cnn/tones/bfloat16-autocast", operator="mixed precision", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = Hearing(3)
    return hear(watch, net, momentum(net), autocast=True)


@program("cnn/tones/early-stopped-weight-norm", operator="stopped when it is best", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = Hearing(norm=False)
    for block in net.blocks:
        parametrizations.weight_norm(block.conv)
    return hear(watch, net, optim.Adam(net.parameters(), lr=4e-3), patience=3, epochs=25)


@program(
    "cnn/tones/sixteen-bit-integers",
    causes=("bad-inputs",),
    operator="inputs not scaled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Hearing(norm=False)
    return hear(watch, net, momentum(net), prepare=lambda x: (x * 20_000).round())


@program(
    "cnn/tones/in-microvolts",
    causes=("bad-inputs",),
    operator="inputs not scaled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Written in volts, the recordings are some millionths."""
    net = Hearing(norm=False)
    return hear(watch, net, momentum(net), prepare=lambda x: x * 3e-6)


@program(
    "cnn/tones/blocks-that-triple",
    causes=("exploding-gradient", "bad-initialization"),
    operator="remove normalisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Each of 12 blocks adds three times its input."""
    net = Hearing(12, norm=False, gain=3.0)
    return hear(watch, net, momentum(net, 0.005))


@program(
    "cnn/tones/halved-each-batch",
    causes=("lr-too-low", "parameters-not-updating"),
    operator="scheduler stepped per batch",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Hearing(norm=False)
    return hear(watch, net, momentum(net), schedule=lambda o: ExponentialLR(o, gamma=0.5))


@program(
    "cnn/tones/order-of-another-shuffle",
    causes=("bad-targets",),
    operator="change labels",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Hearing(2, norm=False)
    order = torch.randperm(800, generator=torch.Generator().manual_seed(9))
    return hear(watch, net, momentum(net), relabel=lambda y: y[order])


@program(
    "cnn/tones/tanh-at-its-end",
    causes=("saturated-activation", "bad-initialization"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = nn.Sequential(
        *(nn.Conv1d(1, 12, 9, stride=4, padding=4), nn.Tanh()),
        *(nn.Conv1d(12, 12, 5, stride=2, padding=2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(96, 4)),
    )
    for layer in (net[0], net[2]):
        nn.init.normal_(layer.weight, std=1)
        nn.init.constant_(layer.bias, 15)
    return hear(watch, net, momentum(net, 0.01))


@program(
    "cnn/tones/loss-scale-left-in",
    causes=("exploding-gradient", "lr-too-high", "diverging-loss"),
    operator="gradients not unscaled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The loss is multiplied for half precision, and its gradients are never divided."""
    net = Hearing(norm=False)
    return hear(watch, net, momentum(net), scale=1024)
