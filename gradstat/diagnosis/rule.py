"""What a rule is, and the case that it judges: the evidence with what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gradstat.diagnosis.curve import Shape, shape_of
from gradstat.diagnosis.evidence import ABS_MAX, L2, Batch, Evidence, Floats, norms
from gradstat.diagnosis.finding import Finding
from gradstat.diagnosis.medians import median, quantiles
from gradstat.diagnosis.task import Task

INPUT_ROWS = 512
"""Rows of inputs that tell their scale, those that a batch begins with."""

_STANDS = 0.97
"""Last validation loss over the first, and training over validation loss, from which a loss that
has fallen has only come down to a guess."""

DEFAULT_GAIN = 0.577
"""Of the weights that torch's layers begin with: uniform up to the root of 1 / fan-in."""

_NEARLY = 0.04
"""Distance from it, at most."""

_FAR = 1e6
"""How many times the variance of the targets the error is, from which nothing is learnt."""


class Case:
    """A run under judgement."""

    def __init__(self, run: Evidence) -> None:
        self.run = run

    @cached_property
    def task(self) -> Task:
        """What the run is asked to do."""
        return Task(self.run.batches)

    @cached_property
    def loss(self) -> Shape | None:
        """Shape of the training loss."""
        return shape_of(self.run.loss)

    @cached_property
    def input_rows(self) -> Floats:
        """About `INPUT_ROWS` sampled rows of inputs that are finite, (n, features), or none."""
        arrays = [
            batch.inputs.reshape(len(batch.inputs), -1)
            for batch in self.run.batches
            if batch.inputs is not None and batch.inputs.size
        ]
        of_each = max(2, INPUT_ROWS // max(1, len(arrays)))
        width = arrays[0].shape[1] if arrays else 0
        alike = [array[:of_each] for array in arrays if array.shape[1] == width]
        rows = np.concatenate(alike) if alike else np.zeros((0, 0))
        is_finite = np.isfinite(rows)
        return rows if is_finite.all() else rows[is_finite.all(-1)]

    @cached_property
    def input_rms(self) -> float:
        """Their root mean square."""
        rows = self.input_rows
        squares = np.einsum("ij,ij->", rows, rows)  # without the threads of a BLAS
        return float(np.sqrt(squares / rows.size))

    @cached_property
    def input_deviations(self) -> Floats:
        """Standard deviation of each of their columns, exactly 0 where all rows are the same."""
        rows = self.input_rows
        centred = rows - rows[0]
        centred -= centred.sum(0) / len(rows)
        deviations: Floats = np.sqrt(np.einsum("ij,ij->j", centred, centred) / len(rows))
        return deviations

    @cached_property
    def late(self) -> list[Batch]:
        """Samples of the last third of the run."""
        return [batch for batch in self.run.batches if batch.step >= self.run.step * 2 / 3]

    @cached_property
    def skill(self) -> float | None:
        """How much better than a guess the late outputs are; see `Task.skill`."""
        return self.task.skill(self.late)

    @cached_property
    def left(self) -> float | None:
        """Share of a guess's loss that is left at the end; None where it is not known."""
        shape, chance = self.loss, self.task.chance
        if shape is None or chance is None or chance <= self.task.floor:
            return None
        return (shape.last - self.task.floor) / (chance - self.task.floor)

    @cached_property
    def is_well(self) -> bool:
        """Whether the run learns, and not much of a guess's loss is left where that is known."""
        return bool(self.learns) and (self.left is None or self.left < 0.5)

    @cached_property
    def is_settled(self) -> bool | None:
        """Whether the loss ends near its best; None where there is too little of it.

        It may have given back a tenth of its fall, or of what a guess scores; half of what it
        varies by from step to step, where it has fallen by much more than that.
        """
        shape = self.loss
        if shape is None:
            return None
        fall = max(shape.first - shape.best, self.task.chance or 0.0, 3 * shape.noise)
        noise = 0.5 * shape.noise if shape.first - shape.best > 3 * shape.noise else 0.0
        return shape.last <= shape.best + max(0.1 * fall, noise)

    @cached_property
    def is_supervised(self) -> bool:
        """Whether there are targets: without them a loss need not fall for a run to be well."""
        return bool(self.task.with_targets) or self.run.val_loss is not None

    @cached_property
    def may_be_adversary(self) -> bool:
        """Whether this may be the critic of a GAN, which a good generator keeps at a guess.

        It has two classes, real and made, and they come in blocks: not so in shuffled batches.
        Where that is not known it is told by Adam's first beta of one half, which is in use for
        little else (Radford et al. 2016, 1511.06434, section 4).
        """
        optimizer = self.run.optimizer
        if self.task.kind == "unknown" and optimizer is not None:
            is_usual = optimizer.is_adaptive and optimizer.momentum == 0.5
            return is_usual and self.run.val_loss is None
        if self.task.kind != "binary" or self.run.val_loss is not None:
            return False
        changes = [
            np.count_nonzero(np.diff(batch.targets.ravel()))
            for batch in self.task.paired
            if batch.targets is not None
        ]
        return bool(max(changes, default=0) <= 1)

    @cached_property
    def is_adversary(self) -> bool:
        """Whether that is sure enough to say nothing of its loss."""
        is_known = self.task.kind == "unknown" or len(self.task.paired) >= 3
        return self.may_be_adversary and is_known

    @cached_property
    def is_judged_by_loss(self) -> bool:
        """Whether the loss has to fall for a run to be well."""
        return self.is_supervised and not self.may_be_adversary

    @cached_property
    def generalises(self) -> bool:
        """Whether the validation loss comes down and stays there.

        To half of its first value, or to 70 % of what a guess scores where that is known; and where
        the training loss has first risen far, to 70 % of what it began with.
        """
        val, chance = self.run.val_loss, self.task.val_chance
        if val is None or len(val.finite) < 3:
            return False
        last = median(val.finite[-max(1, len(val.finite) // 5) :])
        low = 0.7 * chance if chance is not None else 0.5 * float(val.finite[0])
        loss = self.run.loss
        if chance is None and loss is not None and loss.finite.size:
            very_first = float(loss.finite[0])
            if 0 < very_first < loss.finite.max() / 3:
                low = min(low, 0.7 * very_first)
        return bool(last < low and last < 2 * val.finite.min())

    @cached_property
    def is_steady(self) -> bool:
        """Whether the validation loss has hardly moved; nothing, where a guess's is known."""
        val = self.run.val_loss
        if val is None or self.task.val_chance is not None or len(val.finite) < 5:
            return False
        low, middle, high = quantiles(val.finite, [0.1, 0.5, 0.9])
        return bool(high - low < 0.75 * abs(middle))

    def falls_throughout(self, several: int) -> bool:
        """Whether there are several validation losses, each of them below the one before."""
        val = self.run.val_loss
        if val is None or len(val.finite) < several:
            return False
        return bool((np.diff(val.finite) < 0).all())

    @cached_property
    def learns(self) -> bool | None:
        """Whether the run has clearly got somewhere; None where nothing tells.

        Told by the validation loss, else by the outputs where they can be compared with targets: a
        third of what there is to explain. Else by the loss: it ends below 70 % of what a guess
        scores, or of where it began.
        """
        shape, chance = self.loss, self.task.chance
        if shape is not None and chance is not None and shape.last > 1.2 * chance:
            return False
        if self.is_wild:
            return False
        if self.generalises:
            return True
        # Without the loss the outputs' own scale is not known: they may be logits.
        if self.skill is not None and (self.skill > 1 / 3 or self.task.loss is not None):
            has_fallen = (
                shape is not None and self.task.loss is None and shape.last < 0.5 * self.start
            )
            return self.skill > 1 / 3 and (self.is_settled is not False or has_fallen)
        if shape is None:
            return None
        val = self.run.val_loss
        if chance is None and val is not None and len(val.finite) > 3:
            last = float(val.finite[-1])
            if last > _STANDS * val.finite[0] and shape.last > _STANDS * last:
                return False  # it has come down to a guess
        return bool(self.is_settled) and shape.last < 0.7 * (chance if chance else self.start)

    @cached_property
    def is_wild(self) -> bool:
        """Whether the losses of the second half are on average ten times what a guess scores.

        Their median may be 0 all the same, as of batches of one row. Or the outputs are a thousand
        times as far from the targets as a guess is.
        """
        if self.task.kind == "numbers" and self.skill is not None and self.skill < -_FAR:
            return True
        loss, chance = self.run.loss, self.task.chance
        if loss is None or chance is None or chance <= 0:
            return False
        half = loss.values[len(loss) // 2 :]
        half = half[np.isfinite(half)]
        return bool(half.size and half.mean() > 10 * chance)

    @cached_property
    def has_scale(self) -> bool:
        """Whether more than the loss's own start tells if the run learns."""
        return self.skill is not None or self.generalises or self.task.chance is not None

    @property
    def start(self) -> float:
        """What the loss began with: its very first value, if it has grown at once."""
        assert self.loss is not None
        assert self.run.loss is not None
        very_first = float(self.run.loss.values[0])
        return very_first if 0 < very_first < 0.8 * self.loss.first else self.loss.first

    @cached_property
    def is_unfed(self) -> bool:
        """Whether the first layer's inputs are all 0: its bias gets a gradient, its weights none.

        As training begins; what feeds it may learn to give a constant.
        """
        return self._begins_with_zeros(0)

    @cached_property
    def ends_in_zeros(self) -> bool:
        """Whether the last layer's inputs are, in the same way."""
        return self._begins_with_zeros(-1)

    def _begins_with_zeros(self, place: int) -> bool:
        probes, layers = self.run.probes, self.run.layers
        if not len(self.run.matrices) or not len(probes.steps) or probes.steps[0] != 1:
            return False
        weight = self.run.matrices[place]
        owner = layers[weight].name.rpartition(".")[0]
        largest = probes.gradients[0, :, ABS_MAX]
        return bool(largest[weight] == 0) and any(
            layers[i].name.rpartition(".")[0] == owner and largest[i] > 0
            for i in np.flatnonzero(self.run.dimensions == 1)
        )

    @cached_property
    def sees_no_order(self) -> bool:
        """Whether the model has attention, and nothing that tells it the places of what it sees.

        A table that is used is known by its gradient.
        """
        run, model = self.run, self.run.model
        used = np.nan_to_num(run.probes.gradients[:, run.embeddings, ABS_MAX]).any(axis=0)
        if model is None or model.has_tables or used.sum() > 1:
            return False
        tells = ("Conv", "RNN", "GRU", "LSTM")
        attends = "NonDynamicallyQuantizableLinear" in model.kinds  # of MultiheadAttention
        return attends and not any(kind.startswith(tells) for kind in model.kinds)

    @cached_property
    def forgets_at_once(self) -> bool:
        """Whether no recurrent weight ever gets a gradient: the state is 0, or is detached."""
        places = self.run.recurrent
        return bool(places) and bool((self.run.probes.gradients[:, places, ABS_MAX] == 0).all())

    @cached_property
    def is_clipped(self) -> bool:
        """Whether the gradients have been scaled to the same norm before each step."""
        norms = self.run.probes.total_norms
        return bool(norms.size > 1 and norms.std() < 1e-3 * norms.mean())

    @cached_property
    def total_update_ratio(self) -> Floats:
        """Update of all weights over all weights, in norm: (p,)."""
        run = self.run
        chosen = run.matrices if len(run.matrices) else np.arange(len(run.layers))
        moved = norms(run.probes.updates[..., L2][:, chosen])
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio: Floats = moved / norms(run.probes.weights[..., L2][:, chosen])
        return ratio

    @cached_property
    def root_fans(self) -> Floats:
        """Root of the fan-in of each of the matrices."""
        layers = self.run.layers
        roots: Floats = np.sqrt([layers[i].fan_in for i in self.run.matrices])
        return roots

    @cached_property
    def is_fresh(self) -> bool:
        """Whether most weights began as torch makes them, so that this is no fine-tuning."""
        probes = self.run.probes
        if not len(probes.steps) or probes.steps[0] != 1:
            return False
        gains = probes.first_std[self.run.matrices] * self.root_fans
        return bool(gains.size) and bool((np.abs(gains - DEFAULT_GAIN) < _NEARLY).mean() >= 0.5)

    @cached_property
    def growth(self) -> float:
        """What the first weights of a plain stack of layers make of a signal's size, about: log10.

        Each multiplies it by its gain over the root of 2, which ReLU takes (He et al. 2015,
        1502.01852). Where next to nothing is left, what comes out is the biases'.
        """
        run = self.run
        if not len(run.probes.steps) or len(run.matrices) < 2:
            return 0.0
        gains = run.probes.weight_rms[0, run.matrices[:-1]] * self.root_fans[:-1] / np.sqrt(2)
        return float(np.nansum(np.log10(np.maximum(gains, 1e-30))))

    @cached_property
    def late_probes(self) -> NDArray[np.bool_]:
        """Which probes belong to the second half of the run."""
        steps = self.run.probes.steps
        late: NDArray[np.bool_] = (steps > self.run.step / 2) | (steps == steps.max(initial=0))
        return late


class Rule:
    """One way for a run to be wrong.

    A rule is a frozen dataclass: its thresholds are fields, and ``dataclasses.replace`` overrides
    them.
    """

    codes: ClassVar[tuple[str, ...]]
    """What it can find."""

    needs: ClassVar[tuple[str, ...]] = ()
    """What has to be observed for it to judge: names of curves or of batches' arrays."""

    def judge(self, case: Case) -> Iterator[Finding]:
        """Yield what is found; nothing where nothing is wrong or too little is known."""
        raise NotImplementedError
