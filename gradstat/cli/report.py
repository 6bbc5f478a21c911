"""``gradstat report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from gradstat.cli.command import Command, print_json
from gradstat.report import make_report


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run log, written by attach(..., log=...)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="HTML file (the run's name with .html)"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print key numbers and findings as JSON; a page only with -o",
    )


def _run(arguments: argparse.Namespace) -> None:
    report = make_report(arguments.run)
    saved = None
    if arguments.output is not None or not arguments.json:
        saved = report.save(arguments.output or arguments.run.with_suffix(".html"))
    if arguments.json:
        print_json(report.to_dict())
    else:
        print(saved)


COMMAND = Command("report", "write a run's report as one HTML file", _add_arguments, _run)
