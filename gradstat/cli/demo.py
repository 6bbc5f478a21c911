"""``gradstat demo``."""

from __future__ import annotations

import argparse

from gradstat.cli.command import Command, positive
from gradstat.demo import run_demo


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epochs", type=positive, default=20, metavar="N", help="passes over the data (20)"
    )
    parser.add_argument(
        "--every", type=positive, default=88, metavar="N", help="show a table each N steps (88)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of every draw (0)")
    parser.add_argument("--plain", action="store_true", help="no colours, no live display")


def _run(arguments: argparse.Namespace) -> None:
    run_demo(
        epochs=arguments.epochs,
        every=arguments.every,
        seed=arguments.seed,
        plain=arguments.plain,
    )


COMMAND = Command("demo", "train a small network and watch its gradients", _add_arguments, _run)
