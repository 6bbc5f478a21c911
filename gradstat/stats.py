"""Statistics of gradients, and of any tensors, as a table: one read of the memory, one row each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gradstat import _kernels
from gradstat._names import named_parameters
from gradstat.errors import ArgumentTypeError, ArgumentValueError
from gradstat.table import StatTable

Names = Sequence[str] | Callable[[], Sequence[str]]

ParameterSource = (
    torch.nn.Module
    | Tensor
    | Iterable[Tensor]
    | Iterable[tuple[str, Tensor]]
    | Mapping[str, Tensor]
)
"""What parameters can be given as."""


def grad_stats(model_or_params: ParameterSource, *, histogram: bool = False) -> StatTable:
    """Return the statistics of every gradient, one row per parameter in model order.

    Reads each gradient once and writes none. A parameter without a gradient keeps its row and says
    so (``has_grad`` is False). A sparse gradient is described by its coalesced values, its ``rows``
    and ``dead_rows`` by the whole tensor. A complex gradient is described by its magnitudes. A
    parameter that is listed twice counts once. Names are those of the model without `torch.compile`
    and data parallelism, as `Monitor.names` has them.

    Args:
        model_or_params: A module, a parameter, an iterable of parameters or of ``(name,
            parameter)`` pairs, or a dict of tensors. Any shapes, fp64, fp32, bf16, fp16 or complex,
            mixed as they come, on any devices. A tensor that is no parameter (it does not require
            grad) is itself taken as a gradient.
        histogram: Also count magnitudes by binary exponent, in the same pass.

    Returns:
        The table, on the device of the gradients (on the CPU where they lie on several). Does not
        synchronise with a CUDA device; the first look at the table does. Exceptions: gradients
        that are sparse, on several devices, or on a device without a kernel.

    Raises:
        ArgumentTypeError: An item is no tensor, or names and bare parameters are mixed.
        ArgumentValueError: A generator has nothing left to give; or, found where the names are
            first looked at, a name stands twice.
        UnsupportedTensorError: A gradient holds no floating-point numbers in memory.

    Example:
        >>> loss.backward()
        >>> table = gradstat.grad_stats(model)
        >>> table.total_norm, table["layers.0.weight"].l2
    """
    names, items = collect(model_or_params, "model_or_params", unnamed="param")
    try:
        return _table(names, items, "gradient", histogram, take_grad=True)
    except _kernels.RepeatedError as error:
        later = set(error.positions)
        all_names = list(names() if callable(names) else names)
        kept = [index for index in range(len(items)) if index not in later]
        return _table(
            [all_names[i] for i in kept], [items[i] for i in kept], "gradient", histogram,
            take_grad=True,
        )  # fmt: skip


def tensor_stats(
    tensors: ParameterSource,
    names: Sequence[str] | None = None,
    *,
    histogram: bool = False,
    kind: str = "tensor",
) -> StatTable:
    """Return the statistics of any tensors: weights, updates, activations.

    Args:
        tensors: A tensor, an iterable of tensors or of ``(name, tensor)`` pairs, a dict of tensors,
            or a module, whose parameters (not their gradients) are then measured. Any shapes, fp64,
            fp32, bf16, fp16 or complex. `None` among them keeps a row that says it is missing.
        names: One name for each tensor; needed where ``tensors`` gives none and ``tensor0``,
            ``tensor1``, ... will not do.
        histogram: Also count magnitudes by binary exponent, in the same pass.
        kind: What the rows are, for the headline of the table.

    Returns:
        The table, as from `grad_stats`, with the same rules of synchronisation.

    Raises:
        ArgumentTypeError: An item is no tensor, or names and bare tensors are mixed.
        ArgumentValueError: ``names`` has another length than ``tensors``; or, found where the names
            are first looked at, a name stands twice.
        UnsupportedTensorError: A tensor holds no floating-point numbers in memory.

    Example:
        >>> gradstat.tensor_stats(model)["layers.0.weight"].rms
    """
    own_names, items = collect(tensors, "tensors", unnamed="tensor")
    if names is not None:
        if not callable(own_names):
            raise ArgumentValueError(
                "names must be left out where tensors brings names of its own (a module, a dict or "
                "pairs), got both; pass list(tensors.values()) with names, or tensors alone"
            )
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise ArgumentTypeError(
                f"names must be a sequence of str, got {names!r}; pass for example names=['a', 'b']"
            )
        own_names = list(names)
        if len(own_names) != len(items):
            raise ArgumentValueError(
                f"names must hold one name for each tensor, got {len(own_names)} names for "
                f"{len(items)} tensors; pass names of the same length"
            )
    return _table(own_names, items, kind, histogram, take_grad=False)


def _table(
    names: Names, items: Sequence[Any], kind: str, histogram: bool, *, take_grad: bool
) -> StatTable:
    def name_of(index: int) -> str:
        return repr(list(names() if callable(names) else names)[index])

    batch = _kernels.gather(items, take_grad=take_grad, or_itself=take_grad, name_of=name_of)
    data, bins = _kernels.moments(batch, histogram=histogram)
    return StatTable(names, data, bins, kind=kind, note=batch.note)


def collect(source: Any, argument: str, *, unnamed: str) -> tuple[Names, Sequence[Any]]:
    """Return names and items of anything that parameters can be given as.

    Args:
        source: See `grad_stats`.
        argument: Name of the argument, for errors.
        unnamed: What to call items without a name: ``param`` makes ``param0``, ``param1``, ...

    Raises:
        ArgumentTypeError: The source is nothing of the kind, or mixes pairs and bare tensors.
        ArgumentValueError: The source is a generator that yields nothing.
    """
    if isinstance(source, torch.nn.Module):
        named = named_parameters(source)
        return [name for name, _ in named], [parameter for _, parameter in named]
    if isinstance(source, Mapping):
        return [str(name) for name in source], list(source.values())
    if isinstance(source, Tensor):
        items: list[Any] = [source]
    elif isinstance(source, Iterable) and not isinstance(source, str | bytes):
        items = list(_started(source, argument) if isinstance(source, Iterator) else source)
    else:
        raise ArgumentTypeError(
            f"{argument} must be a module, tensors, (name, tensor) pairs or a dict, got "
            f"{type(source).__name__}; pass for example model or model.named_parameters()"
        )
    if items and isinstance(items[0], tuple):
        return _split(items, argument)
    return (lambda: [f"{unnamed}{index}" for index in range(len(items))]), items


def _started(source: Iterator[Any], argument: str) -> Iterator[Any]:
    """Return the iterator, having made sure that it yields something."""
    try:
        first = next(source)
    except StopIteration:
        raise ArgumentValueError(
            f"{argument} must yield at least one item, got a generator that yields none: it was "
            "used up before, or the model has no parameters; pass list(model.parameters())"
        ) from None
    return chain((first,), source)


def _split(pairs: list[Any], argument: str) -> tuple[list[str], list[Any]]:
    for index, pair in enumerate(pairs):
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ArgumentTypeError(
                f"{argument} must hold (name, tensor) pairs throughout once it holds one, got "
                f"{type(pair).__name__} at position {index}; pass model.named_parameters()"
            )
    return [name for name, _ in pairs], [item for _, item in pairs]
