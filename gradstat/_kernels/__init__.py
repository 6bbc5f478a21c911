"""The only importer of the compiled module: checks tensors, picks devices, streams and threads.

Everything above works with a `Batch`: the tensors of one call, unpacked once, one part a device.
"""

from gradstat._kernels.batch import Batch, NameOf, Part, RepeatedError, describe_position, gather
from gradstat._kernels.compiled import (
    COUNTER_CLIPPED,
    COUNTER_SKIPPED,
    COUNTER_SKIPPED_IN_A_ROW,
    COUNTER_STEPS,
    HISTOGRAM_BINS,
    NORM_KINDS,
    NUM_CLIP_COUNTERS,
    NUM_CLIP_OUT,
    NUM_COLUMNS,
    OUT_ALLOWED,
    OUT_COEFFICIENT,
    OUT_FACTOR,
    OUT_FINITE,
    OUT_NORM,
    OUT_SKIP,
    ClipStep,
    KernelConfig,
    Nonfinite,
    kernel_config,
    use_cpu_variant,
)
from gradstat._kernels.copies import Copies
from gradstat._kernels.reading import (
    Norm,
    make_clip,
    measure_gradients,
    moments,
    moments_and_clip,
    total_norm,
    units,
)
from gradstat._kernels.writing import clamp, scale

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
    "Batch",
    "ClipStep",
    "Copies",
    "KernelConfig",
    "NameOf",
    "Nonfinite",
    "Norm",
    "Part",
    "RepeatedError",
    "clamp",
    "describe_position",
    "gather",
    "kernel_config",
    "make_clip",
    "measure_gradients",
    "moments",
    "moments_and_clip",
    "scale",
    "total_norm",
    "units",
    "use_cpu_variant",
]
