"""What a model's parameters are called, the same with and without what is put around the model."""

from __future__ import annotations

from torch import nn

_COMPILED = "_orig_mod."


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of `torch.compile` and data parallelism, in whatever order."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inside = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
    return unwrapped(inside) if isinstance(inside, nn.Module) else model


def plain_name(name: str) -> str:
    """Return the name that a parameter or module has where no part of the model is compiled."""
    return name.replace(_COMPILED, "")


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters with the names that they have in the plain model."""
    return [(plain_name(name), p) for name, p in unwrapped(model).named_parameters()]
