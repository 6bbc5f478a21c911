"""Rules on the size of gradients: from layer to layer, and from step to step."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gradstat.diagnosis.evidence import (
    ABS_MAX,
    DEAD_ROWS,
    INFS,
    L2,
    NANS,
    NUMEL,
    ROWS,
    ZEROS,
    Curve,
    Floats,
)
from gradstat.diagnosis.finding import Finding, Measure
from gradstat.diagnosis.medians import median, middle
from gradstat.diagnosis.rule import DEFAULT_GAIN, Case, Rule


@dataclass(frozen=True)
class Vanishing(Rule):
    """Gradients that fade on their way back to the first layers."""

    codes = ("vanishing-gradient",)
    needs = ("steps",)

    faded: float = 1e-3
    """The first layers' gradient over the last one's, root mean squares. Relative, since absolute
    thresholds of earlier tools lie between 1e-7 and 1e-3 (AutoTrainer compares first with last)."""

    min_matrices: int = 4

    faded_shallow: float = 1e-6
    """The same of fewer weights than that: in a recurrent network depth is in time."""

    sound: float = 0.01
    """The same in the first step, from which it is later steps that have made gradients vanish."""

    still: float = 1e-4
    """Way of the first weights, over their own size, below which they have learnt nothing."""

    rounding: float = 1e-7
    """Largest gradient's root mean square over the loss, below which it is the rounding of a
    derivative that is 0: fp32's epsilon is 1.2e-7."""

    def judge(self, case: Case) -> Iterator[Finding]:
        run = case.run
        if len(run.probes.steps) < 3 or len(run.matrices) < 2:
            return
        yield from self._to_rounding(case)
        if case.learns and not self._stand_still(case):
            return
        gradients = run.probes.gradient_rms[:, run.matrices]
        quarter = max(1, len(run.matrices) // 4)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = middle(gradients[:, :quarter], axis=1) / gradients[:, -1]
        known = ratios[np.isfinite(ratios)]
        if known.size == 0 or not known.any():
            return
        # Later on the last layer's gradient may be nothing either, where no other layer moves.
        ratio = min(median(known), median(known[:4]))
        faded = self.faded if len(run.matrices) >= self.min_matrices else self.faded_shallow
        if ratio >= faded:
            return
        yield Finding(
            "vanishing-gradient",
            "error" if ratio < 1e-5 else "warning",
            0.75 if known[0] > self.sound else 0.92 if ratio < 1e-5 else 0.8,
            f"the first layers' gradient is {ratio:.1g} of the last one's, so they hardly learn",
            (
                "use ReLU or GELU in place of sigmoid or tanh",
                "add normalisation layers or residual connections",
                "initialise for the activation (torch.nn.init.calculate_gain)",
            ),
            (
                Measure("first layers' gradient over the last one's", ratio, threshold=faded),
                *[
                    Measure(f"root mean square at {run.layers[i].name}", float(value))
                    for i, value in zip(
                        run.matrices, middle(gradients[:, :3], axis=0), strict=False
                    )
                ],
            ),
            "Glorot and Bengio 2010; AutoTrainer (Zhang et al. 2021)",
            tuple(run.layers[i].name for i in run.matrices[:quarter]),
        )

    def _stand_still(self, case: Case) -> bool:
        """Whether the first weights have not moved though the loss, all that is known, has fallen.

        It falls as soon as the last layer gives the targets' mean.
        """
        probes = case.run.probes
        quarter = case.run.matrices[: max(1, len(case.run.matrices) // 4)]
        moved = probes.updates[:, quarter, L2].sum(axis=0) * case.run.step / len(probes.steps)
        stands = moved < self.still * probes.weights[0, quarter, L2]
        return not case.has_scale and bool(stands.all())

    def _to_rounding(self, case: Case) -> Iterator[Finding]:
        shape, run = case.loss, case.run
        if shape is None or case.learns or shape.last == 0 or case.is_wild:
            return
        largest = np.nanmax(run.probes.gradient_rms, axis=1, initial=0.0)
        size = median(largest) / abs(shape.last)
        if 0 < size < self.rounding and not case.is_clipped:
            yield Finding(
                "vanishing-gradient",
                "error",
                0.9,
                "no gradient is more than the rounding of 0: hardly anything of the loss depends "
                "on the parameters smoothly",
                (
                    "look between model and loss for a normalisation of a single number, a sign, "
                    "a clamp or a function in its flat part",
                ),
                (Measure("largest gradient over the loss", size, threshold=self.rounding),),
                "IEEE 754 arithmetic",
            )


@dataclass(frozen=True)
class Exploding(Rule):
    """Gradients that grow on their way back, or from step to step."""

    codes = ("exploding-gradient",)
    needs = ("steps",)

    grown: float = 1e3
    """The largest gradient's size over the weights' own, root mean squares; for a loss of order one
    it is below 1."""

    beyond_doubt: float = 1e6
    """The same from which a loss that has fallen says nothing: from such a start any does."""

    grown_in_time: float = 10.0
    """The same of a recurrent weight in the first step, where the last layer's gradient is less
    than half as large: what is large by the loss is so there first."""

    spike: float = 50.0
    """Largest total norm over the median of those before it: late ones may be small because the run
    has converged."""

    def judge(self, case: Case) -> Iterator[Finding]:
        run = case.run
        if case.learns and case.has_scale:
            return
        if run.loss is not None and len(run.loss) and not np.isfinite(run.loss.values[0]):
            return  # no gradient has led to that
        steps = np.concatenate([run.probes.steps, run.recent_steps])
        norms = np.concatenate([run.probes.total_norms, run.decisions[:, 0]])
        norms = norms[np.argsort(steps, kind="stable")]
        norms = norms[np.isfinite(norms) & (norms > 0)]
        if norms.size == 0:
            return
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = run.probes.gradient_rms[:1] / run.probes.weight_rms[:1]
        matrices = relative[:, run.matrices] if len(run.matrices) else relative
        largest = float(np.nanmax(np.where(np.isfinite(matrices), matrices, 0), initial=0))
        if case.learns and largest < self.beyond_doubt:
            return
        through_time = self._through_time(case)
        if largest > self.grown:
            confidence = float(min(0.95, 0.75 + 0.05 * np.log10(largest / self.grown)))
            seen = Measure("gradient over weight", largest, threshold=self.grown)
            text = f"gradients are {largest:.2g} times as large as the weights they are to correct"
        elif through_time > self.grown_in_time:
            confidence = 0.8
            seen = Measure("first gradient of a recurrent weight over the weight", through_time,
                           threshold=self.grown_in_time)  # fmt: skip
            text = (
                "from the first step on, before any update, a recurrent weight's gradient is "
                f"{through_time:.2g} times the weight: it grows with each step back in time"
            )
        elif (
            norms.size >= 20
            and not case.is_steady
            and (case.loss is None or case.is_judged_by_loss)
            and (spread := _largest_jump(norms)) > self.spike
        ):
            confidence = 0.55
            seen = Measure("largest norm over the median before it", spread, threshold=self.spike)
            text = f"the total norm jumps to {spread:.2g} times its usual value"
        else:
            return
        yield Finding(
            "exploding-gradient",
            "warning",
            confidence,
            text,
            (
                'clip: gradstat.attach(optimizer, model, clip="auto")',
                "lower lr, or initialise with a smaller gain",
                "add normalisation layers",
            ),
            (seen, Measure("largest total norm", float(norms.max()))),
            "Pascanu et al. 2013, 1211.5063",
        )

    def _through_time(self, case: Case) -> float:
        """Return how many times a recurrent weight its gradient is, as the run begins.

        One that begins smaller than torch makes it counts as large as that. 0 where the gradient
        of the last layer, through which the loss comes in, is as large.
        """
        run = case.run
        recurrent = [i for i in run.recurrent if i in run.matrices]
        if not recurrent or not len(run.probes.steps) or run.probes.steps[0] != 1:
            return 0.0
        gradients, weights = run.probes.gradient_rms[0], run.probes.weight_rms[0]
        last = gradients[run.matrices[-1]]
        usual = [DEFAULT_GAIN / math.sqrt(run.layers[i].fan_in) for i in recurrent]
        grown = [
            gradients[i] / max(weights[i], size)
            for i, size in zip(recurrent, usual, strict=True)
            if gradients[i] > 2 * last
        ]
        return float(np.max(grown, initial=0.0))


@dataclass(frozen=True)
class Nonfinite(Rule):
    """A loss or gradients that are NaN or Inf."""

    codes = ("nonfinite-loss", "nonfinite-gradient")
    needs = ("steps",)

    lasting: float = 0.3
    """Share of the last values that are not finite: a scaler's first overflows pass."""

    warm_up: int = 10
    """Values in which a scaler may look for its scale."""

    soon: int = 4
    """Steps before the first such loss in which such gradients are its cause. Earlier ones passed,
    as when a scaler looks for its scale."""

    sudden: float = 100.0
    """Largest loss before an Inf, over the first, below which the Inf came of itself."""

    def judge(self, case: Case) -> Iterator[Finding]:
        run = case.run
        loss = run.loss
        first_loss = None
        if loss is not None and len(loss):
            bad = ~np.isfinite(loss.values)
            if bad[-max(1, len(bad) // 4) :].mean() > self.lasting or bad[-3:].all():
                first_loss = int(loss.steps[bad.argmax()]) + 1
                yield self._of_loss(case, loss, bad)
            elif bad[self.warm_up :].sum() >= 2:
                first_loss = int(loss.steps[bad.argmax()]) + 1
                yield self._now_and_then(first_loss, float(bad.mean()))
        counts = run.recent_nonfinite
        bad_steps = np.asarray((counts > 0).any(axis=1))
        if not bad_steps.size or bad_steps[-max(4, len(bad_steps) // 4) :].mean() <= self.lasting:
            return
        probes = run.probes.gradients
        bad_probes = np.asarray((probes[..., NANS] + probes[..., INFS] > 0).any(axis=1))
        known = np.concatenate([run.recent_steps[bad_steps], run.probes.steps[bad_probes]])
        if run.first_nonfinite is not None:
            known = np.append(known, run.first_nonfinite)
        first = int(known.min())
        # Gradients of a finite loss spoil the weights, and with them the next loss.
        spoilt = first_loss is not None and bool(
            ((known < first_loss) & (known > first_loss - self.soon)).any()
        )
        at = np.asarray((counts[bad_steps] > 0).any(axis=0))
        is_loss_finite = loss is not None and first_loss is None
        yield Finding(
            "nonfinite-gradient",
            "error",
            0.93 if is_loss_finite or spoilt else 0.75,
            "gradients hold NaN or Inf"
            + (" while the loss is finite" if is_loss_finite else "")
            + (" in the last steps of a loss that is still finite" if spoilt else ""),
            (
                "look for sqrt, log, norm or division at 0 in the loss: add an epsilon inside",
                "torch.autograd.set_detect_anomaly(True) names the operation",
                'attach(..., on_nonfinite="skip") keeps the parameters whole meanwhile',
            ),
            (Measure("share of recent steps", float(bad_steps.mean()), threshold=self.lasting),),
            "IEEE 754 arithmetic",
            tuple(layer.name for layer, b in zip(run.layers, at, strict=True) if b),
            (first,),
        )

    def _now_and_then(self, step: int, share: float) -> Finding:
        return Finding(
            "nonfinite-loss",
            "warning",
            0.85,
            f"the loss of some batches is NaN or Inf ({share:.1%} of them)",
            (
                "look at these batches: an empty mask or class makes a mean over nothing",
                "divide by max(count, 1)",
            ),
            (Measure("share of losses not finite", share, threshold=0.0),),
            "IEEE 754 arithmetic",
            steps=(step,),
        )

    def _of_loss(self, case: Case, loss: Curve, bad: NDArray[np.bool_]) -> Finding:
        place = int(bad.argmax())
        step = int(loss.steps[place]) + 1
        share = float(bad.mean())
        before = np.abs(loss.values[:place])
        # A run that explodes takes some steps; log(0) and exp(1000) come out of the blue.
        is_sudden = np.isinf(loss.values[place]) and (
            place == 0 or before.max() < self.sudden * before[0]
        )
        half = (case.run.epsilons > 1e-4).any()
        return Finding(
            "nonfinite-loss",
            "error",
            0.95 if is_sudden else 0.9,
            f"the loss is NaN or Inf from step {step} on",
            (
                "look for log(0), division by 0 and exp of large numbers in model and loss",
                "lower lr and clip, if the loss grew before it",
                *(["use bf16 or a GradScaler: fp16 ends at 65504"] if half else []),
            ),
            (Measure("share of losses not finite", share, threshold=0.0),),
            "IEEE 754 arithmetic",
            steps=(step,),
        )


@dataclass(frozen=True)
class SparseGradients(Rule):
    """Weights most of which get no gradient in a step, so that each is hardly ever corrected."""

    codes = ("sparse-gradients",)
    needs = ("steps",)

    zero: float = 0.9
    """Share of a weight's gradient that is exactly 0, the median over the probes."""

    visits: float = 20.0
    """Steps that have had a gradient for an element, on average, at most."""

    many: int = 3
    """Weights whose gradients are all sparse, from which that is not what goes through them."""

    alike: float = 0.02
    """Largest share of zeros of a weight's gradient less the smallest, up to which they were made
    so by the same share."""

    moved: float = 0.3
    """Share of its own size that an element could have moved in these steps, at most: what moves
    far in a few steps has an optimizer that makes up for it."""

    min_steps: int = 40
    """Steps before which no element has had its turn."""

    often: float = 0.75
    """Share of zeros from which a weight that has moved less than `still`, while most others moved
    farther than `go`, is kept back by it."""

    go: float = 0.1
    """`moved` of most others then, at least."""

    still: float = 0.05
    """`moved` of such a weight, at most."""

    left: float = 0.85
    """Share of a guess's loss that is left, at least, where it is known."""

    def judge(self, case: Case) -> Iterator[Finding]:
        run = case.run
        if len(run.probes.steps) < 4 or not run.layers:
            return
        tables = run.probes.gradients
        wide = np.flatnonzero(run.dimensions >= 2)
        zero = np.full(len(run.layers), np.nan)
        with np.errstate(invalid="ignore", divide="ignore"):
            zero[wide] = middle(tables[:, wide, ZEROS] / tables[:, wide, NUMEL], axis=0)
        often = zero > self.often
        if not often.any():
            return
        sparse = often & (zero > self.zero)
        sparse &= (tables[..., ABS_MAX] > 0).mean(0) > 0.5
        if len(run.matrices) and sparse[last := run.matrices[-1]] and self._is_left_out(case, last):
            yield self._finding(
                case, [last], zero, "most of the last layer's units take no part in the loss",
                ("check what the loss leaves out: a slice, a mask, a clamp",), 0.8,
            )  # fmt: skip
            return
        of_matrices = zero[run.matrices]
        if sparse[run.matrices].sum() >= self.many and np.ptp(of_matrices) < self.alike:
            yield self._finding(
                case, list(run.matrices), zero,
                "the same small share of every weight's gradient is not 0: something drops the "
                "rest",
                ("look between backward() and step() for what keeps the largest elements alone, "
                 "and let it add what it drops to the next step's (error feedback)",), 0.75,
            )  # fmt: skip
            return
        alive = np.maximum(1 - zero, 0)
        moved = np.nanmean(run.probes.update_ratio, axis=0) * run.step * np.sqrt(alive)
        if run.step < self.min_steps:
            return
        rare = sparse & (alive * run.step < self.visits) & (moved < self.moved)
        others_move = len(run.matrices) and median(moved[run.matrices]) > self.go
        if others_move and case.learns is False:
            rare |= often & (alive * run.step >= self.visits) & (moved < self.still)
        hindered = not case.learns if case.left is None else case.left > self.left
        if rare.any() and hindered:
            yield self._finding(
                case, list(np.flatnonzero(rare)), zero,
                "an element gets a gradient in so few steps that it stays nearly where it began",
                (
                    "use an optimizer that scales each element's step: Adagrad, SparseAdam, Adam",
                    "train for more epochs, with a larger lr for these parameters",
                    "merge rare ids or words into one",
                ), 0.75,
            )  # fmt: skip

    def _is_left_out(self, case: Case, place: int) -> bool:
        """Whether most rows of a weight's gradient are nothing but 0."""
        tables = case.run.probes.gradients[:, place]
        return bool(middle(tables[:, DEAD_ROWS] / tables[:, ROWS]) > self.zero)

    def _finding(
        self, case: Case, places: list[int], zero: Floats, text: str, remedy: tuple[str, ...],
        confidence: float,
    ) -> Finding:  # fmt: skip
        visits = float(np.min(1 - zero[places])) * case.run.step
        return Finding(
            "sparse-gradients",
            "warning",
            confidence,
            text,
            remedy,
            (
                Measure("median share of zeros", float(np.max(zero[places])), threshold=self.zero),
                Measure("steps with a gradient for an element", visits, threshold=self.visits),
            ),
            "Duchi et al. 2011, Adaptive Subgradient Methods, section 1; Stich et al. 2018, "
            "1809.07599; AutoTrainer",
            tuple(case.run.layers[i].name for i in places),
        )


def _largest_jump(norms: Floats, first: int = 5) -> float:
    """Return the largest norm over the median of those before it, without the first ones; or 1."""
    ordered = sorted(norms[:first].tolist())
    jumps = []
    for norm in norms[first:].tolist():
        half = len(ordered) // 2
        jumps.append(norm / ((ordered[half] + ordered[~half]) / 2))
        insort(ordered, norm)
    return max(jumps, default=1.0)
