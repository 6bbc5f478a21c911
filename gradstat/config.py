"""What this installation is made of and what runs the kernels here."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch

from gradstat._kernels import kernel_config


@dataclass(frozen=True)
class Config:
    """What `show_config` found."""

    version: str
    python: str
    torch: str
    cpu_variant: str
    """Instruction set of the CPU kernels in use."""

    cpu_variant_reason: str
    cpu_variants: dict[str, bool]
    """The compiled variants, best first, and whether this processor runs each."""

    threads: int
    thread_source: str
    """The thread pool that the CPU kernels run on."""

    cuda: bool
    """Whether CUDA tensors, where there are any, are read by our kernels."""

    cuda_reason: str
    """What the kernels were built with, or why they were not."""

    cuda_devices: int
    no_cuda_device: str
    """Why there is no device; empty where there is one, or no kernel for it."""

    other_devices: str
    """How tensors on devices without a kernel are measured."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the fields as aligned lines."""
        built = ", ".join(f"{k} ({'yes' if v else 'no'})" for k, v in self.cpu_variants.items())
        no_device = bool(self.no_cuda_device)
        lines = {
            "gradstat": self.version,
            "python": self.python,
            "torch": self.torch,
            "CPU kernels": f"{self.cpu_variant} ({self.cpu_variant_reason})",
            "runs here": built,
            "threads": f"{self.threads}, {self.thread_source}",
            "CUDA kernels": f"{'yes' if self.cuda else 'no'} ({self.cuda_reason})",
            "CUDA devices": f"{self.cuda_devices}" + (f" ({self.no_cuda_device})" * no_device),
            "other devices": self.other_devices,
        }
        return "\n".join(f"{name:<14} {value}" for name, value in lines.items())


def get_config() -> Config:
    """Return what this installation is made of. Does not initialise CUDA in torch."""
    kernels = kernel_config()
    return Config(
        version=metadata.version("gradstat"),
        python=platform.python_version(),
        torch=torch.__version__,
        cpu_variant=kernels.cpu_variant,
        cpu_variant_reason=kernels.cpu_variant_reason,
        cpu_variants=dict(kernels.cpu_variants),
        threads=kernels.threads,
        thread_source=kernels.thread_source,
        cuda=kernels.cuda_built and torch.version.hip is None,
        cuda_reason=kernels.cuda_reason,
        cuda_devices=kernels.cuda_devices,
        no_cuda_device=kernels.no_cuda_device,
        other_devices="plain torch operations, equal results",
    )


def show_config() -> Config:
    """Print version, CPU variant and why, CUDA yes or no and why, and threads; return them too."""
    config = get_config()
    print(config)
    return config
