"""``gradstat config``."""

from __future__ import annotations

import argparse

from gradstat.cli.command import Command, print_json
from gradstat.config import get_config, show_config


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def _run(arguments: argparse.Namespace) -> None:
    if arguments.json:
        print_json(get_config().to_dict())
    else:
        show_config()


COMMAND = Command("config", "show what this installation is made of", _add_arguments, _run)
