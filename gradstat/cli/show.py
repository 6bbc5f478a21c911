"""``gradstat show``."""

from __future__ import annotations

import argparse
from pathlib import Path

from gradstat.cli.command import NOT_WELL, Command, positive, print_json
from gradstat.diagnosis.finding import SEVERITIES
from gradstat.errors import import_optional
from gradstat.runlog import open_run
from gradstat.show.state import read_state


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run log, written by attach(..., log=...)")
    parser.add_argument("--layers", type=positive, default=8, metavar="N", help="how many (8)")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument(
        "--fail-on",
        choices=SEVERITIES[1:],
        metavar="SEVERITY",
        help=f"exit with code {NOT_WELL} where a finding is at least this severe: warning, error",
    )


def _run(arguments: argparse.Namespace) -> int:
    with open_run(arguments.run) as run:
        state = read_state(run)
    if arguments.json:
        print_json(state.to_dict())
    else:
        import_optional("rich", purpose="gradstat show", install="gradstat[rich]")
        from gradstat.show.view import show  # noqa: PLC0415 - needs rich

        show(state, n_layers=arguments.layers)
    if arguments.fail_on is None:
        return 0
    limit = SEVERITIES.index(arguments.fail_on)
    gravest = max((SEVERITIES.index(told.finding.severity) for told in state.findings), default=-1)
    return NOT_WELL if gravest >= limit else 0


COMMAND = Command("show", "show a run: numbers, findings, the worst layers", _add_arguments, _run)
