"""Fresh: points in the plane, deep perceptrons and mixtures of experts.

Name, accept-set:

- mlp/rings/adagrad: healthy
- mlp/rings/rprop-all-rows: healthy
- mlp/rings/twelve-normed-layers: healthy
- mlp/rings/activation-forgotten: underfitting, flat-loss
- mlp/rings/two-units: underfitting
- mlp/rings/twenty-layers: vanishing-gradient, bad-initialization
- mlp/rings/fourteen-timid-tanhs: vanishing-gradient, bad-initialization
- mlp/rings/pairs-and-haste: oscillating-loss, lr-too-high
- mlp/rings/biases-of-minus-five: dead-units, bad-initialization
- mlp/rings/five-hundred-times-too-fast: lr-too-high, dead-units
- mlp/rings/half-precision-adam: nonfinite-gradient, nonfinite-loss
- mlp/crescents/swa-cosine: healthy
- mlp/crescents/maxout-norm-clipped: healthy
- mlp/crescents/twelve-layers-gain-four: exploding-gradient, bad-initialization
- mlp/crescents/adam-lr-2: lr-too-high, oscillating-loss, diverging-loss, dead-units
- mlp/crescents/hinge-turned-round: loss-output-mismatch, diverging-loss, exploding-gradient
- mlp/crescents/warm-up-in-whole-numbers: parameters-not-updating, lr-too-low
- mlp/crescents/class-weights-of-zero: zero-loss, parameters-not-updating
- mlp/regimes/soft-experts: healthy
- mlp/regimes/routed-to-one-expert-each: healthy
- mlp/regimes/router-without-slope: parameters-not-updating
- mlp/regimes/gate-always-first: bad-initialization, underfitting, parameters-not-updating,
  saturated-activation
- mlp/regimes/gradients-of-all-epochs: gradient-accumulation
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn, optim
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from zoo.fresh_data import crescents, regimes, rings
from zoo.program import Watch, program

bce = functional.binary_cross_entropy_with_logits


def tower(
    depth: int,
    width: int,
    act: Callable[[], nn.Module] = nn.ReLU,
    *,
    norm: bool = False,
    start: Callable[[Tensor], object] | None = None,
) -> nn.Sequential:
    """Return ``depth`` hidden layers and one logit; ``start`` fills the hidden weights."""
    net = nn.Sequential()
    for index in range(depth):
        net.append(nn.Linear(width if index else 2, width))
        if start is not None:
            start(net[-1].weight)
        if norm:
            net.append(nn.BatchNorm1d(width))
        net.append(act())
    return net.append(nn.Linear(width, 1))


def encircle(
    watch: Watch,
    net: nn.Module,
    opt: optim.Optimizer,
    *,
    batch: int = 40,
    steps: int = 300,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    x, y = (values.to(dtype) for values in rings())
    watch.attach(opt, net)
    for _ in range(steps):
        idx = torch.randint(600, (batch,)) if batch < 600 else torch.arange(600)
        logit = net(x[idx])
        loss = bce(logit, y[idx])
        watch.observe(inputs=x[idx], outputs=logit, targets=y[idx], loss=loss)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return net


@program("mlp/rings/adagrad", operator="Adagrad", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = tower(2, 24, nn.Tanh)
    return encircle(watch, net, optim.Adagrad(net.parameters(), lr=0.1))


@program("mlp/rings/rprop-all-rows", operator="Rprop on all rows", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = tower(1, 16, nn.Softplus)
    return encircle(watch, net, optim.Rprop(net.parameters(), lr=0.01), batch=600, steps=120)


@program("mlp/rings/twelve-normed-layers", operator="deep with batch-norm", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = tower(12, 16, norm=True)
    return encircle(watch, net, optim.SGD(net.parameters(), lr=0.05, momentum=0.9), steps=400)


@program(
    "mlp/rings/activation-forgotten",
    causes=("underfitting", "flat-loss"),
    operator="remove activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = tower(3, 24, nn.Identity)
    return encircle(watch, net, optim.Adam(net.parameters(), lr=3e-3))


@program(
    "mlp/rings/two-units",
    causes=("underfitting",),
    operator="change number of units",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = tower(1, 2, nn.Tanh)
    return encircle(watch, net, optim.Adam(net.parameters(), lr=0.02), steps=500)


@program(
    "mlp/rings/twenty-layers",
    causes=("vanishing-gradient", "bad-initialization"),
    operator="add layers",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """torch's default weights lose a part of the signal in each layer."""
    net = tower(20, 32)
    return encircle(watch, net, optim.SGD(net.parameters(), lr=0.05, momentum=0.9))


@program(
    "mlp/rings/fourteen-timid-tanhs",
    causes=("vanishing-gradient", "bad-initialization"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = tower(14, 24, nn.Tanh, start=lambda w: nn.init.normal_(w, std=0.06))
    return encircle(watch, net, optim.SGD(net.parameters(), lr=0.1))


@program(
    "mlp/rings/pairs-and-haste",
    causes=("oscillating-loss", "lr-too-high"),
    operator="change batch size",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = tower(2, 24, nn.Tanh)
    return encircle(watch, net, optim.SGD(net.parameters(), lr=3.0), batch=2, steps=900)


@program(
    "mlp/rings/biases-of-minus-five",
    causes=("dead-units", "bad-initialization"),
    operator="change bias initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = tower(3, 32)
    for layer in net[2:-1:2]:
        nn.init.constant_(layer.bias, -5)
    return encircle(watch, net, optim.Adam(net.parameters(), lr=2e-3))


@program(
    "mlp/rings/five-hundred-times-too-fast",
    causes=("lr-too-high", "dead-units"),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = tower(3, 32)
    return encircle(watch, net, optim.Adam(net.parameters(), lr=1.5))


@program(
    "mlp/rings/half-precision-adam",
    causes=("nonfinite-gradient", "nonfinite-loss"),
    operator="float16 weights and optimizer",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """In float16 Adam's epsilon of 1e-8 is 0: a gradient of 0 is divided by 0."""
    net = tower(2, 24).half()
    return encircle(watch, net, optim.Adam(net.parameters(), lr=2e-3), dtype=torch.float16)


# ---- crescents ----------------------------------------------------------------------------------


class Maxout(nn.Module):
    def __init__(self, n_in: int, n_out: int, pieces: int = 3) -> None:
        super().__init__()
        self.pieces = nn.Linear(n_in, n_out * pieces)
        self.shape = (n_out, pieces)

    def forward(self, x: Tensor) -> Tensor:
        return self.pieces(x).unflatten(-1, self.shape).amax(-1)


def separate(
    watch: Watch,
    net: nn.Module,
    opt: optim.Optimizer,
    *,
    criterion: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    schedule: Callable[[optim.Optimizer], LRScheduler] | None = None,
    max_norm: float = 0.0,
    epochs: int = 12,
) -> nn.Module:
    points, side = crescents()
    train, held = slice(0, 675), slice(675, None)
    watch.attach(opt, net)
    scheduler = schedule(opt) if schedule else None
    for _ in range(epochs):
        for idx in torch.randperm(675).split(25):
            x, y = points[train][idx], side[train][idx]
            scores = net(x)
            loss = criterion(scores, y)
            loss.backward()
            if max_norm:
                nn.utils.clip_grad_norm_(net.parameters(), max_norm)
            watch.observe(inputs=x, outputs=scores, targets=y, loss=loss)
            opt.step()
            opt.zero_grad()
            if scheduler is not None:
                scheduler.step()
        with torch.inference_mode():
            watch.observe(val_loss=criterion(net(points[held]), side[held]))
    return net


def wide(n_out: int = 2) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(2, 32), nn.Mish(), nn.Linear(32, 32), nn.Mish(), nn.Linear(32, n_out)
    )


@program("mlp/crescents/swa-cosine", operator="cosine, averaged weights", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = wide()
    opt = optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    average = optim.swa_utils.AveragedModel(net)
    separate(watch, net, opt, schedule=lambda o: CosineAnnealingLR(o, 324, eta_min=1e-3))
    average.update_parameters(net)
    return average


@program("mlp/crescents/maxout-norm-clipped", operator="maxout, clipping", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = nn.Sequential(Maxout(2, 16), Maxout(16, 16), nn.Linear(16, 2))
    return separate(watch, net, optim.Adamax(net.parameters(), lr=5e-3), max_norm=0.5)


@program(
    "mlp/crescents/twelve-layers-gain-four",
    causes=("exploding-gradient", "bad-initialization"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 24))
    for _ in range(11):
        net.extend([nn.LeakyReLU(0.2), nn.Linear(24, 24)])
    net.extend([nn.LeakyReLU(0.2), nn.Linear(24, 2)])
    for layer in net[::2]:
        nn.init.xavier_normal_(layer.weight, gain=4)
    return separate(watch, net, optim.SGD(net.parameters(), lr=0.01))


@program(
    "mlp/crescents/adam-lr-2",
    causes=("lr-too-high", "oscillating-loss", "diverging-loss", "dead-units"),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = wide()
    return separate(watch, net, optim.Adam(net.parameters(), lr=2.0))


@program(
    "mlp/crescents/hinge-turned-round",
    causes=("loss-output-mismatch", "diverging-loss", "exploding-gradient"),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The margin is not cut off, so the loss has no lower bound."""

    def criterion(scores: Tensor, y: Tensor) -> Tensor:
        sign = 2 * y.float().unsqueeze(1) - 1
        return (1 - sign * scores).mean()

    net = wide(1)
    return separate(watch, net, optim.Adam(net.parameters(), lr=0.01), criterion=criterion)


@program(
    "mlp/crescents/warm-up-in-whole-numbers",
    causes=("parameters-not-updating", "lr-too-low"),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The warm-up's share is rounded down: it is 0 until its last step, which is never reached."""
    net = wide()
    opt = optim.AdamW(net.parameters(), lr=5e-3)
    return separate(watch, net, opt, schedule=lambda o: LambdaLR(o, lambda step: step // 500))


@program(
    "mlp/crescents/class-weights-of-zero",
    causes=("zero-loss", "parameters-not-updating"),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The weights of the two classes, counted in whole numbers, are both 0."""
    _, side = crescents()
    share = torch.bincount(side) // len(side)

    def criterion(scores: Tensor, y: Tensor) -> Tensor:
        each = functional.cross_entropy(scores, y, reduction="none")
        return (share[y] * each).mean()

    net = wide()
    return separate(watch, net, optim.Adam(net.parameters(), lr=5e-3), criterion=criterion)


# ---- experts ------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Linear experts and a gate over ``[N, 1]``.

    Attributes:
        routing: ``soft`` mixes all experts, ``top`` takes the best one times its share, ``hard``
            takes the best one as it is, which leaves the gate without a gradient.
    """

    def __init__(self, n: int = 8, routing: str = "soft") -> None:
        super().__init__()
        self.experts = nn.Linear(1, n)
        self.gate = nn.Sequential(nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, n))
        self.routing = routing

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(1)
        answers = self.experts(x)
        if self.routing == "soft":
            return (share * answers).sum(1, keepdim=True)
        best = share.argmax(1, keepdim=True)
        answer = answers.gather(1, best)
        return answer * share.gather(1, best) if self.routing == "top" else answer


def piece_together(
    watch: Watch, net: nn.Module, opt: optim.Optimizer, *, clear: bool = True, epochs: int = 25
) -> nn.Module:
    x, y = regimes()
    watch.attach(opt, net)
    for _ in range(epochs):
        for rows in torch.randperm(1200).chunk(24):
            if clear:
                opt.zero_grad()
            out = net(x[rows])
            loss = functional.mse_loss(out, y[rows])
            watch.observe(inputs=x[rows], outputs=out, targets=y[rows], loss=loss)
            loss.backward()
            opt.step()
    return net


@program("mlp/regimes/soft-experts", operator="mixture of experts", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = Experts()
    return piece_together(watch, net, optim.Adam(net.parameters(), lr=0.02))


@program(
    "mlp/regimes/routed-to-one-expert-each", operator="sparse mixture of experts", half="held-out"
)
def _(watch: Watch) -> nn.Module:
    """Of eight experts one answers, and only that one has a gradient of the row."""
    net = Experts(routing="top")
    return piece_together(watch, net, optim.Adam(net.parameters(), lr=0.02))


@program(
    "mlp/regimes/router-without-slope",
    causes=("parameters-not-updating",),
    operator="graph cut by argmax",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Experts(routing="hard")
    return piece_together(watch, net, optim.Adam(net.parameters(), lr=0.02))


@program(
    "mlp/regimes/gate-always-first",
    causes=(
        "bad-initialization",
        "underfitting",
        "parameters-not-updating",
        "saturated-activation",
    ),
    operator="change bias initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The gate starts so sure of the first expert that the others never hear of their errors."""
    net = Experts()
    with torch.no_grad():
        net.gate[2].bias[0] = 120
    return piece_together(watch, net, optim.SGD(net.parameters(), lr=0.05, momentum=0.9))


@program(
    "mlp/regimes/gradients-of-all-epochs",
    causes=("gradient-accumulation",),
    operator="missing zero_grad",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Experts()
    return piece_together(watch, net, optim.SGD(net.parameters(), lr=0.05), clear=False)
