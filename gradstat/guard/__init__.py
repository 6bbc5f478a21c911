"""Acts upon findings while a run trains: within bounds, on record, and only where asked to."""

from gradstat.guard.guard import Guard
from gradstat.guard.rules import (
    CutLR,
    GuardAction,
    GuardRule,
    RollBack,
    SkipNonfinite,
    StopEarly,
    TightenClip,
)

__all__ = [
    "CutLR",
    "Guard",
    "GuardAction",
    "GuardRule",
    "RollBack",
    "SkipNonfinite",
    "StopEarly",
    "TightenClip",
]
