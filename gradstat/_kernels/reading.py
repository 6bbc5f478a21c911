"""What reads tensors: the table of a batch, its norm, its clip program, the counts of units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradstat import _fallback
from gradstat._kernels.batch import Batch, Part, gather
from gradstat._kernels.compiled import (
    HISTOGRAM_BINS,
    NORM_KINDS,
    NUM_CLIP_OUT,
    NUM_COLUMNS,
    OUT_FACTOR,
    OUT_NORM,
    ClipStep,
    Nonfinite,
    _cuda_device,
    _native,
)
from gradstat._readable import Readable
from gradstat._units import UnitCounts, UnitRule, check_window, units_first
from gradstat.errors import UnsupportedTensorError

_counters: dict[tuple[torch.device, int], Tensor] = {}


def _counter(device: torch.device) -> Tensor:
    """Return four zero bytes for the last-block test of the current stream."""
    stream = torch.cuda.current_stream(device).cuda_stream
    if torch.cuda.is_current_stream_capturing():
        # A graph may be replayed on any stream, beside this one: it owns its counter.
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, stream)
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[key]


def new_table(n_rows: int, device: torch.device) -> Tensor:
    """Return memory for so many rows of moments.

    Raises:
        UnsupportedTensorError: New tensors have no memory here.
    """
    table = torch.empty((n_rows, NUM_COLUMNS), dtype=torch.float64, device=device)
    if type(table) is not Tensor:
        raise UnsupportedTensorError(
            f"results must go to real memory, but new tensors are {type(table).__name__} here; "
            "measure outside of FakeTensorMode and the like"
        )
    return table


def _launch(
    part: Part,
    size: int,
    histogram: bool,
    clip: Any = None,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    device = part.device
    if table is None:
        table = new_table(size + 1, device)
    bins = (
        torch.empty((size + 1, HISTOGRAM_BINS), dtype=torch.int64, device=device)
        if histogram
        else None
    )
    if device.type == "cpu":
        _native.moments(part.tensors, table, bins, clip, threads=torch.get_num_threads())
        return table, bins
    n_bytes = _native.moments_workspace_bytes(part.tensors)
    workspace = torch.empty(n_bytes, dtype=torch.uint8, device=device)
    with _cuda_device(device):
        _native.moments(part.tensors, table, bins, clip, workspace, _counter(device))
    return table, bins


def moments(batch: Batch, *, histogram: bool = False) -> tuple[Tensor, Tensor | None]:
    """Return the table of a batch and, where asked for, its histograms.

    Returns:
        fp64 of shape (size + 1, 12) in the columns of ``csrc/kernels.h``, the last row holding the
        totals and a missing tensor's row being NaN; and `None` or int64 of shape (size + 1, 256).
        Both on ``batch.device``. Does not synchronise, except where tensors lie on several devices
        or on one without a kernel.
    """
    results = []
    for part in batch.parts:
        if part.native:
            table, bins = _launch(part, batch.size, histogram)
        else:
            table, bins = _fallback.moments(part.objects, histogram)
        _correct_sparse_rows(table, part.readable)
        results.append((table, bins))
    return results[0] if len(results) == 1 else _fallback.merge(results)


def _correct_sparse_rows(table: Tensor, readable: dict[int, Readable]) -> None:
    """Let rows and dead rows of a sparse tensor speak of the whole tensor, not of its values."""
    for index, entry in readable.items():
        if entry.rows is None:
            continue
        columns = slice(_fallback.ROWS, _fallback.DEAD_ROWS + 1)
        right = torch.tensor(
            [entry.rows, entry.dead_rows], dtype=torch.float64, device=table.device
        )
        table[-1, columns] += right - table[index, columns]
        table[index, columns] = right


@dataclass(frozen=True)
class Norm:
    """The norm over all tensors of a batch and the factor that clips it."""

    exact: Tensor
    """fp64 of shape (): NaN or Inf only if an element is."""

    result: Tensor
    """The same in ``Batch.result_dtype``, where it may be rounded to Inf."""

    coefficient: Tensor
    """fp64 of shape (1,)."""

    table: Tensor | None
    """The batch's table, where one was made on the way."""


def total_norm(batch: Batch, max_norm: float, norm_type: float) -> Norm:
    """Return the norm of order ``norm_type`` and the factor that clips it to ``max_norm``.

    Everything lies on the first part's device, on the CPU where that has no kernel. Synchronises
    only where a device has no kernel.
    """
    part = batch.parts[0]
    kind = NORM_KINDS.get(norm_type)
    if kind is not None and len(batch.parts) == 1 and part.native:
        unlimited = max_norm == math.inf
        steps: list[ClipStep] = [] if unlimited else [(0, [max_norm], 0)]
        clip = _native.Clip(kind, Nonfinite.KEEP if unlimited else Nonfinite.CLIP, steps)
        clip.out = out = torch.empty(NUM_CLIP_OUT, dtype=torch.float64, device=part.device)
        norm = result = out[OUT_NORM]
        if batch.result_dtype is torch.float32:  # rounded by the kernel: one launch less
            clip.norm_f32 = result = torch.empty((), dtype=torch.float32, device=part.device)
        table, _ = _launch(part, batch.size, False, clip)
        return Norm(norm, result, out[OUT_FACTOR : OUT_FACTOR + 1], table)
    device = part.device if part.native else torch.device("cpu")
    tables = [
        _launch(p, batch.size, False)[0] if p.native else _fallback.moments(p.objects, False)[0]
        for p in batch.parts
    ]
    if kind is not None:
        norm = _fallback.combined_norm([t[-1].to(device) for t in tables], kind)
    else:
        norms = [
            _fallback.power_norms(p.objects, t, norm_type).to(device)
            for p, t in zip(batch.parts, tables, strict=True)
        ]
        norm = _fallback.norm_of_norms(torch.cat(norms), norm_type)
    coefficient = _fallback.clip_coefficient(norm, max_norm)
    # Positions in the first table are those of the batch only where there is one part.
    only_table = tables[0] if len(tables) == 1 else None
    return Norm(norm, norm.to(batch.result_dtype), coefficient, only_table)


def make_clip(nonfinite: Nonfinite, steps: Sequence[ClipStep]) -> Any:
    """Return what `moments_and_clip` runs: policies of the L2 norm, with places for their data."""
    return _native.Clip(2, nonfinite, steps)


def moments_and_clip(
    batch: Batch, table: Tensor, clip: Any, *, histogram: bool = False
) -> Tensor | None:
    """Fill a table and let the clip program decide on the step, in one read of the tensors.

    Args:
        batch: Gradients.
        table: fp64 (size + 1, 12) on ``batch.device``, written.
        clip: From `make_clip`, with ``out`` and ``state`` (and what else the policies need) set to
            tensors on ``batch.device``.
        histogram: Also count the magnitudes.

    Returns:
        The histograms as of `moments`, where asked for. Synchronises only where tensors lie on
        several devices or on one without a kernel: the table and the decision are then made on the
        CPU.
    """
    part = batch.parts[0]
    if len(batch.parts) == 1 and part.native:
        _, bins = _launch(part, batch.size, histogram, clip, table)
        if part.readable:
            _correct_sparse_rows(table, part.readable)
        return bins
    measured, bins = moments(batch, histogram=histogram)
    table.copy_(measured)
    _native.run_clip(table, clip, batch.size)
    return bins


Measure = Callable[[Sequence[Tensor], int, int], bool]


def measurer(tables: Tensor, decisions: Tensor, clip: Any) -> Measure | None:
    """Return what does `gather` and `moments_and_clip` for an ordinary step, in one call.

    Args:
        tables: fp64 (places, size + 1, 12) on the CPU, to be written.
        decisions: fp64 (places, ``NUM_CLIP_OUT``) on the CPU, to be written.
        clip: From `make_clip`, with ``state`` set.

    Returns:
        A function of the parameters with the gradients, the place that their table and decision go
        to, and the number of threads. It returns whether it is done. It is not, and nothing is
        written, where there is no gradient, where one does not lie on the CPU or cannot be read as
        it is, and where a parameter stands twice. None where the tables do not lie on the CPU.
    """
    if tables.device.type != "cpu":
        return None
    return _native.measurer(tables, decisions, clip)


def units(
    tensor: Tensor,
    rule: UnitRule,
    unit_dim: int,
    into: UnitCounts | None = None,
    *,
    name: str = "the activation",
) -> UnitCounts:
    """Return the counts of each unit of an activation, and its moments, from one read.

    Args:
        tensor: Any floating-point tensor; a dense one is read where it lies, in any order of its
            dimensions. One without dimensions is one unit.
        rule: What counts as active, low and high.
        unit_dim: The dimension that units are slices of.
        into: A window to add this activation to, in place; its row may begin as zeros. `None`
            begins one.
        name: How an error names the tensor.

    Returns:
        ``into``, or the new window: on the tensor's device, on the CPU where that has no kernel.
        Synchronises only there.

    Raises:
        ArgumentTypeError: It is no tensor.
        UnsupportedTensorError: Its numbers cannot be read.
        ArgumentValueError: It has no such dimension, or ``into`` holds another number of units.
    """
    view = units_first(tensor, unit_dim, name) if isinstance(tensor, Tensor) else tensor
    batch = gather([view], name_of=lambda _: name)
    part = batch.parts[0]
    if into is None:
        into = UnitCounts(
            torch.zeros((3, len(view)), dtype=torch.int64, device=batch.device),
            torch.zeros(NUM_COLUMNS, dtype=torch.float64, device=batch.device),
        )
    check_window(into, len(view), name)
    if not part.native:
        _fallback.units(part.tensors[0], rule, into)
    elif part.device.type == "cpu":
        _native.units(part.tensors, *rule, *into, threads=torch.get_num_threads())
    else:
        n_bytes = _native.units_workspace_bytes(part.tensors)
        workspace = torch.empty(n_bytes, dtype=torch.uint8, device=part.device)
        with _cuda_device(part.device):
            _native.units(part.tensors, *rule, *into, workspace, _counter(part.device))
    return into
