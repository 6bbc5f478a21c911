"""Parameters with the gradients that a test asks for, and proof that nobody wrote to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def parameter(grad: Tensor | None) -> torch.nn.Parameter:
    """Return a parameter of zeros that has this gradient, the very object."""
    if grad is None:
        return torch.nn.Parameter(torch.zeros(2))
    if grad.layout is torch.sparse_csr:  # torch wants the layouts of both to be equal
        made = torch.nn.Parameter(grad.detach().clone())
    else:
        made = torch.nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype))
    made.grad = grad
    return made


def parameters(grads: Iterable[Tensor | None]) -> list[torch.nn.Parameter]:
    return [parameter(grad) for grad in grads]


def clones(grads: Sequence[Tensor]) -> list[torch.nn.Parameter]:
    """Return parameters with copies of the gradients, gaps in memory included."""
    empty = [torch.empty_strided(g.shape, g.stride(), dtype=g.dtype) for g in grads]
    return parameters([to.copy_(grad) for to, grad in zip(empty, grads, strict=True)])


def bytes_of(tensor: Tensor) -> bytes:
    """Return the elements bit for bit, so that NaN equals itself, and indices of sparse ones."""
    if tensor.layout is torch.sparse_coo:
        return bytes_of(tensor._indices()) + bytes_of(tensor._values())
    if tensor.layout is torch.sparse_csr:
        return bytes_of(tensor.crow_indices()) + bytes_of(tensor.values())
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.flatten().view(torch.uint8).numpy().tobytes()


class Untouched:
    """What gradients are now; `check` fails where an element, object or version counter changed."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.params = [p for p in params if p.grad is not None]
        self.before = [self._state(p) for p in self.params]

    def check(self) -> None:
        for index, (p, before) in enumerate(zip(self.params, self.before, strict=True)):
            assert self._state(p) == before, f"gradient {index} was written"

    @staticmethod
    def _state(p: Tensor) -> tuple[object, ...]:
        grad = p.grad
        assert grad is not None
        # Inference tensors have no version counter.
        version = None if grad.is_inference() else grad._version
        return id(grad), version, grad.requires_grad, bytes_of(grad)
