"""What a command of the command line is."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gradstat._json import json_values


@dataclass(frozen=True)
class Command:
    """A word that may follow ``gradstat``."""

    name: str
    summary: str
    """One line, shown by ``gradstat --help``."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    """Does the work; raises a GradstatError or an OSError where it fails.

    Returns the exit code; None is 0."""


NOT_WELL = 3
"""Exit code of a command that has done its work, and found what it was asked to report so."""


def positive(text: str) -> int:
    """Return a whole number of at least 1 from a command line's text."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def positive_seconds(text: str) -> float:
    """Return a number above 0 from a command line's text."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return value


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print plain values as strict JSON, in which NaN and Inf are null."""
    print(strict_json(value, indent=indent), flush=True)


def strict_json(value: Any, *, indent: int | None = 2) -> str:
    """Return the text that `print_json` prints."""
    return json.dumps(json_values(value), indent=indent, allow_nan=False)
