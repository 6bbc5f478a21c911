"""The documentation's site: what it must hold."""

from __future__ import annotations

import re
from pathlib import Path

import gradstat

ROOT = Path(__file__).resolve().parents[1]


def documented(texts):
    return re.findall(r"^::: gradstat\.(\w+)$", "\n".join(texts), re.MULTILINE)


def test_the_reference_holds_every_public_name_once():
    names = documented(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    assert sorted(names) == sorted(gradstat.__all__)


def test_every_page_stands_in_the_navigation():
    config = (ROOT / "mkdocs.yml").read_text()
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert {page for page in pages if page not in config} == set()
