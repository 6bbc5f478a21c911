"""Tables of known arrays, and the comparison of two tables."""

from __future__ import annotations

import math

import numpy as np
import torch

from gradstat.table import StatTable

COUNTS = (
    "numel", "zeros", "nans", "infs", "rows", "dead_rows", "finite", "nonfinite"
)  # fmt: skip
NAMES = ["embed.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight", "head.weight"]


def raw_row(values):
    """The twelve raw columns of an array, summed exactly; None is a tensor that is missing."""
    if values is None:
        return [math.nan] * 12
    flat = np.asarray(values, np.float64).ravel()
    finite = flat[np.isfinite(flat)].tolist()
    sizes = [abs(x) for x in finite]
    rows = values.reshape(values.shape[0], -1)
    return [
        flat.size, int((flat == 0).sum()), int(np.isnan(flat).sum()), int(np.isinf(flat).sum()),
        math.fsum(finite), math.fsum(sizes), math.fsum(x * x for x in finite),
        max(sizes, default=0.0), min((x for x in sizes if x), default=0.0),
        rows.shape[0], sum(not row.any() for row in rows), math.hypot(*finite),
    ]  # fmt: skip


def raw_table(arrays):
    present = [a for a in arrays if a is not None]
    total = raw_row(np.concatenate([a.ravel() for a in present])) if present else [0.0] * 12
    total[9] = sum(a.shape[0] for a in present)
    total[10] = sum(raw_row(a)[10] for a in present)
    return torch.tensor([*map(raw_row, arrays), total], dtype=torch.float64)


def arrays_of(seed):
    rng = np.random.default_rng(seed)
    embed = rng.normal(size=(20, 6))
    embed[4:17] = 0.0
    broken = rng.normal(size=(4, 5))
    broken[0, 1], broken[2, 2], broken[3, 0] = np.nan, np.inf, -np.inf
    return [embed, rng.normal(3.0, 0.1, size=(7, 9)), None, broken, 1e-30 * rng.normal(size=(2, 3))]


def histogram_of(arrays):
    """Bin by bin from the edges, as the contract words it."""
    table = np.zeros((len(arrays) + 1, 256), np.int64)
    for row, values in zip(table, arrays, strict=False):
        if values is not None:
            sizes = np.abs(values[np.isfinite(values) & (values != 0)])
            row[:] = np.histogram(sizes, [0.0, *(2.0**e for e in range(-126, 129)), np.inf])[0]
    table[-1] = table.sum(0)
    return torch.from_numpy(table)


def without_broken(seed):
    arrays = arrays_of(seed)
    return [np.nan_to_num(a, posinf=1.0, neginf=-1.0) if a is not None else None for a in arrays]


def assert_same_table(left, right):
    assert (left.names, left.kind, left.averaged) == (right.names, right.kind, right.averaged)
    # Bytes, so that NaN equals NaN and -0.0 differs from 0.0.
    assert left.data.cpu().numpy().tobytes() == right.data.cpu().numpy().tobytes()
    if left.histogram is None or right.histogram is None:
        assert left.histogram is right.histogram is None
    else:
        assert left.histogram.dtype == right.histogram.dtype
        assert (left.histogram_data.cpu() == right.histogram_data.cpu()).all()


def window_of(count):
    stacks = [without_broken(seed) for seed in range(count)]
    return stacks, [StatTable(NAMES, raw_table(s), histogram_of(s)) for s in stacks]


def variants():
    arrays = arrays_of(0)
    data = raw_table(arrays)
    odd = ["", "a\0", "ünï.weight", "x" * 300, "\ud800"]
    return {
        "plain": StatTable(NAMES, data),
        "histogram": StatTable(NAMES, data, histogram_of(arrays), kind="weight"),
        "odd names": StatTable(odd, data),
        "average": StatTable(NAMES, data, histogram_of(arrays)) / 3,
        "no rows": StatTable([], torch.zeros(1, 12, dtype=torch.float64)),
    }
