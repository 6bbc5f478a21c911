"""`activation_stats`: what one tensor of activations tells of its units."""

from __future__ import annotations

import torch
from torch import Tensor

from gradstat import _kernels
from gradstat.activations.kinds import chosen_bounds, find_kind
from gradstat.activations.table import ActivationStats, ActivationTable, Layout, Measured, packed
from gradstat.errors import ArgumentTypeError


def activation_stats(
    x: Tensor,
    kind: str = "relu",
    unit_dim: int = 1,
    *,
    low: float | None = None,
    high: float | None = None,
) -> ActivationStats:
    """Return dead and saturated units, zeros and moments of an activation, from one read of it.

    Args:
        x: Output of an activation function: any shape and strides, fp64, fp32, bf16 or fp16, on any
            device. It is not changed and not kept.
        kind: The function that made it, a row of the table in docs/activations.md.
        unit_dim: The dimension of channels or features: 1 after a convolution, -1 in a transformer.
            For softmax the dimension that sums to 1.
        low: Saturated low is y < low, in place of the kind's bound (y <= low where the function
            reaches its limit: hardtanh, hardsigmoid, relu6, threshold).
        high: Saturated high is y > high, or y >= high, in the same way.

    Returns:
        The result, which lies on the tensor's device. Does not synchronise with a CUDA device; the
        first number that is looked at does. A device without a kernel synchronises.

    Raises:
        ArgumentTypeError: ``x`` is no tensor, or another argument has the wrong type.
        ArgumentValueError: There is no such kind, ``x`` has no dimension ``unit_dim``, or a bound
            does not fit.
        UnsupportedTensorError: ``x`` holds no real floating-point numbers in memory.

    Example:
        >>> stats = gradstat.activation_stats(torch.relu(hidden), "relu", unit_dim=-1)
        >>> stats.dead_units, stats.units, stats.zero_fraction

    Reference:
        Dead units: Lu et al. 2019, "Dying ReLU and Initialization", 1903.06733.
    """
    found = find_kind(kind)
    bounds = chosen_bounds(found, low, high)
    if not isinstance(unit_dim, int) or isinstance(unit_dim, bool):
        raise ArgumentTypeError(
            f"unit_dim must be an int, got {type(unit_dim).__name__}; pass 1 for channels or -1 "
            "for features"
        )
    rule = found.rule(bounds, x.dtype if isinstance(x, Tensor) else torch.float64)
    counts = _kernels.units(x, rule, unit_dim, name="x")
    positions = x.numel() // max(x.size(unit_dim) if x.dim() else 1, 1)
    site, device = Measured(found.name, found, counts.counts.shape[1]), counts.row.device
    layout = Layout([site], {device: [site.name]})
    with torch.no_grad():
        return ActivationTable(layout, {device: packed(counts)}, [positions], steps=1)[0]
