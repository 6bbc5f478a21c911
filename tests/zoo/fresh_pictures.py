"""Fresh: residual networks on digits, autoencoders of a plant's sensors, and adversaries.

Name, accept-set:

- cnn/strokes/mixup-cosine: healthy
- cnn/strokes/depthwise-hardswish: healthy
- cnn/strokes/residual-radam: healthy
- cnn/strokes/adam-lr-4: lr-too-high, diverging-loss, oscillating-loss, dead-units
- cnn/strokes/uniform-from-0-to-1: bad-initialization, exploding-gradient
- cnn/strokes/five-layers-of-thousandths: bad-initialization, vanishing-gradient
- cnn/strokes/flipped-within-the-batch: bad-targets
- cnn/strokes/sigmoid-before-the-classes: loss-output-mismatch, underfitting
- autoencoder/sensors/cosine-adamw: healthy
- autoencoder/sensors/variational-annealed: healthy
- autoencoder/sensors/masked: healthy
- autoencoder/sensors/own-units: bad-inputs, bad-targets
- autoencoder/sensors/sigmoid-decoder: loss-output-mismatch
- autoencoder/sensors/softmax-over-sensors: loss-output-mismatch
- autoencoder/sensors/code-priced-away: underfitting, constant-predictions, dead-units
- autoencoder/sensors/sgd-lr-x200: lr-too-high, diverging-loss, exploding-gradient, nonfinite-loss
- autoencoder/sensors/encoder-not-told: parameters-not-updating
- mlp/ellipse/hinge-gan: healthy
- mlp/ellipse/generator-of-a-least-squares-gan: healthy
- mlp/ellipse/optimizer-of-the-critic-for-the-generator: parameters-not-updating
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn, optim
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from zoo.data import digit_images
from zoo.fresh_data import sensors
from zoo.program import Watch, program

Criterion = Callable[[Tensor, Tensor], Tensor]

# ---- strokes ------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions with group-norm, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *(nn.GroupNorm(4, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)),
            *(nn.GroupNorm(4, width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(x)


def resnet(width: int = 12) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        *(Residual(width), Residual(width)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)),
    )


def plain(*last: nn.Module) -> nn.Sequential:
    net = nn.Sequential()
    for n_in in (1, 12, 12, 12):
        net.extend([nn.Conv2d(n_in, 12, 3, padding=1), nn.ReLU()])
    return net.extend([nn.AvgPool2d(2), nn.Flatten(), nn.Linear(192, 10), *last])


def write(
    watch: Watch,
    net: nn.Module,
    opt: optim.Optimizer,
    *,
    mixed: bool = False,
    cosine: bool = False,
    turn: Callable[[Tensor], Tensor] = lambda x: x,
    epochs: int = 6,
) -> nn.Module:
    data = digit_images()
    watch.attach(opt, net)
    steps = epochs * math.ceil(len(data.x) / 48)
    scheduler = CosineAnnealingLR(opt, steps) if cosine else None
    for _ in range(epochs):
        for idx in torch.randperm(len(data.x)).split(48):
            x, y = turn(data.x[idx]), data.y[idx]
            if mixed:
                share, other = 0.5 * torch.rand(()), torch.randperm(len(y))
                x = (1 - share) * x + share * x[other]
                wanted = functional.one_hot(y, 10).float()
                y = (1 - share) * wanted + share * wanted[other]
            logits = net(x)
            loss = functional.cross_entropy(logits, y)
            watch.observe(inputs=x, outputs=logits, targets=y, loss=loss)
            opt.zero_grad()
            loss.backward()
            opt.step()
            if scheduler is not None:
                scheduler.step()
        with torch.no_grad():
            watch.observe(val_loss=functional.cross_entropy(net(data.val_x), data.val_y))
    return net


@program("cnn/strokes/mixup-cosine", operator="mixed pictures, soft targets", half="held-out")
def _(watch: Watch) -> nn.Module:
    """The training loss stays above the validation loss, since no picture is of one class."""
    net = resnet()
    opt = optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    return write(watch, net, opt, mixed=True, cosine=True)


@program("cnn/strokes/depthwise-hardswish", operator="depthwise, RMSprop", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.Hardswish())
    for _ in range(2):
        net.extend([nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)])
        net.extend([nn.BatchNorm2d(16, momentum=0.3), nn.Hardswish()])
    net.extend([nn.Flatten(), nn.Linear(256, 10)])
    return write(watch, net, optim.RMSprop(net.parameters(), lr=2e-3, momentum=0.5))


@program("cnn/strokes/residual-radam", operator="group-norm, residual", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = resnet()
    return write(watch, net, optim.RAdam(net.parameters(), lr=6e-3))


@program(
    "cnn/strokes/adam-lr-4",
    causes=("lr-too-high", "diverging-loss", "oscillating-loss", "dead-units"),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = resnet()
    return write(watch, net, optim.Adam(net.parameters(), lr=4.0))


@program(
    "cnn/strokes/uniform-from-0-to-1",
    causes=("bad-initialization", "exploding-gradient"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = plain()
    for parameter in net.parameters():
        nn.init.uniform_(parameter)
    return write(watch, net, optim.Adam(net.parameters(), lr=1e-3))


@program(
    "cnn/strokes/five-layers-of-thousandths",
    causes=("bad-initialization", "vanishing-gradient"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = plain()
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.normal_(layer.weight, std=1e-3)
            nn.init.zeros_(layer.bias)
    return write(watch, net, optim.SGD(net.parameters(), lr=0.05, momentum=0.9))


@program(
    "cnn/strokes/flipped-within-the-batch",
    causes=("bad-targets",),
    operator="change labels",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """What should mirror the pictures turns the order of the batch, not that of the columns."""
    net = resnet()
    opt = optim.Adam(net.parameters(), lr=2e-3)
    return write(watch, net, opt, turn=lambda x: x.flip(0))


@program(
    "cnn/strokes/sigmoid-before-the-classes",
    causes=("loss-output-mismatch", "underfitting"),
    operator="add activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The scores end in a sigmoid, and cross-entropy takes them as they are."""
    net = plain(nn.Sigmoid())
    return write(watch, net, optim.SGD(net.parameters(), lr=0.05, momentum=0.9))


# ---- sensors ------------------------------------------------------------------------------------


class Compressor(nn.Module):
    def __init__(self, last: nn.Module | None = None, *, variational: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 32), nn.ELU(), nn.Linear(32, 6))
        self.spread = nn.Linear(20, 6) if variational else None
        self.decoder = nn.Sequential(nn.Linear(6, 32), nn.ELU(), nn.Linear(32, 20))
        self.last = last or nn.Identity()
        self.penalty = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        self.penalty = code.abs().sum(1).mean()
        if self.spread is not None:
            log_var = self.spread(x).clamp(-8, 4)
            self.penalty = 0.5 * (log_var.exp() + code**2 - 1 - log_var).sum(1).mean()
            code = code + (0.5 * log_var).exp() * torch.randn_like(code)
        return self.last(self.decoder(code))


def rebuild(
    watch: Watch,
    net: Compressor,
    opt: optim.Optimizer,
    *,
    own_units: bool = False,
    weight: Callable[[int], float] = lambda step: 0.0,
    hide: float = 0.0,
    cosine: bool = False,
) -> nn.Module:
    x = sensors()[own_units]
    watch.attach(opt, net)
    scheduler = CosineAnnealingLR(opt, 300) if cosine else None
    step = 0
    for _ in range(20):
        for idx in torch.randperm(750).split(50):
            seen = torch.rand(len(idx), 20) >= hide
            y = x[idx]
            out = net(y * seen)
            loss = functional.mse_loss(out, y) + weight(step) * net.penalty
            watch.observe(inputs=y, outputs=out, targets=y, loss=loss)
            opt.zero_grad()
            loss.backward()
            opt.step()
            step += 1
            if scheduler is not None:
                scheduler.step()
        with torch.no_grad():
            watch.observe(val_loss=functional.mse_loss(net(x[750:]), x[750:]))
    return net


@program("autoencoder/sensors/cosine-adamw", operator="cosine to zero", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = Compressor()
    return rebuild(watch, net, optim.AdamW(net.parameters(), lr=0.01), cosine=True)


@program("autoencoder/sensors/variational-annealed", operator="variational", half="held-out")
def _(watch: Watch) -> nn.Module:
    """What the code may cost rises from nothing, and the loss with it for a while."""
    net = Compressor(variational=True)
    opt = optim.Adam(net.parameters(), lr=5e-3)
    return rebuild(watch, net, opt, weight=lambda step: 0.02 * min(1.0, step / 150))


@program("autoencoder/sensors/masked", operator="a third of the inputs hidden", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = Compressor()
    return rebuild(watch, net, optim.NAdam(net.parameters(), lr=5e-3), hide=0.3)


@program(
    "autoencoder/sensors/own-units",
    causes=("bad-inputs", "bad-targets"),
    operator="inputs not scaled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Inputs and targets are the same values, from volts of about 1 to pascals of 100,000."""
    net = Compressor()
    return rebuild(watch, net, optim.Adam(net.parameters(), lr=5e-3), own_units=True)


@program(
    "autoencoder/sensors/sigmoid-decoder",
    causes=("loss-output-mismatch",),
    operator="add activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Compressor(nn.Sigmoid())
    return rebuild(watch, net, optim.Adam(net.parameters(), lr=5e-3))


@program(
    "autoencoder/sensors/softmax-over-sensors",
    causes=("loss-output-mismatch",),
    operator="add activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Compressor(nn.Softmax(dim=1))
    return rebuild(watch, net, optim.Adam(net.parameters(), lr=5e-3))


@program(
    "autoencoder/sensors/code-priced-away",
    causes=("underfitting", "constant-predictions", "dead-units"),
    operator="add weights regularisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """What the code costs is more than it can ever be worth, so that it stays at nothing."""
    net = Compressor()
    return rebuild(watch, net, optim.Adam(net.parameters(), lr=5e-3), weight=lambda step: 5.0)


@program(
    "autoencoder/sensors/sgd-lr-x200",
    causes=("lr-too-high", "diverging-loss", "exploding-gradient", "nonfinite-loss"),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Compressor()
    return rebuild(watch, net, optim.SGD(net.parameters(), lr=20.0))


@program(
    "autoencoder/sensors/encoder-not-told",
    causes=("parameters-not-updating",),
    operator="optimizer of too few parameters",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The encoder, whose first layer was started at small weights, is in no optimizer."""
    net = Compressor()
    nn.init.normal_(net.encoder[0].weight, std=0.02)
    return rebuild(watch, net, optim.Adam(net.decoder.parameters(), lr=5e-3))


# ---- adversaries --------------------------------------------------------------------------------


def ellipse(n: int) -> Tensor:
    angle = 2 * math.pi * torch.rand(n)
    return torch.stack([1.5 * angle.cos(), 0.7 * angle.sin()], 1) + 0.05 * torch.randn(n, 2)


def contend(watch: Watch, *, watched: str, game: str, swapped: bool = False) -> nn.Module:
    """Let a generator and a critic play; one of the two is watched."""
    make = nn.Sequential(
        nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
    )
    judge = nn.Sequential(nn.Linear(2, 48), nn.LeakyReLU(0.2), nn.Linear(48, 1))
    opt_judge = optim.Adam(judge.parameters(), lr=1e-3, betas=(0.5, 0.99))
    opt_make = optim.Adam((judge if swapped else make).parameters(), lr=1e-3, betas=(0.5, 0.99))
    if watched == "critic":
        watch.attach(opt_judge, judge)
    else:
        watch.attach(opt_make, make)
    for _ in range(400):
        fake = make(torch.randn(48, 3))
        scores = judge(torch.cat([ellipse(48), fake.detach()]))
        labels = torch.cat([torch.ones(48, 1), torch.zeros(48, 1)])
        if game == "hinge":
            loss = functional.relu(1 - (2 * labels - 1) * scores).mean()
        else:
            loss = functional.mse_loss(scores, labels)
        if watched == "critic":
            watch.observe(outputs=scores, targets=labels, loss=loss)
        opt_judge.zero_grad()
        loss.backward()
        opt_judge.step()
        opinion = judge(fake)
        loss = (opinion - 1).square().mean() if game == "squares" else -opinion.mean()
        if watched == "generator":
            watch.observe(outputs=fake, loss=loss)
        opt_make.zero_grad()
        loss.backward()
        opt_make.step()
    return judge if watched == "critic" else make


@program("mlp/ellipse/hinge-gan", operator="GAN, its critic watched", half="held-out")
def _(watch: Watch) -> nn.Module:
    """The better the generator, the higher the critic's loss."""
    return contend(watch, watched="critic", game="hinge")


@program(
    "mlp/ellipse/generator-of-a-least-squares-gan",
    operator="GAN, its generator watched",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return contend(watch, watched="generator", game="squares")


@program(
    "mlp/ellipse/optimizer-of-the-critic-for-the-generator",
    causes=("parameters-not-updating",),
    operator="optimizer of another model",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The line was copied, and the generator's optimizer has the critic's parameters."""
    return contend(watch, watched="generator", game="squares", swapped=True)
