"""gradstat: per-layer gradient statistics and clipping, in one read of the gradients."""

from importlib import metadata as _metadata

from gradstat import records as records
from gradstat import sinks as sinks
from gradstat.activations import (
    ActivationMonitor,
    ActivationStats,
    ActivationTable,
    activation_stats,
)
from gradstat.check import CheckReport, check
from gradstat.clipping import (
    AGC,
    AdaGC,
    AutoClip,
    Chain,
    GlobalNorm,
    PerLayer,
    Policy,
    SkipOnSpike,
    Value,
    ZClip,
    clip_grad_norm_,
    clip_grad_value_,
    get_total_norm,
)
from gradstat.config import Config, get_config, show_config
from gradstat.diagnosis import Finding
from gradstat.errors import (
    ArgumentTypeError,
    ArgumentValueError,
    CudaError,
    GradstatError,
    LayerNotFoundError,
    MissingPackageError,
    NativeModuleError,
    NonFiniteNormError,
    RunLogError,
    RunNotFoundError,
    UnsupportedTensorError,
)
from gradstat.guard import (
    CutLR,
    Guard,
    GuardAction,
    GuardRule,
    RollBack,
    SkipNonfinite,
    StopEarly,
    TightenClip,
)
from gradstat.lr_range import LrRangeResult, lr_range_test
from gradstat.monitor import Monitor
from gradstat.noise import NoiseScale, noise_scale
from gradstat.optimizer import attach, detach
from gradstat.overhead import OverheadReport, measure_overhead
from gradstat.plots import plot_clip, plot_grad_flow, plot_heatmap, plot_update_ratio
from gradstat.report import Report, compare_runs, make_report
from gradstat.runlog import Run, open_run
from gradstat.stats import grad_stats, tensor_stats
from gradstat.table import StatRow, StatTable
from gradstat.wrapper import GradStatOptimizer

__version__ = _metadata.version("gradstat")

__all__ = [
    "AGC",
    "ActivationMonitor",
    "ActivationStats",
    "ActivationTable",
    "AdaGC",
    "ArgumentTypeError",
    "ArgumentValueError",
    "AutoClip",
    "Chain",
    "CheckReport",
    "Config",
    "CudaError",
    "CutLR",
    "Finding",
    "GlobalNorm",
    "GradStatOptimizer",
    "GradstatError",
    "Guard",
    "GuardAction",
    "GuardRule",
    "LayerNotFoundError",
    "LrRangeResult",
    "MissingPackageError",
    "Monitor",
    "NativeModuleError",
    "NoiseScale",
    "NonFiniteNormError",
    "OverheadReport",
    "PerLayer",
    "Policy",
    "Report",
    "RollBack",
    "Run",
    "RunLogError",
    "RunNotFoundError",
    "SkipNonfinite",
    "SkipOnSpike",
    "StatRow",
    "StatTable",
    "StopEarly",
    "TightenClip",
    "UnsupportedTensorError",
    "Value",
    "ZClip",
    "activation_stats",
    "attach",
    "check",
    "clip_grad_norm_",
    "clip_grad_value_",
    "compare_runs",
    "detach",
    "get_config",
    "get_total_norm",
    "grad_stats",
    "lr_range_test",
    "make_report",
    "measure_overhead",
    "noise_scale",
    "open_run",
    "plot_clip",
    "plot_grad_flow",
    "plot_heatmap",
    "plot_update_ratio",
    "show_config",
    "tensor_stats",
]
