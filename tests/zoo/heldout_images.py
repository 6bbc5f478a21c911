"""Held out: convolutional classifiers of handwritten digits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from zoo.data import digits_raw
from zoo.program import Watch, program


class Net(nn.Module):
    """The usual tutorial's network."""

    def __init__(
        self,
        *,
        batch_norm: bool = True,
        act: Callable[[Tensor], Tensor] = F.relu,
        last: Callable[[Tensor], Tensor] = lambda x: x,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.norm0 = nn.BatchNorm2d(1) if batch_norm else nn.Identity()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 24, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(24) if batch_norm else nn.Identity()
        self.fc1 = nn.Linear(24 * 4 * 4, 48)
        self.fc2 = nn.Linear(48, classes)
        self.act, self.last = act, last

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv1(self.norm0(x)))
        x = F.max_pool2d(self.act(self.norm2(self.conv2(x))), 2)
        x = self.act(self.fc1(torch.flatten(x, 1)))
        return self.last(self.fc2(x))


def images(scale: float = 1.0, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return digits as ``[N, 1, 8, 8]``, from 0 to 16 unless scaled, and their labels."""
    raw = digits_raw()
    x, val_x = (part.reshape(-1, 1, 8, 8) * scale - shift for part in (raw.x, raw.val_x))
    return x, raw.y, val_x, raw.val_y


def train_net(
    watch: Watch,
    net: nn.Module,
    data: tuple[Tensor, Tensor, Tensor, Tensor],
    optimizer: Optimizer,
    *,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    epochs: int = 5,
    batch_size: int = 64,
    order: Callable[[int], Tensor] = torch.randperm,
    one_cycle: float | None = None,
    clear: bool = True,
) -> nn.Module:
    x, y, val_x, val_y = data
    watch.attach(optimizer, net)
    steps = epochs * -(-len(x) // batch_size)
    scheduler = (
        torch.optim.lr_scheduler.OneCycleLR(optimizer, one_cycle, total_steps=steps)
        if one_cycle
        else None
    )
    for _ in range(epochs):
        net.train()
        for index in order(len(x)).split(batch_size):
            if clear:
                optimizer.zero_grad()
            output = net(x[index])
            loss = criterion(output, y[index])
            watch.observe(inputs=x[index], outputs=output, targets=y[index], loss=loss)
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
        net.eval()
        with torch.no_grad():
            watch.observe(val_loss=criterion(net(val_x), val_y))
    return net


# ---- healthy ------------------------------------------------------------------------------------


@program("cnn/mnist/raw-pixels-batch-norm", operator="unscaled inputs, normed", half="held-out")
def _(watch: Watch) -> nn.Module:
    """The first layer is a batch norm, which makes pixels from 0 to 255 harmless."""
    net = Net()
    return train_net(watch, net, images(16.0), Adam(net.parameters(), lr=2e-3))


@program("cnn/mnist/one-cycle", operator="learning rate warms up and decays", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = Net()
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return train_net(watch, net, images(1 / 16), optimizer, one_cycle=0.15)


@program("cnn/mnist/squares-of-one-hot", operator="mean squared error, one-hot", half="held-out")
def _(watch: Watch) -> nn.Module:
    x, y, val_x, val_y = images(1 / 16)
    data = x, F.one_hot(y, 10).float(), val_x, F.one_hot(val_y, 10).float()
    net = Net(batch_norm=False)
    return train_net(watch, net, data, Adam(net.parameters(), lr=1e-3), criterion=nn.MSELoss())


@program("cnn/mnist/pretrained-fine-tuning", operator="small learning rate", half="held-out")
def _(watch: Watch) -> nn.Module:
    """Trained already, then tuned on digits turned by 90 degrees: body slow, new head quick."""
    net = Net()
    x, y, val_x, val_y = images(1 / 16)
    warm = Adam(net.parameters(), lr=2e-3)
    for index in torch.randperm(len(x)).repeat(3).split(64):
        warm.zero_grad()
        F.cross_entropy(net(x[index]), y[index]).backward()
        warm.step()
    net.fc2 = nn.Linear(48, 10)
    body = [p for name, p in net.named_parameters() if not name.startswith("fc2")]
    optimizer = torch.optim.AdamW(
        [{"params": body, "lr": 2e-5}, {"params": net.fc2.parameters(), "lr": 5e-3}]
    )
    data = x.rot90(1, (2, 3)), y, val_x.rot90(1, (2, 3)), val_y
    return train_net(watch, net, data, optimizer)


@program("cnn/mnist/is-it-a-seven", operator="90:10 imbalance that is learnt", half="held-out")
def _(watch: Watch) -> nn.Module:
    x, y, val_x, val_y = images(1 / 16)
    net = Net(classes=2)
    weight = torch.tensor([1.0, 4.0])
    data = x, (y == 7).long(), val_x, (val_y == 7).long()
    return train_net(
        watch,
        net,
        data,
        Adam(net.parameters(), lr=1e-3),
        criterion=lambda output, target: F.cross_entropy(output, target, weight),
    )


# ---- faulty -------------------------------------------------------------------------------------


@program(
    "cnn/mnist/adam-lr-0.5",
    causes=("lr-too-high", "dead-units", "exploding-gradient"),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Net(batch_norm=False)
    return train_net(watch, net, images(1 / 16), Adam(net.parameters(), lr=0.5))


@program(
    "cnn/mnist/loss-made-anew",
    causes=("parameters-not-updating",),
    operator="graph cut at the loss",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Net()

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        return torch.tensor(F.cross_entropy(output, target).item(), requires_grad=True)

    return train_net(
        watch, net, images(1 / 16), Adam(net.parameters(), lr=1e-3), criterion=criterion
    )


@program(
    "cnn/mnist/optimizer-before-deepcopy",
    causes=("parameters-not-updating",),
    operator="optimizer of another model",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    best = Net()
    optimizer = SGD(best.parameters(), lr=0.05, momentum=0.9)
    return train_net(watch, copy.deepcopy(best), images(1 / 16), optimizer)


@program(
    "cnn/mnist/only-inputs-shuffled",
    causes=("bad-targets",),
    operator="change labels",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    x, y, val_x, val_y = images(1 / 16)
    net = Net()
    data = x[torch.randperm(len(x))], y, val_x, val_y
    return train_net(watch, net, data, Adam(net.parameters(), lr=1e-3), epochs=10)


@program(
    "cnn/mnist/mean-of-mnist-off-raw-pixels",
    causes=("bad-inputs",),
    operator="inputs not scaled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Net(batch_norm=False)
    data = images(16 / 0.3081, 0.1307 / 0.3081)
    return train_net(watch, net, data, SGD(net.parameters(), lr=0.05, momentum=0.9))


@program(
    "cnn/mnist/softmax-in-forward",
    causes=("loss-output-mismatch",),
    operator="add activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Net(last=lambda x: F.softmax(x, dim=1), batch_norm=False)
    return train_net(watch, net, images(1 / 16), SGD(net.parameters(), lr=0.05, momentum=0.9))


@program(
    "cnn/mnist/relu-on-the-logits",
    causes=("loss-output-mismatch", "dead-units", "constant-predictions"),
    operator="add activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Net(last=F.relu, batch_norm=False)
    return train_net(watch, net, images(1 / 16), Adam(net.parameters(), lr=0.01))


@program(
    "cnn/mnist/two-of-each",
    causes=("overfitting",),
    operator="delete training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    x, y, val_x, val_y = images(1 / 16)
    few = torch.cat([(y == digit).nonzero()[:2, 0] for digit in range(10)])
    net = Net(batch_norm=False)
    data = x[few] + 0.2 * torch.randn(len(few), 1, 8, 8), y[few], val_x, val_y
    return train_net(watch, net, data, Adam(net.parameters(), lr=2e-3), epochs=120, batch_size=20)


@program(
    "cnn/mnist/folder-by-folder",
    causes=("bad-inputs", "oscillating-loss", "bad-targets"),
    operator="training data not shuffled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    x, y, val_x, val_y = images(1 / 16)
    by_class = y.argsort(stable=True)
    net = Net(batch_norm=False)
    data = x[by_class], y[by_class], val_x, val_y
    optimizer = SGD(net.parameters(), lr=0.05, momentum=0.9)
    return train_net(watch, net, data, optimizer, order=torch.arange)


@program(
    "cnn/mnist/normal-weights",
    causes=("bad-initialization", "exploding-gradient"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Net(batch_norm=False)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return train_net(watch, net, images(1 / 16), SGD(net.parameters(), lr=1e-3), epochs=4)


@program(
    "cnn/mnist/hidden-bias-minus-6",
    causes=("dead-units", "bad-initialization"),
    operator="change bias initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Net(batch_norm=False)
    with torch.no_grad():
        net.fc1.bias.fill_(-6.0)
    return train_net(watch, net, images(1 / 16), SGD(net.parameters(), lr=0.05, momentum=0.9))


@program(
    "cnn/mnist/never-zeroed",
    causes=("gradient-accumulation",),
    operator="missing zero_grad",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Net(batch_norm=False)
    optimizer = SGD(net.parameters(), lr=0.1)
    return train_net(watch, net, images(1 / 16), optimizer, clear=False, epochs=10)
