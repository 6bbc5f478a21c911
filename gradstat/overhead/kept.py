"""Model and optimizer as they were, however often they are trained in between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Back = Callable[[], Any]


class Kept:
    """What a training step changes, to be put back in place: all tensors stay the same objects.

    Parameters with their gradients, buffers, training flags, and all attributes of the optimizer:
    state, groups, hooks. The copies are on the host, of ``parameters + gradients + buffers +
    optimizer state`` bytes.

    Args:
        optimizer: Its parameters are kept, those that the model does not know too.
        model: The model, or None.
        also: Anything else with ``state_dict`` and ``load_state_dict``: schedulers, a `GradScaler`.
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module | None, also: Sequence[Any] = ()
    ) -> None:
        self._known: dict[int, Back] = {}
        modules = list(model.modules()) if model is not None else []
        self._flags = [(module, module.training) for module in modules]
        self._backs = [self._keep(module._buffers) for module in modules]
        grouped = (parameter for group in optimizer.param_groups for parameter in group["params"])
        self._gradients = [
            (parameter, parameter.requires_grad, self._keep(parameter.grad))
            for parameter in _unlike([*(model.parameters() if model is not None else ()), *grouped])
        ]
        self._backs += [self._keep(parameter) for parameter, *_ in self._gradients]
        self._backs.append(self._keep(vars(optimizer)))
        self._also = [(holder, copy.deepcopy(holder.state_dict())) for holder in also]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back. Synchronises with a CUDA device."""
        for back in self._backs:
            back()
        for parameter, requires_grad, gradient in self._gradients:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient()
        for module, training in self._flags:
            module.training = training
        for holder, state in self._also:
            holder.load_state_dict(copy.deepcopy(state))

    def _keep(self, value: Any) -> Back:
        """Return a function that makes a value what it is now, in place, and returns it."""
        if id(value) not in self._known:
            self._known[id(value)] = self._back_to(value)
        return self._known[id(value)]

    def _back_to(self, value: Any) -> Back:
        if isinstance(value, Tensor):
            return _tensor_back(value)
        if isinstance(value, dict):
            entries = {key: self._keep(entry) for key, entry in value.items()}

            def dict_back() -> Any:
                now = {key: back() for key, back in entries.items()}
                value.clear()
                value.update(now)
                return value

            return dict_back
        if isinstance(value, list):
            items = [self._keep(item) for item in value]

            def list_back() -> Any:
                value[:] = [back() for back in items]
                return value

            return list_back
        return lambda: value


def _tensor_back(tensor: Tensor) -> Back:
    if any(
        size > 1 and stride == 0
        for size, stride in zip(tensor.shape, _strides(tensor), strict=False)
    ):
        return lambda: tensor  # elements that share memory: torch lets nobody write there
    twin = tensor.detach().to("cpu", copy=True)

    def back() -> Tensor:
        tensor.detach().copy_(twin)
        return tensor

    return back


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout is torch.strided else ()


def _unlike(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())
