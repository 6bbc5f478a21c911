"""The clip policies in plain Python, each from its paper or the program that made it known.

Nothing here imports the package. A policy takes the norm of every gradient by name, and answers
with a factor for each, or `None` to skip the step. Norms that are not finite never reach a policy:
`Reference` keeps them away, which the published versions do not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Norms = Mapping[str, float]
Factors = dict[str, float]


def total(norms: Norms) -> float:
    return math.hypot(*norms.values())


class Rule(Protocol):
    def factors(self, norms: Norms) -> Factors | None: ...


class GlobalNorm:
    """torch.nn.utils.clip_grad_norm_, with its 1e-6."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def factors(self, norms: Norms) -> Factors:
        return dict.fromkeys(norms, min(1.0, self.max_norm / (total(norms) + 1e-6)))


class PerLayer:
    """The same for each gradient on its own."""

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm

    def factors(self, norms: Norms) -> Factors:
        return {name: min(1.0, self.max_norm / (norm + 1e-6)) for name, norm in norms.items()}


class AutoClip:
    """Seetharaman et al. 2020, arXiv:2007.14469, with a bound on the history.

    The norm goes into the history first, then the percentile is taken. The paper has no factor, no
    least history (so no norm until then), and no regard to the highest percentile.
    """

    def __init__(
        self,
        percentile: float,
        window: int,
        factor: float = 1.0,
        min_history: int = 1,
        warmup_norm: float = math.inf,
        peak_share: float = math.inf,
    ) -> None:
        self.percentile, self.window, self.factor = percentile, window, factor
        self.min_history, self.warmup_norm = min_history, warmup_norm
        self.peak_share, self.peak = peak_share, 0.0
        self.history: list[float] = []

    def factors(self, norms: Norms) -> Factors:
        norm = total(norms)
        self.history = [*self.history, norm][-self.window :]
        limit = self.warmup_norm
        if len(self.history) >= self.min_history:
            level = float(np.percentile(self.history, self.percentile))
            self.peak = max(self.peak, level)
            limit = min(self.factor * level, self.peak_share * self.peak)
        return dict.fromkeys(norms, min(1.0, limit / norm))


class ZClip:
    """Kumar et al. 2025, arXiv:2504.02507: z-score on moving averages, reciprocal clipping.

    `floor` is the least deviation, as a share of the mean; the published version has none.
    """

    def __init__(
        self,
        alpha: float,
        z_thresh: float,
        warmup_steps: int,
        max_grad_norm: float,
        floor: float = 0.0,
    ) -> None:
        self.alpha, self.z_thresh, self.floor = alpha, z_thresh, floor
        self.warmup_steps, self.max_grad_norm = warmup_steps, max_grad_norm
        self.warmup: list[float] = []
        self.mean = self.variance = math.nan

    def factors(self, norms: Norms) -> Factors:
        norm = total(norms)
        limit = math.inf
        if len(self.warmup) < self.warmup_steps:
            self.warmup.append(norm)
            self.mean, self.variance = float(np.mean(self.warmup)), float(np.var(self.warmup))
        else:
            deviation = max(math.sqrt(self.variance), self.floor * self.mean)
            z = (norm - self.mean) / (deviation + 1e-6)
            if z > self.z_thresh:
                limit = self.mean + self.z_thresh * deviation / (z / self.z_thresh)
            taken = min(norm, limit)
            self.mean = self.alpha * self.mean + (1 - self.alpha) * taken
            square = (taken - self.mean) ** 2
            self.variance = self.alpha * self.variance + (1 - self.alpha) * square
        return dict.fromkeys(norms, min(1.0, min(limit, self.max_grad_norm) / norm))


class SkipOnSpike:
    """OLMo-core's SkipStepOptimizer, on the gradient norm; one-sided, as its later versions are.

    The history holds the norms before this one; their count with this one must have reached
    `min_history`. `floor` is the least deviation, as a share of the mean; OLMo-core has none.
    """

    def __init__(self, sigma: float, window: int, min_history: int, floor: float = 0.0) -> None:
        self.sigma, self.window, self.min_history = sigma, window, min_history
        self.floor = floor
        self.history: list[float] = []

    def factors(self, norms: Norms) -> Factors | None:
        norm = total(norms)
        past, self.history = self.history, [*self.history, norm][-self.window :]
        if len(past) + 1 < self.min_history or len(past) < 2:
            return dict.fromkeys(norms, 1.0)
        mean, deviation = float(np.mean(past)), float(np.std(past, ddof=1))
        limit = mean + self.sigma * max(deviation, self.floor * mean)
        return None if norm > limit else dict.fromkeys(norms, 1.0)


class AdaGC:
    """Wang et al. 2025, arXiv:2502.11034, algorithm 1."""

    def __init__(
        self, lambda_rel: float, lambda_abs: float, beta: float, warmup_steps: int
    ) -> None:
        self.lambda_rel, self.lambda_abs = lambda_rel, lambda_abs
        self.beta, self.warmup_steps = beta, warmup_steps
        self.gamma: dict[str, float] = {}
        self.step = 0

    def factors(self, norms: Norms) -> Factors:
        result = {}
        for name, norm in norms.items():
            if self.step < self.warmup_steps:
                factor = min(1.0, self.lambda_abs / total(norms))
                self.gamma[name] = min(self.gamma.get(name, math.inf), factor * norm)
            else:
                gamma = self.gamma.get(name, norm)
                factor = min(1.0, self.lambda_rel * gamma / norm)
                self.gamma[name] = self.beta * gamma + (1 - self.beta) * factor * norm
            result[name] = factor
        self.step += 1
        return result


class Reference:
    """Policies one after the other, kept from norms that are not finite and from all-zero steps."""

    def __init__(self, *rules: Rule) -> None:
        self.rules = rules

    def factors(self, norms: Norms) -> Factors | None:
        """Return the product of the policies' factors; `None` where the step is to be skipped."""
        if not math.isfinite(total(norms)):
            return None
        result = dict.fromkeys(norms, 1.0)
        for rule in self.rules:
            left = {name: norm * result[name] for name, norm in norms.items()}
            if total(left) == 0:
                break
            answer = rule.factors(left)
            if answer is None:
                return None
            result = {name: result[name] * answer[name] for name in norms}
        return result


def agc(
    weight: NDArray[np.float64], gradient: NDArray[np.float64], clipping: float, eps: float
) -> NDArray[np.float64]:
    """Return the gradient clipped unit by unit (Brock et al. 2021, arXiv:2102.06171, section 4.1).

    A unit is a row of a matrix or a kernel of a convolution; a vector is one unit.
    """
    units: Sequence[int | EllipsisType] = range(len(weight)) if weight.ndim > 1 else [...]
    result = gradient.copy()
    for unit in units:
        allowed = clipping * max(float(np.linalg.norm(weight[unit])), eps)
        norm = float(np.linalg.norm(gradient[unit]))
        if norm > allowed:
            result[unit] = gradient[unit] * (allowed / norm)
    return result


def value(gradient: NDArray[np.float64], limit: float) -> NDArray[np.float64]:
    """Return the gradient clamped element by element (torch.nn.utils.clip_grad_value_)."""
    return np.clip(gradient, -limit, limit)
