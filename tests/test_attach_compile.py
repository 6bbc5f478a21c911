"""`torch.compile` of a step with gradstat on it."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from small_training import (
    backward,
    grad_norm,
    grads,
    make_model,
    monitor_of,
    poison,
    sgd,
    weights,
)

import gradstat


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("clip", [None, gradstat.GlobalNorm(0.05)], ids=["watch", "clip"])
@pytest.mark.parametrize("form", ["bound", "function"])
def test_a_compiled_step_measures_and_clips(backend: str, clip: Any, form: str) -> None:
    torch._dynamo.reset()
    model, plain_model = make_model(), make_model()
    optimizer, plain = sgd(model, momentum=0.9), sgd(plain_model, momentum=0.9)
    gradstat.attach(optimizer, model, clip=clip)
    gradstat.attach(plain, plain_model, clip=clip)
    with warnings.catch_warnings(record=True) as words:
        warnings.simplefilter("always")
        compiled: Any = optimizer.step
        if form == "function":

            def compiled() -> None:
                optimizer.step()

        compiled = torch.compile(compiled, backend=backend)
        for step in range(4):
            backward(model, step)
            backward(plain_model, step)
            norm = grad_norm(model)
            if step == 2 and clip is not None:
                poison(model)
                poison(plain_model)
                norm = math.nan
            compiled()
            plain.step()
            assert monitor_of(optimizer).total_norm == pytest.approx(norm, nan_ok=True)
    assert not [w for w in words if "gradstat" in str(w.message) or "pybind" in str(w.message)]
    for a, b in zip(weights(model), weights(plain_model), strict=True):
        torch.testing.assert_close(a, b)
    monitor = monitor_of(optimizer)
    assert monitor.step == 4
    assert monitor.skipped_steps == (clip is not None)
    assert None not in grads(model)
    torch._dynamo.reset()
