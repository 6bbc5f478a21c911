"""Samples of what went into a model, came out, and was wanted: small copies, made without waiting.

A copy holds at most `MAX_ELEMENTS` numbers, whatever the size of the batch. Outputs and targets
keep their rows together, so that a row's target stays beside its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradstat._units import MAX_DENSE
from gradstat.errors import UnsupportedTensorError

BATCH_NAMES = ("inputs", "outputs", "targets")

MAX_ROWS = 256
MAX_INPUT_ROWS = 32
MAX_ELEMENTS = 65536


class TensorSample(NamedTuple):
    """Some rows of a tensor."""

    rows: Tensor
    """A detached copy, on the tensor's device: (n, features), or (n,) where a row is a number."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""

    dtype: torch.dtype
    is_whole: bool
    """Whether every element is in ``rows``."""


class BatchSample:
    """What is kept of one batch; it does not change.

    Args:
        step: Finished optimizer steps.
        batch: Tensors under names of `BATCH_NAMES`.
        loss: Their loss, where it was told with them.
    """

    def __init__(self, step: int, batch: Mapping[str, Tensor], loss: float | Tensor | None) -> None:
        self.step = step
        self.loss = loss
        self.tensors: dict[str, TensorSample] = {}
        self.is_paired = False
        """Whether row i of the outputs belongs to row i of the targets."""

        self._take(batch)

    def extended(self, batch: Mapping[str, Tensor], loss: float | Tensor | None) -> BatchSample:
        """Return it with what was not yet told of this step; nothing of a second batch is kept."""
        longer = copy(self)
        longer.tensors = dict(self.tensors)
        longer._take({name: value for name, value in batch.items() if name not in self.tensors})
        longer.loss = loss if self.loss is None else self.loss
        return longer

    def _take(self, batch: Mapping[str, Tensor]) -> None:
        whole = {name: t.detach() if t.requires_grad else t for name, t in batch.items()}
        rows, count = whole, None
        if "outputs" in whole and "targets" in whole:
            pair = _rows_of_pair(whole["outputs"], whole["targets"])
            if pair is not None:
                self.is_paired = True
                rows = whole | {"outputs": pair[0], "targets": pair[1]}
                count = _row_count(pair[0])
        for name, tensor in whole.items():
            if name == "inputs":
                n_rows = min(_row_count(tensor), MAX_INPUT_ROWS)
            else:
                n_rows = _row_count(rows[name]) if count is None else count
            self.tensors[name] = _sample(tensor, rows[name], n_rows)


def first_tensor(given: Any) -> Any:
    """Return the tensor in a container of tensors: the logits of a dict, else the first.

    What holds no tensor is None; what is no container is itself.
    """
    if isinstance(given, Tensor) or given is None:
        return given
    if isinstance(given, Mapping):
        values = [given["logits"]] if "logits" in given else list(given.values())
    elif isinstance(given, list | tuple):
        values = list(given)
    elif isinstance(getattr(given, "logits", None), Tensor):
        return given.logits
    else:
        return given
    return next((value for value in values if isinstance(value, Tensor)), None)


def readable(value: Any) -> Tensor:
    """Return a tensor whose rows can be taken; a sparse one is made dense where it is small.

    Raises:
        UnsupportedTensorError: It is none, or holds no numbers in memory.
    """
    if not isinstance(value, Tensor):
        what, remedy = type(value).__name__, "pass the tensor that is in it"
    elif value.is_meta or value.is_nested or value.is_quantized:
        kinds = {"meta": value.is_meta, "nested": value.is_nested, "quantised": value.is_quantized}
        what, remedy = next(f"a {kind} tensor" for kind in kinds if kinds[kind]), "leave it out"
    elif value.layout is not torch.strided and value.numel() > MAX_DENSE:
        what, remedy = f"a sparse one of {value.numel()} elements", "pass some rows of it"
    elif value.layout is not torch.strided:
        return value.detach().to_dense()
    else:
        return value
    raise UnsupportedTensorError(f"it must be a tensor of numbers in memory, got {what}; {remedy}")


def _rows_of_pair(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return both as rows that belong together; None where the shapes do not say how.

    Classes: outputs (N, C, ...) or (..., C) beside targets without that dimension become (n, C) and
    (n,). Equal shapes become (N, k) each, and one number for each row (N, 1): of one output for
    each row integers are no classes.
    """
    shape, wanted = outputs.shape, targets.shape
    if shape == wanted:
        return (outputs, targets) if shape else None
    is_column = shape[:1] == wanted[:1] and shape.numel() == wanted.numel() == shape[0]
    # The loss may bring them together.
    if is_column and (targets.is_floating_point() or shape[1:].numel() == 1):
        return outputs.reshape(-1, 1), targets.reshape(-1, 1)
    if len(shape) == len(wanted) + 1 and not targets.is_floating_point():
        if len(shape) == 2 and shape[0] == wanted[0]:
            return outputs, targets
        if len(shape) > 2 and shape[:1] + shape[2:] == wanted:
            return outputs.movedim(1, -1).flatten(0, -2), targets.flatten()
        if shape[:-1] == wanted:
            return outputs.flatten(0, -2), targets.flatten()
    return None


def _row_count(rows: Tensor) -> int:
    """Return how many rows are kept."""
    shape = rows.shape
    n_elements = rows.numel() // shape[0] if shape else 1
    return max(1, min(MAX_ROWS, MAX_ELEMENTS // n_elements))


def _sample(whole: Tensor, rows: Tensor, count: int) -> TensorSample:
    shape = rows.shape
    if not shape:
        rows = rows.reshape(1)
    elif shape[0] > count:
        rows = rows[:count]
    if len(shape) > 2:
        rows = rows.flatten(1)
    if len(shape) > 1 and rows.shape[1] > MAX_ELEMENTS:
        rows = rows[:, :MAX_ELEMENTS]
    return TensorSample(
        rows.clone(), tuple(whole.shape), whole.dtype, is_whole=rows.numel() == whole.numel()
    )
