"""The only importer of the compiled module: checks tensors, picks devices, streams and threads.

Everything above works with a `Batch`: the tensors of one call, unpacked once, one part a device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from gradstat import _fallback
from gradstat._readable import Readable, check_writable, make_readable
from gradstat._units import UnitCounts, UnitRule, check_window, units_first
from gradstat.errors import (
    ArgumentTypeError,
    CudaError,
    NativeModuleError,
    UnsupportedTensorError,
)

try:
    from gradstat import _native
except ImportError as error:
    raise NativeModuleError(
        "gradstat needs its compiled module gradstat._native, which does not load "
        f"({error}); reinstall with: pip install --force-reinstall --no-deps gradstat"
    ) from error
try:
    _native.register_tensor_types([torch.Tensor, torch.nn.Parameter])
except RuntimeError as error:
    raise NativeModuleError(f"{error} (this is torch {torch.__version__})") from error

NUM_COLUMNS: int = _native.NUM_COLUMNS
HISTOGRAM_BINS: int = _native.HISTOGRAM_BINS
NORM_KINDS = {1.0: 1, 2.0: 2, math.inf: 3}
"""Orders of the norms that the kernels take, and their number in ``csrc/kernels.h``."""

NUM_CLIP_OUT: int = _native.NUM_CLIP_OUT
NUM_CLIP_COUNTERS: int = _native.NUM_CLIP_COUNTERS
# Places in ClipRequest::out and ClipRequest::state (csrc/kernels.h).
OUT_NORM, OUT_FACTOR, OUT_COEFFICIENT, OUT_SKIP, OUT_ALLOWED, OUT_FINITE = range(6)
COUNTER_STEPS, COUNTER_CLIPPED, COUNTER_SKIPPED, COUNTER_SKIPPED_IN_A_ROW = range(4)


class Nonfinite(IntEnum):
    """What a norm of NaN or Inf does; numbers and meaning in ``csrc/kernels.h``."""

    KEEP = 0
    SKIP = 1
    ZERO = 2
    CLIP = 3


ClipStep = tuple[int, list[float], int]
"""Number of a policy, its parameters, and where its state begins."""

NameOf = Callable[[int], str]

_WIDE_DTYPES = (torch.float64, torch.complex128)


def describe_position(index: int) -> str:
    """Return how an error names a tensor that has no name."""
    return f"tensor {index}"


@dataclass
class Part:
    """The tensors of a batch that lie on one device; at all other positions it has none."""

    device: torch.device
    tensors: Any
    """``_native.TensorList`` for the kernels, or a plain list for `_fallback`."""

    readable: dict[int, Readable]
    """What stands in for the tensors that no kernel reads as they are."""

    @property
    def native(self) -> bool:
        """Whether the compiled kernels read this part."""
        return isinstance(self.tensors, _native.TensorList)

    @property
    def objects(self) -> list[Tensor | None]:
        """The tensors that are read, `None` where there is none."""
        objects: list[Tensor | None] = self.tensors.objects if self.native else self.tensors
        return objects


@dataclass
class Batch:
    """The tensors of one call, by device; the first part is the first tensor's device."""

    parts: list[Part]
    size: int
    originals: list[Tensor | None] | None
    """The tensors as they came, kept only where some had to be replaced for reading."""

    result_dtype: torch.dtype
    """Dtype of a norm: fp64 where a tensor is, else fp32."""

    @property
    def device(self) -> torch.device:
        """Device of the results: that of the only part, and the CPU's where there are several."""
        part = self.parts[0]
        return part.device if len(self.parts) == 1 and part.native else torch.device("cpu")

    @property
    def is_empty(self) -> bool:
        """Whether every tensor is missing."""
        return all(
            part.tensors.n_present == 0
            if part.native
            else not any(tensor is not None for tensor in part.objects)
            for part in self.parts
        )

    @property
    def note(self) -> str:
        """What a table of this batch says of how it was made; empty where by kernels alone."""
        devices = [part.device.type for part in self.parts if not part.native]
        return f"{', '.join(devices)} tensors by plain torch operations" if devices else ""

    def tensors(self) -> list[Tensor]:
        """The tensors as they came, without the missing ones."""
        items = self.originals if self.originals is not None else self.parts[0].objects
        return [item for item in items if item is not None]


class RepeatedError(Exception):
    """The list names one parameter several times; ``positions`` are the later ones."""

    def __init__(self, positions: list[int]) -> None:
        super().__init__(positions)
        self.positions = positions


def _kernel_device(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    return device.type == "cuda" and torch.version.hip is None and _native.cuda_is_built()


def gather(
    items: Sequence[Any],
    *,
    take_grad: bool = False,
    or_itself: bool = False,
    name_of: NameOf = describe_position,
) -> Batch:
    """Return the batch of these tensors, or of their gradients.

    Args:
        items: Tensors, or parameters where ``take_grad``. `None` is a missing tensor.
        take_grad: Take ``.grad`` of each.
        or_itself: Take a tensor that is no parameter as a gradient itself, where ``take_grad``.
        name_of: Gives the name of the tensor at a position, for an error.

    Raises:
        ArgumentTypeError: An item is no tensor.
        UnsupportedTensorError: A tensor's numbers cannot be read.
        RepeatedError: An item stands in the list twice (only where ``take_grad``).
    """
    tensors = _native.TensorList(items, take_grad, or_itself)
    if take_grad and tensors.repeated:
        # None, a gradient that is missing, may stand anywhere and often.
        repeated = [index for index in tensors.repeated if items[index] is not None]
        if repeated:
            raise RepeatedError(repeated)
    if not tensors.irregular:
        device = torch.device("cpu")
        if tensors.on_cuda:
            device = torch.device("cuda", tensors.device_index)
        if _kernel_device(device):
            dtype = torch.float64 if tensors.has_f64 else torch.float32
            return Batch([Part(device, tensors, {})], len(tensors), None, dtype)
    originals: list[Tensor | None] = tensors.objects
    by_device: dict[torch.device, dict[int, Readable]] = {}
    suspects = set(tensors.irregular)
    for index, tensor in enumerate(originals):
        if tensor is None:
            continue
        readable = make_readable(tensor, name_of(index)) if index in suspects else Readable(tensor)
        by_device.setdefault(readable.tensor.device, {})[index] = readable
    parts = []
    for device, chosen in by_device.items():
        objects: list[Tensor | None] = [None] * len(originals)
        for index, readable in chosen.items():
            objects[index] = readable.tensor
        replaced = {i: r for i, r in chosen.items() if r.tensor is not originals[i]}
        native = _kernel_device(device)
        if not native:
            _warn_fallback(device)
        parts.append(
            Part(device, _native.TensorList(objects, False) if native else objects, replaced)
        )
    if not parts:
        parts = [Part(torch.device("cpu"), _native.TensorList(originals, False), {})]
    wide = any(t is not None and t.dtype in _WIDE_DTYPES for t in originals)
    return Batch(parts, len(originals), originals, torch.float64 if wide else torch.float32)


def _warn_fallback(device: torch.device) -> None:
    warnings.warn(
        f"gradstat has no kernel for {device.type} tensors here and measures them with plain torch "
        "operations, with equal results but more slowly; gradstat.show_config() says why. To "
        'silence: warnings.filterwarnings("ignore", message="gradstat has no kernel")',
        RuntimeWarning,
        stacklevel=5,  # the caller of grad_stats, clip_grad_norm_ and the like
    )


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


def _launch(
    part: Part,
    size: int,
    histogram: bool,
    clip: Any = None,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    device = part.device
    if table is None:
        table = torch.empty((size + 1, NUM_COLUMNS), dtype=torch.float64, device=device)
    if type(table) is not Tensor:
        raise UnsupportedTensorError(
            f"results must go to real memory, but new tensors are {type(table).__name__} here; "
            "measure outside of FakeTensorMode and the like"
        )
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


@contextmanager
def _cuda_device(device: torch.device) -> Iterator[None]:
    """Make a device the current one, as torch does it: without a context on the one before.

    Raises:
        CudaError: A launch inside failed.
    """
    with torch.cuda.device(device):
        try:
            yield
        except RuntimeError as error:
            raise CudaError(str(error)) from error


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


def moments_and_clip(batch: Batch, table: Tensor, clip: Any) -> None:
    """Fill a table and let the clip program decide on the step, in one read of the tensors.

    Args:
        batch: Gradients.
        table: fp64 (size + 1, 12) on ``batch.device``, written.
        clip: From `make_clip`, with ``out`` and ``state`` (and what else the policies need) set to
            tensors on ``batch.device``.

    Synchronises only where tensors lie on several devices or on one without a kernel: the table
    and the decision are then made on the CPU.
    """
    part = batch.parts[0]
    if len(batch.parts) == 1 and part.native:
        _launch(part, batch.size, False, clip, table)
        _correct_sparse_rows(table, part.readable)
        return
    table.copy_(moments(batch)[0])
    _native.run_clip(table, clip, batch.size)


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


def scale(batch: Batch, coefficient: Tensor, *, name_of: NameOf = describe_position) -> None:
    """Multiply every tensor of a batch in place by a coefficient that lies on a device.

    Args:
        batch: Tensors; those that were replaced for reading are scaled where they are.
        coefficient: fp64 of shape (1,), or (size,) for one coefficient a tensor. Where it is 1 or
            NaN nothing is written; where it is 0 zeros are written, over NaN and Inf too.
        name_of: Gives the name of the tensor at a position, for an error.

    Raises:
        ArgumentTypeError: A tensor overlaps itself in memory. No tensor is changed then.
    """
    per_tensor = coefficient.numel() != 1

    def of(index: int) -> Tensor:
        return coefficient[index] if per_tensor else coefficient[0]

    _write(
        batch,
        name_of,
        native=lambda part, tensors: _native.scale(
            tensors, coefficient.to(part.device), per_tensor, torch.get_num_threads()
        ),
        other=lambda index, tensor: _fallback.scale_(tensor, of(index)),
    )


def clamp(batch: Batch, limit: float, *, name_of: NameOf = describe_position) -> None:
    """Clamp every element of a batch in place to [-limit, limit]; NaN stays.

    Raises:
        ArgumentTypeError: A tensor is complex, or overlaps itself in memory. None is changed then.
    """
    for index, tensor in enumerate(batch.originals or []):
        if tensor is not None and tensor.is_complex():
            raise ArgumentTypeError(
                f"clip_grad_value_ needs real gradients, got {tensor.dtype} for {name_of(index)}: "
                "complex numbers have no order; use clip_grad_norm_"
            )
    _write(
        batch,
        name_of,
        native=lambda _part, tensors: _native.clamp(tensors, limit, torch.get_num_threads()),
        other=lambda _index, tensor: _fallback.clamp_(tensor, limit),
    )


def _write(
    batch: Batch,
    name_of: NameOf,
    *,
    native: Callable[[Part, Any], None],
    other: Callable[[int, Tensor], None],
) -> None:
    """Change a batch in place: what the kernels read as it is by them, the rest by torch."""
    if batch.originals is not None:
        for index, tensor in enumerate(batch.originals):
            if tensor is not None:
                check_writable(tensor, name_of(index))
    for part in batch.parts:
        replaced = set(part.readable) if part.native else set(range(batch.size))
        tensors = part.tensors
        if part.native:
            if replaced:
                objects = [None if i in replaced else t for i, t in enumerate(part.objects)]
                tensors = _native.TensorList(objects, False)
            if part.device.type == "cuda":
                with _cuda_device(part.device):
                    native(part, tensors)
            else:
                native(part, tensors)
            torch.autograd.graph.increment_version([t for t in tensors.objects if t is not None])
        for index in sorted(replaced):
            original = batch.originals[index] if batch.originals is not None else None
            if original is not None and part.objects[index] is not None:
                with torch.no_grad():
                    other(index, original)


@dataclass(frozen=True)
class KernelConfig:
    """What the compiled module is and what it found on this machine."""

    cpu_variant: str
    cpu_variant_reason: str
    cpu_variants: list[tuple[str, bool]]
    thread_source: str
    threads: int
    cuda_built: bool
    cuda_reason: str
    cuda_devices: int
    no_cuda_device: str


def kernel_config() -> KernelConfig:
    """Return what runs the kernels here. Does not initialise CUDA in torch."""
    devices, reason = _native.cuda_devices() if _native.cuda_is_built() else (0, "")
    return KernelConfig(
        cpu_variant=_native.cpu_variant(),
        cpu_variant_reason=_native.cpu_variant_reason(),
        cpu_variants=_native.cpu_variants(),
        thread_source=_native.thread_source(),
        threads=torch.get_num_threads(),
        cuda_built=_native.cuda_is_built(),
        cuda_reason=_native.cuda_reason,
        cuda_devices=devices,
        no_cuda_device=reason,
    )


def use_cpu_variant(name: str) -> None:
    """Run the named CPU variant from now on; an empty name returns to the default.

    Raises:
        ValueError: No such variant runs here.
    """
    _native.use_cpu_variant(name)
