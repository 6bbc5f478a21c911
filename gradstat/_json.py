"""Plain values that strict JSON can hold, which knows neither NaN nor Inf."""

from __future__ import annotations

import math
from typing import Any


def json_values(value: Any) -> Any:
    """Return plain values with None in place of NaN and Inf, and lists in that of tuples."""
    if isinstance(value, dict):
        return {str(key): json_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
