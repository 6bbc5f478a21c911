"""Loss scaling: what a GradScaler leaves on an optimizer, and the steps that it drops."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradstat.errors import ArgumentTypeError


def is_fused(optimizer: Optimizer) -> bool:
    """Return whether the step reads ``found_inf`` on the device, for every parameter."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def makes_momentum(optimizer: Optimizer) -> bool:
    """Return whether this step makes the momentum buffers of a group of a fused SGD.

    torch (2.13, ``_fused_sgd``) leaves them uninitialised where ``found_inf`` is set in that step,
    and the next step goes on with what happened to be in memory.
    """
    return any(
        group.get("momentum") and _makes_momentum(optimizer, group["params"])
        for group in optimizer.param_groups
    )


def _makes_momentum(optimizer: Optimizer, parameters: Iterable[Tensor]) -> bool:
    found = False
    for parameter in parameters:
        if parameter.grad is not None:
            if optimizer.state.get(parameter, {}).get("momentum_buffer") is not None:
                return False
            found = True
    return found


def amp_scalar(
    optimizer: Optimizer, name: str, device: torch.device | None = None
) -> Tensor | None:
    """Return ``grad_scale`` or ``found_inf`` of an optimizer that reads them: fp32, shape ().

    On the device it is on, if none is named.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    value = getattr(optimizer, name, None)
    if value is None:
        return None
    value = torch.as_tensor(value).detach()
    return value.to(device or value.device, torch.float32).reshape(())


class OverflowCount:
    """Counts the steps that a GradScaler dropped.

    A fused optimizer's step is called all the same, with ``found_inf`` set. Another's is not called
    at all: such a step shows in the scaler's scale, which has fallen by the next step.
    """

    def __init__(self, scaler: Any) -> None:
        if scaler is not None and not hasattr(scaler, "get_backoff_factor"):
            raise ArgumentTypeError(
                f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}; pass the "
                "object whose step(optimizer) is called"
            )
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        """Whose scale tells of dropped steps; None where there is none, or the optimizer hears."""

        self._counted = 0
        self._on_device: Tensor | None = None
        self._stepped = False
        self._seen = self._scale_and_tracker()

    def heard(self, found_inf: Tensor) -> None:
        """Count a fused step that the scaler drops, if it does. Synchronises with no device."""
        self.scaler = None  # it has told all that there is to know
        if self._on_device is None or self._on_device.device != found_inf.device:
            self._counted = self._total_heard()
            self._on_device = torch.zeros((), dtype=torch.int64, device=found_inf.device)
        self._on_device += found_inf > 0

    def look(self) -> None:
        """Count the steps dropped since the last look, which is right after a step was taken.

        Waits for the device, as the scaler has just done itself.
        """
        self._counted += self._dropped_since()
        self._seen, self._stepped = self._scale_and_tracker(), True

    @property
    def total(self) -> int:
        """Steps dropped so far. Synchronises."""
        return self._total_heard() + self._dropped_since()

    def restore(self, total: int) -> None:
        """Go on from a saved total."""
        self._counted, self._on_device, self._stepped = total, None, False
        self._seen = self._scale_and_tracker()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_counted": self.total, "_on_device": None, "scaler": None}

    def _total_heard(self) -> int:
        return self._counted + (int(self._on_device.item()) if self._on_device is not None else 0)

    def _scale_and_tracker(self) -> tuple[float, int]:
        """Return the scale and the number of steps since it changed."""
        if self.scaler is None:
            return 1.0, 0
        state = self.scaler.state_dict()
        return float(state["scale"]), int(state["_growth_tracker"])

    def _dropped_since(self) -> int:
        """Return how often the scale has fallen since the last look."""
        scaler = self.scaler
        if scaler is None:
            return 0
        scale, tracker = self._scale_and_tracker()
        if (scale, tracker) == self._seen:
            return 0
        expected = self._seen[0]
        if self._stepped and self._seen[1] + 1 == scaler.get_growth_interval():
            expected *= scaler.get_growth_factor()
        if not 0 < scale < expected:
            return 0
        return max(1, round(math.log(scale / expected) / math.log(scaler.get_backoff_factor())))
