"""Builds the CUDA sources for the CPU, and calls their kernels on torch's CPU tensors.

The sources are compiled as they are, by a C++ compiler that finds `include/cuda_runtime.h` of this
folder instead of CUDA's. Not covered: the compilation by nvcc, the visibility of memory between
blocks, and speed. With CUDA_EMULATION_FLAGS="-fsanitize=address,undefined" and libasan preloaded
(see `make sanitize`) every access of the kernels is checked too.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from kernel_calls import Result
from torch import Tensor

from gradstat import _native
from gradstat._kernels import OUT_FACTOR, OUT_NORM
from gradstat._units import UnitCounts, UnitRule

HERE = Path(__file__).parent
CUDA_SOURCES = HERE.parents[1] / "csrc" / "cuda"
FLAGS = (
    "-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",  # a fortified longjmp forbids changing to another stack
    "-fPIC", "-shared",
)  # fmt: skip
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
MISSING = -1


class TensorRef(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("numel", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("run", ctypes.c_int64),
        ("dtype", ctypes.c_uint8),
    ]


class EmulationError(Exception):
    """What the emulated CUDA code threw."""


@functools.cache
def load_emulator() -> Emulator:
    """Return the emulator, built once a session; skip the test where that is not possible."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the emulation of CUDA needs Linux and g++")
    with tempfile.TemporaryDirectory() as folder:
        return Emulator(build(compiler, Path(folder) / "cuda_emulation.so"))


def build(compiler: str, library: Path) -> Path:
    """Compile everything into one library."""
    sources = [CUDA_SOURCES / name for name in ("moments.cu", "scale.cu", "units.cu", "device.cu")]
    sources += [HERE / name for name in ("emulation.cpp", "runtime.cpp", "library.cpp")]
    flags = [*FLAGS, *os.environ.get("CUDA_EMULATION_FLAGS", "").split()]
    command = [compiler, *flags, "-I", HERE / "include", "-x", "c++", *sources]
    done = subprocess.run([*command, "-o", library], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{compiler} must build the emulation of CUDA, got:\n{done.stderr}")
    return library


def ref(tensor: Tensor | None) -> TensorRef:
    """Describe a dense tensor as csrc/tensor_list.cpp does."""
    if tensor is None:
        return TensorRef(None, MISSING, 0, 0, 0)
    numel = tensor.numel()
    rows = tensor.shape[0] if tensor.dim() > 0 else 1
    run = numel // rows if rows else 0
    if numel > 0 and rows > 1 and not tensor.is_contiguous():
        run = tensor.stride(0)
    return TensorRef(tensor.data_ptr(), numel, rows, run, DTYPES[tensor.dtype])


def with_specials(tensor: Tensor, positions: Sequence[int]) -> Tensor:
    """Put NaN, Inf and -Inf in turn at these positions, where the tensor has them."""
    for position, value in zip(positions, itertools.cycle((math.nan, math.inf, -math.inf))):
        if position < tensor.numel():
            tensor.view(-1)[position] = value
    return tensor


class Emulator:
    """The emulated kernels. `seed` 0 and 1 run threads and blocks in order and in reverse."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def moments(
        self,
        tensors: Sequence[Tensor | None],
        *,
        histogram: bool = False,
        max_norm: float = math.inf,
        norm_kind: int = 2,
        device: int = 0,
        seed: int = 0,
    ) -> Result:
        table = torch.full((len(tensors) + 1, _native.NUM_COLUMNS), -7.0, dtype=torch.float64)
        bins = None
        if histogram:
            bins = torch.full((len(tensors) + 1, _native.HISTOGRAM_BINS), -7, dtype=torch.int64)
        clip = torch.full((_native.NUM_CLIP_OUT,), -7.0, dtype=torch.float64)
        self._call(
            "moments",
            *self._list([ref(tensor) for tensor in tensors]),
            ctypes.c_void_p(table.data_ptr()),
            ctypes.c_void_p(None if bins is None else bins.data_ptr()),
            ctypes.c_double(max_norm),
            norm_kind,
            ctypes.c_void_p(clip.data_ptr()),
            device,
            ctypes.c_uint64(seed),
        )
        return Result(table, bins, clip[OUT_NORM].item(), clip[OUT_FACTOR].item())

    def scale(
        self,
        tensors: Sequence[Tensor | None],
        coefficient: float | Sequence[float],
        *,
        device: int = 0,
        seed: int = 0,
    ) -> None:
        one = isinstance(coefficient, int | float)
        values = torch.tensor([coefficient] if one else coefficient, dtype=torch.float64)
        self._call(
            "scale",
            *self._list([ref(tensor) for tensor in tensors]),
            ctypes.c_void_p(values.data_ptr()),
            ctypes.c_int64(0 if one else 1),
            device,
            ctypes.c_uint64(seed),
        )

    def clamp(
        self, tensors: Sequence[Tensor | None], limit: float, *, device: int = 0, seed: int = 0
    ) -> None:
        refs = self._list([ref(tensor) for tensor in tensors])
        self._call("clamp", *refs, ctypes.c_double(limit), device, ctypes.c_uint64(seed))

    def units(
        self, tensor: Tensor, rule: UnitRule, into: UnitCounts, *, device: int = 0, seed: int = 0
    ) -> None:
        """Add an activation whose units are its dimension 0 to a window."""
        refs, _ = self._list([ref(tensor)])
        self._call(
            "units",
            refs,
            int(rule.active),
            *[ctypes.c_double(bound) for bound in rule[1:]],
            ctypes.c_void_p(into.counts.data_ptr()),
            ctypes.c_void_p(into.row.data_ptr()),
            device,
            ctypes.c_uint64(seed),
        )

    def packing(self, refs: Sequence[TensorRef]) -> int:
        """Check the packing of a list; return the number of batches that it takes."""
        batches = ctypes.c_int64()
        self._call("packing", *self._list(refs), ctypes.byref(batches))
        return batches.value

    def barrier(self, threads: int, *, seed: int = 0) -> None:
        """Let that many of 64 threads wait for the block."""
        self._call("barrier", threads, ctypes.c_uint64(seed))

    def device_count(self, devices: int, driver: int) -> tuple[int, str]:
        reason = ctypes.c_char_p()
        count = self._library.emulated_device_count(devices, driver, ctypes.byref(reason))
        return count, (reason.value or b"").decode()

    def history(self) -> dict[str, int]:
        """Tell what happened since the last call."""
        values = (ctypes.c_int64 * 4)()
        self._library.emulated_history(values)
        names = ("launches", "launch_device", "current_device", "set_device_calls")
        return dict(zip(names, values, strict=True))

    def _list(self, refs: Sequence[TensorRef]) -> tuple[ctypes.Array[TensorRef], ctypes.c_int64]:
        return (TensorRef * len(refs))(*refs), ctypes.c_int64(len(refs))

    def _call(self, name: str, *arguments: object) -> None:
        function = getattr(self._library, f"emulated_{name}")
        function.restype = ctypes.c_char_p
        error = function(*arguments).decode()
        if error:
            raise EmulationError(error)
