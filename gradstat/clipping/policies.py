"""The policies: fixed norms, norms learnt from the run, and limits on units and elements.

Each is described, with its formula, defaults and use, in docs/clipping.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradstat.clipping.policy import FusedPolicy, Opcode, Policy
from gradstat.errors import ArgumentValueError


def _require_positive(owner: str, name: str, value: float, remedy: str) -> None:
    if not isinstance(value, int | float) or not value > 0:
        raise ArgumentValueError(f"{owner}: {name} must be positive, got {value!r}; {remedy}")


def _require_share(owner: str, name: str, value: float, remedy: str) -> None:
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise ArgumentValueError(f"{owner}: {name} must lie in [0, 1), got {value!r}; {remedy}")


def _require_count(owner: str, name: str, value: int, least: int, remedy: str) -> None:
    if not isinstance(value, int) or value < least:
        raise ArgumentValueError(
            f"{owner}: {name} must be a whole number of at least {least}, got {value!r}; {remedy}"
        )


def _require_names(owner: str, name: str, value: object) -> None:
    if isinstance(value, str):  # its letters would be taken for names
        raise ArgumentValueError(
            f"{owner}: {name} must be a tuple of names, got {value!r}; use {name}=({value!r},)"
        )


_NO_LIMIT = 'use float("inf") for no limit'


def _published(value: float) -> str:
    return f"the published value is {value}"


@dataclass(frozen=True)
class GlobalNorm(FusedPolicy):
    """Scale all gradients by ``min(1, max_norm / (norm + 1e-6))``.

    Reference: Pascanu et al. 2013, arXiv:1211.5063; torch.nn.utils.clip_grad_norm_.
    """

    max_norm: float
    """Largest total L2 norm, in the gradients' unit."""

    opcode = Opcode.GLOBAL_NORM

    def __post_init__(self) -> None:
        _require_positive("GlobalNorm", "max_norm", self.max_norm, _NO_LIMIT)


@dataclass(frozen=True)
class PerLayer(FusedPolicy):
    """Scale each gradient by ``min(1, max_norm / (norm + 1e-6))`` of its own L2 norm."""

    max_norm: float
    """Largest L2 norm of one parameter's gradient."""

    opcode = Opcode.PER_LAYER

    def __post_init__(self) -> None:
        _require_positive("PerLayer", "max_norm", self.max_norm, _NO_LIMIT)


@dataclass(frozen=True)
class AutoClip(FusedPolicy):
    """Clip the total norm to a percentile of the norms so far, this step's included.

    The norm allowed is ``min(factor * percentile, peak_share * highest percentile so far)``. The
    history is bounded by ``window``; norms that are not finite, or zero, never enter it. At the
    defaults this is the published rule, but for the bound.

    Reference: Seetharaman et al. 2020, arXiv:2007.14469, section 2 (percentile 10 of all norms).
    """

    percentile: float = 10.0
    """0..100; at the published value, 10, nine steps in ten are clipped."""

    window: int = 1000
    """Norms remembered."""

    factor: float = 1.0
    """Multiplies the percentile."""

    min_history: int = 1
    """Norms, this step's included, from which the percentile is trusted."""

    warmup_norm: float = math.inf
    """Largest norm until then."""

    peak_share: float = math.inf
    """Largest norm as a share of the highest percentile so far; ``inf`` for any."""

    opcode = Opcode.PERCENTILE

    def __post_init__(self) -> None:
        if not isinstance(self.percentile, int | float) or not 0 <= self.percentile <= 100:
            raise ArgumentValueError(
                f"AutoClip: percentile must lie in 0..100, got {self.percentile!r}; "
                + _published(10)
            )
        _require_positive("AutoClip", "factor", self.factor, _published(1))
        _require_count("AutoClip", "window", self.window, 1, "use for example 1000")
        _require_count("AutoClip", "min_history", self.min_history, 1, _published(1))
        _require_positive("AutoClip", "warmup_norm", self.warmup_norm, _NO_LIMIT)
        _require_positive("AutoClip", "peak_share", self.peak_share, _NO_LIMIT)

    def initial_state(self, n_tensors: int) -> list[float]:
        """Return an empty window, room for its values in order, and no peak."""
        return [0.0] * (3 + 2 * self.window)


@dataclass(frozen=True)
class ZClip(FusedPolicy):
    """Clip norms that lie ``z_thresh`` deviations above their moving average.

    A norm n with z = (n - mean) / (deviation + 1e-6) above the threshold is brought down to
    ``mean + z_thresh^2 * deviation / z``; the averages then take the clipped norm. During warm-up,
    and afterwards on top, the norm is held to ``max_grad_norm``. A deviation under a thousandth of
    the mean counts as that much: a constant history makes no outlier of a rounding error.

    Reference: Kumar et al. 2025, arXiv:2504.02507, sections 3.1 to 3.3.
    """

    alpha: float = 0.97
    """Share of the past in the moving averages."""

    z_thresh: float = 2.5
    """Deviations above the mean that count as a spike."""

    warmup_steps: int = 25
    """Steps from which the first mean and variance are taken."""

    max_grad_norm: float = 1.0
    """Largest norm at any time; ``inf`` for none."""

    opcode = Opcode.ZCLIP

    def __post_init__(self) -> None:
        _require_share("ZClip", "alpha", self.alpha, _published(0.97))
        _require_positive("ZClip", "z_thresh", self.z_thresh, _published(2.5))
        _require_positive("ZClip", "max_grad_norm", self.max_grad_norm, _NO_LIMIT)
        _require_count("ZClip", "warmup_steps", self.warmup_steps, 1, _published(25))

    def initial_state(self, n_tensors: int) -> list[float]:
        """Return a count, mean, variance and sum of squares of no norms."""
        return [0.0] * 4


@dataclass(frozen=True)
class AdaGC(FusedPolicy):
    """Clip each gradient relative to the moving average of its own clipped norms.

    After warm-up a gradient's norm may be ``lambda_rel`` times its average gamma. During warm-up
    the total norm is held to ``lambda_abs`` and gamma is the smallest clipped norm so far. A
    gradient that is all zero teaches nothing (a gamma of 0 would never let go).

    Reference: Wang et al. 2025, arXiv:2502.11034, algorithm 1.
    """

    lambda_rel: float = 1.05
    """Norm allowed, as a multiple of gamma."""

    lambda_abs: float = 1.0
    """Largest total norm during warm-up."""

    beta: float = 0.98
    """Share of the past in gamma."""

    warmup_steps: int = 100
    """Steps of warm-up."""

    opcode = Opcode.ADAGC

    def __post_init__(self) -> None:
        _require_positive("AdaGC", "lambda_rel", self.lambda_rel, _published(1.05))
        _require_positive("AdaGC", "lambda_abs", self.lambda_abs, _published(1.0))
        _require_share("AdaGC", "beta", self.beta, _published(0.98))
        _require_count("AdaGC", "warmup_steps", self.warmup_steps, 0, _published(100))

    def initial_state(self, n_tensors: int) -> list[float]:
        """Return no steps, and for each gradient a gamma that any norm undercuts."""
        return [0.0] + [math.inf] * n_tensors


@dataclass(frozen=True)
class SkipOnSpike(FusedPolicy):
    """Skip a step whose total norm is ``sigma`` deviations above the mean of the last ``window``.

    Parameters and optimizer state stay as they are on a skipped step. Every finite norm enters the
    window, spikes too, so that a lasting change of level is accepted in time. Policies after it in
    a chain do not see a skipped step. The deviation has the same floor as that of `ZClip`.

    Reference: OLMo-core, SkipStepOptimizer (6 sigma over 128 steps).
    """

    sigma: float = 6.0
    """Deviations above the mean that count as a spike."""

    window: int = 128
    """Norms remembered."""

    min_history: int = 64
    """Norms, this step's included, needed before anything is skipped."""

    opcode = Opcode.SKIP_ON_SPIKE

    def __post_init__(self) -> None:
        _require_positive("SkipOnSpike", "sigma", self.sigma, _published(6))
        _require_count("SkipOnSpike", "window", self.window, 2, _published(128))
        _require_count("SkipOnSpike", "min_history", self.min_history, 2, _published(64))

    def initial_state(self, n_tensors: int) -> list[float]:
        """Return an empty window."""
        return [0.0] * (2 + self.window)


@dataclass(frozen=True)
class Value(Policy):
    """Clamp every element to [-max_value, max_value], after all other policies.

    Reference: torch.nn.utils.clip_grad_value_.
    """

    max_value: float
    """Largest magnitude of an element."""

    def __post_init__(self) -> None:
        _require_positive("Value", "max_value", self.max_value, _NO_LIMIT)


@dataclass(frozen=True)
class AGC(Policy):
    """Scale each unit's gradient to at most ``clipping`` times the norm of the unit's weights.

    A unit is a slice along dimension 0 (an output neuron or channel); a parameter of one dimension
    or less is one unit. ``min(1, clipping * max(norm W, eps) / norm G)``. Reads the weights and
    the gradients once more, with torch operations.

    A sparse gradient is left alone.

    Reference: Brock et al. 2021, arXiv:2102.06171, section 4.1; timm's agc.py.
    """

    clipping: float = 0.01
    """Largest ratio of gradient norm to weight norm (lambda)."""

    eps: float = 1e-3
    """Norm that a unit's weights have at least; without it units that start at 0 never move."""

    exclude: tuple[str, ...] = ()
    """Names of parameters, or prefixes of names, left alone: the paper excludes the last layer."""

    def __post_init__(self) -> None:
        _require_positive("AGC", "clipping", self.clipping, _published(0.01))
        _require_positive("AGC", "eps", self.eps, _published(0.001))
        _require_names("AGC", "exclude", self.exclude)

    def excludes(self, name: str) -> bool:
        """Return whether the parameter of this name is left alone."""
        return any(name == entry or name.startswith(entry + ".") for entry in self.exclude)
