"""`open_run`: a run log as NumPy arrays and pandas frames, while the run goes on or afterwards."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gradstat._table_rows import layer_not_found
from gradstat.columns import COLUMN_NAMES, HISTOGRAM_BINS, RAW_COLUMNS, derive, unknown_column
from gradstat.diagnosis import Finding
from gradstat.diagnosis.finding import Measure
from gradstat.errors import (
    ArgumentValueError,
    RunLogError,
    RunNotFoundError,
    import_optional,
)
from gradstat.guard import GuardAction
from gradstat.records import TableKind
from gradstat.runlog import schema
from gradstat.runlog.lock import is_written

Status = Literal["running", "finished", "interrupted"]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_RAW_NAMES = tuple(column.name for column in RAW_COLUMNS)

FRAMES = {
    "sessions": "SELECT * FROM sessions ORDER BY session",
    "layers": "SELECT * FROM layers ORDER BY position",
    "steps": "SELECT * FROM run_steps ORDER BY session, step",
    "scalars": "SELECT * FROM run_scalars ORDER BY session, step",
    "gradients": "SELECT * FROM run_gradients",
    "weights": "SELECT * FROM run_weights",
    "updates": "SELECT * FROM run_updates",
    "update_ratios": "SELECT * FROM run_update_ratios",
    "histograms": "SELECT * FROM run_histograms",
    "activations": "SELECT * FROM run_activations",
    "findings": "SELECT * FROM run_findings",
    "actions": "SELECT * FROM actions ORDER BY rowid",
}
"""What `Run.frame` gives, by name."""


class LayerInfo(NamedTuple):
    """One watched parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int


class Session(NamedTuple):
    """A part of a run: from a start, a resume or a step back to the next one, or to the end."""

    number: int
    started: float
    """Seconds since 1970 UTC, as the next one."""

    ended: float | None
    """None where it has not ended in good order."""

    first_step: int | None
    """None where no step was finished."""

    hidden_from: int | None
    """First step that a later session has done anew; None where all of them stand."""

    dropped: int
    """Steps of which nothing was kept."""


class Run:
    """A run log, open for reading; made by `open_run`, closed by `close` or at the end of a with.

    Every property reads the file as it is now. Of steps that were done again after a resume the
    last time counts. Numbers that are not known are NaN. No call synchronises with a device.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        """Where the file is."""

        self._connection = _connect(path)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- the run as a whole ----------------------------------------------------------------------

    @property
    def id(self) -> str:
        """What tells this run from others; empty before it has begun."""
        found = self._rows("SELECT id FROM run")
        return found[0][0] if found else ""

    @property
    def meta(self) -> dict[str, Any]:
        """Facts of the newest session: ``model``, ``optimizer``, ``config``, ``versions``, ..."""
        names = ("model", "optimizer", "config", "versions", "machine")
        found = self._rows(f"SELECT {', '.join(names)} FROM sessions ORDER BY session DESC LIMIT 1")
        return dict(zip(names, map(json.loads, found[0]), strict=True)) if found else {}

    @property
    def sessions(self) -> list[Session]:
        """Its parts, oldest first."""
        columns = "session, started, ended, first_step, hidden_from, dropped"
        return [Session(*row) for row in self._rows(f"SELECT {columns} FROM sessions")]

    @property
    def status(self) -> Status:
        """``"running"``, ``"finished"``, or ``"interrupted"`` where it has just ceased."""
        if is_written(self.path):
            return "running"
        newest = self.sessions[-1:]
        return "finished" if newest and newest[0].ended is not None else "interrupted"

    @property
    def dropped(self) -> int:
        """Steps of which nothing was kept, because the disk was too slow."""
        return sum(session.dropped for session in self.sessions)

    @property
    def layers(self) -> list[LayerInfo]:
        """The watched parameters, in the order of the tables; none before the first table."""
        rows = self._rows(
            "SELECT name, shape, dtype, numel FROM layers WHERE position IS NOT NULL "
            "ORDER BY position"
        )
        return [LayerInfo(name, tuple(json.loads(s)), dtype, n) for name, s, dtype, n in rows]

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(layer.name for layer in self.layers)

    # ---- steps -----------------------------------------------------------------------------------

    @property
    def steps(self) -> dict[str, NDArray[Any]]:
        """All finished steps, ascending: an array (steps,) for each of these.

        ``step`` (int64), ``time`` (seconds since 1970 UTC), ``loss``, ``lr``, ``total_norm`` before
        clipping, ``clip_coef``, ``clip_threshold``, and ``skipped`` (bool).
        """
        columns = ", ".join(f"steps.{name}" for name in schema.STEP_COLUMNS)
        rows = self._array(
            f"SELECT {columns} FROM {schema.visible('steps')} ORDER BY steps.session, steps.step",
            len(schema.STEP_COLUMNS),
        )
        found: dict[str, NDArray[Any]] = dict(zip(schema.STEP_COLUMNS, rows.T, strict=True))
        found["step"] = found["step"].astype(np.int64)
        found["skipped"] = found["skipped"] == 1
        return found

    @property
    def scalars(self) -> dict[str, tuple[Integers, Floats]]:
        """What else was observed, by name: steps (s,) and values (s,)."""
        names = [name for (name,) in self._rows("SELECT DISTINCT name FROM scalars ORDER BY name")]
        found = {}
        for name in names:
            rows = self._array(
                f"SELECT scalars.step, value FROM {schema.visible('scalars')} WHERE name = ? "
                "ORDER BY scalars.session, scalars.step",
                2,
                name,
            )
            found[name] = (rows[:, 0].astype(np.int64), rows[:, 1])
        return found

    # ---- layers ----------------------------------------------------------------------------------

    def table(
        self, column: str, kind: TableKind = "gradient", *, since: int = 0
    ) -> tuple[Integers, Floats]:
        """Return one column of the statistics of every layer at the steps that were kept.

        Args:
            column: Any of docs/statistics.md: ``"l2"``, ``"rms"``, ``"zero_fraction"``, ...
            kind: ``"gradient"``, ``"weight"`` or ``"update"``; the last two are there where
                `attach` was asked for them.
            since: First step that is wanted.

        Returns:
            Steps (s,) and values (s, layers), in the order of `names`; NaN where a layer had no
            gradient.

        Raises:
            ArgumentValueError: There is no such column or kind.
        """
        steps, found = self.tables((column,), kind, since=since)
        return steps, found[column]

    def tables(
        self, columns: Sequence[str], kind: TableKind = "gradient", *, since: int = 0
    ) -> tuple[Integers, dict[str, Floats]]:
        """Return several columns, by name, at the price of one; see `table`."""
        for column in columns:
            if column not in COLUMN_NAMES:
                raise unknown_column(column)
        if kind not in schema.TABLE_OF:
            raise ArgumentValueError(
                f'kind must be "gradient", "weight" or "update", got {kind!r}; leave it out for '
                "gradients"
            )
        if set(columns) <= set(_RAW_NAMES):
            steps, values = self._layer_values(schema.TABLE_OF[kind], tuple(columns), since)
            return steps, {name: values[..., place] for place, name in enumerate(columns)}
        steps, values = self._layer_values(schema.TABLE_OF[kind], _RAW_NAMES, since)
        derived = derive(values.reshape(-1, len(_RAW_NAMES)))
        missing = np.isnan(values[..., 0])
        shaped = {name: derived[name].reshape(values.shape[:2]) for name in columns}
        return steps, {name: np.where(missing, np.nan, of) for name, of in shaped.items()}

    def update_ratio(self, *, since: int = 0) -> tuple[Integers, Floats] | None:
        """Return steps (s,) and, for each layer, norm of the step's change over norm: (s, layers).

        Of layers with more than 65,536 elements it is that of the first so many, unless `attach`
        was asked for ``updates``. None where none was kept.
        """
        steps, values = self._layer_values("update_ratios", ("ratio",), since)
        return (steps, values[..., 0]) if steps.size else None

    def histograms(self, layer: str) -> tuple[Integers, Integers]:
        """Return steps (h,) and a layer's counts by binary exponent, (h, 256).

        The bins are those of ``gradstat.columns.histogram_edges()``.

        Raises:
            LayerNotFoundError: There is no such layer.
        """
        if layer not in self.names:
            raise layer_not_found(layer, self.names)
        rows = self._rows(
            f"SELECT histograms.step, first_bin, counts FROM {schema.visible('histograms')} "
            "WHERE layer = (SELECT layer FROM layers WHERE name = ?) "
            "ORDER BY histograms.session, histograms.step",
            layer,
        )
        counts = np.zeros((len(rows), HISTOGRAM_BINS), np.int64)
        for place, (_, first, text) in enumerate(rows):
            found = json.loads(text)
            counts[place, first : first + len(found)] = found
        return np.array([row[0] for row in rows], np.int64), counts

    @property
    def histogram_steps(self) -> Integers:
        """Steps with histograms, ascending: (h,)."""
        rows = self._array(
            f"SELECT DISTINCT histograms.step FROM {schema.visible('histograms')} ORDER BY 1", 1
        )
        return rows[:, 0].astype(np.int64)

    def histogram_table(self, step: int) -> Integers:
        """Return the histograms of all layers at one of `histogram_steps`: (layers, 256)."""
        place = {name: index for index, name in enumerate(self.names)}
        counts = np.zeros((len(place), HISTOGRAM_BINS), np.int64)
        for name, first, text in self._rows(
            "SELECT name, first_bin, counts FROM run_histograms WHERE step = ?", int(step)
        ):
            if name in place:
                found = json.loads(text)
                counts[place[name], first : first + len(found)] = found
        return counts

    def _layer_values(
        self, table: str, columns: tuple[str, ...], since: int
    ) -> tuple[Integers, Floats]:
        """Return steps (s,) and values (s, layers, columns)."""
        numbers = self._array(
            "SELECT layer FROM layers WHERE position IS NOT NULL ORDER BY position", 1
        )[:, 0]
        rows = self._array(
            f"SELECT {table}.step, layer, {', '.join(columns)} FROM {schema.visible(table)} "
            f"WHERE {table}.step >= ? ORDER BY {table}.session, {table}.step",
            2 + len(columns),
            since,
        )
        rows = rows[np.isin(rows[:, 1], numbers)]
        steps, step_of = np.unique(rows[:, 0].astype(np.int64), return_inverse=True)
        order = np.argsort(numbers)
        place_of = order[np.searchsorted(numbers, rows[:, 1], sorter=order)]
        values = np.full((len(steps), len(numbers), len(columns)), np.nan)
        values[step_of, place_of] = rows[:, 2:]
        return steps, values

    # ---- activations, findings, actions ----------------------------------------------------------

    @property
    def activations(self) -> dict[str, dict[str, NDArray[Any]]]:
        """By site, an array for each of ``step``, ``units``, ``dead_units``, ``saturated_low``, ...

        The columns are those of `gradstat.records.SiteRecord`; ``kind`` holds text.
        """
        names = (
            "site", "step", "kind", "units", "dead_units", "saturated_low", "saturated_high",
            "zero_fraction", "mean", "std",
        )  # fmt: skip
        rows = self._rows(
            f"SELECT {', '.join(names)} FROM run_activations ORDER BY session, step, place"
        )
        by_site: dict[str, list[tuple[Any, ...]]] = {}
        for site, *row in rows:
            by_site.setdefault(site, []).append(tuple(row))
        return {
            site: {
                name: np.array(values, _DTYPES.get(name, np.float64))
                for name, values in zip(names[1:], zip(*found, strict=True), strict=True)
            }
            for site, found in by_site.items()
        }

    @property
    def findings(self) -> list[tuple[int, Finding]]:
        """What the newest look at the run has found, the likeliest cause first.

        With each the step of the look that was the first to find its code.
        """
        looks = self._rows(
            f"SELECT diagnoses.session, diagnoses.step FROM {schema.visible('diagnoses')} "
            "ORDER BY diagnoses.session DESC, diagnoses.step DESC LIMIT 1"
        )
        if not looks:
            return []
        first = dict(self._rows("SELECT code, min(step) FROM run_findings GROUP BY code"))
        rows = self._rows(
            "SELECT code, severity, confidence, explanation, remedy, evidence, source, layers, "
            "steps, caused_by FROM findings WHERE session = ? AND step = ? ORDER BY place",
            *looks[0],
        )
        return [(first[row[0]], _finding(row)) for row in rows]

    @property
    def actions(self) -> list[GuardAction]:
        """What a guard has done, oldest first, that of steps done again included."""
        rows = self._rows(
            "SELECT step, action, cause, because, before, after FROM actions ORDER BY rowid"
        )
        return [GuardAction(*row[:4], *map(json.loads, row[4:])) for row in rows]

    def frame(self, name: str) -> Any:
        """Return a `pandas.DataFrame` of one kind of rows, without those that are hidden.

        Args:
            name: ``"steps"``, ``"gradients"``, ``"activations"``, ``"findings"``, or another of
                `gradstat.runlog.run.FRAMES`.

        Raises:
            ArgumentValueError: There is no such kind.
            MissingPackageError: pandas is not installed.
        """
        if name not in FRAMES:
            raise ArgumentValueError(
                f'name must be one of {", ".join(FRAMES)}; got {name!r}; use "steps"'
            )
        pandas = import_optional("pandas", purpose="frame()", install="gradstat[pandas]")
        return pandas.read_sql_query(FRAMES[name], self._connection)

    # ---- reading ---------------------------------------------------------------------------------

    def _rows(self, query: str, *arguments: Any) -> list[Any]:
        try:
            return self._connection.execute(query, arguments).fetchall()
        except sqlite3.Error as error:
            raise self._unreadable(error) from error

    def _array(self, query: str, n_columns: int, *arguments: Any) -> Floats:
        """Return rows of numbers; NULL is NaN."""
        try:
            rows = self._connection.execute(query, arguments)
            return np.fromiter(rows, np.dtype((np.float64, n_columns)))
        except sqlite3.Error as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: sqlite3.Error) -> RunLogError:
        return RunLogError(
            f"{self.path} must be readable, got: {error}; open it again, or look whether the disk "
            "is full"
        )

    def __repr__(self) -> str:
        last = self._rows("SELECT count(*), max(step) FROM run_steps")[0]
        return f"Run({str(self.path)!r}, {self.status}, {last[0]} steps up to {last[1] or 0})"


_DTYPES: dict[str, Any] = {
    "step": np.int64,
    "kind": np.str_,
    "units": np.int64,
    "dead_units": np.int64,
}


def open_run(path: str | os.PathLike[str]) -> Run:
    """Return the run in a file that ``gradstat.attach(..., log=path)`` writes or has written.

    Reads only, also while the run goes on; nothing waits for the run, nor it for the reader. Does
    not synchronise.

    Raises:
        RunNotFoundError: There is no such file; it is a FileNotFoundError, too.
        RunLogError: The file is no run log, or one of another version.

    Example:
        >>> with gradstat.open_run("runs/first.db") as run:
        ...     steps, norms = run.table("l2")
        ...     run.steps["loss"], run.findings
    """
    return Run(Path(path).expanduser().absolute())


def _connect(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise RunNotFoundError(
            f"path must be that of a run log, got {path}, where there is no file; "
            'gradstat.attach(..., log="...") makes one'
        )
    try:
        connection = sqlite3.connect(
            f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
        )
    except sqlite3.Error as error:
        raise schema.not_a_run(path, error) from error
    try:
        if schema.is_empty(connection):
            raise RunLogError(
                f"{path} must be a run log, got a file that is empty; if its run has just been "
                "started, wait a moment"
            )
        schema.check(connection, path)
    except sqlite3.Error as error:
        connection.close()
        raise schema.not_a_run(path, error) from error
    except RunLogError:
        connection.close()
        raise
    return connection


def _measure(plain: dict[str, Any]) -> Measure:
    return Measure(**plain | {"value": np.nan if plain["value"] is None else plain["value"]})


def _finding(row: tuple[Any, ...]) -> Finding:
    code, severity, confidence, explanation, remedy, evidence, source, layers, steps, cause = row
    return Finding(
        code,
        severity,
        np.nan if confidence is None else confidence,
        explanation,
        tuple(json.loads(remedy)),
        tuple(map(_measure, json.loads(evidence))),
        source,
        tuple(json.loads(layers)),
        tuple(json.loads(steps)),
        cause,
    )
