"""The rule on the gradient noise scale: what it says of the batch size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gradstat.diagnosis.finding import Finding, Measure
from gradstat.diagnosis.medians import median
from gradstat.diagnosis.rule import Case, Rule

SOURCE = "McCandlish et al. 2018, 1812.06162, section 2"


@dataclass(frozen=True)
class BatchSize(Rule):
    """A batch far from the gradient noise scale, in either direction."""

    codes = ("batch-size",)
    needs = ("gradient_signal", "gradient_noise", "batch_size")

    last: int = 50
    """Estimates that are averaged, of signal and of noise apart: their ratio is biased where it is
    taken first (appendix A.1)."""

    factor: float = 4.0
    """Batch size over noise scale, or the inverse, from which there is something to say: with a
    quarter of it a run needs 5 steps for each one that a huge batch needs."""

    def judge(self, case: Case) -> Iterator[Finding]:
        """Yield advice where all three have been observed."""
        names = BatchSize.needs
        curves = [case.run.curves.get(name) for name in names]
        known = [curve.finite[-self.last :] for curve in curves if curve is not None]
        if len(known) < len(names) or any(len(values) == 0 for values in known):
            return
        signal, noise = float(known[0].mean()), float(known[1].mean())
        yield from self.advise(signal, noise, median(known[2]))

    def advise(self, signal: float, noise: float, batch_size: float) -> Iterator[Finding]:
        """Yield what a noise scale of ``noise / signal`` rows says of a batch of so many rows.

        Steps over the least possible are 1 + scale / batch; rows over the least possible are
        1 + batch / scale.
        """
        scale = noise / signal if signal > 0 else math.inf
        if noise <= 0 or 1 / self.factor < batch_size / scale < self.factor:
            return
        is_small = batch_size < scale
        if math.isinf(scale):
            text = f"in a batch of {batch_size:g} rows the gradient is lost in its noise"
        else:
            text = (
                f"the gradient noise scale is {scale:.3g} rows and a batch has {batch_size:g}: "
                + (
                    "twice the batch would need nearly half the steps"
                    if is_small
                    else "half the batch would need hardly more steps"
                )
            )
        yield Finding(
            "batch-size",
            "info",
            0.5,
            text,
            (
                "larger batches, or accumulated gradients, with a larger lr",
                "or a smaller lr: it averages over more steps",
            )
            if is_small
            else ("smaller batches reach the same loss with fewer rows, and cost less memory",),
            (
                Measure("gradient noise scale", scale, "rows"),
                Measure("batch size", batch_size, "rows"),
                Measure("steps over the least possible", 1 + scale / batch_size),
                Measure("rows over the least possible", 1 + batch_size / scale),
            ),
            SOURCE,
        )
