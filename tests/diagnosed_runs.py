"""Small runs that are watched and diagnosed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat

import torch
from torch import Tensor, nn

import gradstat
from gradstat.diagnosis import Finding

LossFunction = Callable[[Tensor, Tensor], Tensor]
ROWS = 512


def net(n_in: int = 8, n_out: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, 24), nn.Tanh(), nn.Linear(24, n_out))


def classes(n: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, 8)
    return x, (x @ torch.randn(8, n)).argmax(1)


def numbers(n: int = 1) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, 8)
    return x, torch.tanh(x @ torch.randn(8, n))


class Reader(nn.Module):
    """Reads sequences of (N, T, 1) and answers after the last step."""

    def __init__(self, kind: type[nn.RNNBase] = nn.RNN, units: int = 12) -> None:
        super().__init__()
        self.reader, self.head = kind(1, units, batch_first=True), nn.Linear(units, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.reader(x)[0][:, -1])
        return result


def signs(length: int, at: int) -> tuple[Tensor, Tensor]:
    """Sequences of numbers, and whether the one at a place is positive."""
    x = torch.randn(ROWS, length, 1)
    return x, (x[:, at, 0] > 0).long()


def binary() -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, 8)
    return x, (x @ torch.randn(8, 1) > 0).float()


def fit(
    model: nn.Module,
    loss_fn: LossFunction,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    steps: int = 150,
    each: int = 1,
) -> gradstat.Monitor:
    """Train on the batches of a function, with a step of the optimizer after ``each``."""
    attached = gradstat.attach(torch.optim.Adam(model.parameters(), 0.01), model, diagnose=None)
    monitor: gradstat.Monitor = attached.gradstat  # type: ignore[attr-defined]
    for step in range(steps):
        x, y = batch(step)
        outputs = model(x)
        loss = loss_fn(outputs, y)
        monitor.observe(inputs=x, outputs=outputs, targets=y, loss=loss)
        loss.backward()
        if step % each == each - 1:
            attached.step()
            attached.zero_grad()
    monitor._kept_alive = attached  # type: ignore[attr-defined]
    return monitor


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    loss_fn: LossFunction,
    *,
    steps: int = 120,
    optimizer: torch.optim.Optimizer | None = None,
    val: tuple[Tensor, Tensor] | None = None,
    schedule: Callable[[int], float] | None = None,
    distort: Callable[[Tensor], Tensor] = lambda x: x,
    see: tuple[str, ...] = ("inputs", "outputs", "targets", "loss"),
) -> gradstat.Monitor:
    """Train with batches of 32 and observe; validate every 12th step where there is a set."""
    chosen = optimizer or torch.optim.Adam(model.parameters(), 0.01)
    attached = gradstat.attach(chosen, model, diagnose=None)
    monitor: gradstat.Monitor = attached.gradstat  # type: ignore[attr-defined]
    base = [group["lr"] for group in chosen.param_groups]
    x, y = data
    for step in range(steps):
        if schedule is not None:
            for group, lr in zip(chosen.param_groups, base, strict=True):
                group["lr"] = lr * schedule(step)
        rows = torch.randint(len(x), (32,))
        inputs = distort(x[rows])
        outputs = model(inputs)
        loss = loss_fn(outputs, y[rows])
        seen = {"inputs": inputs, "outputs": outputs, "targets": y[rows], "loss": loss}
        monitor.observe(**{name: value for name, value in seen.items() if name in see})
        chosen.zero_grad()
        loss.backward()
        chosen.step()
        if val is not None and step % 12 == 11:
            model.eval()
            with torch.no_grad():
                monitor.observe(val_loss=loss_fn(model(val[0]), val[1]))
            model.train()
    monitor._kept_alive = attached  # type: ignore[attr-defined]
    return monitor


def told(
    losses: Iterable[float], val_losses: Iterable[float] = (), lrs: Iterable[float] = repeat(0.01)
) -> gradstat.Monitor:
    """A run that says these losses and then these of validation, whatever it trains."""
    model = nn.Linear(8, 1)
    sgd = torch.optim.SGD(model.parameters())
    monitor: gradstat.Monitor = gradstat.attach(sgd, model).gradstat  # type: ignore[attr-defined]
    for loss, lr in zip(losses, lrs, strict=False):
        sgd.param_groups[0]["lr"] = lr
        monitor.observe(loss=loss)
        model(torch.randn(4, 8)).mean().backward()
        sgd.step()
        sgd.zero_grad()
    for val_loss in val_losses:
        monitor.observe(val_loss=val_loss)
    monitor._kept_alive = sgd  # type: ignore[attr-defined]
    return monitor


def raised(monitor: gradstat.Monitor) -> list[str]:
    return [f.code for f in monitor.diagnose() if f.severity != "info"]


def named(monitor: gradstat.Monitor, code: str) -> list[Finding]:
    return [f for f in monitor.diagnose() if f.code == code and f.severity != "info"]
