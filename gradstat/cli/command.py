"""What a command of the command line is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A word that may follow ``gradstat``."""

    name: str
    summary: str
    """One line, shown by ``gradstat --help``."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    """Does the work; raises a GradstatError or an OSError where it fails."""


def positive(text: str) -> int:
    """Return a whole number of at least 1 from a command line's text."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value
