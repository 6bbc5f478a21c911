"""What a skipped step borrows from the optimizer, and how it gets it back whatever happens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_MISSING = object()


class Loan:
    """Gradients set aside for one step, and the ``found_inf`` of a fused optimizer."""

    def __init__(self) -> None:
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._optimizer: Any = None
        self._lent: Tensor | None = None
        self._own_found_inf: Any = _MISSING

    @property
    def is_out(self) -> bool:
        """Whether something has not been given back yet."""
        return bool(self._gradients) or self._lent is not None

    def set_aside(self, parameters: Iterable[Tensor]) -> None:
        """Leave the optimizer without gradients: it then changes neither parameters nor state.

        Zeros would not do: momentum and weight decay move parameters without a gradient's help.
        """
        for parameter in parameters:
            if parameter.grad is not None:
                self._gradients.append((parameter, parameter.grad))
                parameter.grad = None

    def lend_found_inf(self, optimizer: Any, found_inf: Tensor) -> None:
        """Have a fused optimizer skip on the device where ``found_inf`` is 1, or its own one is."""
        own = optimizer.__dict__.get("found_inf", _MISSING)
        if isinstance(own, Tensor):
            # The kernels skip at exactly 1; a GradScaler sums over devices.
            found_inf = torch.maximum(own.to(found_inf.device).reshape(()), found_inf).clamp_(max=1)
        self._optimizer, self._own_found_inf, self._lent = optimizer, own, found_inf
        optimizer.found_inf = found_inf

    def give_back(self) -> None:
        """Restore everything that is still out."""
        for parameter, gradient in self._gradients:
            if parameter.grad is None:
                parameter.grad = gradient
        self.forget_gradients()
        if self._lent is not None:
            # A GradScaler may have put its own one there after a step that raised.
            if self._optimizer.__dict__.get("found_inf") is self._lent:
                if self._own_found_inf is _MISSING:
                    del self._optimizer.found_inf
                else:
                    self._optimizer.found_inf = self._own_found_inf
            self._optimizer, self._lent, self._own_found_inf = None, None, _MISSING

    def forget_gradients(self) -> None:
        """Drop what was set aside: a later step must not find an old gradient again."""
        self._gradients.clear()


class Held(tuple[Any, ...]):
    """The arguments of a step with something on loan.

    torch runs no hook after a step that raised. The step's frame holds these arguments, so the loan
    is given back when the frame goes: at the end of the ``except`` that catches the exception.
    """

    loan: Loan

    @classmethod
    def of(cls, args: Iterable[Any], loan: Loan) -> Held:
        """Return the arguments, holding the loan."""
        held = cls(args)
        held.loan = loan
        return held

    def __del__(self) -> None:
        self.loan.give_back()
