"""`TensorBoard`: the records of a run under the tags that the field uses."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstat.columns import HISTOGRAM_BINS, INFS, L2, NANS
from gradstat.errors import ArgumentTypeError, import_optional
from gradstat.records import (
    ActionRecord,
    ActivationRecord,
    DiagnosisRecord,
    HistogramRecord,
    LayersRecord,
    Record,
    RunStart,
    Sink,
    StepRecord,
    TableRecord,
    UpdateRatioRecord,
)

_EXPONENTS = np.arange(HISTOGRAM_BINS + 1, dtype=np.float64) - 127.0
"""The edges of the histogram's bins as powers of two. The outermost bins, down to 0 and up to Inf,
are drawn as wide as the others."""


_PACKAGE = {"purpose": "TensorBoard(directory)", "install": "'gradstat[tensorboard]'"}


class TensorBoard(Sink):
    """Writes to TensorBoard: ``train/loss``, ``grad_norm/total`` and others, see docs/sinks.md.

    Numbers that are NaN are left out: in a record they are the ones not known. Histograms are of
    ``log2 |g|``: they are made from the bins that were counted with the statistics, signs unknown.

    Args:
        writer_or_dir: A directory, or a ``SummaryWriter`` (torch's or tensorboardX's). In a
            directory a run that is resumed or goes back hides what was written of the steps that it
            does again; use one that nothing else writes to. A writer is left open at the end.

    Raises:
        ArgumentTypeError: It is neither.
        MissingPackageError: A directory is given and tensorboard is not installed.

    Example:
        >>> gradstat.attach(optimizer, model, log=gradstat.sinks.TensorBoard("runs/exp1"))
    """

    def __init__(self, writer_or_dir: Any) -> None:
        self._directory: str | None = None
        self._writer: Any = None
        if isinstance(writer_or_dir, str | os.PathLike):
            import_optional("tensorboard", **_PACKAGE)
            self._directory = os.fspath(writer_or_dir)
            self._open(purge_step=None)
        elif hasattr(writer_or_dir, "add_histogram_raw"):
            self._writer = writer_or_dir
        else:
            raise ArgumentTypeError(
                "writer_or_dir must be a directory or a SummaryWriter, got "
                f'{type(writer_or_dir).__name__}; pass for example "runs/exp1"'
            )
        self._start: RunStart | None = None
        self._has_steps = False
        self._names: tuple[str, ...] = ()

    def _open(self, purge_step: int | None) -> None:
        if self._writer is not None:
            self._writer.close()
        writer = import_optional("torch.utils.tensorboard", **_PACKAGE).SummaryWriter
        self._writer = writer(self._directory, purge_step=purge_step)

    # ---- records ---------------------------------------------------------------------------------

    def write(self, record: Record) -> None:
        """Hand a record to the writer, which has a queue and a thread of its own."""
        if isinstance(record, RunStart):
            self._start = record
        elif isinstance(record, LayersRecord):
            self._names = record.names
        elif isinstance(record, StepRecord):
            self._step(record)
        elif isinstance(record, TableRecord):
            self._table(record)
        elif isinstance(record, UpdateRatioRecord):
            self._by_layer("update_ratio", record.ratios, record.step)
        elif isinstance(record, HistogramRecord):
            for name, counts in zip(self._names, record.counts, strict=True):
                self._histogram(f"grad_log2/{name}", counts, record.step)
        elif isinstance(record, ActivationRecord):
            self._activations(record)
        elif isinstance(record, DiagnosisRecord):
            found = "\n\n".join(map(str, record.findings))
            self._text("findings", found or "nothing was found", record.step)
        elif isinstance(record, ActionRecord):
            self._text(f"actions/{record.action.action}", str(record.action), record.step)

    def flush(self) -> None:
        """Write the events so far to the file."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file; a writer that was given is flushed and stays open."""
        self._writer.flush()
        if self._directory is not None:
            self._writer.close()

    def _step(self, record: StepRecord) -> None:
        if self._start is not None:
            self._begin(self._start, record.step)
            self._start = None
        self._has_steps = True
        scalars = {
            "train/loss": record.loss,
            "train/lr": record.lr,
            "grad_norm/total": record.total_norm,
            "clip/coef": record.clip_coef,
            "clip/skipped": float(record.is_skipped),
        }
        if math.isfinite(record.clip_threshold):
            scalars["clip/threshold"] = record.clip_threshold
        scalars |= {_tag(name): value for name, value in record.scalars.items()}
        self._scalars(scalars, record.step, record.time)

    def _begin(self, start: RunStart, step: int) -> None:
        """Say which run goes on with this step, and hide what was written from there on."""
        if self._directory is not None and (self._has_steps or step > 1):
            self._open(purge_step=step)
        known = {key: value for key, value in vars(start).items() if key != "time"}
        self._text("run", json.dumps(known, indent=2, default=str), step)

    def _table(self, record: TableRecord) -> None:
        norms = record.data[:, L2]
        if record.kind != "gradient":
            self._by_layer(f"{record.kind}_norm", norms, record.step)
            return
        self._by_layer("grad_norm", norms, record.step)
        nonfinite = record.data[:, NANS] + record.data[:, INFS]
        nonfinite[nonfinite == 0] = np.nan
        self._by_layer("grad_nonfinite", nonfinite, record.step)

    def _by_layer(self, group: str, values: NDArray[np.float64], step: int) -> None:
        names = (f"{group}/{name}" for name in self._names)
        self._scalars(dict(zip(names, values.tolist(), strict=True)), step)

    def _activations(self, record: ActivationRecord) -> None:
        shares = {}
        for site in record.sites:
            dead = site.dead_units / site.units if site.units else math.nan
            shares[f"dead_units/{site.name}"] = dead
            shares[f"saturated_low/{site.name}"] = site.saturated_low
            shares[f"saturated_high/{site.name}"] = site.saturated_high
        self._scalars(shares, record.step)

    # ---- what a writer takes ---------------------------------------------------------------------

    def _scalars(self, values: Mapping[str, float], step: int, time: float | None = None) -> None:
        known = {tag: value for tag, value in values.items() if not math.isnan(value)}
        torchs = sys.modules.get("torch.utils.tensorboard")
        if torchs is not None and isinstance(self._writer, torchs.SummaryWriter):
            # One event: of 500 layers a fifth of the time that an event each would take.
            summary = import_optional("torch.utils.tensorboard.summary", **_PACKAGE).Summary
            entries = [summary.Value(tag=tag, simple_value=value) for tag, value in known.items()]
            self._writer.file_writer.add_summary(summary(value=entries), step, time)
        else:
            for tag, value in known.items():
                self._writer.add_scalar(tag, value, step, time)

    def _text(self, tag: str, text: str, step: int) -> None:
        # Indented by four it is code, which Markdown shows as it is.
        self._writer.add_text(tag, textwrap.indent(text, "    "), step)

    def _histogram(self, tag: str, counts: NDArray[np.int64], step: int) -> None:
        filled = np.flatnonzero(counts)
        if not filled.size:
            return
        bins = slice(int(filled[0]), int(filled[-1]) + 1)
        lefts, rights = _EXPONENTS[:-1][bins], _EXPONENTS[1:][bins]
        counts, centres = counts[bins], (lefts + rights) / 2
        self._writer.add_histogram_raw(
            tag,
            min=lefts[0],
            max=rights[-1],
            num=int(counts.sum()),
            sum=float(counts @ centres),
            sum_squares=float(counts @ centres**2),
            bucket_limits=rights.tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )


def _tag(name: str) -> str:
    """Return the tag of a value that was observed: ``val_loss`` becomes ``val/loss``."""
    tag = re.sub(r"^(train|val|valid|validation|test|eval)_", r"\1/", name)
    return tag if "/" in tag else f"train/{tag}"
