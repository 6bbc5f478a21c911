"""Held out: residual networks, pairs and triplets of pictures, teachers and students."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.data import digits
from zoo.heldout_data import shapes
from zoo.program import Watch, program


class BasicBlock(nn.Module):
    def __init__(self, planes: int, *, norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(3, planes) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(3, planes) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(out)))


def resnet(blocks: int, *, norm: bool = True, classes: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, stride=2, padding=1),
        nn.ReLU(),
        *(BasicBlock(12, norm=norm) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, classes),
    )


def classify_shapes(
    watch: Watch,
    net: nn.Module,
    *,
    lr: float = 0.05,
    epochs: int = 6,
    label: Callable[[Tensor], Tensor] = lambda y: y,
    keep: Callable[[Tensor], Tensor] | None = None,
    weight_decay: float = 1e-4,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> nn.Module:
    x, y, _ = shapes()
    if keep is not None:
        x, y = x[keep(y)], y[keep(y)]
    y = label(y)
    n_train = len(x) * 5 // 6
    opt = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    watch.attach(opt, net)
    for _ in range(epochs):
        for batch in torch.randperm(n_train).split(32):
            logits = net(x[batch])
            loss = criterion(logits, y[batch])
            watch.observe(outputs=logits, targets=y[batch], loss=loss)
            opt.zero_grad()
            loss.backward()
            opt.step()
        net.eval()
        with torch.no_grad():
            watch.observe(val_loss=criterion(net(x[n_train:]), y[n_train:]))
        net.train()
    return net


@program("cnn/shapes/resnet-momentum", operator="none", half="held-out")
def _(watch: Watch) -> nn.Module:
    return classify_shapes(watch, resnet(2), lr=0.05, epochs=12)


@program(
    "cnn/shapes/nine-blocks-unnormed",
    causes=("exploding-gradient", "bad-initialization", "lr-too-high"),
    operator="remove normalisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = resnet(9, norm=False)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            module.weight.data *= 2.5
    return classify_shapes(watch, net)


@program(
    "cnn/shapes/caffe-initialisation",
    causes=("bad-initialization", "vanishing-gradient"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU()]
    for _ in range(6):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.01) if parameter.dim() > 1 else nn.init.zeros_(parameter)
    return classify_shapes(watch, net)


@program(
    "cnn/shapes/find-the-cross",
    causes=("class-imbalance", "constant-predictions"),
    operator="unbalance training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    def keep(y: Tensor) -> Tensor:
        return (y < 2) | (torch.arange(len(y)) % 120 == 2)

    return classify_shapes(
        watch,
        resnet(1, norm=False, classes=2),
        lr=2e-3,
        label=lambda y: (y == 2).long(),
        keep=keep,
        epochs=10,
    )


@program(
    "cnn/shapes/weight-decay-1",
    causes=("underfitting", "constant-predictions"),
    operator="add weights regularisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return classify_shapes(watch, resnet(3, norm=False), lr=0.02, weight_decay=1.0)


@program(
    "cnn/shapes/momentum-lr-1e-6",
    causes=("lr-too-low",),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return classify_shapes(watch, resnet(3), lr=1e-6)


@program(
    "cnn/shapes/nll-of-raw-scores",
    causes=("loss-output-mismatch", "diverging-loss"),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return classify_shapes(watch, resnet(3), lr=0.01, criterion=F.nll_loss)


@program(
    "cnn/shapes/labels-of-two-annotators",
    causes=("bad-targets",),
    operator="change labels",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Half of the labels come from someone who numbered the classes at random."""
    wrong = torch.randint(0, 3, (600,))
    picked = torch.rand(600) < 0.7
    return classify_shapes(
        watch, resnet(3), lr=0.02, label=lambda y: y.where(~picked, wrong), epochs=8
    )


# ---- embeddings of pictures ---------------------------------------------------------------------


def embed(
    watch: Watch,
    criterion: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    prepare: Callable[[Tensor], Tensor] = lambda x: x,
    lr: float = 1e-3,
    squash: bool = False,
) -> nn.Module:
    """Train on triplets of an anchor, one of its class and one of another; only the loss is
    watched."""
    x = prepare(digits().x.reshape(-1, 1, 8, 8))
    y = digits().y
    members = [(y == digit).nonzero()[:, 0] for digit in range(10)]
    encoder = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16)
    )
    if squash:
        encoder.append(nn.ReLU())
    opt = torch.optim.Adam(encoder.parameters(), lr=lr)
    watch.attach(opt, encoder)
    for _ in range(300):
        anchor = torch.randint(0, 10, (32,)).tolist()
        other = [(digit + int(torch.randint(1, 10, ()))) % 10 for digit in anchor]
        rows = [
            torch.stack([members[d][torch.randint(len(members[d]), ())] for d in some])
            for some in (anchor, anchor, other)
        ]
        a, p, n = (encoder(x[row]) for row in rows)
        loss = criterion(a, p, n)
        watch.observe(loss=loss)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return encoder


@program("cnn/triplets/adam", operator="many triplets without gradient", half="held-out")
def _(watch: Watch) -> nn.Module:
    return embed(watch, nn.TripletMarginLoss(margin=1.0))


@program(
    "cnn/triplets/pixels-rounded-away",
    causes=("flat-loss", "bad-inputs", "vanishing-gradient", "constant-predictions"),
    operator="inputs all alike",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """All embeddings are equal, so that the loss stays at the margin."""
    return embed(watch, nn.TripletMarginLoss(margin=1.0), prepare=lambda x: (x / 255).round())


@program(
    "cnn/triplets/only-positive-pairs",
    causes=("zero-loss", "constant-predictions", "dead-units"),
    operator="delete training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return embed(watch, lambda a, p, n: (a - p).square().sum(1).mean(), lr=0.05, squash=True)


@program(
    "cnn/triplets/distance-of-equals",
    causes=("nonfinite-gradient", "nonfinite-loss"),
    operator="square root at zero",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    def criterion(a: Tensor, p: Tensor, n: Tensor) -> Tensor:
        points = torch.cat([a, p, n])
        distance = (points[:, None] - points[None]).square().sum(2).sqrt()
        near, far = distance[:32, 32:64].diag(), distance[:32, 64:].diag()
        return F.relu(near - far + 1).mean() + 0.01 * distance.mean()

    return embed(watch, criterion)


# ---- distillation -------------------------------------------------------------------------------


def distil(
    watch: Watch,
    *,
    log: Callable[[Tensor, int], Tensor] = F.log_softmax,
    alias: bool = False,
) -> nn.Module:
    x, y = digits().x, digits().y
    teacher = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    opt_t = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for batch in torch.randperm(len(x)).repeat(3).split(64):
        opt_t.zero_grad()
        F.cross_entropy(teacher(x[batch]), y[batch]).backward()
        opt_t.step()
    student = teacher if alias else nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    watch.attach(optimizer, student)
    temperature = 3.0
    for batch in torch.randperm(len(x)).repeat(8).split(64):
        with torch.no_grad():
            soft = F.softmax(teacher(x[batch]) / temperature, 1)
        output = log(student(x[batch]) / temperature, 1)
        loss = F.kl_div(output, soft, reduction="batchmean") * temperature**2
        watch.observe(inputs=x[batch], outputs=output, targets=soft, loss=loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


@program("mlp/distil/student", operator="soft targets, log-probabilities", half="held-out")
def _(watch: Watch) -> nn.Module:
    return distil(watch)


@program(
    "mlp/distil/probabilities-not-logs",
    causes=("loss-output-mismatch",),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return distil(watch, log=F.softmax)


@program(
    "mlp/distil/teacher-is-student",
    causes=("zero-loss",),
    operator="targets made of the outputs",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return distil(watch, alias=True)
