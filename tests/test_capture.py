"""Whether a CUDA graph is captured is asked of torch only where CUDA is in use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gradstat._alarms import LateCopy
from gradstat._capture import is_capturing


def refuse() -> Any:
    raise RuntimeError("CUDA was asked")


def test_without_cuda_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", refuse)
    assert not is_capturing()
    copy = LateCopy()
    copy.start(torch.ones(2))
    copy._event = SimpleNamespace(query=lambda: True)
    assert copy.take() is not None


@pytest.mark.parametrize("answer", [True, False])
def test_with_cuda_torch_answers(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: answer)
    assert is_capturing() is answer
