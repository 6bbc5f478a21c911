"""A policy at work: its program for the kernel, its state on the device, its decision on a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradstat import _kernels
from gradstat.clipping.policies import AGC, AdaGC, GlobalNorm, PerLayer, SkipOnSpike, Value
from gradstat.clipping.policy import FusedPolicy, Policy, policies_of
from gradstat.clipping.resolve import MAX_STEPS
from gradstat.clipping.units import clip_units_
from gradstat.columns import RAW_COLUMNS
from gradstat.errors import ArgumentTypeError, ArgumentValueError

_ABS_MAX = [column.name for column in RAW_COLUMNS].index("abs_max")


class Clipper:
    """Holds a policy and what it has learnt; decides and carries out the clipping of a step.

    Args:
        policy: The policy, or `None` to measure only.
        nonfinite: What a NaN or Inf in a gradient does, a `gradstat._kernels.Nonfinite`.
    """

    def __init__(self, policy: Policy | None, nonfinite: _kernels.Nonfinite) -> None:
        self.policy = policy
        policies = policies_of(policy)
        self._fused = [p for p in policies if isinstance(p, FusedPolicy)]
        self._after = [p for p in policies if not isinstance(p, FusedPolicy)]
        self._nonfinite = nonfinite
        self._ceiling: float | None = None
        self._per_tensor = any(isinstance(p, PerLayer | AdaGC) for p in self._fused)
        self.may_skip = nonfinite == _kernels.Nonfinite.SKIP or any(
            isinstance(p, SkipOnSpike) for p in self._fused
        )
        self._names: tuple[str, ...] = ()
        self.program: Any = None
        """What the kernel runs; None before `bind`."""

        self.state: Tensor | None = None
        """fp64 on the gradients' device: counters, then the state of each fused policy."""

        self._coefficients: Tensor | None = None

    @torch.inference_mode(False)
    def bind(self, names: Sequence[str], device: torch.device) -> None:
        """Make room for these parameters on this device; keep what is known of the ones that stay.

        Synchronises when the parameters or the device have changed, and only then.
        """
        old_names, old_state = self._names, self.state
        offsets, state = self._layout(len(names))
        if old_state is not None:
            old_offsets, _ = self._layout(len(old_names))
            state = self._carried(
                old_state.cpu().tolist(), old_offsets, old_names, state, offsets, names
            )
        self._names = tuple(names)
        self.state = torch.tensor(state, dtype=torch.float64).to(device)
        self._coefficients = (
            torch.ones(len(names), dtype=torch.float64, device=device) if self._per_tensor else None
        )
        self._build(offsets)

    def _build(self, offsets: list[int]) -> None:
        """Make the kernel's program. The ceiling comes last and has no state."""
        steps = [
            (int(p.opcode), p.parameters(), offset)
            for p, offset in zip(self._fused, offsets, strict=True)
        ]
        if self._ceiling is not None:
            assert self.state is not None
            last = GlobalNorm(self._ceiling)
            steps.append((int(last.opcode), last.parameters(), len(self.state)))
        self.program = _kernels.make_clip(self._nonfinite, steps)
        self.program.state = self.state
        self.program.coefficients = self._coefficients

    @property
    def ceiling(self) -> float | None:
        """Largest total norm after all fused policies, set while training; None for any.

        It is no part of the policy, whose state and checkpoints stay as they are. Setting it does
        not synchronise.

        Raises:
            ArgumentValueError: It is not positive, or the kernel's program is full.
        """
        return self._ceiling

    @ceiling.setter
    def ceiling(self, max_norm: float | None) -> None:
        if max_norm is not None:
            GlobalNorm(max_norm)
            if len(self._fused) >= MAX_STEPS:
                raise ArgumentValueError(
                    f"a ceiling must find room beside the fused policies, got {len(self._fused)} "
                    f"of at most {MAX_STEPS}; drop one"
                )
        self._ceiling = max_norm
        self._rebuild()

    def skip_nonfinite(self) -> None:
        """Skip steps with a NaN or Inf from now on. Does not synchronise."""
        self._nonfinite, self.may_skip = _kernels.Nonfinite.SKIP, True
        self._rebuild()

    def _rebuild(self) -> None:
        if self.state is not None:
            self._build(self._layout(len(self._names))[0])

    @property
    def acts(self) -> bool:
        """Whether a step can come out other than without this clipper."""
        return self.policy is not None or self._ceiling is not None or self.may_skip

    def _layout(self, n_tensors: int) -> tuple[list[int], list[float]]:
        state = [0.0] * _kernels.NUM_CLIP_COUNTERS
        offsets = []
        for policy in self._fused:
            offsets.append(len(state))
            state += policy.initial_state(n_tensors)
        return offsets, state

    def _carried(
        self,
        old: list[float],
        old_offsets: list[int],
        old_names: Sequence[str],
        new: list[float],
        offsets: list[int],
        names: Sequence[str],
    ) -> list[float]:
        """Return the new state with the old one's content: by place, and by name for AdaGC."""
        n_counters = _kernels.NUM_CLIP_COUNTERS
        new[:n_counters] = old[:n_counters]
        for policy, start, old_start in zip(self._fused, offsets, old_offsets, strict=True):
            if isinstance(policy, AdaGC):
                gammas = dict(zip(old_names, old[old_start + 1 :], strict=False))
                new[start] = old[old_start]
                for index, name in enumerate(names):
                    new[start + 1 + index] = gammas.get(name, math.inf)
            else:
                length = len(policy.initial_state(0))
                new[start : start + length] = old[old_start : old_start + length]
        return new

    @property
    def needs_scale(self) -> bool:
        """Whether the fused policies can ask for another coefficient than 1."""
        return self._ceiling is not None or any(not isinstance(p, SkipOnSpike) for p in self._fused)

    def measure(
        self,
        batch: _kernels.Batch,
        table: Tensor,
        out: Tensor,
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        histogram: bool = False,
    ) -> Tensor | None:
        """Fill the step's table and decision in one read of the gradients.

        Args:
            batch: Gradients; one for each bound name, `None` where there is none.
            table: fp64 (names + 1, 12), written.
            out: fp64 of ``_kernels.NUM_CLIP_OUT`` values, written.
            grad_scale: fp32 scalar that the gradients are multiplied with, under loss scaling.
            found_inf: fp32 scalar that becomes 1 where the step is to be skipped.
            histogram: Also count the magnitudes.

        Returns:
            Where asked for, int64 (names + 1, 256), of the gradients as they are, scaled or not.
        """
        self.program.out = out
        self.program.grad_scale = grad_scale
        self.program.found_inf = found_inf
        return _kernels.moments_and_clip(batch, table, self.program, histogram=histogram)

    def apply(self, batch: _kernels.Batch, out: Tensor, name_of: _kernels.NameOf) -> None:
        """Scale the gradients as decided. Synchronises with no device."""
        if not self.needs_scale:
            return
        if self._coefficients is not None:
            # Each counts: that of a small tensor may be lost in the rounding of the total norm.
            _kernels.scale(batch, self._coefficients, name_of=name_of)
            return
        factor = out[_kernels.OUT_FACTOR : _kernels.OUT_FACTOR + 1]
        if out.device.type != "cpu" or factor.item() != 1:
            _kernels.scale(batch, factor, name_of=name_of)

    def apply_rest(
        self,
        batch: _kernels.Batch,
        table: Tensor,
        parameters: Sequence[Tensor],
        name_of: _kernels.NameOf,
        grad_scale: Tensor | None = None,
    ) -> None:
        """Run the policies that are not fused, in their order.

        Args:
            batch: Gradients.
            table: Their table, in true units.
            parameters: Their parameters.
            name_of: Gives the name of the one at a position, for an error.
            grad_scale: Scalar that the gradients are multiplied with, under loss scaling.
        """
        out, state = self.program.out, self.state
        assert state is not None
        # The kernel has counted the step if it clipped, and does not count a skipped one.
        is_counted = (out[_kernels.OUT_COEFFICIENT] < 1 - 1e-12) | (out[_kernels.OUT_SKIP] != 0)
        has_clipped = torch.zeros_like(is_counted)
        for policy in self._after:
            if isinstance(policy, Value):
                has_clipped |= self._largest(table) > policy.max_value
                if grad_scale is None:
                    _kernels.clamp(batch, policy.max_value, name_of=name_of)
                else:
                    _clamp_scaled(batch, policy.max_value * grad_scale)
            elif isinstance(policy, AGC):
                here = clip_units_(policy, parameters, self._names, grad_scale)
                has_clipped |= here.to(has_clipped.device)
            else:
                answer = _answer(policy, table, batch.size)
                _kernels.scale(batch, answer, name_of=name_of)
                has_clipped |= (answer < 1).any()
        state[_kernels.COUNTER_CLIPPED] += has_clipped & ~is_counted

    def _largest(self, table: Tensor) -> Tensor:
        """Return the largest magnitude that the fused policies have left."""
        factors = self._coefficients
        if factors is None:
            factors = self.program.out[_kernels.OUT_FACTOR]
        return (table[:-1, _ABS_MAX] * factors).nan_to_num(0.0).max()

    @property
    def has_rest(self) -> bool:
        """Whether there are policies that are not fused."""
        return bool(self._after)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"program": None}  # a copy is for reading

    def state_dict(self) -> dict[str, Any]:
        """Return what the policy has learnt, by parameter name where it matters."""
        return {
            "policy": repr(self.policy),
            "names": list(self._names),
            "state": None if self.state is None else self.state.detach().cpu().clone(),
        }

    def load_state_dict(self, saved: dict[str, Any], device: torch.device) -> bool:
        """Take over a saved state; where it is another policy's, return False, changing nothing."""
        if saved.get("policy") != repr(self.policy):
            return False
        if saved.get("state") is None:  # saved before the first step
            return True
        if len(saved["state"]) != len(self._layout(len(saved["names"]))[1]):
            return False
        names = self._names
        self._names = tuple(saved["names"])
        self.state = saved["state"].clone().to(torch.float64)
        self.bind(names or self._names, device)
        return True


def _answer(policy: Policy, table: Tensor, n_tensors: int) -> Tensor:
    given = policy.coefficient(table)
    try:
        answer = torch.as_tensor(given, dtype=torch.float64, device=table.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentTypeError(
            f"{type(policy).__name__}.coefficient must return a tensor or a number, got "
            f"{type(given).__name__}; return 1.0 to leave the gradients as they are"
        ) from error
    answer = answer.reshape(-1).contiguous()
    if answer.numel() not in (1, n_tensors):
        raise ArgumentValueError(
            f"{type(policy).__name__}.coefficient must return one number or one for each of the "
            f"{n_tensors} parameters, got {answer.numel()}; table[:-1] has a row for each"
        )
    return answer


def _clamp_scaled(batch: _kernels.Batch, limit: Tensor) -> None:
    """Clamp to a limit that lies on the device, without reading it."""
    for tensor in batch.tensors():
        values = tensor if tensor.layout is torch.strided else tensor._values()
        here = limit.to(values.device)
        torch.clamp(values, -here, here, out=values)
