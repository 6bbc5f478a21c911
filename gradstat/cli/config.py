"""``gradstat config``."""

from __future__ import annotations

import argparse
import json

from gradstat.cli.command import Command
from gradstat.config import get_config, show_config


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def _run(arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(get_config().to_dict(), indent=2))
    else:
        show_config()


COMMAND = Command("config", "show what this installation is made of", _add_arguments, _run)
