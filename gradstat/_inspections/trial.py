"""A model with a batch on trial, and the notes that inspections make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gradstat._batch_sample import first_tensor
from gradstat._trial import Outcome, Program, fresh, private_copy, tensors_of
from gradstat.diagnosis.finding import Finding, Measure

MIN_ROWS = 16
"""Fewer rows do not tell a dead unit from one that they happen not to wake."""


@dataclass
class Notes:
    """What the inspections have found so far."""

    findings: list[Finding] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    not_judged: dict[str, str] = field(default_factory=dict)


@dataclass
class Trial:
    """A model with a batch, and what the first pass of a copy over it gave.

    Args:
        model: The user's own, which is only read: what runs is a `twin`.
        program: How the loss comes about.
        batch: The user's own, of which every pass gets a copy.
        batch_dim: Dimension of rows in inputs and outputs.
    """

    model: nn.Module
    program: Program
    batch: Any
    batch_dim: int

    first: Outcome = field(init=False)
    call: tuple[tuple[Any, ...], dict[str, Any]] | None = field(init=False, default=None)
    """Arguments of the model's first call; None where it was not called as a whole."""

    outputs: Tensor | None = field(init=False, default=None)
    called: set[str] = field(init=False, default_factory=set)
    """Names of the modules that took part."""

    def __post_init__(self) -> None:
        model = self.twin()
        with self._listening(model):
            self.first = self.run(model)
        if self.first.loss.requires_grad:
            self.first.loss.backward()  # type: ignore[no-untyped-call]
        self.gradients = {name: p.grad for name, p in model.named_parameters()}

    def twin(self) -> nn.Module:
        """Return a copy of the model, in training mode."""
        model: nn.Module = private_copy(self.model)
        return model if model.training else model.train()

    def run(self, model: nn.Module) -> Outcome:
        """Return what a pass over a copy of the batch gives."""
        return self.program(model, fresh(self.batch, model))

    @property
    def inputs(self) -> Tensor | None:
        """The first tensor that the model was given."""
        tensors = tensors_of(self.call) if self.call is not None else []
        return tensors[0] if tensors else None

    def told(self, outcome: Outcome) -> dict[str, Tensor]:
        """Return inputs, outputs and targets of a pass, as far as they are known."""
        found = {
            "inputs": self.inputs,
            "outputs": as_tensor(outcome.outputs),
            "targets": as_tensor(outcome.targets),
        }
        if found["outputs"] is None:
            found["outputs"] = self.outputs
        return {name: value for name, value in found.items() if value is not None}

    @contextmanager
    def _listening(self, model: nn.Module) -> Iterator[None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            if self.call is None:
                copied = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
                self.call = copied

        def after(module: nn.Module, args: Any, outputs: Any) -> None:
            del module, args
            if self.outputs is None:
                self.outputs = as_tensor(outputs)

        def listener(name: str) -> Callable[..., None]:
            return lambda *_: self.called.add(name)

        handles = [
            module.register_forward_pre_hook(listener(name))
            for name, module in model.named_modules()
        ]
        handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(model.register_forward_hook(after))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def as_tensor(given: Any) -> Tensor | None:
    """Return the tensor in what a model gives: its logits, or the first one."""
    found = first_tensor(given)
    return found if isinstance(found, Tensor) else None
