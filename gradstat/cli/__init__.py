"""The command line. A command is a module here, and one entry of COMMANDS.

Exit codes: 0 done, 1 failed (one line on stderr says why), 2 called wrongly, 3 done but what was
looked at is not well (``show --fail-on``, ``watch`` of a run that broke off), 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from gradstat import __version__
from gradstat.cli import bench, compare, config, demo, plot, report, show, watch
from gradstat.cli.command import Command
from gradstat.errors import GradstatError

COMMANDS: tuple[Command, ...] = (
    demo.COMMAND,
    show.COMMAND,
    watch.COMMAND,
    report.COMMAND,
    compare.COMMAND,
    plot.COMMAND,
    bench.COMMAND,
    config.COMMAND,
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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # no name of a layer is worth losing the answer
    try:
        code = command.run(arguments) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `gradstat config | head -1` is no failure; keep the interpreter's last flush silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (GradstatError, OSError, ValueError) as error:
        message = " ".join(str(error).split())
        print(f"gradstat {command.name}: error: {message}", file=sys.stderr)
        return 1
    return code


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
