"""Tells whether gradients are added to those of the step before: a missing ``zero_grad``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef


class Accumulation:
    """Follows the gradient of one parameter from some steps to the next.

    Each backward pass adds to a gradient in place, which raises the tensor's version by one; so
    does zeroing. A gradient that is the same tensor one version later after each backward pass
    since the last step was added to and not zeroed, whatever clipping does to it before the step.
    It is held weakly: its memory goes where ``zero_grad`` lets it go. The hook that counts the
    passes stays between the looks, since to put it on costs more than to call it in vain.
    """

    FIRST: ClassVar[int] = 4
    STRIDE: ClassVar[int] = 7
    """After the steps before `FIRST` and then after every so many the next one is looked at: a
    prime, which the periods of loops that zero gradients now and then seldom are."""

    def __init__(self) -> None:
        self.looks = 0
        """Steps that were looked at."""

        self.steps = 0
        """Those whose gradients held those of the step before."""

        self.is_following = False
        """Whether the next step is looked at."""

        self._parameter: TensorWeakRef | None = None
        self._gradient: TensorWeakRef | None = None
        self._version = 0
        self._passes = 0
        self._handle: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"looks": self.looks, "steps": self.steps}  # a copy is for reading

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__ |= state

    def is_due(self, step: int) -> bool:
        """Whether one of the gradients is followed after this many finished steps."""
        return step % self.STRIDE == 0 or step < self.FIRST

    def follow(self, parameters: Sequence[Tensor]) -> None:
        """Follow one of the gradients of a step that has happened, until the next one."""
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None or gradient.is_inference():  # those count no versions
                continue
            if self._parameter is None or self._parameter() is not parameter:
                self._hook(parameter)
            self._gradient, self._version = TensorWeakRef(gradient), gradient._version
            self._passes = 0
            self.is_following = True
            return

    def look(self) -> None:
        """Count the step about to happen, and whether its gradients hold those of the last one."""
        self.looks += 1
        self.steps += self._gradient is not None and self._passes > 0
        self._gradient, self.is_following = None, False

    def stop(self) -> None:
        """Follow nothing any more."""
        if self._handle is not None:
            self._handle.remove()
        self._parameter = self._gradient = self._handle = None
        self.is_following = False

    def _hook(self, parameter: Tensor) -> None:
        self.stop()
        if parameter.is_leaf and parameter.requires_grad:
            self._handle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._has_passed
            )
            self._parameter = TensorWeakRef(parameter)

    def _has_passed(self, parameter: Tensor) -> None:
        """Look at a gradient that a backward pass has just been added to."""
        if self._gradient is None:
            return
        gradient, version = parameter.grad, self._version + 1
        if gradient is not None and self._gradient() is gradient and gradient._version == version:
            self._version = version
            self._passes += 1
        else:
            self._gradient = None
