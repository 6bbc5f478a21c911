"""What a monitor leaves in a checkpoint of its optimizer, and how it is taken over again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradstat import _kernels
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


def restore(readings: Readings, given: Any) -> bool:
    """Take over what `state_of` returned; return False, changing nothing, where it cannot be read.

    Tables of other parameters are left out.
    """
    try:
        saved = _Saved.of(given)
    except Exception as error:  # whatever the file holds, training goes on from it
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        warn_user(
            f"the checkpoint's gradstat state cannot be read ({reason}): statistics and policy "
            "take nothing from it, the optimizer's own state is loaded; delete "
            'state_dict["gradstat"] to silence this',
            UserWarning,
        )
        return False
    recorder, clipper = readings._recorder, readings._clipper
    recorder.step = saved.step
    readings._overflows.restore(saved.scaler_overflows)
    window = recorder.window
    device = window.device if window is not None else torch.device("cpu")
    learnt, policy = saved.clipper, clipper.policy
    if not clipper.load_state_dict(learnt, device) and learnt["policy"] != "None":
        warn_user(
            f"the checkpoint holds the state of clip={learnt['policy']}, and this run uses "
            f"clip={policy!r}: its history starts afresh; attach with the same policy to go on "
            "with it",
            UserWarning,
        )
    if window is not None and window.names == saved.names:
        recorder.refill(saved.recorded_steps, saved.tables, saved.decisions)
    return True


class _Saved(NamedTuple):
    """What `state_of` returned, each part of the type and shape that it must have."""

    step: int
    scaler_overflows: int
    clipper: dict[str, Any]
    names: tuple[str, ...]
    recorded_steps: list[int]
    tables: Tensor
    decisions: Tensor

    @classmethod
    def of(cls, given: Any) -> _Saved:
        """Return the parts of a saved state; `ValueError` and others where one is not as it was."""
        if given["version"] != _STATE_VERSION:
            raise ValueError(
                f"it is of version {given['version']!r} and this gradstat reads version "
                f"{_STATE_VERSION}"
            )
        names = tuple(map(str, given["names"]))
        steps = [int(step) for step in given["recorded_steps"]]
        clipper = given["clipper"]
        state = clipper["state"]
        return cls(
            int(given["step"]),
            int(given["scaler_overflows"]),
            {
                "policy": str(clipper["policy"]),
                "names": tuple(map(str, clipper["names"])),
                "state": state if state is None else _shaped(state, (len(state),)),
            },
            names,
            steps,
            _shaped(given["tables"], (len(steps), len(names) + 1, _kernels.NUM_COLUMNS)),
            _shaped(given["decisions"], (len(steps), _kernels.NUM_CLIP_OUT)),
        )


def _shaped(given: Any, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.as_tensor(given, dtype=torch.float64)
    if tensor.shape != shape:
        raise ValueError(f"a tensor of shape {shape} is one of {tuple(tensor.shape)}")
    return tensor
