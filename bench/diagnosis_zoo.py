"""How often the diagnosis is right: `make diagnosis-bench` writes it into docs/diagnosis.md.

Every program of tests/zoo runs from three seeds, plain and watched in turn, in processes of one
thread. Of each run is kept: the findings, whether both ended with the same weights bit for bit, and
both wall times. The programs that rules were developed on are reported apart from the others.

Options: --seeds N; --jobs N; --only PART of a name; --no-docs.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import logging
import multiprocessing
import os
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import torch
from torch import nn
from torch.optim import Optimizer
from zoo import Program

import gradstat

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "diagnosis.md"
BEGIN, END = "<!-- accuracy: begin -->", "<!-- accuracy: end -->"
PARTS = {
    "held-out": "held out",
    "counted": "held out at first, looked at after a count",
    "tuning": "used for tuning",
}


def part_of(program: Program) -> str:
    """Return which part of the zoo a program belongs to.

    The rules were developed on the tuning half. After a first count of the other half they were
    improved on a part of it, chosen by a hash of the names; what is left has not been looked at.
    """
    if program.half == "tuning":
        return "tuning"
    is_left = hashlib.sha1(program.name.encode()).digest()[0] % 2
    return "held-out" if is_left else "counted"


class Watch:
    """Watches a program as a user would: attach once, observe every batch."""

    def __init__(self) -> None:
        self._optimizers: list[Optimizer] = []

    def attach(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Attach gradstat, which only watches."""
        self._optimizers.append(gradstat.attach(optimizer, model))

    def observe(self, **values: Any) -> None:
        """Tell the monitor of the newest optimizer."""
        self._optimizers[-1].gradstat.observe(**values)  # type: ignore[attr-defined]

    def diagnose(self) -> list[gradstat.Finding]:
        """Return the findings of all optimizers."""
        return [
            finding
            for optimizer in self._optimizers
            for finding in optimizer.gradstat.diagnose()  # type: ignore[attr-defined]
        ]


def run_one(job: tuple[str, int]) -> dict[str, Any]:
    """Run one program from one seed, plain and watched, and return what came of it."""
    from zoo import programs, run

    torch.set_num_threads(1)
    logging.disable()  # the findings are counted, not read
    name, seed = job
    program = next(program for program in programs() if program.name == name)
    watch = Watch()
    seconds, weights, findings = {}, {}, []
    # What comes second finds warm caches: each side is first in half of the jobs.
    for side in ("plain", "watched") if (seed + len(name)) % 2 else ("watched", "plain"):
        start = time.perf_counter()
        weights[side] = run(program, seed, watch if side == "watched" else None)
        if side == "watched":
            findings = watch.diagnose()
        seconds[side] = time.perf_counter() - start
    return {
        "name": name,
        "seed": seed,
        "part": part_of(program),
        "operator": program.operator,
        "causes": list(program.causes),
        "findings": [
            {"code": f.code, "severity": f.severity, "confidence": round(f.confidence, 3),
             "caused_by": f.caused_by}
            for f in findings
        ],
        "same_weights": _same(weights["plain"], weights["watched"]),
        "plain_seconds": seconds["plain"],
        "watched_seconds": seconds["watched"],
    }  # fmt: skip


def _same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def raised(result: dict[str, Any]) -> list[str]:
    """Return the codes at warning or above, in their order."""
    return [f["code"] for f in result["findings"] if f["severity"] != "info"]


def is_right(result: dict[str, Any], among: int) -> bool:
    """Whether a cause of the accept-set stands among the first so many."""
    return any(code in result["causes"] for code in raised(result)[:among])


def accuracy(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of the two halves, as Markdown."""
    lines = [
        "| programs | runs | faulty: flagged | first cause right | among the first three | "
        "healthy: flagged |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for part, title in PARTS.items():
        mine = [r for r in results if r["part"] == part]
        faulty, healthy = [r for r in mine if r["causes"]], [r for r in mine if not r["causes"]]
        cells = [
            share([bool(raised(r)) for r in faulty]),
            share([is_right(r, 1) for r in faulty]),
            share([is_right(r, 3) for r in faulty]),
            share([bool(raised(r)) for r in healthy]),
        ]
        lines.append(f"| {title} | {len(mine)} | " + " | ".join(cells) + " |")
    faulty = [r for r in results if r["causes"] and r["part"] == "held-out"]
    answers = Counter(code for r in faulty for code in r["causes"])
    if answers:
        common = answers.most_common(1)[0][0]
        right = share([common in r["causes"] for r in faulty])
        lines += [
            "",
            f"Always answering `{common}` would be right first in {right} of the held-out runs.",
        ]
    return lines


def by_code(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line for each code that is a best cause, without the tuning half."""
    mine = [r for r in results if r["part"] != "tuning"]
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in mine:
        if result["causes"]:
            groups[result["causes"][0]].append(result)
    healthy = [r for r in mine if not r["causes"]]
    lines = [
        "| best cause | runs | flagged | first right | first three | named first instead | "
        "healthy runs that get it |",
        "|---|--:|--:|--:|--:|---|--:|",
    ]
    for code, runs in sorted(groups.items()):
        wrong = Counter(next(iter(raised(r)), "nothing") for r in runs if not is_right(r, 1))
        others = ", ".join(f"{other} {count}" for other, count in wrong.most_common(3))
        false = sum(code in raised(r) for r in healthy)
        lines.append(
            f"| {code} | {len(runs)} | {share([bool(raised(r)) for r in runs])} | "
            f"{share([is_right(r, 1) for r in runs])} | {share([is_right(r, 3) for r in runs])} | "
            f"{others} | {false} |"
        )
    return lines


def share(hits: Sequence[bool]) -> str:
    """Return a share in percent."""
    return f"{100 * sum(hits) / len(hits):.1f} %" if hits else "-"


def costs(results: Sequence[dict[str, Any]]) -> str:
    """Return the sentences on wall time, where a program counts by its median seed, and weights."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        runs[result["name"]].append(result)
    watched, plain = (
        [statistics.median(r[f"{side}_seconds"] for r in of_one) for of_one in runs.values()]
        for side in ("watched", "plain")
    )
    each = sorted(w / p for w, p in zip(watched, plain, strict=True))
    same = sum(r["same_weights"] for r in results)
    return (
        f"Watching, observing and diagnosing took {sum(watched) / sum(plain):.2f} times the wall "
        f"time of the zoo without, by the median of each program's seeds; of a single program "
        f"{statistics.median(each):.2f} times in the median, where half take less than "
        f"{statistics.median(plain):.2f} s. {same} of {len(results)} runs ended with the same "
        "weights, bit for bit."
    )


def compact(record: dict[str, Any]) -> str:
    """Return a record as JSON with one run a line."""
    head = json.dumps({**record, "runs": []})
    runs = ",\n".join(map(json.dumps, record["runs"]))
    return head.removesuffix("]}") + "\n" + runs + "\n]}\n"


def page(results: Sequence[dict[str, Any]], about: str) -> list[str]:
    """Return the lines for docs/diagnosis.md."""
    return ["", about, "", *accuracy(results), "", *by_code(results), "", costs(results), ""]


def main() -> None:
    """Run the zoo, print the tables, and write them down."""
    from zoo import programs

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="")
    parser.add_argument("--no-docs", action="store_true")
    options = parser.parse_args()
    names = [program.name for program in programs() if options.only in program.name]
    jobs = [(name, seed) for seed in range(options.seeds) for name in names]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.jobs) as pool:
        results = pool.map(run_one, jobs, chunksize=8)
    commit = machine.commit()
    about = (
        f"{len(names)} programs, {options.seeds} seeds each; {datetime.date.today():%Y-%m-%d}, "
        "commit "
        f"{commit['id']}{' with changes' if commit['changed'] else ''}, torch {torch.__version__}."
    )
    print("\n".join(page(results, about)))
    if options.no_docs:
        return
    record = {"machine": machine.machine(), "commit": commit, "runs": results}
    path = HERE / "results" / f"diagnosis-{datetime.date.today():%Y-%m-%d}.json"
    path.write_text(compact(record))
    text = PAGE.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(before + BEGIN + "\n".join(page(results, about)) + END + after)


if __name__ == "__main__":
    main()
