"""Which steps of an optimizer are under way, as the stack tells."""

from __future__ import annotations

import inspect

from torch.optim import Optimizer

_TORCH_STEP = Optimizer.profile_hook_step(lambda self: None).__code__
"""The function that torch puts around every step, where it fires the hooks."""


def steps_under_way(optimizer: Optimizer) -> int:
    """Return how many steps of this optimizer the caller is inside of.

    More than one where a class calls ``super().step()``: torch fires the hooks for each. Walks the
    stack, so it is for the rare case only.
    """
    steps = 0
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _TORCH_STEP.co_filename and code.co_name == _TORCH_STEP.co_name:
            steps += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps
