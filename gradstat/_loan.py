"""What a skipped step borrows from the optimizer, and how it gets it back whatever happens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradstat._stack import steps_under_way

_MISSING = object()


class Loan:
    """Gradients set aside for one step, and the ``found_inf`` of a fused optimizer."""

    def __init__(self) -> None:
        self._gradients: list[tuple[Tensor, Tensor]] = []
        self._numbers: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._optimizer: Any = None
        self._lent: Tensor | None = None
        self._own_found_inf: Any = _MISSING
        self.is_out = False
        """Whether something has not been given back yet."""

    def set_aside(self, optimizer: Any) -> None:
        """Leave the optimizer without gradients: it then changes neither parameters nor state.

        Zeros would not do: momentum and weight decay move parameters without a gradient's help.
        What an optimizer counts in its groups (optimi, schedule-free) is noted, for `end_step`.
        """
        for group in optimizer.param_groups:
            numbers = {key: value for key, value in group.items() if key != "params"}
            self._numbers.append((group, numbers))
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._gradients.append((parameter, parameter.grad))
                    parameter.grad = None
        self.is_out = True

    def lend_found_inf(self, optimizer: Any, found_inf: Tensor) -> None:
        """Have a fused optimizer skip on the device where ``found_inf`` is 1, or its own one is."""
        own = optimizer.__dict__.get("found_inf", _MISSING)
        if isinstance(own, Tensor):
            # The kernels skip at exactly 1; a GradScaler sums over devices.
            found_inf = torch.maximum(own.to(found_inf.device).reshape(()), found_inf).clamp_(max=1)
        self._optimizer, self._own_found_inf, self._lent = optimizer, own, found_inf
        self.is_out = True
        optimizer.found_inf = found_inf

    def end_step(self) -> None:
        """Restore everything that is still out, and what a skipped step changed in its groups."""
        for group, numbers in self._numbers:
            group.update(numbers)
        self.give_back()

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
        self.is_out = False

    def forget_gradients(self) -> None:
        """Drop what was set aside: a later step must not find an old gradient again."""
        self._gradients.clear()
        self._numbers.clear()
        self.is_out = self._lent is not None


class Held(tuple[Any, ...]):
    """The arguments of a step with something on loan.

    torch runs no hook after a step that raised. The step's frame holds these arguments, so the loan
    is given back when the frame goes: at the end of the ``except`` that catches the exception. They
    go earlier where another hook gives the step other arguments; the loan then stays out.
    """

    loan: Loan
    optimizer: Any

    @classmethod
    def of(cls, args: Iterable[Any], loan: Loan, optimizer: Any) -> Held:
        """Return the arguments of a step of this optimizer, holding the loan."""
        held = cls(args)
        held.loan, held.optimizer = loan, optimizer
        return held

    def __del__(self) -> None:
        if self.loan.is_out and not steps_under_way(self.optimizer):
            self.loan.give_back()
