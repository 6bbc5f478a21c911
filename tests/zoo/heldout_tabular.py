"""Held out: multilayer perceptrons on tables and on points in the plane."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.heldout_data import customers, prices, standard
from zoo.program import Watch, program


class ChurnNet(nn.Module):
    def __init__(self, *, normalise: bool = True) -> None:
        super().__init__()
        self.plan = nn.Embedding(12, 4)
        self.region = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(5) if normalise else nn.Identity()
        self.fc1 = nn.Linear(12, 48)
        self.fc2 = nn.Linear(48, 24)
        self.out = nn.Linear(24, 1)
        self.drop = nn.Dropout(0.1)

    def forward(self, kinds: Tensor, numbers: Tensor) -> Tensor:
        x = torch.cat([self.plan(kinds[:, 0]), self.region(kinds[:, 1]), self.norm(numbers)], 1)
        x = self.drop(functional.relu(self.fc1(x)))
        x = self.drop(functional.relu(self.fc2(x)))
        return self.out(x)


def churn(
    watch: Watch,
    *,
    normalise: bool = True,
    numeric: Callable[[Tensor], Tensor] = lambda x: x,
    label: Callable[[Tensor], Tensor] = lambda y: y,
    criterion: Callable[[Tensor, Tensor], Tensor] = functional.binary_cross_entropy_with_logits,
    keep: float = 1.0,
) -> nn.Module:
    kinds, numbers, left = customers()
    if keep < 1:  # a later year, when hardly anyone left
        chosen = (left == 0) | (torch.arange(2000) % 100 < 100 * keep)
        kinds, numbers, left = kinds[chosen], numbers[chosen], left[chosen]
    numbers, left = numeric(numbers), label(left)
    n_train = int(0.8 * len(left))
    net = ChurnNet(normalise=normalise)
    opt = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    watch.attach(opt, net)
    for _ in range(8):
        net.train()
        for idx in torch.randperm(n_train).split(64):
            opt.zero_grad()
            logit = net(kinds[idx], numbers[idx])
            target = left[idx].unsqueeze(1)
            loss = criterion(logit, target)
            watch.observe(inputs=numbers[idx], outputs=logit, targets=target, loss=loss)
            loss.backward()
            opt.step()
        net.eval()
        with torch.no_grad():
            logit = net(kinds[n_train:], numbers[n_train:])
            watch.observe(val_loss=criterion(logit, left[n_train:].unsqueeze(1)))
    return net


@program("mlp/churn/adamw-noisy", operator="labels told only in part", half="held-out")
def _(watch: Watch) -> nn.Module:
    """The columns do not tell who leaves, so the loss ends far from zero: nothing is wrong."""
    return churn(watch)


@program(
    "mlp/churn/labels-of-plus-minus-one",
    causes=("loss-output-mismatch", "bad-targets"),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return churn(watch, label=lambda y: 2 * y - 1)


@program(
    "mlp/churn/customer-since",
    causes=("bad-inputs",),
    operator="a column of seconds since 1970",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    def numeric(x: Tensor) -> Tensor:
        return torch.cat([x[:, :4], 1.6e9 + 3e7 * x[:, 4:]], 1)

    return churn(watch, normalise=False, numeric=numeric)


@program(
    "mlp/churn/log-of-income",
    causes=("bad-inputs", "nonfinite-loss"),
    operator="logarithm of a negative feature",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return churn(watch, numeric=lambda x: torch.cat([x[:, :4], (x[:, 4:] + 2.2).log()], 1))


@program(
    "mlp/churn/hardly-anyone-leaves",
    causes=("class-imbalance", "constant-predictions"),
    operator="unbalance training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return churn(watch, keep=0.04)


@program(
    "mlp/churn/cross-entropy-of-one-logit",
    causes=("loss-output-mismatch", "zero-loss"),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return churn(watch, criterion=nn.CrossEntropyLoss())


def house_prices(
    watch: Watch,
    *,
    unit: str = "standard",
    opt: Callable[..., torch.optim.Optimizer] = torch.optim.NAdam,
    lr: float = 3e-3,
    criterion: nn.Module | None = None,
    last: nn.Module | None = None,
    flat: bool = False,
    epochs: int = 20,
    first_layer: Callable[[Tensor], object] | None = None,
) -> nn.Module:
    X, y = prices()  # noqa: N806
    if unit == "standard":
        y = standard(y)
    if flat:
        y = y.squeeze(1)
    model = nn.Sequential(nn.Linear(10, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU())
    model.append(nn.Linear(64, 1))
    if last is not None:
        model.append(last)
    if first_layer is not None:
        with torch.no_grad():
            for layer in model[::2]:
                first_layer(layer.weight)
    criterion = criterion or nn.SmoothL1Loss()
    optimizer = opt(model.parameters(), lr=lr)
    watch.attach(optimizer, model)
    for _ in range(epochs):
        for batch in torch.randperm(640).split(40):
            pred = model(X[batch])
            loss = criterion(pred, y[batch])
            watch.observe(outputs=pred, targets=y[batch], loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            watch.observe(val_loss=criterion(model(X[640:]), y[640:]).item())
    return model


@program("mlp/prices/nadam-huber", operator="none", half="held-out")
def _(watch: Watch) -> nn.Module:
    return house_prices(watch)


@program("mlp/prices/rmsprop-sum", operator="loss summed over the batch", half="held-out")
def _(watch: Watch) -> nn.Module:
    return house_prices(
        watch, opt=torch.optim.RMSprop, lr=1e-3, criterion=nn.MSELoss(reduction="sum")
    )


@program(
    "mlp/prices/dollars-sgd",
    causes=("bad-targets", "lr-too-high", "exploding-gradient"),
    operator="targets not scaled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return house_prices(watch, unit="dollar", opt=torch.optim.SGD, lr=0.01, criterion=nn.MSELoss())


@program(
    "mlp/prices/dollars-adam",
    causes=("bad-targets", "lr-too-low"),
    operator="targets not scaled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return house_prices(watch, unit="dollar", opt=torch.optim.Adam, lr=1e-3, criterion=nn.L1Loss())


@program(
    "mlp/prices/flat-targets",
    causes=("loss-output-mismatch",),
    operator="targets [N] against outputs [N, 1]",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return house_prices(watch, flat=True)


@program(
    "mlp/prices/price-cannot-be-negative",
    causes=("loss-output-mismatch",),
    operator="add activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return house_prices(watch, last=nn.Softplus(beta=5))


@program(
    "mlp/prices/adagrad-lr-1e-5",
    causes=("lr-too-low",),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return house_prices(watch, opt=torch.optim.Adagrad, lr=1e-5)


@program(
    "mlp/prices/weights-all-a-half",
    causes=("bad-initialization",),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return house_prices(watch, first_layer=lambda w: w.fill_(0.5), lr=1e-3)


@program(
    "mlp/prices/rmsprop-lr-3",
    causes=("lr-too-high", "oscillating-loss", "diverging-loss"),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return house_prices(watch, opt=torch.optim.RMSprop, lr=3.0)
