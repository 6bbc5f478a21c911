"""From the argument ``clip`` of `attach` to a policy; what ``clip="auto"`` stands for."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from torch.optim import Optimizer

from gradstat._optimizer_kind import is_scale_free
from gradstat.clipping.policies import AutoClip, Value
from gradstat.clipping.policy import Chain, FusedPolicy, Policy, check, policies_of
from gradstat.errors import ArgumentTypeError, ArgumentValueError

MAX_STEPS = 4
"""Policies that one statistics kernel runs (``kMaxPolicySteps``)."""

AUTO = AutoClip(percentile=50.0, window=100, factor=1.5, min_history=10, warmup_norm=1.0)
"""``clip="auto"`` for an optimizer whose step grows with the gradient, such as SGD.

No norm above one and a half times the median of the last hundred; 1.0 in the first nine steps, when
no median can be trusted. docs/clipping.md argues it from measurements.
"""

AUTO_SCALE_FREE = AutoClip(
    percentile=50.0, window=100, factor=1.0, min_history=10, warmup_norm=1.0, peak_share=0.5
)
"""``clip="auto"`` for an optimizer that divides by past gradients, such as AdamW.

To clip half of the steps costs such an optimizer nothing, since only the ratio of one gradient to
the others counts. Half of the highest median evens out the large gradients of the first steps,
which would otherwise stay in the second moment and shorten the steps that follow.
"""


def auto_policy(optimizer: Optimizer | None) -> AutoClip:
    """Return what ``clip="auto"`` stands for with this optimizer.

    One that is not known gets `AUTO`, which is safe for all.
    """
    return AUTO_SCALE_FREE if is_scale_free(optimizer) else AUTO


def resolve(clip: object, optimizer: Optimizer | None = None) -> Policy | None:
    """Return the policy that the argument ``clip`` of `attach` means.

    Raises:
        ArgumentTypeError: It means none.
        ArgumentValueError: Policies are combined that cannot be.
    """
    if clip is None:
        return None
    if isinstance(clip, str):
        if clip != "auto":
            raise ArgumentValueError(
                f'clip must be a policy or "auto", got {clip!r}; use clip="auto"'
            )
        return auto_policy(optimizer)
    if isinstance(clip, Policy):
        policy = clip
    elif isinstance(clip, Iterable):
        policies = tuple(check(entry) for entry in clip)
        if not policies:
            return None
        policy = Chain(policies)
    else:
        raise ArgumentTypeError(
            f"clip must be a policy, a list of policies or None, got {type(clip).__name__}; "
            "use for example clip=gradstat.GlobalNorm(1.0)"
        )
    _check_order(policies_of(policy))
    return policy


def _check_order(policies: tuple[Policy, ...]) -> None:
    def stage(policy: Policy) -> int:
        return 0 if isinstance(policy, FusedPolicy) else 2 if isinstance(policy, Value) else 1

    for first, second in pairwise(policies):
        if stage(second) < stage(first):
            raise ArgumentValueError(
                f"{type(second).__name__} must stand before {type(first).__name__}: it works on "
                "the norms of the one read of the gradients, the other changes them; swap the two"
            )
    fused = [policy for policy in policies if isinstance(policy, FusedPolicy)]
    if len(fused) > MAX_STEPS:
        raise ArgumentValueError(
            f"clip must combine at most {MAX_STEPS} of the fused policies, got {len(fused)}; "
            "drop some, or subclass gradstat.Policy"
        )
