"""What the figures were measured on, and with which commit."""

from __future__ import annotations

import os
import platform
import subprocess
import warnings
from pathlib import Path
from typing import Any

import torch

import gradstat

ROOT = Path(__file__).parent.parent


def machine() -> dict[str, Any]:
    """Return the processors and the versions: nothing that tells whose machine it is."""
    config = gradstat.get_config()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if has_gpu() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradstat": config.version,
        "threads": config.threads,
        "cpu_variant": config.cpu_variant,
    }


def has_gpu() -> bool:
    """Return whether torch finds a CUDA device."""
    with warnings.catch_warnings():
        # A CUDA edition of torch warns where it finds no driver.
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def commit() -> dict[str, Any]:
    """Return the commit's short id and whether tracked files differ from it."""
    status = _git("status", "--porcelain", "--untracked-files=no", "--", ":!*README.md")
    return {"id": _git("rev-parse", "--short", "HEAD") or "unknown", "changed": bool(status)}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""  # a source tree without its history
    return done.stdout.strip()
