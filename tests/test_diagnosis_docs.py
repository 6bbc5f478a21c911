"""docs/diagnosis.md lists every rule with its codes, needs, thresholds and their meaning."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from pathlib import Path

import pytest

from gradstat.diagnosis import RULES, Rule

PAGE = Path(__file__).parents[1] / "docs" / "diagnosis.md"
RECORDS = sorted((PAGE.parents[1] / "bench" / "results").glob("diagnosis-*.json"))
BEGIN, END = "<!-- rules: begin -->", "<!-- rules: end -->"


def meanings(rule: Rule) -> dict[str, str]:
    """Return the text below each field of a rule's class."""
    source = inspect.getsource(type(rule))
    found = re.findall(
        r'^    (\w+): \w+ = [^\n]+\n    """(.*?)"""', source, re.DOTALL | re.MULTILINE
    )
    return {name: " ".join(textwrap.dedent(text).split()) for name, text in found}


def table() -> str:
    """Return the table of rules as it must stand on the page."""
    lines = [
        "| rule | finds | needs | what it looks for, and its thresholds |",
        "|---|---|---|---|",
    ]
    for rule in RULES:
        about = " ".join((type(rule).__doc__ or "").split())
        texts = meanings(rule)
        for field in dataclasses.fields(rule):  # type: ignore[arg-type]
            text = texts.get(field.name, "")
            about += f" `{field.name}` = {getattr(rule, field.name):g}" + (
                f": {text}" if text else "."
            )
        codes = ", ".join(f"`{code}`" for code in rule.codes)
        lines.append(f"| {type(rule).__name__} | {codes} | {', '.join(rule.needs)} | {about} |")
    return "\n".join(lines)


def test_the_page_lists_every_rule() -> None:
    text = PAGE.read_text()
    listed = text.split(BEGIN)[1].split(END)[0].strip()
    assert listed == table(), "write the output of `python tests/test_diagnosis_docs.py` there"


if __name__ == "__main__":
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}")


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_of_runs_stands_one_run_a_line(path: Path) -> None:
    text = path.read_text()
    lines = [json.loads(line.removesuffix(",")) for line in text.splitlines()[1:-1]]
    assert lines == json.loads(text)["runs"]
