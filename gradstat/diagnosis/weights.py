"""Rules on the parameters as training began."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.evidence import NUMEL
from gradstat.diagnosis.finding import Finding, Measure
from gradstat.diagnosis.medians import median
from gradstat.diagnosis.rule import Case, Rule

EQUAL = 1e-3
"""Deviation over the root mean square, up to which weights are equal: it is the root of a
difference that fp32 rounds."""

SOURCE = "Glorot and Bengio 2010; He et al. 2015, 1502.01852"


@dataclass(frozen=True)
class Initialization(Rule):
    """Weights that start constant, or far from the scale that keeps signals alive."""

    codes = ("bad-initialization",)
    needs = ("steps",)

    large: float = 4.0
    """Gain (deviation times the root of the fan-in) above which a layer amplifies too much: He's is
    1.4, Glorot's about 1, torch's default for Linear 0.58."""

    small: float = 0.03
    """Gain below which a layer lets hardly anything through. GPT-2's 0.02 at width 64 is 0.16."""

    faint: float = 0.1
    """The same where no normalisation follows, the layers together leave 0.3 % of a signal, and
    nothing is learnt."""

    large_embedding: float = 10.0
    """Deviation of an embedding, above; torch's default is 1, GPT-2's 0.02."""

    small_embedding: float = 1e-3
    """Deviation of an embedding, below."""

    nearly_all: float = 0.8
    """Share of the weights that start constant, above which no design explains it, as it may where
    residual branches or adapters start at 0, though the run learns."""

    left: float = 0.2
    """Share of a guess's loss that is left, above which signals that grow a thousandfold are worth
    a warning though the run learns: from such a start any loss falls."""

    swells: float = 2.0
    """Powers of ten by which a plain stack without normalisation makes a signal larger, from which
    it is worth a warning though the run learns; and the median gain that is a reason for it."""

    some: float = 0.2
    """Share of the layers that amplify too much, from which they may be what hampers a run."""

    bias: float = 3.0
    """Root mean square of a bias that shuts or saturates its layer whatever comes in."""

    shut: float = 0.6
    """Confidence where a layer is seen to be dead: that is said first, then what it began with."""

    def judge(self, case: Case) -> Iterator[Finding]:
        run = case.run
        if len(run.probes.steps) == 0 or run.probes.steps[0] != 1:
            return
        yield from self._of_embeddings(case)
        if len(run.matrices) == 0:
            return
        layers = [run.layers[i] for i in run.matrices]
        trained = np.asarray(np.isfinite(run.probes.gradients[..., NUMEL]).any(0))[run.matrices]
        std = run.probes.first_std[run.matrices]
        gains = std * case.root_fans
        rms = run.probes.weight_rms[0, run.matrices]
        constant = (std <= EQUAL * rms) & np.array([layer.shape[0] > 1 for layer in layers])
        if case.learns is not False:  # weights of 0 that move may be those of residual branches
            constant &= ~((rms == 0) & (run.probes.weight_rms[-1, run.matrices] > 0))
        early = constant[:-1] if len(layers) > 1 else constant
        severity = "info" if case.learns else "error"
        scale = 0.3 if case.learns else 1.0
        if early.mean() > self.nearly_all and case.learns:
            severity, scale = "warning", 0.7
        if early.any() and early.mean() >= 0.3:
            yield self._finding(
                "weights start all equal, so all units of a layer compute the same and stay the "
                "same",
                ("initialise them at random: torch.nn.init.kaiming_normal_ or xavier_uniform_",),
                0.96 * scale,
                severity,
                layers=[la.name for la, c in zip(layers, constant, strict=True) if c],
                seen=Measure("deviation of the weights", 0.0, threshold=0.0),
            )
            return
        varied = trained & (std > EQUAL * rms)
        usual = median(gains[varied]) if varied.any() else 1.0
        is_hampered = case.left is None or case.left > self.left
        repeated = np.isin(run.matrices, run.recurrent) & (gains > self.large)
        is_large = usual > self.large and (case.growth > 3 or repeated.any())
        if is_large and case.learns and is_hampered:
            severity, scale = "warning", 0.7
        is_plain = run.model is not None and not run.model.normalises
        fades = usual < self.faint and case.growth < -2.5 and not case.learns and is_plain
        swells = usual > self.swells and case.growth > self.swells and is_plain
        if swells and case.learns:
            severity, scale = "warning", 0.7
        amplify = varied & (gains > self.large)
        drowns = bool((amplify & (std > self.large_embedding)).any())
        if usual > self.large or usual < self.small or fades or swells:
            yield self._finding(
                f"weights start at {usual:.2g} times the size that keeps a signal's size: it "
                + ("grows" if usual > 1 else "shrinks")
                + " from layer to layer and so does the gradient",
                ("initialise with torch.nn.init.kaiming_normal_ (ReLU) or xavier_uniform_ (tanh)",),
                0.93 * scale,
                severity,
                layers=[la.name for la in layers],
                seen=Measure(
                    "median gain",
                    usual,
                    threshold=self.swells if swells and usual <= self.large
                    else self.large if usual > 1 else self.faint if fades else self.small,
                ),
            )  # fmt: skip
        elif (drowns or amplify.mean() >= self.some) and not case.is_well and is_hampered:
            yield self._finding(
                "some weights start so large that what they are added to is lost"
                if drowns
                else "some layers start so large that what follows them is saturated: a softmax, a "
                "sigmoid or tanh",
                ("initialise with torch.nn.init.xavier_uniform_, or divide what goes into the "
                 "softmax of an attention by the root of its width",),
                0.9 if drowns else 0.65,
                "warning",
                layers=[la.name for la, a in zip(layers, amplify, strict=True) if a],
                seen=Measure("largest gain", float(gains[amplify].max()), threshold=self.large),
            )  # fmt: skip
        biases = np.flatnonzero(run.dimensions == 1)
        sizes = run.probes.weight_rms[0, biases]
        off = [i for i in biases[:-1][sizes[:-1] > self.bias]
               if not run.layers[i].module.endswith("Norm")]  # fmt: skip
        if off:
            yield self._finding(
                "biases start so far from 0 that their units are shut or saturated whatever "
                "comes in",
                ("initialise biases with zeros",),
                (self.shut if any(site.is_dead for site in run.sites) else 0.7) * scale,
                severity,
                layers=[run.layers[i].name for i in off],
                seen=Measure("largest root mean square of a bias", float(np.nanmax(sizes)),
                             threshold=self.bias),
            )  # fmt: skip

    def _of_embeddings(self, case: Case) -> Iterator[Finding]:
        run = case.run
        for i in run.embeddings:
            std = float(run.probes.first_std[i])
            if self.small_embedding <= std <= self.large_embedding:
                continue
            yield self._finding(
                f"an embedding starts with a deviation of {std:.2g}: "
                + ("its units are saturated" if std > 1 else "its rows can hardly be told apart"),
                ("initialise it with torch.nn.init.normal_(weight, std=0.02 ... 1)",),
                0.4 if case.is_well else 0.93,
                "info" if case.is_well else "error",
                [run.layers[i].name],
                Measure(
                    "deviation", std,
                    threshold=self.large_embedding if std > 1 else self.small_embedding,
                ),
            )  # fmt: skip

    def _finding(
        self,
        text: str,
        remedy: tuple[str, ...],
        confidence: float,
        severity: str,
        layers: list[str],
        seen: Measure,
    ) -> Finding:
        return Finding(
            "bad-initialization", severity, confidence, text, remedy, (seen,), SOURCE,  # type: ignore[arg-type]
            tuple(layers), (1,),
        )  # fmt: skip


@dataclass(frozen=True)
class FirstLoss(Rule):
    """A first loss far above that of a guess: the model starts sure of wrong answers."""

    codes = ("bad-initialization",)
    needs = ("loss", "outputs", "targets")

    above: float = 5.0
    """First loss over that of a guess. It should be about 1: ln C for C classes (Karpathy 2019)."""

    far_above: float = 10.0
    """The same from which it is worth a warning where `left` of a guess's loss is left."""

    left: float = 0.3
    """Share of a guess's loss, at least."""

    def judge(self, case: Case) -> Iterator[Finding]:
        loss, chance, task = case.run.loss, case.task.chance, case.task
        if loss is None or not len(loss) or chance is None or chance < 0.3:
            return
        if task.kind not in ("classes", "binary") or loss.steps[0] > 0:
            return
        unsure = np.log(task.n_classes or 2) * (task.loss.factor if task.loss is not None else 1.0)
        ratio = float(loss.values[0] / max(chance, unsure))  # what is rare is not known at first
        is_hampered = case.left is not None and case.left > self.left
        if case.is_well and not (ratio > self.far_above and is_hampered):
            return
        if ratio > self.above and np.isfinite(ratio):
            yield Finding(
                "bad-initialization",
                "warning" if case.is_well else "error",
                0.7 if case.is_well else 0.85,
                f"the first loss is {ratio:.2g} times what a guess scores: the outputs start far "
                "too large, and the first steps go into making them small",
                (
                    "initialise the last layer with a smaller gain, or with zeros",
                    "check the scale of the inputs",
                ),
                (Measure("first loss over a guess", ratio, threshold=self.above),),
                "Karpathy 2019, A Recipe for Training Neural Networks, 'verify loss @ init'",
                steps=(1,),
            )
