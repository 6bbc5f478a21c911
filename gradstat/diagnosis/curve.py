"""The shape of a loss curve in a few numbers that do not depend on its unit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.evidence import Curve, Floats
from gradstat.diagnosis.medians import median, medians_of_parts

MIN_VALUES = 20
"""A shorter curve has no shape."""

TAIL = 0.2
"""Share of a curve that is called its end."""

_POINTS = 10
"""Medians that a robust line goes through."""

_EARLIER, _LATER = np.triu_indices(_POINTS, 1)


@dataclass(frozen=True)
class Shape:
    """A loss curve without its values that are not finite."""

    first: float
    """Median of the first 2 % of the values, three at least."""

    last: float
    """Median of the last fifth."""

    best: float
    """Lowest median of any tenth."""

    peak: float
    """Largest value."""

    noise: float
    """Spread from value to value near the end: median |difference| / 0.95, which for independent
    normal noise is its standard deviation."""

    trend: float
    """Change over the last half by a robust line (Theil-Sen on ten medians), in the loss's unit."""

    trend_error: float
    """What that change would be by noise alone."""

    rises_steadily: bool
    """Whether each tenth lies above the one before: the loss is being raised, not lost."""

    @property
    def fall(self) -> float:
        """Share of the first value that has been gained; negative where the loss has risen."""
        return (self.first - self.last) / max(abs(self.first), 1e-12)

    @property
    def still_falls(self) -> bool:
        """Whether the second half falls by more than noise and by a twentieth of what is left."""
        return -self.trend > max(3 * self.trend_error, 0.05 * abs(self.last))


def shape_of(curve: Curve | None) -> Shape | None:
    """Return the shape of a curve, or None where it has too few finite values."""
    if curve is None or len(curve.finite) < MIN_VALUES:
        return None
    values = curve.finite
    n = len(values)
    tenths = medians_of_parts(values, 10)
    half = values[n // 2 :]
    noise = median(np.abs(half[1:] - half[:-1])) / 0.954
    trend = _line(half)
    return Shape(
        first=median(values[: max(3, n // 50)]),
        last=median(values[-max(3, int(TAIL * n)) :]),
        best=float(tenths.min()),
        peak=float(values.max()),
        noise=noise,
        rises_steadily=bool((tenths[1:] > tenths[:-1]).all()),
        trend=trend,
        trend_error=noise * 3.5 / np.sqrt(len(half)),
    )


def _line(values: Floats) -> float:
    medians = medians_of_parts(values, _POINTS)
    slopes = (medians[_LATER] - medians[_EARLIER]) / (_LATER - _EARLIER)
    return median(slopes) * (_POINTS - 1)
