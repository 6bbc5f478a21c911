"""``gradstat report``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gradstat.cli.command import Command
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
    if arguments.json and arguments.output is None:
        print(json.dumps(report.to_dict(), indent=2))
        return
    saved = report.save(arguments.output or arguments.run.with_suffix(".html"))
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else saved)


COMMAND = Command("report", "write a run's report as one HTML file", _add_arguments, _run)
