"""gradstat: per-layer gradient statistics and clipping, in one read of the gradients."""

from importlib import metadata as _metadata

from gradstat.clipping import clip_grad_norm_, clip_grad_value_, get_total_norm
from gradstat.config import Config, get_config, show_config
from gradstat.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CudaError,
    GradstatError,
    LayerNotFoundError,
    MissingPackageError,
    NativeModuleError,
    NonFiniteNormError,
    UnsupportedTensorError,
)
from gradstat.stats import grad_stats, tensor_stats
from gradstat.table import StatRow, StatTable

__version__ = _metadata.version("gradstat")

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "Config",
    "CudaError",
    "GradstatError",
    "LayerNotFoundError",
    "MissingPackageError",
    "NativeModuleError",
    "NonFiniteNormError",
    "StatRow",
    "StatTable",
    "UnsupportedTensorError",
    "clip_grad_norm_",
    "clip_grad_value_",
    "get_config",
    "get_total_norm",
    "grad_stats",
    "show_config",
    "tensor_stats",
]
