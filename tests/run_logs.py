"""Run logs to look at: of a real training run, and written record by record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

import gradstat
from gradstat.diagnosis import Finding
from gradstat.diagnosis.finding import Measure
from gradstat.guard import GuardAction
from gradstat.records import (
    ActionRecord,
    ActivationRecord,
    DiagnosisRecord,
    HistogramRecord,
    LayersRecord,
    RunEnd,
    RunStart,
    SiteRecord,
    StepRecord,
    TableRecord,
    UpdateRatioRecord,
)
from gradstat.runlog import DatabaseSink

NAMES = tuple(f"encoder.layers.{n // 2}.{'weight' if n % 2 == 0 else 'bias'}" for n in range(12))
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror='window.hacked = 1'>",
    "слой.重み.🙂.weight",
    "long." + "x" * 290 + ".bias",
    '"quoted" & %{y} <a href="https://example.com">',
    "\u202eright to left\x1b[31m",
)
FINDINGS = (
    Finding(
        "saturated-activation",
        "error",
        0.93,
        "Units of <b>one</b> layer stand at 0 or 1 on nearly all samples: no gradient passes.",
        ("divide the inputs by 255", "replace sigmoid by GELU"),
        (Measure("share saturated", 0.97, "", 0.5), Measure("largest input", 255.0)),
        "Glorot and Bengio 2010, section 3",
        NAMES[:2],
        (20,),
    ),
    Finding(
        "vanishing-gradient",
        "warning",
        0.82,
        "The gradient of the first layers is small: they hardly learn.",
        ("use residual connections",),
        steps=(40,),
        caused_by="saturated-activation",
    ),
    Finding("gradient-noise", "info", 0.6, "Batches could be larger.", ("try 256",)),
)


def train(path: Path, steps: int = 30, *, depth: int = 3, lr: float = 1e-2, **attach: object):
    """Return the optimizer of a small network that was trained with a run log."""
    torch.manual_seed(0)
    layers = [module for _ in range(depth) for module in (nn.Linear(8, 8), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(8, 2))
    optimizer = gradstat.attach(
        torch.optim.AdamW(model.parameters(), lr=lr), model, log=path, log_every=2, **attach
    )
    x, y = torch.randn(32, 8), torch.randint(0, 2, (32,))
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.gradstat.observe(loss=loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.gradstat.observe(val_loss=0.5)
    return optimizer


def write(
    path: Path,
    steps: int = 60,
    names: Sequence[str] = NAMES,
    *,
    value: float | None = None,
    findings: Sequence[Finding] = FINDINGS,
    extras: bool = True,
    seed: int = 0,
    lr: float = 1e-3,
) -> Path:
    """Write a run log of made-up numbers and return its path.

    Args:
        path: Where.
        steps: Finished steps, all with a table.
        names: The layers.
        value: Loss, norms and gradients on all steps; None makes them up.
        findings: What the last look found.
        extras: Whether updates, histograms, activations and actions are there.
        seed: Of the numbers.
        lr: Learning rate, of the optimizer's facts too.
    """
    random = np.random.default_rng(seed)
    sink = DatabaseSink(path)
    optimizer = {"class": "AdamW", "lr": lr}
    sink.write(RunStart("ab" * 16, 1.7e9, {"class": "Net"}, optimizer, {"clip": "auto"}, {}, {}))
    shapes = tuple((16, 16) if n % 2 == 0 else (16,) for n in range(len(names)))
    sink.write(LayersRecord(tuple(names), shapes, ("float32",) * len(names)))
    numel = np.array([float(np.prod(shape)) for shape in shapes])
    depth = np.linspace(-4, 0, len(names))
    for step in range(1, steps + 1):
        norm = float(np.exp(random.normal(0.0, 0.5))) if value is None else value
        loss = 2.0 / step**0.5 if value is None else value
        skipped = not np.isfinite(norm) or step == 7
        coef = min(1.0, 1.0 / max(norm, 1e-9)) if np.isfinite(norm) else float("nan")
        sink.write(StepRecord(step, 1.7e9 + step, loss, lr, norm, coef, 1.0, skipped, {}))
        data = np.zeros((len(names), 12))
        l2 = 10.0 ** (depth + random.normal(0.0, 0.1, len(names))) if value is None else value
        data[:, 0] = numel
        data[:, 9] = 16
        data[:, 11] = l2 if value is None or np.isfinite(value) else 0.0
        data[:, 7] = data[:, 11] / 3
        data[:, 2] = numel if value is not None and np.isnan(value) else 0.0
        sink.write(TableRecord(step, "gradient", data))
        if extras:
            ratios = 10.0 ** random.normal(-3.0, 0.4, len(names))
            sink.write(UpdateRatioRecord(step, ratios))
        if extras and step % 10 == 1:
            counts = np.zeros((len(names), 256), np.int64)
            counts[:, 100:120] = random.integers(0, 50, (len(names), 20))
            sink.write(HistogramRecord(step, counts))
            dead = min(step // 20, 16)
            site = SiteRecord("act/relu#0", "relu", 16, dead, 0.1, 0.2, 0.3, 0.0, 1.0)
            sink.write(ActivationRecord(step, (site,)))
    if extras and steps:
        action = GuardAction(
            7, "cut-lr", "diverging-loss", "Too <i>high</i>.", {"lr": 1}, {"lr": 0}
        )
        sink.write(ActionRecord(7, action))
    if steps:
        sink.write(DiagnosisRecord(steps, tuple(findings)))
    sink.write(RunEnd(1.7e9 + steps, 0))
    sink.flush()
    sink.close()
    return path
