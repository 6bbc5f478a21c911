"""`DatabaseSink`: a run in one SQLite file, which others read while it grows."""

from __future__ import annotations

import json
import os
import sqlite3
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from gradstat.columns import NUM_RAW_COLUMNS, NUMEL
from gradstat.errors import RunLogError
from gradstat.records import (
    ActionRecord,
    ActivationRecord,
    DiagnosisRecord,
    DroppedRecord,
    HistogramRecord,
    LayersRecord,
    Record,
    RunEnd,
    RunStart,
    Sink,
    StepRecord,
    TableRecord,
    UpdateRatioRecord,
)
from gradstat.runlog import schema
from gradstat.runlog.lock import WriterLock


class DatabaseSink(Sink):
    """Writes a run into an SQLite file in WAL mode; what `attach` makes of ``log="run.db"``.

    What a `flush` has committed outlives the process, however it ends. A file that holds a run is
    gone on with: under the same run id, as a further session. See docs/runlog.md.

    Args:
        path: The file; its folders are made where missing.

    Raises:
        RunLogError: It cannot be written, another process writes it, or it is no run log of this
            version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self.run_id = ""
        self._dropped = self._dropped_before = 0
        self._has_gap = False
        self._connect()

    def reopen(self) -> None:
        """Go on after a failure, as a further session; steps lost meanwhile count as dropped.

        Raises:
            RunLogError: As when it was made.
        """
        self._connect()
        self._has_gap = True

    def _connect(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = WriterLock(self.path)
        except OSError as error:
            raise self._failure(error) from error
        try:
            # Opened here, where errors reach the script, and used by the background thread alone.
            self._connection = sqlite3.connect(
                self.path, isolation_level=None, check_same_thread=False
            )
            try:
                self.run_id = self._open()
            except BaseException:
                self._connection.close()
                raise
        except BaseException as error:
            self._lock.release()
            if isinstance(error, sqlite3.Error):
                raise self._failure(error) from error
            raise
        self._session = 0
        self._has_stepped = False
        self._layers: list[int] = []

    def _open(self) -> str:
        connection = self._connection
        try:
            is_new = schema.is_empty(connection)
            if not is_new:
                schema.check(connection, self.path)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise schema.not_a_run(self.path, error) from error
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        if is_new:
            schema.create(connection)
        found = connection.execute("SELECT id FROM run").fetchone()
        return found[0] if found else self.run_id or uuid.uuid4().hex

    def _failure(self, error: Exception) -> RunLogError:
        return RunLogError(
            f"{self.path} must be a file that can be written, got: {error}; choose another path or "
            "make room. What was committed stays readable"
        )

    # ---- writing ---------------------------------------------------------------------------------

    def write(self, record: Record) -> None:
        """Add the rows of a record to the open transaction."""
        try:
            if not self._connection.in_transaction:
                self._connection.execute("BEGIN")
            _WRITERS[type(record)](self, record)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def flush(self) -> None:
        """Commit."""
        try:
            if self._connection.in_transaction:
                self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Close the file; one that nobody reads becomes a single file without a WAL beside it."""
        with suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        with suppress(sqlite3.Error):
            self._connection.execute("PRAGMA journal_mode = DELETE")
        with suppress(sqlite3.Error):
            self._connection.close()
        self._lock.release()

    def _insert(self, table: str, *rows: tuple[Any, ...]) -> None:
        if rows:
            places = ", ".join("?" * len(rows[0]))
            self._connection.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({places})", rows)

    def _start(self, record: RunStart) -> None:
        if self._session:
            self._end_session(record.time)
        else:
            held = self._connection.execute("SELECT count(*) FROM run").fetchone()[0]
            if not held:
                self._insert("run", (self.run_id, record.time))
        facts = (record.model, record.optimizer, record.config, record.versions, record.machine)
        cursor = self._connection.execute(
            "INSERT INTO sessions (started, model, optimizer, config, versions, machine) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (record.time, *map(_json, facts)),
        )
        assert cursor.lastrowid is not None
        self._session = cursor.lastrowid
        self._has_stepped = False
        self._dropped_before = self._dropped

    def _end_session(self, time: float) -> None:
        self._connection.execute(
            "UPDATE sessions SET ended = ? WHERE session = ?", (time, self._session)
        )

    def _end(self, record: RunEnd) -> None:
        self._note_dropped(record)
        self._end_session(record.time)

    def _note_dropped(self, record: DroppedRecord | RunEnd) -> None:
        self._dropped = record.dropped
        self._update_dropped()

    def _note_gap(self, step: int) -> None:
        """Count the steps between the last one that is in the file and this one as dropped."""
        (last,) = self._connection.execute("SELECT ifnull(max(step), 0) FROM steps").fetchone()
        self._dropped_before -= max(step - last - 1, 0)
        self._has_gap = False
        self._update_dropped()

    def _update_dropped(self) -> None:
        self._connection.execute(
            "UPDATE sessions SET dropped = ? WHERE session = ?",
            (self._dropped - self._dropped_before, self._session),
        )

    def _name_layers(self, record: LayersRecord) -> None:
        connection = self._connection
        connection.execute("UPDATE layers SET position = NULL")
        connection.executemany(
            "INSERT INTO layers (name, shape, dtype, numel, position) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET shape = excluded.shape, dtype = excluded.dtype, "
            "numel = excluded.numel, position = excluded.position",
            [
                (name, _json(shape), dtype, int(np.prod(shape, dtype=np.int64)), position)
                for position, (name, shape, dtype) in enumerate(
                    zip(record.names, record.shapes, record.dtypes, strict=True)
                )
            ],
        )
        numbers = dict(connection.execute("SELECT name, layer FROM layers"))
        self._layers = [numbers[name] for name in record.names]

    def _step(self, record: StepRecord) -> None:
        if self._has_gap:
            self._note_gap(record.step)
        if not self._has_stepped:
            self._has_stepped = True
            self._connection.execute(
                "UPDATE sessions SET first_step = ? WHERE session = ?",
                (record.step, self._session),
            )
            self._connection.execute(
                "UPDATE sessions SET hidden_from = min(ifnull(hidden_from, ?1), ?1) "
                "WHERE session < ?2",
                (record.step, self._session),
            )
        self._insert(
            "steps",
            (
                self._session,
                record.step,
                record.time,
                record.loss,
                record.lr,
                record.total_norm,
                record.clip_coef,
                record.clip_threshold,
                record.is_skipped,
            ),
        )
        scalars = record.scalars.items()
        self._insert("scalars", *((self._session, name, record.step, v) for name, v in scalars))

    def _table(self, record: TableRecord) -> None:
        rows = zip(self._layers, record.data[:, :NUM_RAW_COLUMNS].tolist(), strict=True)
        self._insert(
            schema.TABLE_OF[record.kind],
            *(
                (self._session, record.step, layer, *row)
                for layer, row in rows
                if row[NUMEL] == row[NUMEL]  # a layer without a gradient has no row
            ),
        )

    def _ratios(self, record: UpdateRatioRecord) -> None:
        ratios = zip(self._layers, record.ratios.tolist(), strict=True)
        rows = ((self._session, record.step, layer, ratio) for layer, ratio in ratios)
        self._insert("update_ratios", *rows)

    def _histograms(self, record: HistogramRecord) -> None:
        rows = []
        for layer, counts in zip(self._layers, record.counts, strict=True):
            (bins,) = counts.nonzero()
            if bins.size:
                first, last = int(bins[0]), int(bins[-1])
                text = _json(counts[first : last + 1].tolist())
                rows.append((self._session, record.step, layer, first, text))
        self._insert("histograms", *rows)

    def _activations(self, record: ActivationRecord) -> None:
        for place, site in enumerate(record.sites):
            self._insert("activations", (self._session, record.step, place, *vars(site).values()))

    def _diagnosis(self, record: DiagnosisRecord) -> None:
        at = (self._session, record.step)
        self._connection.execute("DELETE FROM findings WHERE session = ? AND step = ?", at)
        self._insert("diagnoses", at)
        for place, finding in enumerate(record.findings):
            plain = finding.to_dict()
            for name in ("remedy", "evidence", "layers", "steps"):
                plain[name] = _json(plain[name])
            self._insert("findings", (*at, place, *plain.values()))

    def _action(self, record: ActionRecord) -> None:
        action = record.action
        before, after = _json(action.before), _json(action.after)
        self._insert(
            "actions",
            (
                self._session,
                record.step,
                action.action,
                action.cause,
                action.because,
                before,
                after,
            ),
        )


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


_WRITERS: dict[type[Any], Callable[[DatabaseSink, Any], None]] = {
    RunStart: DatabaseSink._start,
    LayersRecord: DatabaseSink._name_layers,
    StepRecord: DatabaseSink._step,
    TableRecord: DatabaseSink._table,
    UpdateRatioRecord: DatabaseSink._ratios,
    HistogramRecord: DatabaseSink._histograms,
    ActivationRecord: DatabaseSink._activations,
    DiagnosisRecord: DatabaseSink._diagnosis,
    ActionRecord: DatabaseSink._action,
    DroppedRecord: DatabaseSink._note_dropped,
    RunEnd: DatabaseSink._end,
}
