"""The command line: ``gradstat demo``, ``gradstat config``. A new command is one entry of COMMANDS.

Exit codes: 0 done, 1 failed (one line on stderr says why), 2 called wrongly, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gradstat import __version__
from gradstat.config import get_config, show_config
from gradstat.demo import run_demo
from gradstat.errors import GradstatError


@dataclass(frozen=True)
class Command:
    """A word that may follow ``gradstat``."""

    name: str
    summary: str
    """One line, shown by ``gradstat --help``."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    """Does the work; raises a GradstatError or an OSError where it fails."""


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epochs", type=_positive, default=20, metavar="N", help="passes over the data (20)"
    )
    parser.add_argument(
        "--every", type=_positive, default=88, metavar="N", help="show a table each N steps (88)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of every draw (0)")
    parser.add_argument("--plain", action="store_true", help="no colours, no live display")


def _run_demo(arguments: argparse.Namespace) -> None:
    run_demo(
        epochs=arguments.epochs,
        every=arguments.every,
        seed=arguments.seed,
        plain=arguments.plain,
    )


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def _run_config(arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(get_config().to_dict(), indent=2))
    else:
        show_config()


COMMANDS: tuple[Command, ...] = (
    Command("demo", "train a small network and watch its gradients", _demo_arguments, _run_demo),
    Command("config", "show what this installation is made of", _config_arguments, _run_config),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code.

    Args:
        argv: Words after the program's name; None takes them from ``sys.argv``.
    """
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help (code 0) or what was wrong (code 2)
        return stop.code if isinstance(stop.code, int) else 2
    command: Command = arguments.command
    try:
        command.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `gradstat config | head -1` is no failure; keep the interpreter's last flush silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (GradstatError, OSError, ValueError) as error:
        message = " ".join(str(error).split())
        print(f"gradstat {command.name}: error: {message}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gradstat", description="Per-layer gradient statistics for PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"gradstat {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="command", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name, help=command.summary, description=command.summary.capitalize() + "."
        )
        command.add_arguments(subparser)
        subparser.set_defaults(command=command)
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value
