"""``gradstat demo``."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from gradstat.cli.command import Command, positive, print_json
from gradstat.demo import Attempt, run_demo


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="where run logs and reports go (runs/demo)",
    )
    parser.add_argument(
        "--epochs", type=positive, default=20, metavar="N", help="passes over the data (20)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of every draw (0)")
    parser.add_argument("--plain", action="store_true", help="no colours, no progress bar")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object at the end; the tour goes to stderr"
    )


def _run(arguments: argparse.Namespace) -> None:
    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        result = run_demo(
            arguments.folder, epochs=arguments.epochs, seed=arguments.seed, plain=arguments.plain
        )
    if arguments.json:
        print_json(
            {
                "before": _plain(result.before),
                "after": _plain(result.after),
                "pages": [str(page) for page in result.pages],
            }
        )


def _plain(attempt: Attempt) -> dict[str, Any]:
    return {
        "log": str(attempt.log),
        "accuracy": attempt.accuracy,
        "findings": [finding.to_dict() for finding in attempt.findings],
    }


COMMAND = Command("demo", "see a network fail, be diagnosed, and mended", _add_arguments, _run)
