"""The compiled module itself: loaded, with its numbers, its launches and what it found here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

import torch

from gradstat.errors import CudaError, NativeModuleError

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

__all__ = [
    "COUNTER_CLIPPED",
    "COUNTER_SKIPPED",
    "COUNTER_SKIPPED_IN_A_ROW",
    "COUNTER_STEPS",
    "HISTOGRAM_BINS",
    "NORM_KINDS",
    "NUM_CLIP_COUNTERS",
    "NUM_CLIP_OUT",
    "NUM_COLUMNS",
    "OUT_ALLOWED",
    "OUT_COEFFICIENT",
    "OUT_FACTOR",
    "OUT_FINITE",
    "OUT_NORM",
    "OUT_SKIP",
    "ClipStep",
    "KernelConfig",
    "Nonfinite",
    "_cuda_device",
    "_native",
    "kernel_config",
    "use_cpu_variant",
]

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
