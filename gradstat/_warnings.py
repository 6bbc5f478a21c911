"""Warnings that point at the user's own line, however deep in hooks they are found."""

from __future__ import annotations

import inspect
import os
import warnings

import torch

_PACKAGES = tuple(os.path.dirname(path) + os.sep for path in (__file__, torch.__file__))


def warn_user(message: str, category: type[Warning] = RuntimeWarning) -> None:
    """Warn at the newest line that belongs neither to torch nor to this package."""
    level = 1
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGES):
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)
