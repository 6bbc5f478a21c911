"""All that a run needs to go on from a point as if nothing had happened since."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradstat._names import plain_name
from gradstat.errors import ArgumentValueError

VERSION = 2
"""Of the layout of a state."""


class RunState:
    """Takes and restores the state of a run.

    A state is a dict of tensors on the host and plain values, which ``weights_only=True`` loads:
    ``parameters`` (those that only the optimizer knows too) and ``buffers`` by name, ``optimizer``
    with gradstat's own state, ``schedulers``, ``scaler``, ``rng``.

    Args:
        optimizer: Returns the optimizer.
        model: The model; its buffers belong to the state.
        schedulers: Anything with ``state_dict`` and ``load_state_dict``.
        scaler: A `GradScaler`, or None.
    """

    def __init__(
        self,
        optimizer: Callable[[], Optimizer | None],
        model: nn.Module | None,
        schedulers: Sequence[Any],
        scaler: Any,
    ) -> None:
        self._optimizer = optimizer
        self._model = model
        self._schedulers = schedulers
        self._scaler = scaler

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer."""
        optimizer = self._optimizer()
        assert optimizer is not None, "a guard acts inside of its optimizer's step"
        return optimizer

    def take(self) -> dict[str, Any]:
        """Return a copy on the host. Synchronises with a CUDA device."""
        return {
            "version": VERSION,
            "parameters": {name: copied(tensor) for name, tensor in self._parameters()},
            "buffers": {name: copied(tensor) for name, tensor in self._buffers()},
            "kind": self._kind(),
            "optimizer": copied(self.optimizer.state_dict()),
            "schedulers": [copied(scheduler.state_dict()) for scheduler in self._schedulers],
            "scaler": None if self._scaler is None else copied(self._scaler.state_dict()),
            "rng": _rng_state(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """Put a state back, all of it or nothing; parameters stay the same tensors.

        Raises:
            ArgumentValueError: It is another run's state; nothing is changed.
        """
        if state.get("version") != VERSION:
            raise ArgumentValueError(
                f"a snapshot must be of layout {VERSION}, got {state.get('version')}; resume it "
                "with the gradstat that wrote it, or use another directory"
            )
        tensors = dict(self._parameters()) | dict(self._buffers())
        saved = state["parameters"] | state["buffers"]
        unlike = [
            name
            for name in {**tensors, **saved}
            if name not in tensors or name not in saved or tensors[name].shape != saved[name].shape
        ]
        what = repr(unlike[0]) if unlike else ""
        if state["kind"] != self._kind():
            what = what or f"{state['kind']} beside {self._kind()}"
        if what:
            raise ArgumentValueError(
                f"a snapshot must be of this model, optimizer and schedulers, got one that differs "
                f"in {what}; use a directory of its own for each run"
            )
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
        _load_optimizer(self.optimizer, copied(state["optimizer"]))
        for scheduler, known in zip(self._schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(copied(known))
        if self._scaler is not None and state["scaler"]:
            self._scaler.load_state_dict(copied(state["scaler"]))
        _set_rng_state(state["rng"])

    def _kind(self) -> list[Any]:
        """Return the classes of optimizer and schedulers, and how many parameters are in a group.

        The state of another optimizer would be loaded, and be wrong.
        """
        groups = [len(group["params"]) for group in self.optimizer.param_groups]
        schedulers = [type(scheduler).__name__ for scheduler in self._schedulers]
        return [type(self.optimizer).__name__, groups, schedulers]

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        known = set()
        for name, parameter in self._model.named_parameters() if self._model is not None else ():
            known.add(id(parameter))
            yield plain_name(name), parameter
        for index, group in enumerate(self.optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                if id(parameter) not in known:
                    known.add(id(parameter))
                    yield f"group{index}.param{place}", parameter

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all buffers, those that the model's ``state_dict`` leaves out too."""
        for name, buffer in self._model.named_buffers() if self._model is not None else ():
            yield plain_name(name), buffer


def is_whole(state: dict[str, Any]) -> bool:
    """Return whether nothing is NaN in model and optimizer, and nothing Inf in a parameter.

    Buffers may hold Inf: masks do.
    """
    optimizer = state["optimizer"]["state"]
    tensors = [*_tensors_in(state["buffers"]), *_tensors_in(optimizer)]
    return all(bool(tensor.isfinite().all()) for tensor in _tensors_in(state["parameters"])) and (
        not any(bool(tensor.isnan().any()) for tensor in tensors)
    )


def size_of(value: Any) -> int:
    """Return the bytes of all tensors in a state."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors_in(value))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(entry)


def copied(value: Any) -> Any:
    """Return a copy that shares nothing, with tensors on the host and numpy's numbers as Python's.

    Synchronises with a CUDA device.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) in (dict, OrderedDict):
        return {key: copied(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    return value.item() if isinstance(value, np.generic) else copy.deepcopy(value)


def _load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load, and keep the tensors in the groups: a captured step reads its learning rate there."""
    old = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, before in zip(optimizer.param_groups, old, strict=True):
        for name, value in before.items():
            if isinstance(value, Tensor):
                group[name] = value.copy_(torch.as_tensor(group[name]))


def _rng_state() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    on_devices = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if on_devices else [],
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
