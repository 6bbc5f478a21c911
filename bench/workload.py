"""Parameters with gradients to measure, and a limit that every call exceeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter


def parameters(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Parameter]:
    """Return parameters whose gradients are normal numbers around 0.01, one in 97 of them zero."""
    generator = torch.Generator(device).manual_seed(0)
    result = []
    for shape in shapes:
        # The values of a parameter are never read here, so its memory is never touched.
        parameter = Parameter(torch.empty(shape, dtype=dtype, device=device))
        gradient = torch.empty(shape, dtype=dtype, device=device)
        gradient.normal_(0.0, 0.01, generator=generator)
        gradient.view(-1)[::97] = 0.0
        parameter.grad = gradient
        result.append(parameter)
    return result


def gradients(params: Sequence[Parameter]) -> list[Tensor]:
    """Return the gradient of each parameter."""
    return [param.grad for param in params if param.grad is not None]


def count_bytes(params: Sequence[Parameter]) -> int:
    """Return the bytes of all gradients."""
    return sum(grad.numel() * grad.element_size() for grad in gradients(params))


@dataclass
class FallingLimit:
    """A ``max_norm`` that falls from call to call, so that every call on the same gradients clips.

    Both sides share one limit: to refill the gradients between calls would cost more than a call.
    """

    max_norm: float
    factor: float
    """Share of the limit that is left after a call: far enough below 1 to survive rounding."""

    calls: list[tuple[Tensor, float]] = field(default_factory=list)

    def clip(
        self, function: Callable[[Sequence[Parameter], float], Tensor], params: Sequence[Parameter]
    ) -> None:
        """Call a clipping function with the next limit."""
        self.max_norm *= self.factor
        self.calls.append((function(params, self.max_norm), self.max_norm))

    def check(self) -> None:
        """Assert that every call had to clip."""
        for norm, max_norm in self.calls:
            assert max_norm < norm.item() < math.inf
