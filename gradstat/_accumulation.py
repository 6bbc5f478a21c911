"""Tells whether gradients are added to those of the step before: a missing ``zero_grad``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef


class Accumulation:
    """Follows the gradient of one parameter from step to step.

    Each backward pass adds to a gradient in place, which raises the tensor's version by one; so
    does zeroing. A gradient that is the same tensor one version later after each backward pass
    since the last step was added to and not zeroed, whatever clipping does to it before the step.
    It is held weakly: its memory goes where ``zero_grad`` lets it go.
    """

    def __init__(self) -> None:
        self.steps = 0
        """Steps whose gradients held those of the step before."""

        self._parameter: TensorWeakRef | None = None
        self._gradient: TensorWeakRef | None = None
        self._version = 0
        self._passes = 0
        self._handle: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"steps": self.steps}  # a copy is for reading

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.steps = state["steps"]

    def look(self) -> None:
        """Count the step about to happen, if its gradients hold those of the last one."""
        self.steps += self._gradient is not None and self._passes > 0

    def remember(self, parameters: Sequence[Tensor]) -> None:
        """Note the gradients of a step that has happened."""
        self._gradient, self._passes = None, 0
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is not None:
                if not gradient.is_inference():  # those count no versions
                    self._follow(parameter)
                    self._gradient, self._version = TensorWeakRef(gradient), gradient._version
                return

    def stop(self) -> None:
        """Follow nothing any more."""
        if self._handle is not None:
            self._handle.remove()
        self._parameter = self._gradient = self._handle = None

    def _follow(self, parameter: Tensor) -> None:
        if self._parameter is not None and self._parameter() is parameter:
            return
        self.stop()
        if parameter.is_leaf and parameter.requires_grad:
            self._handle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._has_passed
            )
            self._parameter = TensorWeakRef(parameter)

    def _has_passed(self, parameter: Tensor) -> None:
        """Look at a gradient that a backward pass has just been added to."""
        gradient = parameter.grad
        if self._gradient is None or gradient is None:
            return
        if self._gradient() is gradient and gradient._version == self._version + 1:
            self._version += 1
            self._passes += 1
        else:
            self._gradient = None
