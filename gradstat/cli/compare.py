"""``gradstat compare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from gradstat.cli.command import Command, print_json
from gradstat.report import compare_runs


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", type=Path, help="run log, written by attach(..., log=...)")
    parser.add_argument("second", type=Path, help="the other one")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write an HTML file in place of text"
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def _run(arguments: argparse.Namespace) -> None:
    comparison = compare_runs(arguments.first, arguments.second)
    saved = comparison.save(arguments.output) if arguments.output is not None else None
    if arguments.json:
        print_json(comparison.to_dict())
    else:
        print(saved or comparison)


COMMAND = Command("compare", "show two runs beside each other", _add_arguments, _run)
