"""Held out: classifiers of points in the plane, trained on all of them at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from zoo.heldout_data import spirals
from zoo.program import Watch, program


def spiral_net(
    watch: Watch,
    *,
    hidden: int = 64,
    layers: int = 2,
    act: type[nn.Module] = nn.ReLU,
    make: Callable[..., Optimizer] = torch.optim.Adam,
    lr: float = 1e-2,
    init: Callable[[nn.Linear], object] | None = None,
    clear: bool = True,
    gamma: float = 1.0,
    steps: int = 250,
) -> nn.Module:
    x, y = spirals()
    order = torch.randperm(450)
    train, val = order[:360], order[360:]
    blocks: list[nn.Module] = [nn.Linear(2, hidden), act()]
    for _ in range(layers - 1):
        blocks += [nn.Linear(hidden, hidden), act()]
    model = nn.Sequential(*blocks, nn.Linear(hidden, 3))
    if init is not None:
        with torch.no_grad():
            for module in model:
                if isinstance(module, nn.Linear):
                    init(module)
    optimizer = make(model.parameters(), lr=lr)
    watch.attach(optimizer, model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=gamma)
    criterion = nn.CrossEntropyLoss()
    for step in range(steps):
        if clear:
            optimizer.zero_grad()
        scores = model(x[train])
        loss = criterion(scores, y[train])
        watch.observe(inputs=x[train])
        watch.observe(outputs=scores, targets=y[train], loss=loss)
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % 25 == 24:
            with torch.no_grad():
                watch.observe(val_loss=criterion(model(x[val]), y[val]))
    return model


def momentum(parameters, lr: float) -> Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True)


@program("mlp/spirals/adam", operator="none", half="held-out")
def _(watch: Watch) -> nn.Module:
    return spiral_net(watch)


@program("mlp/spirals/nesterov-bold", operator="edge of stability", half="held-out")
def _(watch: Watch) -> nn.Module:
    """The loss spikes now and then and comes back lower."""
    return spiral_net(watch, make=momentum, lr=0.3, steps=400)


@program("mlp/spirals/rmsprop-decayed", operator="learning rate decays", half="held-out")
def _(watch: Watch) -> nn.Module:
    return spiral_net(watch, make=torch.optim.RMSprop, lr=5e-3, gamma=0.99, act=nn.Tanh)


@program(
    "mlp/spirals/linear",
    causes=("underfitting", "flat-loss"),
    operator="remove activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return spiral_net(watch, act=nn.Identity)


@program(
    "mlp/spirals/ten-sigmoids",
    causes=("vanishing-gradient",),
    operator="change activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return spiral_net(watch, act=nn.Sigmoid, layers=10, make=momentum, lr=0.05)


@program(
    "mlp/spirals/weights-of-deviation-one",
    causes=("bad-initialization", "exploding-gradient"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return spiral_net(
        watch,
        hidden=128,
        layers=4,
        init=lambda m: m.weight.normal_(),
        make=torch.optim.SGD,
        lr=0.1,
    )


@program(
    "mlp/spirals/bias-minus-four",
    causes=("dead-units", "bad-initialization"),
    operator="change bias initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return spiral_net(watch, init=lambda m: m.bias.fill_(-4.0) if m.out_features > 3 else None)


@program(
    "mlp/spirals/nesterov-lr-20",
    causes=("lr-too-high", "diverging-loss", "exploding-gradient"),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return spiral_net(watch, make=momentum, lr=20.0)


@program(
    "mlp/spirals/decay-each-batch",
    causes=("lr-too-low", "parameters-not-updating"),
    operator="scheduler stepped per batch",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return spiral_net(watch, gamma=0.1)


@program(
    "mlp/spirals/gradients-pile-up",
    causes=("gradient-accumulation",),
    operator="missing zero_grad",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return spiral_net(watch, make=torch.optim.SGD, lr=0.5, clear=False)


@program(
    "mlp/spirals/steep-steps",
    causes=("saturated-activation", "vanishing-gradient"),
    operator="change activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    class Step(nn.Module):
        def forward(self, x):
            return torch.sigmoid(80 * x)

    return spiral_net(watch, act=Step, layers=3, make=torch.optim.SGD, lr=0.1)


def xor(
    watch: Watch, *, deviation: float = 0.5, make: Callable[..., Optimizer] = torch.optim.Adam
) -> nn.Module:
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    y = torch.tensor([[0.0], [1], [1], [0]])
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid())
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=deviation)
    opt = make(net.parameters(), lr=0.05)
    watch.attach(opt, net)
    for _ in range(600):
        out = net(x)
        loss = nn.functional.mse_loss(out, y)
        watch.observe(inputs=x, outputs=out, targets=y, loss=loss)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return net


@program("mlp/xor/adam", operator="four rows, loss near zero", half="held-out")
def _(watch: Watch) -> nn.Module:
    return xor(watch)


@program(
    "mlp/xor/near-the-saddle",
    causes=("plateau", "bad-initialization", "flat-loss"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return xor(watch, deviation=0.02, make=torch.optim.SGD)


@program(
    "mlp/xor/all-zero",
    causes=("bad-initialization", "plateau"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return xor(watch, deviation=0.0)
