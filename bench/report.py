"""Writes the newest results into bench/README.md, and a short table into README.md.

Run it with `python bench/report.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pairing import show_seconds

HERE = Path(__file__).parent
README = HERE / "README.md"
FRONT_PAGE = HERE.parent / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
COMMANDS = {"cpu": "make bench", "gpu": "make gpu-check"}
FILES = {
    "bench_stats.py": 0,
    "bench_units.py": 1,
    "bench_clip.py": 2,
    "bench_step.py": 3,
    "bench_activations.py": 4,
    "bench_attach.py": 5,
    "bench_runlog.py": 6,
}


def newest(kind: str, folder: Path) -> Path | None:
    """Return the latest results of that kind; their names end in the date."""
    # A run that was broken off can leave an empty file behind.
    files = [path for path in folder.glob(f"{kind}-*.json") if path.stat().st_size > 0]
    return max(files, default=None)


def section(kind: str, results: dict[str, Any]) -> list[str]:
    """Return the lines of Markdown for one file of results."""
    benches = sorted(results["benchmarks"], key=_place)
    figures = [bench["extra_info"] for bench in benches if "kind" in bench["extra_info"]]
    pairs = [figure for figure in figures if figure["kind"] == "pair"]
    readings = [figure for figure in figures if figure["kind"] == "reading"]
    lines = [f"### {kind.upper()}", "", _about(kind, results), ""]
    lines += _pairs("Targets", [pair for pair in pairs if pair["target"] is not None])
    lines += _pairs("For information", [pair for pair in pairs if pair["target"] is None])
    if readings:
        lines += [
            "| reading | value | at most | met? | |",
            "|---|---|---|---|---|",
            *[_reading_row(reading) for reading in readings],
            "",
        ]
    return lines


def _place(bench: dict[str, Any]) -> int:
    """Order the files by subject; within a file the order of the benches stays."""
    file = Path(bench["fullname"].split("::")[0]).name
    return FILES.get(file, len(FILES))


def _about(kind: str, results: dict[str, Any]) -> str:
    machine, commit = results["machine_info"], results["commit_info"]
    parts = [
        f"{machine['gpu']} beside" if kind == "gpu" else "",
        f"{machine['cpu']}, {machine['cores']} cores",
    ]
    facts = [
        " ".join(part for part in parts if part),
        f"torch {machine['torch']}",
        f"Python {machine['python']}",
    ]
    if kind == "cpu":
        facts += [f"{machine['threads']} threads", f"variant {machine['cpu_variant']}"]
    changes = " with changes" if commit["changed"] else ""
    facts += [
        f"gradstat {machine['gradstat']}, commit {commit['id']}{changes}",
        results["datetime"][:10],
        f"`{COMMANDS[kind]}`",
    ]
    return "; ".join(facts) + "."


def _pairs(title: str, pairs: list[dict[str, Any]]) -> list[str]:
    if not pairs:
        return []
    return [
        f"| {title} | ours | against | ratio | target | met? | GB/s | of read peak |",
        "|---|--:|---|---|--:|---|--:|--:|",
        *[_pair_row(pair) for pair in pairs],
        "",
    ]


def _pair_row(pair: dict[str, Any]) -> str:
    target = pair["target"]
    cells = [
        pair["work"],
        show_seconds(pair["ours_seconds"]),
        f"{pair['against']}, {show_seconds(pair['against_seconds'])}",
        f"{pair['ratio']:.3f} ({pair['ratio_low']:.3f} to {pair['ratio_high']:.3f})",
        "" if target is None else f"{target:.2f}",
        "" if target is None else _met(pair["ratio"] <= target),
        "" if pair["gb_per_second"] is None else f"{pair['gb_per_second']:.1f}",
        "" if pair["of_read_peak"] is None else f"{pair['of_read_peak']:.2f}",
    ]
    return _row(cells)


def _reading_row(reading: dict[str, Any]) -> str:
    limit = reading["at_most"]
    cells = [
        reading["work"],
        f"{reading['value']:.5g} {reading['unit']}",
        "" if limit is None else f"{limit:g}",
        "" if limit is None else _met(reading["value"] <= limit),
        reading["note"],
    ]
    return _row(cells)


def _row(cells: list[str]) -> str:
    # Kernel names hold signs that Markdown would take for its own.
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def _met(met: bool) -> str:
    return "yes" if met else "**no**"


def rewrite(readme: str, lines: list[str]) -> str:
    """Return the page with everything between the two markers replaced."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md must hold the markers {BEGIN} and {END}, in this order")
    return "\n".join([before + begin, "", *lines, end + after])


def short_table(results: dict[str, Any]) -> list[str]:
    """Return the lines for the front page: the works that have a target."""
    benches = sorted(results["benchmarks"], key=_place)
    figures = [bench["extra_info"] for bench in benches]
    pairs = [figure for figure in figures if figure.get("target") and figure.get("headline", True)]
    return [
        "| work | time | against | ratio |",
        "|---|--:|---|--:|",
        *[
            _row(
                [
                    pair["work"],
                    show_seconds(pair["ours_seconds"]),
                    f"{pair['against']}, {show_seconds(pair['against_seconds'])}",
                    f"{pair['ratio']:.2f}",
                ]
            )
            for pair in pairs
        ],
        "",
        _about("cpu", results),
    ]


def main() -> int:
    """Rewrite the pages; returns the exit status."""
    lines = []
    for kind in COMMANDS:
        path = newest(kind, HERE / "results")
        if path is not None:
            results = json.loads(path.read_text())
            lines += section(kind, results)
            print(f"bench/README.md: {kind.upper()} figures of {path.name}")
            if kind == "cpu":
                FRONT_PAGE.write_text(rewrite(FRONT_PAGE.read_text(), short_table(results)))
    if not lines:
        print("bench/results/ must hold results, but has none; run: make bench", file=sys.stderr)
        return 1
    README.write_text(rewrite(README.read_text(), lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
