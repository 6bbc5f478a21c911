"""Fresh: counts, quantiles, ordered grades and other numbers to be told from tables.

Name, accept-set:

- mlp/visits/poisson-adam: healthy
- mlp/visits/mostly-none-noisy: healthy
- mlp/visits/rate-of-any-sign: loss-output-mismatch, nonfinite-loss, nonfinite-gradient
- mlp/visits/log-rate-rectified: loss-output-mismatch, dead-units, constant-predictions
- mlp/visits/sgd-lr-x100: lr-too-high, exploding-gradient, diverging-loss, nonfinite-loss,
  nonfinite-gradient
- mlp/visits/year-and-population: bad-inputs
- mlp/rent/three-quantiles-nadam: healthy
- mlp/rent/lbfgs-huber: healthy
- mlp/rent/euros-pinball: bad-targets, lr-too-low
- mlp/rent/squeezed-too-soon: loss-output-mismatch
- mlp/rent/pinball-without-maximum: loss-output-mismatch, diverging-loss, exploding-gradient
- mlp/rent/rmsprop-lr-1e-6: lr-too-low
- mlp/rent/sentinel-minus-9999: bad-inputs
- mlp/rent/answers-missing: bad-targets, nonfinite-loss, nonfinite-gradient
- mlp/oils/cumulative-adamw: healthy
- mlp/oils/labels-in-part-noisy: healthy
- mlp/oils/grade-into-one-logit: loss-output-mismatch, bad-targets
- mlp/oils/sheets-joined-wrongly: bad-targets
- mlp/oils/sixty-tasters: overfitting
- mlp/oils/all-a-tenth: bad-initialization
- mlp/oils/penalty-of-ten: underfitting, constant-predictions
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn, optim
from torch.nn import functional

from zoo.fresh_data import grades, rents, visits
from zoo.program import Watch, program

Criterion = Callable[[Tensor, Tensor], Tensor]
Make = Callable[..., optim.Optimizer]

# ---- counts -------------------------------------------------------------------------------------


def count(
    watch: Watch,
    *,
    base: float = 0.6,
    prepare: Callable[[Tensor], Tensor] = lambda x: x,
    last: nn.Module | None = None,
    criterion: Criterion | None = None,
    make: Make = lambda p: optim.Adam(p, lr=3e-3),
) -> nn.Module:
    x, y = visits(base)
    x = prepare(x)
    net = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1))
    if last is not None:
        net.append(last)
    criterion = criterion or nn.PoissonNLLLoss()
    optimizer = make(net.parameters())
    watch.attach(optimizer, net)
    for _ in range(20):
        for chosen in torch.randperm(960).split(48):
            out, target = net(x[chosen]), y[chosen]
            loss = criterion(out, target)
            watch.observe(inputs=x[chosen], outputs=out, targets=target, loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            watch.observe(val_loss=criterion(net(x[960:]), y[960:]))
    return net


@program("mlp/visits/poisson-adam", operator="counts, a log-rate; noisy", half="held-out")
def _(watch: Watch) -> nn.Module:
    return count(watch)


@program("mlp/visits/mostly-none-noisy", operator="counts, two in three are zero", half="held-out")
def _(watch: Watch) -> nn.Module:
    return count(watch, base=-1.0)


@program(
    "mlp/visits/rate-of-any-sign",
    causes=("loss-output-mismatch", "nonfinite-loss", "nonfinite-gradient"),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The loss takes the logarithm of outputs that may be negative."""
    return count(watch, criterion=nn.PoissonNLLLoss(log_input=False))


@program(
    "mlp/visits/log-rate-rectified",
    causes=("loss-output-mismatch", "dead-units", "constant-predictions"),
    operator="add activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Most rates are below 1, so their logarithms are negative; ReLU gives none."""
    return count(watch, base=-1.6, last=nn.ReLU())


@program(
    "mlp/visits/sgd-lr-x100",
    causes=(
        "lr-too-high",
        "exploding-gradient",
        "diverging-loss",
        "nonfinite-loss",
        "nonfinite-gradient",
    ),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return count(watch, make=lambda p: optim.SGD(p, lr=2.0))


@program(
    "mlp/visits/year-and-population",
    causes=("bad-inputs",),
    operator="inputs not scaled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Two columns are a year and the district's inhabitants."""
    scale = torch.tensor([1, 1, 1, 1, 1, 1, 4, 9000.0])
    shift = torch.tensor([0, 0, 0, 0, 0, 0, 2015, 30000.0])
    return count(watch, prepare=lambda x: x * scale + shift)


# ---- rents --------------------------------------------------------------------------------------

TAUS = torch.tensor([0.1, 0.5, 0.9])


def pinball(predicted: Tensor, target: Tensor) -> Tensor:
    error = target - predicted
    return torch.maximum(TAUS * error, (TAUS - 1) * error).mean()


class RentNet(nn.Module):
    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 40)
        self.norm = nn.LayerNorm(40)
        self.outer = nn.Linear(40, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(functional.gelu(self.norm(self.inner(x))))


def estimate(
    watch: Watch,
    net: nn.Module,
    criterion: Criterion,
    make: Make,
    *,
    euros: bool = False,
    spoil: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda x, y: (x, y),
) -> nn.Module:
    x, y = rents()
    x, y = spoil(x, y if euros else (y - 900) / 250)
    opt = make(net.parameters())
    watch.attach(opt, net)
    step = 0
    while step < 400:
        for idx in torch.randperm(len(x)).split(50):
            opt.zero_grad(set_to_none=True)
            pred = net(x[idx])
            loss = criterion(pred, y[idx])
            watch.observe(inputs=x[idx], outputs=pred, targets=y[idx], loss=loss)
            loss.backward()
            opt.step()
            step += 1
    return net


@program("mlp/rent/three-quantiles-nadam", operator="quantile loss", half="held-out")
def _(watch: Watch) -> nn.Module:
    return estimate(watch, RentNet(), pinball, lambda p: optim.NAdam(p, lr=4e-3))


@program("mlp/rent/lbfgs-huber", operator="LBFGS on all rows, losses of a closure", half="held-out")
def _(watch: Watch) -> nn.Module:
    x, y = rents()
    y = (y - 900) / 250
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
    opt = optim.LBFGS(net.parameters(), lr=0.5, max_iter=4, history_size=8)
    watch.attach(opt, net)

    def closure() -> Tensor:
        opt.zero_grad()
        out = net(x)
        loss = functional.smooth_l1_loss(out, y)
        watch.observe(inputs=x, outputs=out, targets=y, loss=loss)
        loss.backward()
        return loss

    for _ in range(40):
        opt.step(closure)
    return net


@program(
    "mlp/rent/euros-pinball",
    causes=("bad-targets", "lr-too-low"),
    operator="targets not scaled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The loss's slope is at most 1, whatever the error: 900 euros are far away."""
    return estimate(watch, RentNet(), pinball, lambda p: optim.NAdam(p, lr=4e-3), euros=True)


@program(
    "mlp/rent/squeezed-too-soon",
    causes=("loss-output-mismatch",),
    operator="outputs [N] against targets [N, 1]",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = nn.Sequential(RentNet(1), nn.Flatten(0))
    return estimate(watch, net, functional.l1_loss, lambda p: optim.AdamW(p, lr=4e-3))


@program(
    "mlp/rent/pinball-without-maximum",
    causes=("loss-output-mismatch", "diverging-loss", "exploding-gradient"),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Without the other branch the loss falls for ever as the estimates rise."""
    return estimate(
        watch,
        RentNet(),
        lambda predicted, target: (TAUS * (target - predicted)).mean(),
        lambda p: optim.NAdam(p, lr=4e-3),
    )


@program(
    "mlp/rent/rmsprop-lr-1e-6",
    causes=("lr-too-low",),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return estimate(watch, RentNet(), pinball, lambda p: optim.RMSprop(p, lr=1e-6))


@program(
    "mlp/rent/sentinel-minus-9999",
    causes=("bad-inputs",),
    operator="noise in training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """A value that is not known is written as -9999."""

    def spoil(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        unknown = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.1
        return x.masked_fill(unknown, -9999), y

    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 1))
    return estimate(
        watch, net, functional.mse_loss, lambda p: optim.SGD(p, lr=0.01, momentum=0.9), spoil=spoil
    )


@program(
    "mlp/rent/answers-missing",
    causes=("bad-targets", "nonfinite-loss", "nonfinite-gradient"),
    operator="NaN in targets",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    def spoil(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.where((torch.arange(len(y)) % 97 == 5).unsqueeze(1), torch.nan, y)

    return estimate(
        watch, RentNet(1), functional.mse_loss, lambda p: optim.AdamW(p, lr=4e-3), spoil=spoil
    )


# ---- ordered grades -----------------------------------------------------------------------------


def cumulative(grade: Tensor) -> Tensor:
    """Return whether each grade is above 0, above 1, and so on: ``[N, 5]``."""
    return (grade.unsqueeze(1) > torch.arange(5)).float()


class Tasting(nn.Module):
    def __init__(self, outputs: int, width: int = 48) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(11, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = functional.leaky_relu(layer(x), 0.1)
        return self.head(x)


def taste(
    watch: Watch,
    net: nn.Module,
    criterion: Criterion = functional.cross_entropy,
    *,
    code: Callable[[Tensor], Tensor] = lambda grade: grade,
    rows: int = 700,
    epochs: int = 15,
    decay: float = 1e-2,
    lr: float = 3e-3,
    penalty: float = 0.0,
) -> nn.Module:
    x, grade = grades()
    y = code(grade)
    opt = optim.AdamW(net.parameters(), lr=lr, weight_decay=decay)
    watch.attach(opt, net)
    for _ in range(epochs):
        net.train()
        for idx in torch.randperm(rows).split(28):
            logits = net(x[idx])
            loss = criterion(logits, y[idx])
            if penalty:
                loss = loss + penalty * sum(p.square().sum() for p in net.parameters())
            watch.observe(inputs=x[idx], outputs=logits, targets=y[idx], loss=loss)
            opt.zero_grad()
            loss.backward()
            opt.step()
        net.eval()
        with torch.no_grad():
            watch.observe(val_loss=criterion(net(x[700:]), y[700:]))
    return net


@program("mlp/oils/cumulative-adamw", operator="ordinal regression", half="held-out")
def _(watch: Watch) -> nn.Module:
    return taste(watch, Tasting(5), functional.binary_cross_entropy_with_logits, code=cumulative)


@program("mlp/oils/labels-in-part-noisy", operator="15 % of labels wrong", half="held-out")
def _(watch: Watch) -> nn.Module:
    """Some labels are anything; the others are learnt, and a good part of the loss stays."""

    def code(grade: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(6)
        wrong = torch.rand(len(grade), generator=generator) < 0.15
        return torch.where(wrong, torch.randint(6, (len(grade),), generator=generator), grade)

    return taste(watch, Tasting(6, 24), code=code, epochs=10)


@program(
    "mlp/oils/grade-into-one-logit",
    causes=("loss-output-mismatch", "bad-targets"),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return taste(
        watch,
        Tasting(1),
        functional.binary_cross_entropy_with_logits,
        code=lambda grade: grade.float().unsqueeze(1),
    )


@program(
    "mlp/oils/sheets-joined-wrongly",
    causes=("bad-targets",),
    operator="change labels",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Grades and measurements were sorted apart before they were joined."""
    order = torch.randperm(900, generator=torch.Generator().manual_seed(8))
    return taste(watch, Tasting(6, 24), code=lambda grade: grade[order], epochs=10)


@program(
    "mlp/oils/sixty-tasters",
    causes=("overfitting",),
    operator="delete training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return taste(watch, Tasting(6, 128), rows=60, epochs=120, decay=0.0)


@program(
    "mlp/oils/all-a-tenth",
    causes=("bad-initialization",),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """All units of a layer are the same and stay so."""
    net = Tasting(6)
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.1)
    return taste(watch, net)


@program(
    "mlp/oils/penalty-of-ten",
    causes=("underfitting", "constant-predictions"),
    operator="add weights regularisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """A penalty on the squares, added to the loss, leaves no weight to speak of."""
    return taste(watch, Tasting(6), penalty=10.0)
