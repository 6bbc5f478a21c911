"""Rules on the shapes of outputs and targets: which number is compared with which."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.evidence import Batch
from gradstat.diagnosis.finding import Finding, Measure
from gradstat.diagnosis.fit import mismatch
from gradstat.diagnosis.rule import Case, Rule
from gradstat.diagnosis.task import ENOUGH, LOSS_TOLERANCE, LOSSES

_BY_ROW = ("mse", "mae", "smooth-l1", "bce", "bce-with-logits")
"""Losses that torch computes of unlike shapes."""


@dataclass(frozen=True)
class Broadcast(Rule):
    """Outputs of shape (N, 1) beside targets of shape (N,): every output meets every target."""

    codes = ("loss-output-mismatch",)
    needs = ("outputs", "targets", "loss")

    few: int = 5
    """Batches of equal shapes that are looked at: the loss of most must be that of a square."""

    drawn: float = 0.3
    """Deviation of late outputs over that of the targets, up to which they are drawn to the mean,
    where the loss is of no known kind."""

    def judge(self, case: Case) -> Iterator[Finding]:
        if case.task.loss is None and case.task.kind in ("numbers", "binary"):
            yield from self._in_the_loss(case)
        seen = [batch for batch in case.run.batches if self._may_be(batch)]
        known = [batch for batch in seen if batch.loss is None or math.isfinite(batch.loss)]
        known = known[:: max(1, len(known) // ENOUGH)]
        ways = [_way(batch) for batch in known]  # now and then one agrees by accident
        if not known or ways.count("side by side") > len(known) / 2:
            return
        is_sure = ways.count("square") > len(known) / 2
        if not is_sure and not self._are_drawn(seen[-3:]):
            return
        yield self._found(seen[0].shapes, 0.98 if is_sure else 0.8)

    def _found(self, shapes: Mapping[str, tuple[int, ...]], confidence: float) -> Finding:
        return mismatch(
            f"outputs of shape {shapes['outputs']} and targets of shape {shapes['targets']} are "
            "broadcast to a square"
            + (" within the loss" if shapes["outputs"] == shapes["targets"] else "")
            + ": every output is pulled to the mean of all targets",
            ("targets = targets.unsqueeze(1)", "or outputs = outputs.squeeze(1)"),
            confidence,
            Measure("rows", shapes["outputs"][0]),
        )

    def _in_the_loss(self, case: Case) -> Iterator[Finding]:
        """Yield what outputs and targets of one shape come to where the loss drops a dimension."""
        columns = [
            b
            for b in case.task.paired
            if b.is_whole and b.outputs is not None and b.outputs.size == len(b.outputs) > 1
        ][: self.few]
        ways = [_way(batch) for batch in columns]
        if ways.count("square") > 2 * self.few / 3 and "side by side" not in ways:
            yield self._found(columns[0].shapes, 0.98)

    def _may_be(self, batch: Batch) -> bool:
        shapes = [batch.shapes.get(name, ()) for name in ("outputs", "targets")]
        return _broadcasts(*shapes) and "targets" not in batch.integers

    def _are_drawn(self, late: Sequence[Batch]) -> bool:
        """Whether the outputs hardly differ where the targets do."""
        outputs = [batch.outputs.ravel() for batch in late if batch.outputs is not None]
        targets = [batch.targets.ravel() for batch in late if batch.targets is not None]
        if not outputs or not targets:
            return False
        spread, wanted = np.concatenate(outputs).std(), np.concatenate(targets).std()
        return bool(spread < self.drawn * wanted)


def _way(batch: Batch) -> str:
    """Return how a batch's loss compares rows: "side by side", in a "square", or "" for unknown."""
    outputs, targets = batch.outputs, batch.targets
    if batch.loss is None or outputs is None or targets is None or outputs.size != targets.size:
        return ""
    outputs, targets = outputs.ravel(), targets.ravel()
    found = set()
    for way, (a, b) in (
        ("side by side", (outputs, targets)),
        ("square", (outputs[:, None], targets[None, :])),
    ):
        for name in _BY_ROW:
            elements = LOSSES[name](a, b)
            error = 0.0 if batch.is_whole else 4 * elements.std() / math.sqrt(len(outputs))
            values = [elements.mean(), elements.sum()] if batch.is_whole else [elements.mean()]
            if min(abs(value - batch.loss) for value in values) <= (
                LOSS_TOLERANCE * abs(batch.loss) + error
            ):
                found.add(way)
                break
        if found and batch.is_whole:
            break
    return found.pop() if len(found) == 1 else ""


def _broadcasts(outputs: tuple[int, ...], targets: tuple[int, ...]) -> bool:
    if len(outputs) == len(targets) or not outputs or not targets or outputs[0] < 2:
        return False
    longer, shorter = sorted((outputs, targets), key=len, reverse=True)
    return longer[-1] == 1 and longer[:-1] == shorter


@dataclass(frozen=True)
class Rearranged(Rule):
    """Logits of a sequence whose class and time were exchanged by a view, not by a transpose.

    Told by the loss: it is not that of the logits beside their targets, but that of the same
    numbers read in the other order.
    """

    codes = ("loss-output-mismatch",)
    needs = ("outputs", "targets", "loss")

    agree: float = 0.8
    """Share of the samples whose loss has to be that of the other order."""

    min_samples: int = 4

    def judge(self, case: Case) -> Iterator[Finding]:
        task = case.task
        if task.kind != "classes" or task.loss is not None or len(task.paired) < self.min_samples:
            return
        agree = [self._agrees(batch) for batch in task.paired]
        if np.mean(agree) > self.agree:
            yield mismatch(
                "the loss is that of logits whose numbers have been read in another order: a view "
                "or reshape has exchanged the dimensions of class and time without moving a number",
                ("logits.transpose(1, 2) in place of view or reshape",),
                0.95,
                Measure("samples whose loss is that of the other order", float(np.mean(agree)),
                        "of all", threshold=self.agree),
            )  # fmt: skip

    def _agrees(self, batch: Batch) -> bool:
        """Whether the loss is that of each sequence's numbers in the other order.

        Within four standard errors: a sample holds the first sequences of its batch.
        """
        shape, wanted = (batch.shapes.get(name, ()) for name in ("outputs", "targets"))
        if len(shape) != 3 or len(wanted) != 2 or batch.loss is None:
            return False
        if shape[1] == shape[2]:  # either may be the class
            return False
        assert batch.outputs is not None
        assert batch.targets is not None
        n_steps, n_classes = wanted[1], batch.outputs.shape[1]
        count = len(batch.outputs) // n_steps
        targets = batch.targets[: count * n_steps].astype(int)
        if count < 2 or n_steps == 1 or targets.min() < 0 or targets.max() >= n_classes:
            return False
        logits = batch.outputs[: count * n_steps].reshape(count, n_steps, n_classes)
        if shape[2] == n_classes:  # seen as (N, T, C), read as (N, C, T)
            other = logits.reshape(count, n_classes, n_steps).swapaxes(1, 2)
        else:
            other = logits.swapaxes(1, 2).reshape(count, n_steps, n_classes)
        losses = LOSSES["cross-entropy"](other.reshape(-1, n_classes), targets)
        error = 0.0 if batch.is_whole else 4 * losses.std() / np.sqrt(len(losses))
        return bool(abs(losses.mean() - batch.loss) <= LOSS_TOLERANCE * abs(batch.loss) + error)
