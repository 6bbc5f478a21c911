"""The zoo: small training programs that fail in a known way, and healthy ones that look alike.

A diagnosis is measured here by whether the first cause it names is in a program's accept-set, and
by whether it stays quiet on the healthy ones. A program needs nothing of gradstat: it trains plain
torch modules and tells a `Watch` what a user's loop would tell a monitor. Faults are the mutation
operators of DeepCrime (Humbatova et al., ISSTA 2021) and the classes of AutoTrainer (Zhang et al.,
ICSE 2021); the healthy programs are their unmutated twins and runs that naive thresholds mistake
for faults. Every program trains in a few seconds on one core.
"""

from __future__ import annotations

import importlib
import pkgutil

from zoo.program import NoWatch, Program, Watch, registered, run

__all__ = ["NoWatch", "Program", "Watch", "programs", "run"]


def programs() -> list[Program]:
    """Return all programs, sorted by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return registered()
