"""Which optimizers take steps of a size of their own, whatever the size of the gradients."""

from __future__ import annotations

_SCALE_FREE = (
    "adam", "adagrad", "adadelta", "adafactor", "rmsprop", "rprop", "lion", "lamb", "lars", "muon",
    "shampoo", "soap", "sophia", "prodigy", "signsgd", "novograd",
)  # fmt: skip
"""Parts of the names of optimizers whose step does not change when all gradients are scaled."""


def is_scale_free(optimizer: object) -> bool:
    """Whether scaling all gradients would not change its step.

    It is told by the names of its class and of the classes above it.
    """
    names = [cls.__name__.lower() for cls in type(optimizer).__mro__]
    return any(part in name for name in names for part in _SCALE_FREE)
