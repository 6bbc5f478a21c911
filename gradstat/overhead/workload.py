"""A training step made of words: a model's factory, the shape of a batch, an optimizer, a loss."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from gradstat._batch_sample import first_tensor
from gradstat.errors import ArgumentTypeError, ArgumentValueError
from gradstat.overhead import models

_BATCH_HELP = (
    "use for example 32x3x224x224, 8x1024:bf16, or 8x128:int50257 for whole numbers below 50257; a "
    "comma stands between several inputs"
)
_DTYPES = {
    "fp32": torch.float32,
    "fp64": torch.float64,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
_OPTIMIZERS: dict[str, type[Optimizer]] = {
    name.lower(): value
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
}


@dataclass(frozen=True)
class BuiltIn:
    """A model of ours with what it is trained on."""

    factory: Callable[[], nn.Module]
    batch: str
    loss: str


BUILT_IN = {
    "mlp": BuiltIn(models.many_layers, "64x32", "square"),
    "cnn": BuiltIn(models.small_cnn, "32x3x32x32", "cross-entropy"),
    "gpt": BuiltIn(partial(models.GPT, width=192, depth=4), "4x64:int256", "cross-entropy"),
}


@dataclass(frozen=True)
class Workload:
    """What `measure_overhead` is given."""

    model: nn.Module
    optimizer: Optimizer
    step: Callable[[], Tensor]


def make_workload(
    *,
    model: str,
    batch: str | None = None,
    loss: str | None = None,
    optimizer: str = "adamw",
    lr: float = 1e-4,
    fused: bool = False,
    device: str = "cpu",
) -> Workload:
    """Return a model with its optimizer and a step on one fixed batch of random numbers.

    Args:
        model: ``package.module:factory``, a function or class that is called without arguments, or
            one of `BUILT_IN`.
        batch: Sizes with x between, and ``:bf16`` or the like or ``:int1000`` behind them.
        loss: ``"cross-entropy"`` and ``"mse"`` against random targets, ``"square"`` for the mean
            square of the outputs, ``"output"`` where the model returns the loss, or
            ``package.module:function`` of the outputs.
        optimizer: A class of `torch.optim` in lower case.
        lr: Its learning rate.
        fused: Ask for the fused one.
        device: Where all of it lies.

    Raises:
        ArgumentTypeError: The factory gives no module, or the loss no tensor.
        ArgumentValueError: A word does not say what it should, or a step fails.
    """
    own = BUILT_IN.get(model)
    if own is None and batch is None:
        raise ArgumentValueError(f"--batch must be given with --model {model}; {_BATCH_HELP}")
    batch = batch or (own.batch if own is not None else "")
    torch.manual_seed(0)
    module = own.factory() if own is not None else load_model(model)
    try:
        place = torch.device(device)
        module.to(place)
        inputs = [made.to(place) for made in make_batch(batch)]
    except (RuntimeError, AssertionError) as error:  # torch's word for no CUDA is an assertion
        raise ArgumentValueError(
            f"--device must be one that torch can use, got {device!r}: {_first_line(error)}"
        ) from error
    stepper = make_optimizer(optimizer, module, lr=lr, fused=fused)
    loss_of = make_loss(loss or (own.loss if own is not None else "square"))

    def step() -> Tensor:
        stepper.zero_grad()
        value = loss_of(module(*inputs))
        torch.autograd.backward(value)
        stepper.step()
        return value.detach()

    try:
        step()
    except Exception as error:
        raise ArgumentValueError(
            f"--model must train on a batch of {batch}, got {type(error).__name__}: "
            f"{_first_line(error)}; see --batch and --loss"
        ) from error
    return Workload(module, stepper, step)


def load_model(text: str) -> nn.Module:
    """Return what a factory makes.

    Raises:
        ArgumentTypeError: It is no module.
        ArgumentValueError: There is no such factory, or it raises.
    """
    factory = _load(text, "--model", f"or one of {', '.join(BUILT_IN)}")
    try:
        model = factory()
    except Exception as error:
        raise ArgumentValueError(
            f"--model must name a factory without arguments, got {type(error).__name__} from "
            f"{text}(): {_first_line(error)}; write one that needs none"
        ) from error
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"--model must name a factory of a torch.nn.Module, got {type(model).__name__} from "
            f"{text}()"
        )
    return model


def make_batch(text: str) -> list[Tensor]:
    """Return random inputs: normal ones, or whole numbers below the one given.

    Raises:
        ArgumentValueError: The text cannot be read.
    """
    return [_make_input(part) for part in text.split(",")]


def _make_input(text: str) -> Tensor:
    match = re.fullmatch(r"([1-9]\d*(?:x[1-9]\d*)*)(?::(\w+))?", text.strip().lower())
    kind = match[2] or "fp32" if match else ""
    whole = re.fullmatch(r"int([1-9]\d*)", kind)
    if match is None or not (whole or kind in _DTYPES):
        raise ArgumentValueError(f"--batch must be sizes, got {text!r}; {_BATCH_HELP}")
    shape = [int(size) for size in match[1].split("x")]
    if whole:
        return torch.randint(int(whole[1]), shape)
    return torch.randn(shape).to(_DTYPES[kind])


def make_optimizer(name: str, model: nn.Module, *, lr: float, fused: bool) -> Optimizer:
    """Return an optimizer of all parameters of a model.

    Raises:
        ArgumentValueError: There is none of that name, or it refuses.
    """
    if name.lower() not in _OPTIMIZERS:
        known = ", ".join(sorted(_OPTIMIZERS))
        raise ArgumentValueError(f"--optimizer must be one of {known}; got {name!r}")
    make: Any = _OPTIMIZERS[name.lower()]
    try:
        made: Optimizer = make(model.parameters(), lr=lr, **({"fused": True} if fused else {}))
    except Exception as error:
        raise ArgumentValueError(
            f"--optimizer {name} must take the model's parameters, got {type(error).__name__}: "
            f"{_first_line(error)}"
        ) from error
    return made


def make_loss(text: str) -> Callable[[Any], Tensor]:
    """Return a function from a model's outputs to the loss.

    Raises:
        ArgumentValueError: There is no such loss.
    """
    losses: dict[str, Callable[[Any], Tensor]] = {
        "square": lambda outputs: _floats(outputs).square().mean(),
        "cross-entropy": _cross_entropy(),
        "mse": _mse(),
        "output": lambda outputs: getattr(outputs, "loss", outputs),
    }
    if text in losses:
        return losses[text]
    loss: Callable[[Any], Tensor] = _load(text, "--loss", f"or one of {', '.join(losses)}")
    return loss


def _cross_entropy() -> Callable[[Any], Tensor]:
    targets: list[Tensor] = []

    def loss(outputs: Any) -> Tensor:
        logits = _floats(outputs)
        logits = logits.flatten(0, -2) if logits.dim() != 4 else logits
        if not targets:
            shape = (logits.shape[0], *logits.shape[2:])
            targets.append(torch.randint(logits.shape[1], shape, device=logits.device))
        return functional.cross_entropy(logits, targets[0])

    return loss


def _mse() -> Callable[[Any], Tensor]:
    targets: list[Tensor] = []

    def loss(outputs: Any) -> Tensor:
        values = _floats(outputs)
        if not targets:
            targets.append(torch.randn_like(values))
        return functional.mse_loss(values, targets[0])

    return loss


def _floats(outputs: Any) -> Tensor:
    tensor = first_tensor(outputs)
    if not isinstance(tensor, Tensor):
        raise ArgumentTypeError(
            f"outputs must hold a tensor, got {type(outputs).__name__}; name a function of the "
            "outputs as --loss package.module:function"
        )
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _load(text: str, option: str, instead: str) -> Any:
    """Return what ``package.module:name`` names; modules in the working folder are found too."""
    module, _, name = text.partition(":")
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*", text):
        raise ArgumentValueError(f"{option} must be package.module:name {instead}; got {text!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module)
        for attribute in name.split("."):
            found = getattr(found, attribute)
    except Exception as error:
        raise ArgumentValueError(
            f"{option} must name something that can be imported, got {type(error).__name__} for "
            f"{text}: {_first_line(error)}; run it where the module can be found"
        ) from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not callable(found):
        raise ArgumentValueError(
            f"{option} must name a function or class, got {type(found).__name__} at {text}"
        )
    return found


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")
