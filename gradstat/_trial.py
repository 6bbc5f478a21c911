"""What probes do with a private copy of a model, so that the user's own is never touched.

A copy (`copy.deepcopy`) restores exactly, whatever happens: parameters, buffers, gradients, hooks,
training flags and the optimizer's state are not put back, they were never changed. What is shared
by the whole process, the random number generators, `kept_randomness` puts back.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from gradstat._names import unwrapped
from gradstat.errors import ArgumentTypeError, ArgumentValueError

LossFn = Callable[[Any, Any], Tensor]
Step = Callable[[nn.Module, Any], Any]


class Outcome(NamedTuple):
    """What one pass forwards gives."""

    loss: Tensor
    outputs: Any = None
    targets: Any = None


@dataclass(frozen=True)
class Program:
    """How a loss comes from a model and a batch: ``loss_fn`` or ``step``, one of the two.

    ``loss_fn(outputs, targets)`` goes with batches ``(inputs, targets)`` or ``(input, input,
    targets)``; a tuple or list of inputs is spread over the model's arguments, a dict over its
    keywords. ``step(model, batch)`` takes any batch and returns the loss, or ``(loss, outputs,
    targets)``.
    """

    loss_fn: LossFn | None
    step: Step | None

    def __post_init__(self) -> None:
        given = {"loss_fn": self.loss_fn, "step": self.step}
        for name, function in given.items():
            if function is not None and not callable(function):
                raise ArgumentTypeError(
                    f"{name} must be a function, got {type(function).__name__}; pass for example "
                    "loss_fn=torch.nn.CrossEntropyLoss()"
                )
        if (self.loss_fn is None) == (self.step is None):
            got = "neither" if self.step is None else "both"
            raise ArgumentValueError(
                f"one of loss_fn and step must be given, got {got}; pass loss_fn(outputs, "
                "targets), or step=... for a function of (model, batch) that returns the loss"
            )

    def __call__(self, model: nn.Module, batch: Any) -> Outcome:
        """Return the loss of a batch.

        Raises:
            ArgumentTypeError: The batch does not come apart, or the loss is no tensor.
            ArgumentValueError: The loss is no scalar.
        """
        if self.step is not None:
            result = self.step(model, batch)
            outcome = Outcome(*result[:3]) if isinstance(result, tuple) else Outcome(result)
        else:
            assert self.loss_fn is not None
            inputs, targets = _in_two(batch)
            outputs = _call(model, inputs)
            outcome = Outcome(self.loss_fn(outputs, targets), outputs, targets)
        if not isinstance(outcome.loss, Tensor):
            raise ArgumentTypeError(
                f"the loss must be a tensor, got {type(outcome.loss).__name__}; return it without "
                ".item() or float()"
            )
        if outcome.loss.numel() != 1:
            raise ArgumentValueError(
                f"the loss must be one number, got a tensor of shape {tuple(outcome.loss.shape)}; "
                "average it, for example with loss.mean()"
            )
        return outcome


def _in_two(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        got = type(batch).__name__ if not isinstance(batch, tuple | list) else f"{len(batch)} items"
        raise ArgumentTypeError(
            f"batch must be (inputs, targets) for loss_fn, got {got}; pass step=..., a function of "
            "(model, batch) that returns the loss"
        )
    return (batch[0] if len(batch) == 2 else tuple(batch[:-1])), batch[-1]


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)


def inner_model(model: Any) -> nn.Module:
    """Return the model inside of `torch.compile` and data parallelism.

    Raises:
        ArgumentTypeError: It is no module, or a lazy one that has not been used.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(map(is_lazy, model.parameters())):
        raise ArgumentTypeError(
            "model must have parameters with values, got those of a lazy module; run one batch "
            "through it first"
        )
    return unwrapped(model)


def private_copy(what: Any) -> Any:
    """Return a deep copy of a model, or of a model and its optimizer together.

    Raises:
        ArgumentTypeError: It cannot be copied.
    """
    try:
        return copy.deepcopy(what)
    except Exception as error:
        remedy = "keep tensors with a graph, locks and open files out of their attributes"
        if "graph leaves" in str(error):  # torch's words, of a tensor that is computed
            remedy += (
                "; torch.nn.utils.weight_norm and spectral_norm make such tensors: use those of "
                "torch.nn.utils.parametrizations"
            )
        raise ArgumentTypeError(
            f"model and optimizer must be fit for copy.deepcopy, got {type(error).__name__}: "
            f"{error}; {remedy}"
        ) from error


def private(program: Program, *others: Any) -> tuple[Any, ...]:
    """Return a program and what goes with it, with deep copies in place of all of it.

    A loss that is a module may have parameters and buffers of its own. A function is no copy.

    Raises:
        ArgumentTypeError: Something cannot be copied.
    """
    if not isinstance(program.loss_fn, nn.Module):
        return program, *private_copy(others)
    loss_fn, *copies = private_copy((program.loss_fn, *others))
    return replace(program, loss_fn=loss_fn), *copies


def tensors_of(batch: Any) -> list[Tensor]:
    """Return the tensors in tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]


def fresh(batch: Any, model: nn.Module) -> Any:
    """Return a batch with copies of its tensors, on the device of a model that lies on one.

    A model may write into its inputs, and a loss into their gradients.
    """
    devices = {parameter.device for parameter in model.parameters()}
    device = devices.pop() if len(devices) == 1 else None

    def copied(tensor: Tensor) -> Tensor:
        twin = tensor.detach().to(device or tensor.device, copy=True)
        return twin.requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, copied, batch)


def rows_of(batch: Any) -> int:
    """Return the length of the first dimension that all tensors of a batch share; 0 if none is."""
    lengths = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors_of(batch)}
    return lengths.pop() if len(lengths) == 1 else 0


@contextmanager
def kept_randomness(*holders: Any) -> Iterator[None]:
    """Put the random number generators of Python, NumPy and torch (CPU, CUDA) back at the end.

    Args:
        *holders: Objects that hold a `torch.Generator` in an attribute, such as samplers.
    """
    generators = [
        value
        for holder in holders
        for value in getattr(holder, "__dict__", {}).values()
        if isinstance(value, torch.Generator)
    ]
    own = [(generator, generator.get_state()) for generator in generators]
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    has_cuda: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda = torch.cuda.get_rng_state_all() if has_cuda else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)
        for generator, state in own:
            generator.set_state(state)


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """Return a whole number that is large enough, if it has to be.

    Raises:
        ArgumentTypeError: It is no int.
        ArgumentValueError: It is too small.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentTypeError(
            f"{name} must be an int, got {type(value).__name__}; use {least or 0}"
        )
    if least is not None and value < least:
        raise ArgumentValueError(f"{name} must be at least {least}, got {value}; use {least}")
    return value
