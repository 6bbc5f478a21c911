"""``gradstat plot``."""

from __future__ import annotations

import argparse
from pathlib import Path

from gradstat.cli.command import Command, positive, print_json
from gradstat.errors import import_optional
from gradstat.plots import PLOTS


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=PLOTS, help="the figure: %(choices)s")
    parser.add_argument("run", type=Path, help="run log, written by attach(..., log=...)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="its suffix says the kind: .png, .svg, .pdf (the run's name and the figure's, .png)",
    )
    parser.add_argument("--dpi", type=positive, default=200, metavar="N", help="of a PNG (200)")
    parser.add_argument("--json", action="store_true", help="print figure and file as one object")


def _run(arguments: argparse.Namespace) -> None:
    # Without pyplot no display is looked for.
    module = import_optional("matplotlib.figure", purpose="a plot", install="'gradstat[plots]'")
    figure = module.Figure(layout="constrained")
    PLOTS[arguments.what](arguments.run, figure.subplots())
    default = arguments.run.with_name(f"{arguments.run.stem}-{arguments.what}.png")
    target = arguments.output or default
    figure.savefig(target, dpi=arguments.dpi)
    if arguments.json:
        print_json({"figure": arguments.what, "file": str(target)})
    else:
        print(target)


COMMAND = Command("plot", "draw a figure of a run as PNG, SVG or PDF", _add_arguments, _run)
