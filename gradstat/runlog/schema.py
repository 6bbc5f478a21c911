"""Tables of a run log, as docs/runlog.md describes them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from gradstat.columns import RAW_COLUMNS
from gradstat.errors import RunLogError
from gradstat.records import TableKind

APPLICATION_ID = 0x67726164
"""``grad`` in ASCII: what marks a SQLite file as a run log."""

VERSION = 1
"""Of the schema, in SQLite's ``user_version``."""

TABLE_OF: dict[TableKind, str] = {"gradient": "gradients", "weight": "weights", "update": "updates"}
"""Where the statistics of each kind stand."""

STEP_COLUMNS = (
    "step",
    "time",
    "loss",
    "lr",
    "total_norm",
    "clip_coef",
    "clip_threshold",
    "skipped",
)

_RAW = ", ".join(
    f"{column.name} {'INTEGER' if column.is_count else 'REAL'}" for column in RAW_COLUMNS
)
_RAW_NAMES = ", ".join(column.name for column in RAW_COLUMNS)

_TABLES = """
CREATE TABLE run (id TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE sessions (
  session INTEGER PRIMARY KEY, started REAL NOT NULL, ended REAL, first_step INTEGER,
  hidden_from INTEGER, dropped INTEGER NOT NULL DEFAULT 0, model TEXT NOT NULL,
  optimizer TEXT NOT NULL, config TEXT NOT NULL, versions TEXT NOT NULL, machine TEXT NOT NULL);
CREATE TABLE layers (
  layer INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, shape TEXT NOT NULL, dtype TEXT NOT NULL,
  numel INTEGER NOT NULL, position INTEGER);
CREATE TABLE steps (
  session INTEGER, step INTEGER, time REAL, loss REAL, lr REAL, total_norm REAL, clip_coef REAL,
  clip_threshold REAL, skipped INTEGER, PRIMARY KEY (session, step)) WITHOUT ROWID;
CREATE TABLE scalars (
  session INTEGER, name TEXT, step INTEGER, value REAL,
  PRIMARY KEY (session, name, step)) WITHOUT ROWID;
CREATE TABLE update_ratios (
  session INTEGER, step INTEGER, layer INTEGER, ratio REAL,
  PRIMARY KEY (session, step, layer)) WITHOUT ROWID;
CREATE TABLE histograms (
  session INTEGER, step INTEGER, layer INTEGER, first_bin INTEGER NOT NULL, counts TEXT NOT NULL,
  PRIMARY KEY (session, step, layer)) WITHOUT ROWID;
CREATE TABLE activations (
  session INTEGER, step INTEGER, place INTEGER, site TEXT NOT NULL, kind TEXT NOT NULL,
  units INTEGER, dead_units INTEGER, saturated_low REAL, saturated_high REAL, zero_fraction REAL,
  mean REAL, std REAL, PRIMARY KEY (session, step, place)) WITHOUT ROWID;
CREATE TABLE diagnoses (
  session INTEGER, step INTEGER, PRIMARY KEY (session, step)) WITHOUT ROWID;
CREATE TABLE findings (
  session INTEGER, step INTEGER, place INTEGER, code TEXT NOT NULL, severity TEXT NOT NULL,
  confidence REAL, explanation TEXT, remedy TEXT, evidence TEXT, source TEXT, layers TEXT,
  steps TEXT, caused_by TEXT, PRIMARY KEY (session, step, place)) WITHOUT ROWID;
CREATE TABLE actions (
  session INTEGER, step INTEGER, action TEXT NOT NULL, cause TEXT, because TEXT, before TEXT,
  after TEXT);
"""

_VISIBLE = "{of}.session = sessions.session AND {of}.step < ifnull(sessions.hidden_from, 9e18)"


def visible(table: str) -> str:
    """Return the SQL that joins a table with the sessions, without the rows that are hidden."""
    return f"{table} JOIN sessions ON {_VISIBLE.format(of=table)}"


def _views() -> str:
    statements = [
        f"CREATE VIEW run_{table} AS SELECT {table}.* FROM {visible(table)};"
        for table in ("steps", "scalars", "activations", "findings")
    ]
    for table, columns in (
        *((table, _RAW_NAMES) for table in TABLE_OF.values()),
        ("update_ratios", "ratio"),
        ("histograms", "first_bin, counts"),
    ):
        named = ", ".join(f"{table}.{column}" for column in columns.split(", "))
        statements.append(
            f"CREATE VIEW run_{table} AS SELECT {table}.session, {table}.step, layers.name, "
            f"{named} FROM {visible(table)} JOIN layers ON layers.layer = {table}.layer;"
        )
    return "\n".join(statements)


def create(connection: sqlite3.Connection) -> None:
    """Make the tables in an empty file, all or none."""
    stats = "".join(
        f"CREATE TABLE {table} (session INTEGER, step INTEGER, layer INTEGER, {_RAW}, "
        "PRIMARY KEY (session, step, layer)) WITHOUT ROWID;\n"
        for table in TABLE_OF.values()
    )
    connection.executescript(
        f"BEGIN IMMEDIATE;\n{_TABLES}{stats}{_views()}\n"
        f"PRAGMA application_id = {APPLICATION_ID};\nPRAGMA user_version = {VERSION};\nCOMMIT;"
    )


def is_empty(connection: sqlite3.Connection) -> bool:
    """Whether a database holds nothing at all."""
    return not connection.execute("SELECT 1 FROM sqlite_master").fetchall()


def check(connection: sqlite3.Connection, path: Path) -> None:
    """Make sure that a database is a run log of this version.

    Raises:
        RunLogError: It is not.
    """
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise RunLogError(
            f"{path} must be a run log, got another SQLite database; give the path of a file that "
            "gradstat.attach(..., log=...) has written"
        )
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != VERSION:
        age, remedy = (
            ("a newer", "update gradstat")
            if version > VERSION
            else ("an older", "read it with the gradstat that wrote it")
        )
        raise RunLogError(
            f"{path} must be a run log of version {VERSION}, got {age} one of version {version}; "
            f"{remedy}"
        )


def not_a_run(path: Path, error: Exception) -> RunLogError:
    """Return the error for a file that SQLite cannot read."""
    return RunLogError(
        f"{path} must be a run log, got a file that cannot be read as one ({error}); give the path "
        "of a file that gradstat.attach(..., log=...) has written"
    )
