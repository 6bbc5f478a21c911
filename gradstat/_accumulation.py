"""Tells whether gradients are added to those of the step before: a missing ``zero_grad``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import TensorWeakRef


class Accumulation:
    """Follows the gradient of one parameter from step to step.

    Each backward pass adds to a gradient in place, which raises the tensor's version by one; so
    does zeroing. The same tensor one version later was added to and not zeroed. Where several
    backward passes belong to a step nothing can be told. The gradient is held weakly: its memory
    goes where ``zero_grad`` lets it go.
    """

    def __init__(self) -> None:
        self.steps = 0
        """Steps whose gradients held those of the step before."""

        self._gradient: TensorWeakRef | None = None
        self._version = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_gradient": None}  # a copy is for reading

    def look(self, parameters: Sequence[Tensor]) -> None:
        """Compare the gradients of a step about to happen with those of the last one."""
        known = self._gradient() if self._gradient is not None else None
        if known is not None and known._version == self._version + 1:
            self.steps += any(parameter.grad is known for parameter in parameters)

    def remember(self, parameters: Sequence[Tensor]) -> None:
        """Note the gradients of a step that has happened."""
        self._gradient = None
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is not None:
                if not gradient.is_inference():  # those count no versions
                    self._gradient, self._version = TensorWeakRef(gradient), gradient._version
                return
