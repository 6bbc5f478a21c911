"""``gradstat demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from gradstat.cli.command import Command, positive
from gradstat.demo import run_demo


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


def _run(arguments: argparse.Namespace) -> None:
    run_demo(arguments.folder, epochs=arguments.epochs, seed=arguments.seed, plain=arguments.plain)


COMMAND = Command("demo", "see a network fail, be diagnosed, and mended", _add_arguments, _run)
