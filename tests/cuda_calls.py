"""What the tests on a CUDA device share: tensors there, and how close results must be."""

from __future__ import annotations

import torch
from kernel_calls import DTYPES, sample
from torch import Tensor

CUDA = torch.device("cuda")
TOLERANCE = 1e-6  # the contract's


def on_device(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(CUDA, copy=True) for tensor in tensors]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Check for values that were scaled by coefficients within the contract of each other."""
    relative = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(actual.dtype, 4 * TOLERANCE)
    torch.testing.assert_close(actual.cpu(), expected, rtol=relative, atol=1e-7)


def parameters(device: torch.device = CUDA) -> list[torch.nn.Parameter]:
    """Make parameters of every dtype with gradients, one without, and one of several chunks."""
    made = []
    for index, n in enumerate([3, 1000, 70_000, 300_001, 12]):
        dtype = list(DTYPES.values())[index % 4]
        made.append(torch.nn.Parameter(torch.zeros(n, dtype=dtype, device=device)))
        made[-1].grad = sample(n, dtype, seed=n).to(device)
    made.append(torch.nn.Parameter(torch.zeros(5, device=device)))
    return made
