"""Clipping of gradients, on the norms that the kernels measure."""

from gradstat.clipping.functional import clip_grad_norm_, clip_grad_value_, get_total_norm
from gradstat.clipping.policies import (
    AGC,
    AdaGC,
    AutoClip,
    GlobalNorm,
    PerLayer,
    SkipOnSpike,
    Value,
    ZClip,
)
from gradstat.clipping.policy import Chain, Policy

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "Chain",
    "GlobalNorm",
    "PerLayer",
    "Policy",
    "SkipOnSpike",
    "Value",
    "ZClip",
    "clip_grad_norm_",
    "clip_grad_value_",
    "get_total_norm",
]
