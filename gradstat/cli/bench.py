"""``gradstat bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gradstat.cli.command import Command, positive, positive_seconds, print_json, strict_json
from gradstat.clipping import GlobalNorm
from gradstat.errors import ArgumentValueError
from gradstat.overhead import measure_overhead
from gradstat.overhead.workload import BUILT_IN, make_workload


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        action="append",
        metavar="M",
        help=f"package.module:factory, or {', '.join(BUILT_IN)}; by default these, one by one",
    )
    parser.add_argument(
        "--batch", metavar="SHAPE", help="of the inputs: 32x3x224x224, 8x128:int50257, 8x64:bf16"
    )
    parser.add_argument(
        "--loss",
        metavar="L",
        help="square (default), cross-entropy, mse, output, or package.module:function",
    )
    parser.add_argument("--optimizer", default="adamw", metavar="O", help="of torch.optim (adamw)")
    parser.add_argument("--fused", action="store_true", help="the optimizer's fused form")
    parser.add_argument("--lr", type=float, default=1e-4, metavar="X", help="(1e-4)")
    parser.add_argument(
        "--clip", default="auto", metavar="C", help='"auto" (default), "none", or a norm'
    )
    parser.add_argument("--no-log", action="store_true", help="leave the log of the run out")
    parser.add_argument("--steps", type=positive, metavar="N", help="in a block, at least")
    parser.add_argument("--rounds", type=positive, metavar="N", help="blocks of each side")
    parser.add_argument(
        "--seconds",
        type=positive_seconds,
        default=60.0,
        metavar="S",
        help="for each model, about (60)",
    )
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu (default), cuda, ...")
    parser.add_argument("--threads", type=positive, metavar="N", help="of torch on the CPU")
    parser.add_argument("--json", metavar="FILE", help='write the figures there; "-" for stdout')


def _run(arguments: argparse.Namespace) -> None:
    clip = _clip(arguments.clip)
    names = arguments.model or list(BUILT_IN)
    if arguments.json not in (None, "-"):
        Path(arguments.json).touch()  # said now rather than after minutes
    reports = []
    with _threads(arguments.threads):
        for name in names:
            work = make_workload(
                model=name,
                batch=arguments.batch,
                loss=arguments.loss,
                optimizer=arguments.optimizer,
                lr=arguments.lr,
                fused=arguments.fused,
                device=arguments.device,
            )
            report = measure_overhead(
                work.step,
                work.optimizer,
                work.model,
                clip=clip,
                steps=arguments.steps,
                rounds=arguments.rounds,
                seconds=arguments.seconds,
                log=not arguments.no_log,
                progress=_progress(name),
            )
            report = replace(report, work=f"{name}, {report.work}")
            reports.append({"model": name, **report.to_dict()})
            if arguments.json != "-":
                print(f"\n{report.render()}", flush=True)
    figures = {"format": 1, "reports": reports}
    if arguments.json == "-":
        print_json(figures)
    elif arguments.json is not None:
        Path(arguments.json).write_text(f"{strict_json(figures)}\n", encoding="utf-8")


def _clip(text: str) -> Any:
    if text in ("auto", "none"):
        return "auto" if text == "auto" else None
    try:
        norm = float(text)
    except ValueError:
        raise ArgumentValueError(
            f'--clip must be "auto", "none" or a norm, got {text!r}; use for example 1.0'
        ) from None
    return GlobalNorm(norm)


def _progress(name: str) -> Any:
    """Return what shows on a terminal how far it is."""

    def show(done: int, all_blocks: int) -> None:
        if sys.stderr.isatty():
            end = "\r" if done < all_blocks else "\r\x1b[K"
            print(f"{name}: block {done} of {all_blocks}", end=end, file=sys.stderr, flush=True)

    return show


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


COMMAND = Command("bench", "measure what gradstat costs on a model", _add_arguments, _run)
