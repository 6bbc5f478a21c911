"""What a run log says of a run as a whole: model, optimizer, versions, machine."""

from __future__ import annotations

import os
import platform
import socket
import sqlite3
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradstat.config import get_config

MAX_TEXT = 20_000
"""Characters kept of a model's ``repr``."""


def about_model(model: nn.Module | None) -> dict[str, Any]:
    """Return its class, sizes and layers as text; nothing where there is no model."""
    if model is None:
        return {}
    parameters = list(model.parameters())
    text = repr(model)
    return {
        "class": type(model).__name__,
        "modules": sum(1 for _ in model.modules()),
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "devices": sorted({str(p.device) for p in parameters}),
        "text": text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " ...",
    }


def about_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Return its class and its groups, with plain values. Waits where an option is on a device."""
    groups = []
    for group in optimizer.param_groups:
        options = {name: _plain(value) for name, value in group.items() if name != "params"}
        options.pop("param_names", None)
        groups.append(options | {"parameters": sum(p.numel() for p in group["params"])})
    return {"class": type(optimizer).__name__, "groups": groups}


def about_versions() -> dict[str, str]:
    """Return the versions of what computes the run."""
    config = get_config()
    return {
        "gradstat": config.version,
        "torch": config.torch,
        "python": config.python,
        "numpy": np.__version__,
        "sqlite": sqlite3.sqlite_version,
    }


def about_machine() -> dict[str, Any]:
    """Return host, system, processor and devices. Does not initialise CUDA."""
    config = get_config()
    is_used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": config.threads,
        "cpu_variant": config.cpu_variant,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if is_used
        else [],
        "process": os.getpid(),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
