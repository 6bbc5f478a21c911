"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from gradstat.config import get_config


def machine(device: torch.device) -> dict[str, Any]:
    """Return processors, versions and threads: nothing that tells whose machine it is."""
    config = get_config()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": config.python,
        "torch": config.torch,
        "gradstat": config.version,
        "threads": torch.get_num_threads(),
        "cpu_variant": config.cpu_variant,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
