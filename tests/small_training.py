"""A small model and everything around it that the tests of `attach` train with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradstat

Make = Callable[..., Optimizer]


def _maker(cls: type[Optimizer], **options: Any) -> Make:
    def make(parameters: Any, **more: Any) -> Optimizer:
        return cls(parameters, **{**options, **more})

    return make


OPTIMIZERS: dict[str, Make] = {
    f"{name}-{kind}": _maker(cls, **options, **dict.fromkeys(flags, True))
    for name, cls, options in (
        ("sgd", torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
        ("adam", torch.optim.Adam, {"lr": 0.01}),
        ("adamw", torch.optim.AdamW, {"lr": 0.01}),
    )
    for kind, flags in (("fused", ["fused"]), ("foreach", ["foreach"]), ("loop", []))
}
OPTIMIZERS |= {
    "adagrad-fused": _maker(torch.optim.Adagrad, lr=0.05, fused=True),
    "rmsprop": _maker(torch.optim.RMSprop, lr=0.005, momentum=0.9),
}


def make_model(seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def loss_of(model: nn.Module, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    inputs = torch.randn(8, 6, generator=generator)
    targets = torch.randint(0, 3, (8,), generator=generator)
    return scale * nn.functional.cross_entropy(model(inputs), targets)


def backward(model: nn.Module, seed: int = 0, scale: float = 1.0) -> Tensor:
    model.zero_grad()
    loss = loss_of(model, seed, scale)
    loss.backward()
    return loss


def train(
    model: nn.Module, optimizer: Optimizer, steps: int, start: int = 0, scale: float = 1.0
) -> None:
    for step in range(start, start + steps):
        backward(model, step, scale)
        optimizer.step()


def poison(model: nn.Module, value: float = float("nan")) -> None:
    """Put one bad element into the first parameter's gradient."""
    first = next(model.parameters())
    assert first.grad is not None
    first.grad.view(-1)[1] = value


def norm_of(tensors: Iterable[Tensor | None]) -> float:
    """The oracle: the L2 norm in float64."""
    flat = [t.detach().double().flatten() for t in tensors if t is not None]
    return float(torch.linalg.vector_norm(torch.cat(flat)))


def grad_norm(model: nn.Module) -> float:
    return norm_of(parameter.grad for parameter in model.parameters())


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def grads(model: nn.Module) -> list[Tensor | None]:
    found = (parameter.grad for parameter in model.parameters())
    return [None if grad is None else grad.clone() for grad in found]


def optimizer_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Every tensor of the state, step counters included, in the order of the parameters."""
    return [
        value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value)
        for group in optimizer.param_groups
        for parameter in group["params"]
        for _, value in sorted(optimizer.state.get(parameter, {}).items())
        if value is not None
    ]


def same_bits(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        (a is None and b is None) or (a is not None and b is not None and _equal(a, b))
        for a, b in zip(first, second, strict=True)
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.nan_to_num(7.0, 8.0, 9.0), b.nan_to_num(7.0, 8.0, 9.0)
    )


def hook_counts(optimizer: Optimizer) -> list[int]:
    return [
        len(getattr(optimizer, f"_optimizer_{name}_hooks"))
        for name in (
            "step_pre",
            "step_post",
            "state_dict_pre",
            "state_dict_post",
            "load_state_dict_pre",
            "load_state_dict_post",
        )
    ]


def monitor_of(optimizer: Optimizer) -> gradstat.Monitor:
    monitor = optimizer.gradstat  # type: ignore[attr-defined]
    assert isinstance(monitor, gradstat.Monitor)
    return monitor


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def parameter_with(grad: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros_like(grad))
    parameter.grad = grad
    return parameter


class Failing(torch.optim.SGD):
    """Raises in its step while `fails`; calls ``super().step`` otherwise."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise RuntimeError("out of luck")
        return super().step(closure)


def logged(path: Any, steps: int, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """Train with a log to its end."""
    model = model or make_model()
    optimizer = gradstat.attach(sgd(model), model, log=path, **options)
    train(model, optimizer, steps)
    gradstat.detach(optimizer)
    return model
