"""What kind of optimizer it is: whether its step has a size of its own, and its numbers."""

from __future__ import annotations

import math
from typing import Any

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


def as_number(option: Any, default: float = math.nan) -> float:
    """Return an option of a group as a number, the default where it is none.

    Optimizers of one's own keep what they like under the usual names. Synchronises where it is a
    tensor on a device.
    """
    try:
        return float(option)
    except (TypeError, ValueError, RuntimeError):
        return default
