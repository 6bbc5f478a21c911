"""docs/runlog.md describes the schema as it is."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

from gradstat.runlog import schema
from gradstat.runlog.log import HISTOGRAM_EVERY
from gradstat.runlog.pump import MAX_BYTES, MAX_STEPS

PAGE = (Path(__file__).parents[1] / "docs" / "runlog.md").read_text()


def described(kind: str) -> dict[str, set[str]]:
    """Return the words in code of each row of the schema's tables, by the name in its front."""
    rows = [row.split("|")[1:3] for row in PAGE.splitlines() if row.startswith("| `")]
    return {
        name: set(re.findall(r"`([a-z_0-9]+)`", text))
        for names, text in rows
        for name in re.findall(r"`([a-z_]+)`", names)
        if name.startswith("run_") == (kind == "view")
    }


def test_tables_and_columns_are_described() -> None:
    connection = sqlite3.connect(":memory:")
    schema.create(connection)
    for kind in ("table", "view"):
        names = [
            n
            for (n,) in connection.execute("SELECT name FROM sqlite_master WHERE type = ?", (kind,))
        ]
        found = described(kind)
        assert sorted(found) == sorted(names)
        if kind == "table":
            for name in names:
                columns = connection.execute(f"SELECT name FROM pragma_table_info('{name}')")
                assert found[name] == {column for (column,) in columns}, name
    connection.close()


def test_numbers_are_those_of_the_code() -> None:
    assert f"The schema, version {schema.VERSION}" in PAGE
    assert hex(schema.APPLICATION_ID) in PAGE
    assert f"at most {MAX_STEPS} steps or {MAX_BYTES >> 20} MiB" in PAGE
    assert HISTOGRAM_EVERY == 10
    assert "every tenth time" in PAGE
