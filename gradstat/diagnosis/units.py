"""Rules on activations: units that are dead or saturated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gradstat.diagnosis.evidence import ABS_MAX
from gradstat.diagnosis.finding import Finding, Measure
from gradstat.diagnosis.rule import Case, Rule


@dataclass(frozen=True)
class DeadUnits(Rule):
    """Units that are zero for every sample of the window."""

    codes = ("dead-units",)
    needs = ("steps",)

    share: float = 0.5
    """Share of a layer's units that are dead. Never zero for most samples, but zero for all: a unit
    that fires now and then learns (Lu et al. 2019, 1903.06733)."""

    cut: float = 0.5
    """Share of the weights that never get a gradient, from which a dead layer cuts inputs off."""

    fall: float = 0.3
    """Share of the loss that is gained, from which a layer that is dead in part is no matter."""

    most: float = 0.9
    """Share of all units, from which dead ones matter though the few that are left learn."""

    left: float = 0.5
    """Share of a guess's loss that is left then, at least."""

    alive: float = 1e-6
    """Gradient over weight, root mean squares, in the first step, from which a gradient that is 0
    later has died, and has not faded on its way."""

    def judge(self, case: Case) -> Iterator[Finding]:
        run = case.run
        if case.is_unfed:
            return
        # What a softmax leaves out is not dead: it is shut by the others.
        sites = [site for site in run.sites if site.units and site.kind != "softmax"]
        dead = [site for site in sites if site.dead_units > self.share * site.units]
        if dead:
            falls = case.loss is not None and case.is_settled and case.loss.fall > self.fall
            share = sum(s.dead_units for s in sites) / sum(s.units for s in sites)
            is_hampered = share > self.most and case.left is not None and case.left > self.left
            if falls and not is_hampered and not any(s.is_dead for s in dead):
                return
            yield self._finding(
                tuple(s.name for s in dead),
                Measure("dead units", max(s.dead_units / s.units for s in dead), "of a layer",
                        threshold=self.share),
                (0.75 if case.growth < -3 else 0.93)
                if share > 0.3 or any(s.is_dead for s in dead)
                else 0.6,
                is_harmless=bool(case.learns) and not is_hampered and not self._is_cut(case),
            )  # fmt: skip
            return
        silent = self._without_gradient(case)
        if silent and (not sites or len(silent) == len(run.matrices)):
            yield self._finding(
                silent, Measure("layers without any gradient", len(silent)), 0.7,
                is_harmless=bool(case.learns),
            )  # fmt: skip

    def _is_cut(self, case: Case) -> bool:
        """Whether a whole layer was dead from the first step on and nothing tells what that costs.

        A loss falls as soon as what comes after it gives the targets' mean. What the layer cuts off
        has no gradient.
        """
        run = case.run
        first = {site.name for site in run.first_sites if site.is_dead}
        if case.has_scale or not any(site.is_dead and site.name in first for site in run.sites):
            return False
        largest = run.probes.gradients[:, run.matrices, ABS_MAX]
        return bool((largest == 0).all(0).mean() >= self.cut)

    def _without_gradient(self, case: Case) -> tuple[str, ...]:
        """Return weights whose gradients have become exactly zero, before one that lives."""
        run = case.run
        if len(run.matrices) < 2 or len(run.probes.steps) < 4:
            return ()
        largest = run.probes.gradients[..., ABS_MAX][case.late_probes]
        is_silent = (largest == 0).all(0)
        if run.sites:  # none is dead: they died after steps that the window holds
            is_silent &= run.probes.gradient_rms[0] > self.alive * run.probes.weight_rms[0]
        names = [run.layers[i].name for i in run.matrices if is_silent[i]]
        if case.forgets_at_once and all("weight_hh" in name for name in names):
            return ()  # no unit is dead
        lives = bool((largest[:, run.matrices[-1] :] > 0).any())
        return tuple(names) if lives else ()

    def _finding(
        self, layers: tuple[str, ...], seen: Measure, confidence: float, *, is_harmless: bool
    ) -> Finding:
        return Finding(
            "dead-units",
            "info" if is_harmless else "error",
            0.4 * confidence if is_harmless else confidence,
            "units give zero for every sample, so no gradient reaches the weights before them",
            (
                "lower lr: one large step can push biases below zero for good",
                "use LeakyReLU or GELU",
                "initialise with kaiming_normal_ and biases of 0; add normalisation layers",
            ),
            (seen,),
            "Lu et al. 2019, 1903.06733",
            layers,
        )


@dataclass(frozen=True)
class Saturated(Rule):
    """Units at the flat ends of sigmoid or tanh, or a softmax that begins with a single one."""

    codes = ("saturated-activation",)
    needs = ("activations",)

    share: float = 0.5
    """Share of a layer's outputs at the ends; at y = 0.99 the derivative of sigmoid is 0.01."""

    good: float = 0.9
    """Skill from which it does no harm."""

    def judge(self, case: Case) -> Iterator[Finding]:
        kinds = ("sigmoid", "tanh", "hardtanh", "hardsigmoid", "softsign")
        sites = [s for s in case.run.sites[:-1] if s.kind in kinds]  # the last may be the output
        n_outputs = {b.shapes["outputs"][-1:] for b in case.run.batches if "outputs" in b.shapes}
        attended = {
            site.name
            for i, site in enumerate(case.run.first_sites, 1)
            if site.kind == "softmax"
            and site.saturated_fraction > self.share
            and (i < len(case.run.first_sites) or (n_outputs and (site.units,) not in n_outputs))
        }
        sites += [s for s in case.run.sites if s.name in attended]
        flat = [s for s in sites if s.saturated_fraction > self.share]
        began_so = bool(attended) or any(
            site.saturated_fraction > self.share
            for site in case.run.first_sites[:-1]
            if site.kind in kinds
        )
        if not flat or (case.skill is not None and case.skill > self.good):
            return
        yield Finding(
            "saturated-activation",
            "error" if len(flat) > len(sites) / 2 and not case.learns else "warning",
            0.93 if began_so and not case.learns else 0.65,
            "most outputs lie at the flat ends of their activation, where hardly any gradient "
            "passes",
            (
                "scale inputs and initial weights down",
                "add normalisation layers, or use ReLU or GELU",
                *(["divide what goes into the softmax by the root of its width"] * bool(attended)),
            ),
            (Measure("saturated outputs", max(s.saturated_fraction for s in flat), "of a layer",
                     threshold=self.share),),
            "Glorot and Bengio 2010",
            tuple(s.name for s in flat),
        )  # fmt: skip
