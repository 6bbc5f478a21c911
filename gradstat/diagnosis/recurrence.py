"""Rules on networks whose depth is in time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.finding import Finding, Measure, Severity
from gradstat.diagnosis.rates import schedule_has_ended
from gradstat.diagnosis.rule import Case, Rule


def length(case: Case) -> int:
    """Return the steps of the longest sequence that a recurrent network was given.

    0 for other networks, and for outputs at every step, of which each may go by what is near.
    """
    kinds = case.run.model.kinds if case.run.model is not None else ()
    if not any(kind.startswith(("RNN", "GRU", "LSTM")) for kind in kinds):
        return 0
    longest = 0
    for batch in case.run.batches:
        inputs, outputs = (batch.shapes.get(name, ()) for name in ("inputs", "outputs"))
        if len(inputs) >= 2:
            is_batch_first = inputs[:1] == outputs[:1]
            longest = max(longest, inputs[1] if is_batch_first else inputs[0])
            if len(outputs) >= 3 and longest in outputs[:2]:
                return 0
    return longest


def is_plain(case: Case) -> bool:
    """Whether a network is recurrent without gates and answers once for each sequence."""
    kinds = case.run.model.kinds if case.run.model is not None else ()
    shapes = [b.shapes["outputs"] for b in case.run.batches if "outputs" in b.shapes]
    return any(kind in ("RNN", "RNNCell") for kind in kinds) and all(len(s) < 3 for s in shapes)


@dataclass(frozen=True)
class ThroughTime(Rule):
    """Recurrent weights that let a gradient fade, or grow, over the steps of a sequence.

    The gradients of parameters do not show it: they are sums over all steps, and the last ones fill
    them. The weights do: the eigenvalues of a random (h, h) matrix lie within its root mean square
    times the root of h (Girko's circular law), and a step multiplies by one of them. The gates of
    an LSTM or GRU multiply by one half while their biases are about 0.
    """

    codes = ("vanishing-gradient", "exploding-gradient")
    needs = ("steps",)

    long: int = 30
    """Steps of a sequence, at least. A loss soon shows what depends on fewer."""

    kept: float = 1e-3
    """What a sequence leaves of a gradient, at most: as for the layers of a deep network."""

    nothing: float = 1e-8
    """The same of a sequence of any length: torch's default for an RNN comes there in 34 steps."""

    left: float = 0.8
    """Share of a guess's loss, or of the first loss, that is left, at least."""

    left_unknown: float = 0.9
    """The same where it is not known how long the sequences are."""

    faint: float = 0.1
    """What a step leaves of a gradient, below which a sequence need not be long: torch's default
    for an RNN is 0.58."""

    grown: float = 1e6
    """What a sequence makes of a gradient, at least, in a run that is lost."""

    swells: float = 1.4
    """What a step makes of a gradient at first, from which it is worth a warning though the run is
    not lost: orthogonal weights and the identity have 1."""

    wild: float = 4.0
    """The same where the loss has fallen and nothing tells what it could have come to."""

    usual_length: int = 50
    """Steps of a sequence, where inputs are not observed."""

    open_gate: float = 0.4
    """Root mean square of an LSTM's biases, from which its forget gate may be held open (by 1 in a
    quarter of them: Jozefowicz et al. 2015)."""

    def judge(self, case: Case) -> Iterator[Finding]:
        run = case.run
        places = run.recurrent
        if not places or not len(run.probes.steps):
            return
        n_steps, names = length(case), tuple(run.layers[i].name for i in places)
        # The largest counts: what passes one layer's recurrence has passed. NaN if one is unknown.
        first, last = (
            np.array([self._factor(case, i, probe) for i in places]).max() for probe in (0, -1)
        )
        if case.learns:
            if first > self.wild and not case.has_scale:
                yield self._exploding(float(first), n_steps, names, "warning", 0.7)
            return
        if self._is_lost(case) and first ** (n_steps or self.usual_length) > self.grown:
            yield self._exploding(float(first), n_steps, names)
        elif first > self.swells:
            yield self._exploding(float(first), n_steps, names, "warning", 0.7)
        shape = case.loss
        if shape is None or schedule_has_ended(case):
            return
        is_faint = first < self.faint
        is_unknown = n_steps == 0 and last < 1 and is_plain(case)
        kept = (first if is_faint else last) ** (self.usual_length if is_unknown else n_steps)
        is_long = is_unknown or n_steps >= self.long or kept < self.nothing
        if kept < self.kept and (is_faint or is_long):
            start = case.task.chance if case.task.chance is not None else abs(shape.first)
            least = self.left_unknown if is_unknown else self.left
            if start > 0 and least < shape.last / start < 1.2:
                yield self._vanishing(
                    float(kept),
                    n_steps,
                    names,
                    0.5 if is_unknown
                    else 0.8 if is_faint else 0.7 if kept < self.nothing else 0.62,
                )  # fmt: skip

    def _is_lost(self, case: Case) -> bool:
        loss, nonfinite = case.run.loss, case.run.recent_nonfinite
        if loss is not None:
            return not np.isfinite(loss.values[-3:]).any()
        return bool(len(nonfinite) and (np.nansum(nonfinite, axis=1) > 0).all())

    def _factor(self, case: Case, place: int, probe: int) -> float:
        """Return what a step multiplies a gradient by, about; NaN where it cannot be told."""
        run = case.run
        layer = run.layers[place]
        if len(layer.shape) != 2:
            return np.nan
        rows, units = layer.shape
        if rows == units:
            return float(run.probes.weight_rms[probe, place] * np.sqrt(units))
        biases = [
            i for i, other in enumerate(run.layers)
            if other.name in (layer.name.replace("weight_hh", f"bias_{k}") for k in ("hh", "ih"))
        ]  # fmt: skip
        is_open = (run.probes.weight_rms[probe, biases] > self.open_gate).any()
        return np.nan if is_open else 0.5

    def _vanishing(
        self, kept: float, n_steps: int, names: tuple[str, ...], confidence: float
    ) -> Finding:
        return Finding(
            "vanishing-gradient",
            "warning",
            confidence,
            f"over sequences of {n_steps or self.usual_length} steps the recurrent weights "
            + ("leave" if n_steps else "would leave")
            + f" about {kept:.1g} of a gradient, so what came first is not learnt from",
            (
                "give the output more than the last step: the mean over all steps, or attention",
                "use an LSTM with a forget gate's bias of 1 and more, or orthogonal recurrent "
                "weights",
                "shorten the sequences, or make each step hold more",
            ),
            (Measure("share of a gradient that a sequence leaves", kept, threshold=self.kept),),
            "Pascanu et al. 2013, 1211.5063, section 2.1; Girko 1984; Jozefowicz et al. 2015",
            names,
        )

    def _exploding(
        self,
        factor: float,
        n_steps: int,
        names: tuple[str, ...],
        severity: Severity = "error",
        confidence: float = 0.95,
    ) -> Finding:
        return Finding(
            "exploding-gradient",
            severity,
            confidence,
            f"the recurrent weights multiply a signal and its gradient by about {factor:.2g} in "
            "every step of a sequence" + (f", of which there are {n_steps}" if n_steps else ""),
            (
                "start recurrent weights at the identity or orthogonal, not larger",
                'clip: gradstat.attach(optimizer, model, clip="auto")',
            ),
            (Measure("growth in a step", factor, threshold=1.0),),
            "Pascanu et al. 2013, 1211.5063, section 2.1; Girko 1984",
            names,
            (1,),
        )
