"""What rules ask of every sample: computed of all that are alike at once, and kept with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gradstat.diagnosis.evidence import Batch, Floats

AT_ONCE = 32768
"""Numbers of an array that are computed with at once: 256 KB, which stay within a cache."""


def of_each(
    batches: Sequence[Batch],
    name: str,
    arrays: Sequence[str],
    compute: Callable[..., Iterable[Any]],
) -> list[Any]:
    """Return a fact of each batch; None where it lacks an array, or one is empty.

    Args:
        batches: Samples.
        name: What the fact is kept under.
        arrays: Names of the arrays that it follows from.
        compute: Function of the batches and of these arrays, stacked: (n, *shape of one); returns
            the fact of each of the n.
    """
    new = [batch for batch in batches if name not in batch.facts]
    for alike, stacks in _stacked(new, arrays):
        for batch, fact in zip(alike, compute(alike, *stacks), strict=True):
            batch.facts[name] = fact
    return [batch.facts.get(name) for batch in batches]


def _stacked(
    batches: Sequence[Batch], names: Sequence[str]
) -> Iterator[tuple[list[Batch], list[Floats]]]:
    """Yield batches of one shape with their arrays, as many at once as stay within a cache."""
    by_shape: dict[tuple[tuple[int, ...], ...], list[tuple[Batch, list[Floats]]]] = {}
    for batch in batches:
        arrays = [getattr(batch, name) for name in names]
        if all(array is not None and array.size for array in arrays):
            shapes = tuple([array.shape for array in arrays])
            by_shape.setdefault(shapes, []).append((batch, arrays))
    for shapes, alike in by_shape.items():
        count = max(1, AT_ONCE // max(map(math.prod, shapes)))
        for start in range(0, len(alike), count):
            chosen, rows = zip(*alike[start : start + count], strict=True)
            stacks = [
                np.concatenate(one).reshape(-1, *shape)
                for one, shape in zip(zip(*rows, strict=True), shapes, strict=True)
            ]
            yield list(chosen), stacks


def range_of_all(batches: Sequence[Batch], name: str) -> tuple[float, float]:
    """Return smallest and largest number of an array in all batches.

    (Inf, -Inf) of none, NaN where one of them holds some.
    """
    known = [batch.ranges[name] for batch in batches if name in batch.ranges]
    lows, highs = zip(*known, strict=True) if known else ((), ())
    return float(np.min(lows, initial=math.inf)), float(np.max(highs, initial=-math.inf))


def output_spreads(batches: Sequence[Batch]) -> list[float]:
    """Return the deviation of the outputs over the rows, over their size, where it is known."""
    known = of_each(batches, "spread of outputs", ("outputs",), _output_spreads)
    return [spread for spread in known if spread is not None]


def _output_spreads(batches: Sequence[Batch], stack: Floats) -> list[float | None]:
    n, n_rows = stack.shape[:2]
    if n_rows < 4:
        return [None] * n
    sizes = np.sqrt((stack.reshape(n, -1) ** 2).mean(1)).tolist()
    spreads = stack.reshape(n, n_rows, -1).std(1).mean(1).tolist()
    return [
        None if batch.holds_nonfinite("outputs") else spread / size if size > 0 else 0.0
        for batch, spread, size in zip(batches, spreads, sizes, strict=True)
    ]


def input_sums(batches: Sequence[Batch]) -> list[Floats]:
    """Return the weighted sum of each row of the inputs: the same for rows that are equal, (n,)."""
    known = of_each(batches, "sums of inputs", ("inputs",), _input_sums)
    return [np.zeros(0) if sums is None else sums for sums in known]


def _input_sums(_: object, stack: Floats) -> Floats:
    rows = stack.reshape(*stack.shape[:2], -1)
    weights = 1.5 + np.sin(np.arange(rows.shape[-1]) + 1.0)  # no few add up to others
    sums: Floats = (rows * weights).sum(-1)
    return sums
