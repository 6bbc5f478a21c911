"""Short ways to call the compiled kernels, to make their input, and to judge what they give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from reference import COLUMNS, moments
from torch import Tensor

from gradstat import _native
from gradstat._kernels import OUT_FACTOR, OUT_NORM, Nonfinite
from gradstat.clipping.policies import Opcode

# Best first, and whether this processor runs each.
CPU_VARIANTS: dict[str, bool] = dict(_native.cpu_variants())

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

# Largest relative error of abs_sum, sq_sum and l2 on the CPU, and of sum relative to abs_sum. The
# contract is 1e-6 throughout; fp64 is summed in double, the others by sixteens in fp32.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 5e-7,
    torch.bfloat16: 5e-7,
    torch.float16: 5e-7,
}
APPROXIMATE = ("sum", "abs_sum", "sq_sum", "l2")
SMALLEST = math.ulp(0.0)  # results below 2^-1022 have no relative accuracy


class Result(NamedTuple):
    table: Tensor
    histogram: Tensor | None
    norm: float
    coefficient: float


def run_moments(
    tensors: Sequence[Tensor | None],
    *,
    threads: int = 1,
    histogram: bool = False,
    max_norm: float = math.inf,
    norm_kind: int = 2,
) -> Result:
    """Run the kernel on tensors that it can read as they are."""
    listed = _native.TensorList(tensors, False)
    # Full of what no kernel gives: a column left unwritten shows.
    table = torch.full((len(tensors) + 1, _native.NUM_COLUMNS), -7.0, dtype=torch.float64)
    bins = None
    if histogram:
        bins = torch.full((len(tensors) + 1, _native.HISTOGRAM_BINS), -7, dtype=torch.int64)
    clip = clip_to(max_norm, norm_kind)
    clip.out = out = torch.full((_native.NUM_CLIP_OUT,), -7.0, dtype=torch.float64)
    _native.moments(listed, table, bins, clip, threads=threads)
    return Result(table, bins, out[OUT_NORM].item(), out[OUT_FACTOR].item())


def clip_to(max_norm: float, norm_kind: int) -> Any:
    """Return the clip program of clip_grad_norm_."""
    if max_norm == math.inf:
        return _native.Clip(norm_kind, Nonfinite.KEEP, [])
    return _native.Clip(norm_kind, Nonfinite.CLIP, [(Opcode.GLOBAL_NORM, [max_norm], 0)])


def scale_in_place(
    tensors: Sequence[Tensor | None], coefficient: float | Sequence[float], threads: int = 1
) -> None:
    one = isinstance(coefficient, int | float)
    values = torch.tensor([coefficient] if one else coefficient, dtype=torch.float64)
    _native.scale(_native.TensorList(tensors, False), values, not one, threads)


def clamp_in_place(tensors: Sequence[Tensor | None], limit: float, threads: int = 1) -> None:
    _native.clamp(_native.TensorList(tensors, False), limit, threads)


def sample(n: int, dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Make n values of either sign, from 1e-6 to 1e2 in magnitude, every tenth a zero."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(3, n, generator=generator, dtype=torch.float64)
    values = 10 ** (draws[0] * 8 - 6) * (draws[1] - 0.4).sign()
    return torch.where(draws[2] < 0.1, 0.0, values).to(dtype)


def guarded(values: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Return a buffer of NaN with the values in its middle, unaligned, and the view of them."""
    buffer = torch.full((offset + values.numel() + 64,), math.nan, dtype=values.dtype)
    view = buffer[offset : offset + values.numel()]
    view.copy_(values)
    return buffer, view


def bits_of(tensor: Tensor) -> Tensor:
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(sizes[tensor.element_size()])


def assert_table(
    actual: Tensor,
    tensors: Sequence[Tensor | None],
    expected: np.ndarray | None = None,
    tolerance: float | None = None,
) -> None:
    """Check every column of every row, totals included, against the oracle.

    Counts and extremes must be exact; sums may be off by the tolerance of the tensor's dtype.
    """
    table = actual.numpy()
    expected = moments(tensors) if expected is None else expected
    assert table.shape == expected.shape
    dtypes = [torch.float64 if t is None or t.is_complex() else t.dtype for t in tensors]
    bounds = [TOLERANCE[dtype] if tolerance is None else tolerance for dtype in dtypes]
    relative = np.array([*bounds, max(bounds, default=0.0)])
    abs_sum = expected[:, COLUMNS.index("abs_sum")]
    for column, name in enumerate(COLUMNS):
        got, want = table[:, column], expected[:, column]
        allowed = np.zeros(len(got))
        if name in APPROXIMATE:
            allowed = relative * (abs_sum if name == "sum" else want) + SMALLEST
        with np.errstate(invalid="ignore"):  # Inf - Inf
            close = np.abs(got - want) <= allowed
        # A sum whose magnitudes leave the range of fp64 has no bound.
        free = np.isinf(abs_sum) if name == "sum" else False
        right = close | (got == want) | (np.isnan(got) & np.isnan(want)) | free
        if not right.all():
            at = int(np.flatnonzero(~right)[0])
            what = "totals" if at == len(tensors) else describe(tensors[at])
            raise AssertionError(f"{name} of row {at} ({what}): got {got[at]}, want {want[at]}")


def describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{tensor.dtype}, shape {tuple(tensor.shape)}, strides {tensor.stride()}"


def assert_same_values(actual: Tensor, expected: Tensor) -> None:
    """Check for equal bits, except that any NaN equals any other."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    same = (bits_of(actual) == bits_of(expected)) | (actual.isnan() & expected.isnan())
    if not same.all():
        at = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(f"element {at}: got {actual[at].item()}, want {expected[at].item()}")
