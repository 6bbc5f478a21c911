"""Copies of parameters from before a step, and the moments of what the step does to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradstat._kernels.batch import gather
from gradstat._kernels.compiled import _native
from gradstat._kernels.reading import moments, new_table


class Copies:
    """Copies of tensors, which tell once what has changed since.

    fp32 and fp64 on the CPU are copied and subtracted by the compiled module, all others by torch,
    with equal results. Neither synchronises with a CUDA device.

    Args:
        tensors: Any tensors on one device; no gradient may be recorded meanwhile.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._native = _native.copies(tensors)
        self._tensors: Sequence[Tensor] = ()
        if self._native is not None:
            return
        if tensors[0].is_cpu:  # where one by one takes half the time, without a launch for each
            self._tensors = [tensor.clone() for tensor in tensors]
        else:
            self._tensors = torch._foreach_mul(list(tensors), 1.0)

    def changes(self, now: Sequence[Tensor]) -> Tensor | None:
        """Return the table of the copies and, after them, of each tensor's change since.

        Returns:
            fp64 (2 n + 1, 12) on the tensors' device, the totals of all last; None where these have
            other shapes than the copies.
        """
        if self._native is not None:
            table = new_table(2 * len(now) + 1, torch.device("cpu"))
            is_done = self._native.changes(now, table, torch.get_num_threads())
            return table if is_done else None
        before = self._tensors
        if [old.shape for old in before] != [new.shape for new in now]:
            return None
        return moments(gather([*before, *torch._foreach_sub(list(now), list(before))]))[0]
