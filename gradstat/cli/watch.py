"""``gradstat watch``."""

from __future__ import annotations

import argparse
from pathlib import Path

from gradstat.cli.command import NOT_WELL, Command, positive_seconds, print_json
from gradstat.errors import import_optional
from gradstat.show.watch import states


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run log; waited for where there is none yet")
    parser.add_argument(
        "--interval", type=positive_seconds, default=1.0, metavar="S", help="seconds (1)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line, each time")


def _run(arguments: argparse.Namespace) -> int:
    last = None
    found = states(arguments.run, arguments.interval)
    if arguments.json:
        for last in found:
            if last is not None:
                print_json(last.to_dict(), indent=None)
    else:
        import_optional("rich", purpose="gradstat watch", install="gradstat[rich]")
        from gradstat.show.view import watch  # noqa: PLC0415 - needs rich

        last = watch(found, arguments.run)
    return 0 if last is not None and last.summary.status == "finished" else NOT_WELL


COMMAND = Command("watch", "follow a run while it trains, until it ends", _add_arguments, _run)
