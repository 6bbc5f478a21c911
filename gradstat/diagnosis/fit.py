"""Rules on whether outputs, targets and loss fit each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.evidence import Batch, Floats
from gradstat.diagnosis.finding import Finding, Measure
from gradstat.diagnosis.medians import median, quantiles
from gradstat.diagnosis.rule import Case, Rule
from gradstat.diagnosis.samples import range_of_all
from gradstat.diagnosis.task import LOSS_TOLERANCE, are_probabilities

SOURCE = "documentation of torch.nn's loss functions; UMLAUT (Schoop et al. 2021)"


def mismatch(text: str, remedy: tuple[str, ...], confidence: float, *seen: Measure) -> Finding:
    """Return a finding of this family."""
    return Finding("loss-output-mismatch", "error", confidence, text, remedy, seen, SOURCE)


def _sum_to_1_over_rows(batch: Batch) -> bool:
    """Whether outputs, or their exponentials, are probabilities along columns, not along rows.

    A column is that of all rows, or of those of one sequence.
    """
    outputs = batch.outputs
    if outputs is None or outputs.ndim != 2 or len(outputs) < 2 or outputs.shape[1] < 2:
        return False
    rows = np.exp(outputs) if (outputs <= 0).all() else outputs
    if are_probabilities(rows):
        return False
    for length in {len(rows), *_lengths(batch)}:
        n_sequences = len(rows) // length
        sequences = rows[: n_sequences * length].reshape(n_sequences, length, -1)
        if are_probabilities(sequences.swapaxes(1, 2).reshape(-1, length)):
            return True
    return False


def _lengths(batch: Batch) -> set[int]:
    """Return how many of the rows of a batch's outputs may be those of one sequence."""
    assert batch.outputs is not None
    shape, given = batch.shapes["outputs"], batch.shapes.get("inputs", ())
    lengths = {shape[1] * shape[2] // batch.outputs.shape[1]} if len(shape) == 3 else set()
    if len(given) > 1 and given[0] and shape[0] % given[0] == 0:
        lengths.add(shape[0] // given[0])
    return {length for length in lengths if 1 < length <= len(batch.outputs)}


@dataclass(frozen=True)
class ProbabilitiesAsLogits(Rule):
    """Outputs that went through softmax or sigmoid, given to a loss that does it again."""

    codes = ("loss-output-mismatch",)
    needs = ("outputs", "targets", "loss")

    min_samples: int = 2

    range: float = 0.5
    """Largest output less the smallest, from which it is no chance that all lie within [0, 1]."""

    centre: float = 0.1
    """Distance of a column's first mean from 0.5, at most, where they lie closer together: a
    sigmoid of next to nothing is one half, where logits may be anything."""

    varies: float = 0.02
    """Median deviation of the outputs of a batch then, at least: one number may lie anywhere."""

    def judge(self, case: Case) -> Iterator[Finding]:
        run, task = case.run, case.task
        paired = [batch for batch in task.paired if batch.outputs is not None]
        if len(paired) < self.min_samples or task.loss is None:
            return
        finite = [batch for batch in paired if not batch.holds_nonfinite("outputs")]
        if any(low < 0 < high for low, high in (batch.ranges["outputs"] for batch in finite)):
            return  # neither probabilities nor their logarithms
        outputs = [batch.outputs for batch in paired if batch.outputs is not None]
        if task.loss.name == "kl-div" and all(map(are_probabilities, outputs)):
            yield mismatch(
                "KLDivLoss is given probabilities where it takes their logarithms",
                ("give it log_softmax(logits, dim=-1)",),
                0.97,
                Measure("smallest output", min(float(o.min()) for o in outputs), threshold=0.0),
            )
        if task.loss.name == "cross-entropy" and all(map(are_probabilities, outputs)):
            yield mismatch(
                "the outputs are probabilities already, and the cross-entropy takes the softmax of "
                "them once more: gradients shrink, and the loss cannot get near 0",
                ("remove the softmax and give the loss the logits",),
                0.97,
                Measure(
                    "largest sum of a row less 1", max(abs(o.sum(-1) - 1).max() for o in outputs)
                ),
            )
        if task.loss.name == "cross-entropy" and all(map(_sum_to_1_over_rows, paired)):
            yield mismatch(
                "the outputs of a class sum to 1 over the rows, as after a softmax along the wrong "
                "dimension: what one row gets depends on the others",
                ("remove the softmax and give the loss the logits", "else take that of classes"),
                0.96,
                Measure("rows of a batch that are looked at", float(len(outputs[0]))),
            )
        if len(finite) < self.min_samples:
            return
        outputs = [batch.outputs for batch in finite if batch.outputs is not None]
        low, high = range_of_all(finite, "outputs")
        ends_so = len(run.sites) > 0 and run.sites[-1].kind in ("sigmoid", "softmax")
        ends_so &= run.model is not None and run.model.modules[-1:] in (("Sigmoid",), ("Softmax",))
        in_range = low >= 0 and high <= 1 and (ends_so or self._is_sigmoid(outputs, high - low))
        n_values = sum(o.size for o in outputs)
        is_squashed = in_range and task.n_classes > 1 and not all(map(are_probabilities, outputs))
        if task.loss.name == "cross-entropy" and is_squashed and n_values >= 128:
            yield mismatch(
                "the outputs lie between 0 and 1, as after a sigmoid, where the cross-entropy "
                "takes any number: no class can be more than e times as likely as another",
                ("remove the sigmoid and give the loss the logits",),
                0.93,
                Measure("smallest output", low, threshold=0.0),
                Measure("largest output", high, threshold=1.0),
            )
        is_one_of_many = task.kind == "binary" and all(map(are_probabilities, outputs))
        if is_one_of_many and task.loss.name == "bce" and (task.targets.sum(-1) != 1).any():
            yield mismatch(
                "each row of the outputs sums to 1, as after a softmax, where a row of the targets "
                "holds several ones or none: they can never be met",
                ("use a sigmoid in place of the softmax, or BCEWithLogitsLoss on the logits",),
                0.95,
                Measure("rows of targets that do not sum to 1",
                        float((task.targets.sum(-1) != 1).mean()), threshold=0.0),
            )  # fmt: skip
        if task.loss.name == "bce-with-logits" and in_range and n_values >= 32:
            yield mismatch(
                "the outputs lie between 0 and 1, as after a sigmoid, and BCEWithLogitsLoss takes "
                "the sigmoid of them once more: no answer below one half can be given",
                ("remove the sigmoid and give the loss the logits", "or use BCELoss"),
                0.95,
                Measure("smallest output", low, threshold=0.0),
                Measure("largest output", high, threshold=1.0),
            )

    def _is_sigmoid(self, outputs: list[Floats], width: float) -> bool:
        """Whether outputs within [0, 1] are so by a sigmoid, not by chance."""
        spread = median([float(o.std()) for o in outputs])
        is_centred = abs(outputs[0].mean(axis=0) - 0.5) < self.centre
        return (width > self.range and spread > self.varies) or (spread > 0 and is_centred.all())


@dataclass(frozen=True)
class CutLogits(Rule):
    """Logits that have gone through ReLU or tanh, though their loss takes any number."""

    codes = ("loss-output-mismatch",)
    needs = ("outputs", "targets", "loss")

    zeros: float = 0.02
    """Share of outputs that are exactly 0 where none is negative, at least."""

    edges: float = 0.1
    """Share of the late outputs within 0.04 of -1 or 1 where none is beyond, at least."""

    min_values: int = 128

    def judge(self, case: Case) -> Iterator[Finding]:
        loss = case.task.loss
        if loss is None or loss.name not in ("cross-entropy", "bce-with-logits"):
            return
        paired = case.task.paired
        low, high = range_of_all(paired, "outputs")
        if low < 0 and max(-low, high) > 1:
            return
        if any(batch.holds_nonfinite("outputs") for batch in paired):
            return
        outputs = np.concatenate([b.outputs.ravel() for b in paired if b.outputs is not None])
        if len(outputs) < self.min_values:
            return
        late = [b.outputs.ravel() for b in case.late if b.outputs is not None]
        zeros = float((outputs == 0).mean())
        edges = float((np.abs(np.concatenate(late)) > 0.96).mean()) if late else 0.0
        model = case.run.model
        ends_so = model is not None and model.modules[-1:] == ("ReLU",)
        if low >= 0 and (high > 1 or ends_so) and zeros > self.zeros:
            yield mismatch(
                "no logit is ever negative and many are exactly 0, as after ReLU: a class that is "
                "0 gets no gradient, and none can be ruled out",
                ("remove the last activation and give the loss the logits",),
                0.93,
                Measure("share of outputs that are 0", zeros, threshold=self.zeros),
            )
        elif max(-low, high) <= 1 and edges > self.edges:
            yield mismatch(
                "the logits stay in [-1, 1] and crowd at its ends, as after tanh: no class can be "
                "more than e² times as likely as another",
                ("remove the last activation and give the loss the logits",),
                0.93,
                Measure("share of outputs at the ends", edges, threshold=self.edges),
            )


@dataclass(frozen=True)
class TargetsBeyondProbability(Rule):
    """Binary cross-entropy with targets that are no probabilities, such as -1 and 1."""

    codes = ("loss-output-mismatch",)
    needs = ("outputs", "targets", "loss")

    beyond: float = 0.05
    """Share of the targets outside of [0, 1], at least."""

    def judge(self, case: Case) -> Iterator[Finding]:
        task = case.task
        if task.loss is None or not task.loss.name.startswith("bce") or not task.targets.size:
            return
        lowest, highest = range_of_all(task.with_targets, "targets")
        if 0 <= lowest <= highest <= 1:
            return
        outside = float(((task.targets < 0) | (task.targets > 1)).mean())
        if outside >= self.beyond:
            yield mismatch(
                "the targets of a binary cross-entropy lie outside of [0, 1]: the loss has no "
                "lower bound, and outputs grow for ever",
                ("give it 0 and 1: targets = (targets > 0).float()",),
                0.97,
                Measure("share of targets outside", outside, threshold=self.beyond),
            )


@dataclass(frozen=True)
class ClampedProbabilities(Rule):
    """Numbers beyond 0 and 1 that a binary cross-entropy of one's own clamps to probabilities.

    What is clamped on the wrong side costs the logarithm of the least probability, and gets no
    gradient.
    """

    codes = ("loss-output-mismatch",)
    needs = ("outputs", "targets", "loss")

    beyond: float = 0.1
    """Share of the outputs below 0 or above 1, at least."""

    cheapest: float = 4.6
    """The cost in nats, at least: of a probability of 0.01."""

    dearest: float = 104.0
    """The same, at most: of the smallest of fp32."""

    batches: int = 3
    """Batches, at least, most of which give the same cost."""

    def judge(self, case: Case) -> Iterator[Finding]:
        if case.task.kind != "binary" or case.task.loss is not None:
            return
        costs, shares = [], []
        for batch in case.task.paired:
            p, targets = batch.outputs, batch.targets
            if p is None or targets is None or batch.loss is None or not batch.is_whole:
                continue
            inside = (p > 0) & (p < 1)
            right = np.where(targets == 1, p, 1 - p)
            wrong = int((right <= 0).sum())
            shares.append(float(((p < 0) | (p > 1)).mean()))
            if wrong:
                costs.append((batch.loss * p.size + np.log(right[inside]).sum()) / wrong)
        if len(costs) < self.batches:
            return
        cost, share = median(costs), float(np.mean(shares))
        agree = np.mean(np.abs(np.array(costs) - cost) <= LOSS_TOLERANCE * cost)
        if share > self.beyond and agree > 0.8 and self.cheapest < cost < self.dearest:
            yield mismatch(
                "the loss takes the outputs for probabilities and clamps them, as a logit must not "
                f"be: {share:.0%} lie beyond 0 or 1, where nothing is learnt from",
                ("use BCEWithLogitsLoss", "or put a sigmoid behind the last layer"),
                0.95,
                Measure("share of outputs beyond 0 or 1", share, threshold=self.beyond),
            )


@dataclass(frozen=True)
class LogitsAsLogProbabilities(Rule):
    """NLLLoss on outputs that are no log-probabilities: the loss has no lower bound."""

    codes = ("loss-output-mismatch",)
    needs = ("outputs", "targets", "loss")

    def judge(self, case: Case) -> Iterator[Finding]:
        task = case.task
        if task.loss is None or task.loss.name != "nll":
            return
        off = [
            float(np.abs(np.logaddexp.reduce(batch.outputs, axis=-1)).max())
            for batch in task.paired
            if batch.outputs is not None and np.isfinite(batch.outputs).all()
        ]
        if off and median(off) > 0.05:
            yield mismatch(
                "NLLLoss is given outputs that are no log-probabilities: it can fall for ever "
                "without any answer getting better",
                ("use CrossEntropyLoss on the logits", "or end the model with log_softmax"),
                0.96,
                Measure("log of a row's sum of exp", median(off), "nat", threshold=0.05),
            )


@dataclass(frozen=True)
class Maximised(Rule):
    """A loss with its sign turned round, so that every step makes the model worse."""

    codes = ("diverging-loss",)
    needs = ("outputs", "targets", "loss")

    def judge(self, case: Case) -> Iterator[Finding]:
        loss = case.task.loss
        if loss is None or loss.factor >= 0:
            return
        yield Finding(
            "diverging-loss",
            "error",
            0.96,
            f"what is minimised is {loss.factor:.3g} times the {loss.name} loss: every step makes "
            "the answers worse, without end",
            ("remove the minus sign from the loss",),
            (Measure("observed loss over the mean loss of the samples", loss.factor,
                     threshold=0.0),),
            SOURCE,
        )  # fmt: skip


@dataclass(frozen=True)
class OneUnitSoftmax(Rule):
    """A softmax over one unit gives 1 whatever goes in."""

    codes = ("loss-output-mismatch",)
    needs = ("outputs",)

    min_rows: int = 32

    def judge(self, case: Case) -> Iterator[Finding]:
        arrays = [b.outputs for b in case.run.batches if b.outputs is not None]
        shapes = {b.shapes["outputs"][-1:] for b in case.run.batches if "outputs" in b.shapes}
        n = sum(len(array) for array in arrays)
        if n < self.min_rows or shapes != {(1,)}:
            return
        curve = case.run.loss
        paired = case.task.paired
        by_class = len(paired) > 0 and all("targets" in batch.integers for batch in paired)
        if all((array == 1).all() for array in arrays):
            yield mismatch(
                "the only output is exactly 1 for every row: a softmax over one unit is 1 whatever "
                "goes in, and no gradient comes back",
                ("use a sigmoid in place of the softmax", "with BCEWithLogitsLoss use neither"),
                0.97,
                Measure("outputs that are exactly 1", 1.0, "share"),
            )
        elif by_class and curve is not None and len(curve) and not curve.values.any():
            yield mismatch(
                "a cross-entropy over one class is 0 whatever the output is",
                ("give the last layer one unit for each class", "or use BCEWithLogitsLoss"),
                0.97,
                Measure("classes", 1.0, threshold=2.0),
            )


@dataclass(frozen=True)
class OutputRange(Rule):
    """A last activation that cannot reach some of the targets."""

    codes = ("loss-output-mismatch",)
    needs = ("outputs", "targets")

    beyond: float = 0.05
    """Share of the targets outside of what the outputs can be, at least."""

    far_beyond: float = 0.2
    """The same where the outputs are never negative but not at a limit either."""

    near: float = 0.1
    """Their lowest twentieth over their root mean square, at most: a limit shows where it is near.
    """

    varies: float = 0.05
    """Their deviation within a batch over the largest, from which they are more than one number
    that happens to be positive."""

    min_values: int = 128

    def judge(self, case: Case) -> Iterator[Finding]:
        task = case.task
        if task.kind != "numbers" or (task.loss is not None and task.loss.factor < 0):
            return
        lowest, highest = range_of_all(task.with_targets, "targets")
        if -1e-6 <= lowest <= highest <= 1 + 1e-6:
            return
        targets = task.targets.ravel()
        if ((targets < -1e-6) | (targets > 1 + 1e-6)).mean() < self.beyond:
            return
        outputs = np.concatenate([b.outputs.ravel() for b in task.paired if b.outputs is not None])
        outputs = outputs[np.isfinite(outputs)]
        is_zero = not outputs.any()  # a last ReLU that has died could not have met them alive
        if len(outputs) < self.min_values or not (outputs.std() > 0 or is_zero):
            return
        for name, low, high, looks_so in (
            ("sigmoid or softmax", 0.0, 1.0, outputs.min() >= 0 and outputs.max() <= 1),
            ("tanh", -1.0, 1.0, outputs.min() >= -1 and outputs.max() <= 1),
            ("ReLU", 0.0, np.inf, outputs.min() >= 0 and (outputs == 0).mean() > 0.02),
        ):
            outside = float(((targets < low - 1e-6) | (targets > high + 1e-6)).mean())
            if not looks_so or outside < self.beyond or not self._is_bounded(case, name, outputs):
                continue
            yield mismatch(
                f"the outputs stay in [{low:g}, {high:g}], as after {name}, and {outside:.0%} of "
                "the targets lie outside: they can never be met",
                ("remove the last activation", "or scale the targets into its range"),
                0.93,
                Measure("share of targets out of reach", outside, threshold=self.beyond),
            )
            return
        late_batches = [b for b in case.late if b.is_paired and b.outputs is not None]
        lowest, _ = range_of_all(late_batches, "outputs")
        if not 0 <= lowest < np.inf:
            return
        late = [b.outputs.ravel() for b in late_batches if b.outputs is not None]
        known = np.concatenate(late)
        is_near = quantiles(known, [0.05])[0] < self.near * np.sqrt(np.mean(known**2))
        below = float((targets < -1e-6).mean())
        varies = any(rows.std() > self.varies * np.abs(rows).max() for rows in late if rows.size)
        n_late = sum(map(len, late))
        if is_near and varies and below > self.far_beyond and n_late >= self.min_values:
            yield mismatch(
                f"no output is ever negative, as after softplus or exp, and {below:.0%} of the "
                "targets are: they can never be met",
                ("remove the last activation", "or scale the targets to be positive"),
                0.85,
                Measure("share of targets out of reach", below, threshold=self.far_beyond),
            )

    def _is_bounded(self, case: Case, name: str, outputs: Floats) -> bool:
        """Whether the outputs look cut off: the model ends so, or they crowd at the ends."""
        model = case.run.model
        last = model.modules[-1].lower() if model is not None and model.modules else ""
        if last and last in name.lower():
            return True
        if (outputs == np.rint(outputs)).all():  # whole numbers come from rounding
            return False
        if name == "ReLU":
            return True
        edges = ((outputs < 0.02) | (outputs > 0.98)) if name != "tanh" else np.abs(outputs) > 0.96
        return bool(edges.mean() > 0.1)
