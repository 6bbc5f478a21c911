"""Whether a CUDA graph is being captured, which nothing may wait for or write into twice."""

from __future__ import annotations

import torch


def is_capturing() -> bool:
    """Return whether the current stream is captured; False where CUDA is not in use."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
