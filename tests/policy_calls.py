"""Runs policies on norms that a test chooses: each gradient is one fp64 number, its own norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import gradstat
from gradstat import _kernels
from gradstat.clipping.clipper import Clipper
from gradstat.clipping.policy import Policy
from gradstat.columns import L2

CPU = torch.device("cpu")


class Decided(NamedTuple):
    norm: float
    factor: float
    coefficient: float
    skip: bool
    allowed: float
    finite: bool
    factors: list[float]
    """What each gradient was multiplied by, measured on it; NaN for a missing one."""


class Runner:
    """A policy at work on the gradients of named parameters, step after step."""

    def __init__(
        self,
        policy: Policy | None,
        names: Sequence[str],
        *,
        nonfinite: _kernels.Nonfinite = _kernels.Nonfinite.SKIP,
    ) -> None:
        self.clipper = Clipper(policy, nonfinite)
        self.clipper.bind(names, CPU)
        self.names = list(names)

    def step(
        self,
        norms: Mapping[str, float],
        *,
        grad_scale: float | None = None,
        found_inf: Tensor | None = None,
    ) -> Decided:
        """Measure and scale gradients of these norms; names without one have no gradient."""
        scale = 1.0 if grad_scale is None else grad_scale
        before = [
            torch.tensor([norms[name] * scale], dtype=torch.float64) if name in norms else None
            for name in self.names
        ]
        after = [None if gradient is None else gradient.clone() for gradient in before]
        batch = _kernels.gather(after)
        table = torch.empty((len(before) + 1, _kernels.NUM_COLUMNS), dtype=torch.float64)
        out = torch.full((_kernels.NUM_CLIP_OUT,), -7.0, dtype=torch.float64)
        self.clipper.measure(
            batch,
            table,
            out,
            grad_scale=None if grad_scale is None else torch.tensor(grad_scale),
            found_inf=found_inf,
        )
        self.clipper.apply(batch, out, str)
        factors = [
            math.nan if old is None or new is None else (new / old).item()
            for old, new in zip(before, after, strict=True)
        ]
        norm, factor, coefficient, skip, allowed, finite = out.tolist()
        return Decided(norm, factor, coefficient, bool(skip), allowed, bool(finite), factors)

    def steps(self, sequence: Sequence[Mapping[str, float]]) -> list[Decided]:
        return [self.step(norms) for norms in sequence]

    @property
    def counters(self) -> list[int]:
        """Steps, clipped, skipped, skipped in a row."""
        assert self.clipper.state is not None
        return [int(n) for n in self.clipper.state[: _kernels.NUM_CLIP_COUNTERS].tolist()]


class Halving(gradstat.Policy):
    """Halves all gradients when their total norm is above 0.5."""

    def coefficient(self, table: Tensor) -> Tensor:
        return torch.where(table[-1, L2] > 0.5, 0.5, 1.0)
