"""What a clip policy is: a small immutable description, which `clipper` carries out.

A policy with an `opcode` runs inside the statistics kernel, on the device, with its state beside
it (``csrc/policy.h``); the others work on the finished table or on the elements. Policies combine
with ``|`` or in a list; each with an `opcode` sees the norms that the ones before it leave.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import ClassVar

from torch import Tensor

from gradstat.errors import ArgumentTypeError


class Opcode(IntEnum):
    """Numbers of the policies in ``csrc/kernels.h``, enum PolicyKind."""

    GLOBAL_NORM = 0
    PERCENTILE = 1
    ZCLIP = 2
    SKIP_ON_SPIKE = 3
    PER_LAYER = 4
    ADAGC = 5


class Policy:
    """A rule for clipping. Subclass it and override `coefficient` for one of your own.

    Example:
        >>> from gradstat.columns import L2
        >>> class HalveWhenLarge(gradstat.Policy):
        ...     def coefficient(self, table):
        ...         return torch.where(table[-1, L2] > 10, 0.5, 1.0)
    """

    def coefficient(self, table: Tensor) -> Tensor:
        """Return what to multiply the gradients by: one number, or one for each.

        Called on every step with the step's table; must not synchronise if the step is not to.
        State that it keeps is not in ``state_dict``.

        Args:
            table: fp64 of shape (parameters + 1, 12), the last row holding the totals, columns as
                in ``gradstat.columns.RAW_COLUMNS``, on the gradients' device. The row of a
                parameter without a gradient is NaN. Norms are those before clipping, in true units.

        Returns:
            Tensor of shape () or (1,) for all gradients, or (parameters,) for each. 1 and NaN leave
            a gradient as it is.
        """
        raise TypeError(f"{type(self).__name__} must override coefficient(table)")

    def __or__(self, other: Policy) -> Chain:
        """Return both policies, this one first."""
        return Chain((self, other))

    def __repr__(self) -> str:
        # Without the address: a checkpoint's policy is compared with the one of the run.
        return f"{type(self).__name__}()"


@dataclass(frozen=True)
class Chain(Policy):
    """Several policies, one after the other."""

    policies: tuple[Policy, ...]

    def __post_init__(self) -> None:
        flat: list[Policy] = []
        for policy in self.policies:
            flat.extend(policy.policies if isinstance(policy, Chain) else [check(policy)])
        object.__setattr__(self, "policies", tuple(flat))

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.policies))


@dataclass(frozen=True)
class FusedPolicy(Policy):
    """A policy that runs in the statistics kernel, with its fields as parameters, in order."""

    opcode: ClassVar[Opcode]

    def parameters(self) -> list[float]:
        """Return the parameters as ``csrc/policy.h`` takes them."""
        return [float(getattr(self, field.name)) for field in fields(self)]

    def initial_state(self, n_tensors: int) -> list[float]:
        """Return the state before the first step."""
        del n_tensors
        return []


def check(policy: object) -> Policy:
    """Return the argument.

    Raises:
        ArgumentTypeError: It is no policy.
    """
    if not isinstance(policy, Policy):
        raise ArgumentTypeError(
            f"a policy must be a gradstat.Policy, got {type(policy).__name__}; use for example "
            "gradstat.GlobalNorm(1.0)"
        )
    return policy


def policies_of(policy: Policy | None) -> tuple[Policy, ...]:
    """Return the single policies of a policy."""
    if policy is None:
        return ()
    return policy.policies if isinstance(policy, Chain) else (policy,)
