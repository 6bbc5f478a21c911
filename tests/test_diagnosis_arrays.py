"""Medians and counts are those of NumPy; facts of samples are made once, of all that are alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from gradstat.diagnosis.evidence import Batch, Floats
from gradstat.diagnosis.medians import counted, median, medians_of_parts, middle, quantiles
from gradstat.diagnosis.samples import AT_ONCE, of_each, output_spreads, range_of_all

RANDOM = np.random.default_rng(0)
SIZES = (1, 2, 3, 9, 10, 11, 57, 200)


def batch(step: int, outputs: Floats | None) -> Batch:
    arrays = {} if outputs is None else {"outputs": outputs}
    return Batch(
        step=step,
        inputs=None,
        outputs=outputs,
        targets=None,
        ranges={
            name: (rows.min(), rows.max()) if rows.size else (math.inf, -math.inf)
            for name, rows in arrays.items()
        },
        shapes={name: rows.shape for name, rows in arrays.items()},
        integers=frozenset(),
        is_paired=False,
        is_whole=False,
        loss=None,
    )


@pytest.mark.parametrize("n", SIZES)
def test_medians_and_quantiles_are_those_of_numpy(n: int) -> None:
    values = RANDOM.normal(size=n).round(1)
    assert median(values) == np.median(values)
    shares = [0.0, 0.05, 0.5, 0.9, 1.0]
    np.testing.assert_allclose(quantiles(values, shares), np.quantile(values, shares), rtol=1e-12)
    values[0] = math.inf
    assert quantiles(values, [1.0]) == [math.inf]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("n_parts", [1, 4, 10])
def test_medians_of_parts_are_those_of_a_split(n: int, n_parts: int) -> None:
    values = RANDOM.normal(size=n)
    expected = [
        np.median(part) if part.size else np.nan for part in np.array_split(values, n_parts)
    ]
    np.testing.assert_array_equal(medians_of_parts(values, n_parts), expected)


def test_the_middle_leaves_out_what_is_not_finite() -> None:
    values = np.array([[1.0, np.nan, 3.0], [np.inf, np.nan, -np.inf]])
    np.testing.assert_array_equal(middle(values), [2.0, np.nan])


@pytest.mark.parametrize("n", [0, *SIZES])
def test_counts_are_those_of_unique(n: int) -> None:
    values = RANDOM.integers(5, size=n).astype(float)
    for ours, numpys in zip(counted(values), np.unique(values, return_counts=True), strict=True):
        np.testing.assert_array_equal(ours, numpys)


def test_a_fact_is_made_once_of_each_sample_and_of_all_alike_at_once() -> None:
    shapes = [(4, 3), (2, 3), (4, 3), (0, 3), (4, 3)]
    batches = [batch(i, np.full(shape, float(i))) for i, shape in enumerate(shapes)]
    batches.insert(2, batch(9, None))
    calls: list[int] = []

    def first_numbers(alike: Sequence[Batch], stack: Floats) -> list[float]:
        assert stack.shape == (len(alike), *alike[0].outputs.shape)  # type: ignore[union-attr]
        calls.append(len(alike))
        return [float(rows[0, 0]) for rows in stack]

    expected = [0.0, 1.0, None, 2.0, None, 4.0]
    assert of_each(batches[:3], "first", ["outputs"], first_numbers) == expected[:3]
    assert of_each(batches, "first", ["outputs"], first_numbers) == expected
    assert sorted(calls) == [1, 1, 2]


def test_large_samples_are_taken_one_by_one() -> None:
    batches = [batch(i, np.full((4, AT_ONCE // 4), float(i))) for i in range(3)]
    sizes: list[int] = []

    def steps(alike: Sequence[Batch], _: Floats) -> list[int]:
        sizes.append(len(alike))
        return [one.step for one in alike]

    assert of_each(batches, "step", ["outputs"], steps) == [0, 1, 2]
    assert sizes == [1, 1, 1]


def test_spreads_are_told_of_rows_that_are_enough_and_finite() -> None:
    rows = RANDOM.normal(size=(8, 3))
    few, spoilt = rows[:3], np.where(rows == rows[0, 0], np.nan, rows)
    found = output_spreads([batch(0, rows), batch(1, few), batch(2, spoilt), batch(3, 0 * rows)])
    assert found == [pytest.approx(rows.std(0).mean() / np.sqrt((rows**2).mean())), 0.0]


def test_the_range_of_all_is_that_of_each() -> None:
    assert range_of_all([], "outputs") == (math.inf, -math.inf)
    two = [batch(0, np.array([[1.0, 2.0]])), batch(1, None), batch(2, np.array([[-3.0]]))]
    assert range_of_all(two, "outputs") == (-3.0, 2.0)
