"""What a monitor leaves in a checkpoint of its optimizer, and how it is taken over again."""

from __future__ import annotations

from typing import Any

import torch

from gradstat._readings import Readings
from gradstat._warnings import warn_user

_STATE_VERSION = 1


def state_of(readings: Readings) -> dict[str, Any]:
    """Return counters, the policy's state and the window's tables, on the CPU. Synchronises."""
    window = readings._recorder.window
    return {
        "version": _STATE_VERSION,
        "step": readings.step,
        "scaler_overflows": readings.scaler_overflows,
        "clipper": readings._clipper.state_dict(),
        "names": list(readings.names),
        "recorded_steps": list(window.steps) if window is not None else [],
        "tables": torch.from_numpy(readings._tables("tables")),
        "decisions": torch.from_numpy(readings.decisions),
    }


def restore(readings: Readings, saved: dict[str, Any]) -> bool:
    """Take over what `state_of` returned; return False, changing nothing, where it cannot be read.

    Tables of other parameters are left out.
    """
    if saved.get("version") != _STATE_VERSION:
        warn_user(
            f"the checkpoint's gradstat state is of version {saved.get('version')!r} and this "
            f"gradstat reads version {_STATE_VERSION}: statistics and policy start afresh",
            UserWarning,
        )
        return False
    recorder, clipper = readings._recorder, readings._clipper
    recorder.step = int(saved["step"])
    readings._overflows.restore(int(saved["scaler_overflows"]))
    window = recorder.window
    device = window.device if window is not None else torch.device("cpu")
    learnt, policy = saved["clipper"], clipper.policy
    if not clipper.load_state_dict(learnt, device) and learnt["policy"] != "None":
        warn_user(
            f"the checkpoint holds the state of clip={learnt['policy']}, and this run uses "
            f"clip={policy!r}: its history starts afresh; attach with the same policy to go on "
            "with it",
            UserWarning,
        )
    if window is not None and window.names == tuple(saved["names"]):
        recorder.refill(saved["recorded_steps"], saved["tables"], saved["decisions"])
    return True
