"""Small models with activations of every make, and what a watched run of one is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import gradstat


def seen(model: nn.Module, *inputs: Tensor, **options: object) -> gradstat.ActivationTable:
    with gradstat.ActivationMonitor(model, every=1, **options) as monitor:  # type: ignore[arg-type]
        model(*inputs)
    return monitor.table()


class Calls(nn.Module):
    """Calls one function."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator,no-any-return]


class Block(nn.Module):
    """Calls a module twice, a function twice, a method and an in-place function."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(width, 8)
        self.act = nn.GELU()
        self.second = nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self.act(self.first(x)))
        hidden = functional.relu(hidden) + functional.relu(hidden - 1.0)
        out: Tensor = self.second(hidden).tanh()
        return torch.relu_(out + x)


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(inplace=True),
        Block(),
        nn.Dropout(0.3),
        nn.Linear(6, 3),
        nn.Softmax(-1),
    )


SITES = (
    "2/relu#0",
    "3.act/gelu#0",
    "3.act/gelu#1",
    "3/relu#0",
    "3/relu#1",
    "3/tanh#0",
    "3/relu#2",
    "6/softmax#0",
)


def batch(seed: int, n: int = 10) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(100 + seed))


def outputs_of(
    model: nn.Module, inputs: Tensor, kinds: tuple[type[nn.Module], ...]
) -> dict[str, Tensor]:
    """The oracle: outputs of activation modules, in order, as plain forward hooks see them."""
    found: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda _m, _i, out, name=name: found.update({name: out.detach().clone()})
        )
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    model(inputs)
    for handle in handles:
        handle.remove()
    return found


def hook_state(model: nn.Module) -> list[Any]:
    """Everything that watching could leave on a model's modules."""
    return [
        (name, key, value if not isinstance(value, dict) else list(value.items()))
        for name, module in model.named_modules()
        for key, value in sorted(vars(module).items())
        if "hook" in key or key in ("_compiled_call_impl", "forward", "training")
    ]


def replicate(model: nn.Module) -> nn.Module:
    """Return a replica as torch.nn.parallel.replicate makes it, on the same device."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in copies.items():
        replica._former_parameters = {}
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else copies[child]
        for name, parameter in module._parameters.items():
            if parameter is not None:
                replica._former_parameters[name] = torch.clone(parameter)
                setattr(replica, name, replica._former_parameters[name])
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer
    return copies[model]


def samples(monitor: gradstat.ActivationMonitor) -> dict[str, int]:
    return {row.name: row.samples for row in monitor.table()}


def mode_stack() -> int:
    return int(torch._C._len_torch_function_stack())


def train(
    model: nn.Module,
    steps: int,
    call: Callable[[Tensor], Tensor] | None = None,
    after: Callable[[torch.optim.Optimizer], object] | None = None,
) -> list[Tensor]:
    """Train and return the weights and buffers, and the state of the random numbers."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if after is not None:
        after(optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        (call or model)(batch(step)).square().sum().backward()
        optimizer.step()
    return [*(t.detach().clone() for t in model.state_dict().values()), torch.get_rng_state()]
