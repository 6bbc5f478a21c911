"""`Monitor`: what is known of a training run, for those who look at it."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

from torch.optim import Optimizer

from gradstat import _checkpoint
from gradstat._accumulation import Accumulation
from gradstat._dead_units import DeadUnits, dead_units_of
from gradstat._evidence import (
    BatchArrays,
    Facts,
    Layers,
    ProbeArrays,
    curve_of,
    facts_of,
    sites_of,
)
from gradstat._loss_scale import OverflowCount
from gradstat._observations import Observation, Observations
from gradstat._probes import Probes
from gradstat._readings import Readings
from gradstat._recorder import Recorder
from gradstat._rounds import Rounds
from gradstat._watched import Watched
from gradstat.activations import ActivationMonitor, ActivationTable
from gradstat.clipping.clipper import Clipper
from gradstat.diagnosis import RULES, Finding, Rule, coverage, diagnose
from gradstat.diagnosis.evidence import Evidence, Site
from gradstat.errors import ArgumentTypeError, ArgumentValueError

if TYPE_CHECKING:
    from gradstat.report import Report
    from gradstat.runlog import RunLog

CallableT = TypeVar("CallableT", bound=Callable[..., Any])


class Monitor(Readings):
    """What is known of a training run; made by `attach`, found at ``optimizer.gradstat``.

    Memory is bounded, however long the run. A table is ``(parameters + 1) * 12 * 8`` bytes, on the
    device of the gradients; 48 KB for 500 parameters. There are ``window`` of them for gradients,
    and as many again for ``weights`` and for ``updates`` each. Diagnosis keeps up to 40 probed
    steps of three tables, four where a parameter has more than 65536 elements, and from the first
    diagnosis on as much again on the host. ``updates`` holds a copy of the parameters during a
    recorded step, and a probe up to 65536 elements of each. What `observe` and `ActivationMonitor`
    keep is said there.

    Numbers and arrays are read from the device: their properties wait for a CUDA device, and no
    step does. A copy (`copy.deepcopy`, pickle) keeps what is known now and follows no optimizer.
    """

    def __init__(
        self,
        optimizer: Callable[[], Optimizer | None],
        watched: Watched,
        clipper: Clipper,
        recorder: Recorder,
        probes: Probes,
        overflows: OverflowCount,
        accumulation: Accumulation,
        activations: ActivationMonitor | None,
        rounds: Rounds,
    ) -> None:
        super().__init__(clipper, recorder, overflows)
        self._rounds = rounds
        self._source: Callable[[], Optimizer | None] | Facts = optimizer
        self._watched = watched
        self._accumulation = accumulation
        self._activations = activations
        self._first_activations: ActivationTable | tuple[Site, ...] = ()
        self._probes = probes
        self._arrays = ProbeArrays()
        self._batches = BatchArrays()
        self._layers = Layers()
        self._observations = Observations(recorder.length)
        self._callbacks: list[Callable[[Monitor], Any]] = []

        self.rules: Sequence[Rule] = RULES
        """What `diagnose` and `coverage` judge by, also while training; put others in its place."""

        self.log: RunLog | None = None
        """The run log, where `attach` was asked for one."""

    # ---- activations -----------------------------------------------------------------------------

    @property
    def activations(self) -> ActivationMonitor | None:
        """The activations of sampled steps; `None` unless `attach` was asked for them."""
        return self._activations

    @property
    def dead_units(self) -> list[DeadUnits]:
        """Dead units of each activation, beside the dead rows of the weight that makes them.

        Empty before the first sampled step.

        Raises:
            ArgumentValueError: `attach` was not asked for ``activations``.
        """
        if self._activations is None:
            raise ArgumentValueError(
                "activations must be asked for to be counted; use gradstat.attach(optimizer, "
                "model, activations=True)"
            )
        rows = dict(zip(self.names, self.dead_rows.tolist(), strict=True))
        return dead_units_of(self._activations.table(), rows)

    # ---- what the training script says -----------------------------------------------------------

    def observe(self, **values: Any) -> None:
        """Take note of values of this step: ``loss``, ``outputs``, ``val_loss``, any metric.

        Args:
            **values: Numbers, or tensors of any dtype on any device. Of a tensor with several
                elements the statistics are kept, not the elements. `None` is passed over, and so is
                a tensor that cannot be read, and anything without a tensor under ``inputs``,
                ``outputs`` and ``targets``; the logger ``gradstat`` says so once for a name.

        Does not synchronise and holds no graph. Under each name the last 512 numbers are kept, and
        up to 512 spread evenly over all before. Larger tensors are looked at in probed steps alone:
        the first four and then fewer and fewer. Of ``inputs``, ``outputs`` and ``targets`` samples
        of up to 40 such steps are kept, at most 65536 elements of each tensor, and from the first
        diagnosis on the same in fp64 on the host; of another name the last ``window`` tables.

        Raises:
            ArgumentTypeError: Another value is neither a number nor a tensor; none is kept.

        Example:
            >>> optimizer.gradstat.observe(loss=loss, outputs=logits)
        """
        step = self._recorder.step
        self._observations.add(step, values, is_probed=self._probes.is_due(step + 1))

    def observed(self, name: str) -> list[Observation]:
        """Return what was observed under a name, oldest first; nothing under an unknown one."""
        return self._observations.under(name)

    def on_step(self, callback: Callable[[Monitor], Any]) -> Callable[[Monitor], Any]:
        """Call ``callback(monitor)`` after each finished step.

        It runs inside ``optimizer.step()``, after everything is put back; what it raises comes out
        there.

        Returns:
            ``callback``, so that this serves as a decorator.

        Raises:
            ArgumentTypeError: It is no function.
        """
        self._callbacks.append(_function(callback))
        return callback

    def end_step(self) -> None:
        """Run the callbacks of `on_step`, then look at the run if it is time."""
        step = self._recorder.step
        if self._activations is not None and step == 1:
            self._first_activations = self._activations.table()
        for callback in self._callbacks:
            callback(self)
        if self._rounds.is_due(step):
            self._rounds.tell(self.diagnose, step)

    # ---- diagnosis -------------------------------------------------------------------------------

    def evidence(self) -> Evidence:
        """Return all that is known of the run, on the host. Synchronises with a CUDA device."""
        facts = self._facts()
        names = self._observations.scalar_names
        fits = tuple(self._probes.names) == tuple(layer.name for layer in facts.layers)
        return Evidence(
            step=self.step,
            layers=facts.layers,
            probes=self._arrays.of(self._probes.kept if fits else (), len(facts.layers)),
            recent_steps=self.recorded_steps,
            recent_nonfinite=self._recent_nonfinite(),
            first_nonfinite=self._recorder.first_nonfinite,
            decisions=self.decisions,
            curves={name: curve_of(self._observations.scalars(name)) for name in names},
            batches=self._batches.of(self._observations.samples),
            optimizer=facts.optimizer,
            model=facts.model,
            sites=sites_of(self._activations.table()) if self._activations is not None else (),
            first_sites=self._first_sites(),
            activations_watched=self._activations is not None,
            skipped_steps=self.skipped_steps,
            accumulation_looks=self._accumulation.looks,
            accumulated_steps=self._accumulation.steps,
            unprobed=self._probes.failure,
        )

    def _first_sites(self) -> tuple[Site, ...]:
        if isinstance(self._first_activations, ActivationTable):
            self._first_activations = sites_of(self._first_activations)
        return self._first_activations

    def _facts(self) -> Facts:
        """Return what is known of optimizer and model: now, or in a copy when it was made."""
        if isinstance(self._source, Facts):
            return self._source
        optimizer = self._source()
        if optimizer is None:
            raise ArgumentValueError(
                "a monitor must be asked for a diagnosis while its optimizer exists; keep the "
                "optimizer, or a copy.deepcopy of the monitor"
            )
        return facts_of(optimizer, self._watched, self._layers)

    def diagnose(self) -> list[Finding]:
        """Return what is wrong with the run: the likeliest cause first, each before its symptoms.

        An empty list says that nothing was found, and `coverage` what could be looked for. The
        rules, their thresholds and sources: docs/diagnosis.md. Takes milliseconds on the host;
        synchronises with a CUDA device, once for each kind of table.

        Example:
            >>> for finding in optimizer.gradstat.diagnose():
            ...     print(finding)
        """
        return diagnose(self.evidence(), self.rules)

    def coverage(self) -> dict[str, str]:
        """Return for each code ``"judged"``, or what has to be observed so that it can be judged.

        Synchronises with a CUDA device.
        """
        return coverage(self.evidence(), self.rules)

    def report(self) -> Report:
        """Return the run so far as one HTML page: of its run log, else of the window in memory.

        ``monitor.report().save("run.html")`` writes it; a notebook shows it. Synchronises with a
        CUDA device. Its packages, ``gradstat[report]``, are needed once the page is asked for.
        """
        # The report stands above all that it shows; only a caller's wish leads up there.
        report: Report = importlib.import_module("gradstat.report").make_report(self)
        return report

    def on_finding(self, callback: Callable[[Finding], Any]) -> Callable[[Finding], Any]:
        """Call ``callback(finding)`` for each cause that is found while training, once for a code.

        The run is looked at after 256, 512, 1024, ... steps, or as soon after that as a look takes
        no more than a hundredth of the time since the last one (with a run log exactly then), or
        every so many steps as `attach` was asked for with ``diagnose``. New causes also go to the
        logger ``gradstat``, as warnings. What the callback raises comes out of
        ``optimizer.step()``. Does not synchronise.

        Returns:
            ``callback``, so that this serves as a decorator.

        Raises:
            ArgumentTypeError: It is no function.
        """
        self._rounds.callbacks.append(_function(callback))
        return callback

    # ---- checkpoints -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return counters, the policy's state and the window's tables, on the CPU.

        It travels in ``optimizer.state_dict()["gradstat"]``. Synchronises.
        """
        return _checkpoint.state_of(self)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` returned; tables of other parameters are left out.

        What was observed after the saved step is forgotten. Warns where the policy differs: its
        state then starts afresh.
        """
        if _checkpoint.restore(self, saved):
            self._observations.forget_since(self.step)
            self._probes.forget_after(self.step)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "_callbacks": [],
            "_source": self._facts(),
            "_arrays": ProbeArrays(),
            "_watched": None,
            "log": None,
        }

    def _repr_html_(self) -> str:
        findings = (finding._repr_html_() for finding in self.diagnose())
        table = "" if self.last is None else self.last._repr_html_()
        return "".join([f"<div>{escape(repr(self))}</div>", *findings, table])

    def __repr__(self) -> str:
        return (
            f"Monitor(step={self.step}, parameters={len(self.names)}, "
            f"clip={self._clipper.policy!r})"
        )


def _function(callback: CallableT) -> CallableT:
    if not callable(callback):
        raise ArgumentTypeError(
            f"callback must be a function, got {type(callback).__name__}; pass for example print"
        )
    return callback
