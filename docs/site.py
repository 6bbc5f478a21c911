"""Adds to the site the pages that live elsewhere in the repository."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "benchmarks.md": "bench/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in PAGES.items():
        content = page_of((ROOT / source).read_text())
        files.append(File.generated(config, page, content=content))
    return files


def page_of(text: str) -> str:
    """Return text whose links point into docs/, and whose other relative ones are code."""
    text = re.sub(r"\]\((?:\.\./)?docs/", "](", text)
    return re.sub(r"\[`?([^]`]+)`?\]\((?!https?:|#|\w+\.md)[^)]+\)", r"`\1`", text)
