"""The seam: hooks that measure, clip and skip around an optimizer's own step.

The order of a step: torch calls `Seam.before_step`, which reads the gradients once, scales them
where the policy says so, and keeps the step from happening where it must not; torch steps; then
`Seam.after_step` gives back what was borrowed and counts the step. With a closure the gradients are
read after each call of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradstat import _kernels
from gradstat._accumulation import Accumulation
from gradstat._alarms import Alarms
from gradstat._capture import is_capturing
from gradstat._loan import Held, Loan
from gradstat._loss_scale import OverflowCount, amp_scalar, is_fused, makes_momentum
from gradstat._probes import Probes
from gradstat._recorder import Histogram, Recorder
from gradstat._rounds import Rounds
from gradstat._stack import steps_under_way
from gradstat._warnings import warn_user
from gradstat._watched import Watched
from gradstat.activations import ActivationMonitor
from gradstat.clipping.clipper import Clipper
from gradstat.columns import INFS, NANS
from gradstat.errors import NonFiniteNormError
from gradstat.monitor import Monitor

CallableT = TypeVar("CallableT", bound=Callable[..., Any])
T = TypeVar("T")

STATE_KEY = "gradstat"
KERNEL_RULE = {
    "skip": _kernels.Nonfinite.SKIP,
    "zero": _kernels.Nonfinite.ZERO,
    "raise": _kernels.Nonfinite.KEEP,
    "propagate": _kernels.Nonfinite.KEEP,
}
"""What the kernel is told for each ``on_nonfinite``."""


class Seam:
    """The hooks of one optimizer."""

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        watched: Watched,
        clipper: Clipper,
        recorder: Recorder,
        probes: Probes,
        overflows: OverflowCount,
        on_nonfinite: str,
        activations: ActivationMonitor | None,
        rounds: Rounds,
    ) -> None:
        self.watched = watched
        self._accumulation = accumulation = Accumulation()
        self.alarms = Alarms()
        self.monitor = Monitor(
            weakref.ref(optimizer),
            watched,
            clipper,
            recorder,
            probes,
            overflows,
            accumulation,
            activations,
            rounds,
        )
        self._activations = activations
        self._clipper = clipper
        self._recorder = recorder
        self._probes = probes
        self._overflows = overflows
        self._on_nonfinite = on_nonfinite
        self._only_watches = clipper.policy is None and on_nonfinite == "propagate"
        self._loan = Loan()
        self._parameters: list[Tensor] = []
        self._found_inf: Tensor | None = None
        self._skipped: bool | None = False
        self._is_stepping = False
        self._has_nested = False
        self._has_only_measured = False
        self._is_refused = False
        self._is_phantom = False
        self._has_failed = False
        self._saved: dict[str, Any] | None = None
        # Nobody can trace into the kernels: a compiled step calls these as they are. Not bound, or
        # the cycle would keep the model's memory until the garbage collector comes by.
        self._before_untraced = _untraced(Seam.before_step)
        self._after_untraced = _untraced(Seam.after_step)
        after = optimizer.register_step_post_hook(self.after_step)
        # Before the hooks of others: they find gradients as they would without gradstat.
        optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
        self._handles = [
            optimizer.register_step_pre_hook(self.before_step),
            after,
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]

    def remove(self) -> None:
        """Take the hooks off, and give back what a step that raised may have left."""
        self._loan.give_back()
        self._accumulation.stop()
        for handle in self._handles:
            handle.remove()
        if self._activations is not None:
            self._activations.remove()
        if self.monitor.log is not None:
            self.monitor.log.close()

    def skip_nonfinite(self) -> None:
        """Skip steps with a NaN or Inf from now on, where nothing else was asked for them."""
        if self._on_nonfinite == "propagate":
            self._on_nonfinite = "skip"
            self._clipper.skip_nonfinite()

    def stop_probing(self) -> None:
        """Take no probes for the diagnosis from now on."""
        self._probes.stop("probing was stopped")

    # ---- the step --------------------------------------------------------------------------------

    def before_step(
        self, optimizer: Optimizer, args: Any, kwargs: dict[str, Any], compiled: bool = False
    ) -> Any:
        """Measure now, or after the closure where there is one."""
        if torch.compiler.is_dynamo_compiling():
            return self._before_untraced(self, optimizer, args, kwargs, compiled=True)
        self._has_nested = self._is_stepping and steps_under_way(optimizer) > 1
        if self._has_nested:
            return None
        self._is_stepping = True
        if self._loan.is_out:  # the last step raised, and somebody keeps the exception
            self._loan.forget_gradients()
            self._loan.give_back()
        self._skipped = self._has_only_measured = self._is_refused = False
        self._parameters = self.watched.parameters(optimizer.param_groups)
        self._is_phantom = "closure" in kwargs and _is_phantom(optimizer, kwargs, self._parameters)
        if self._is_phantom or self._has_failed:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None and callable(closure):
            self._attempt(self._begin, optimizer)
            measured = self._measured(closure, optimizer)
            if compiled:
                measured = _untraced(measured)
            if len(args) > 1:
                args = (args[0], measured, *args[2:])
            else:
                kwargs = {**kwargs, "closure": measured}
            return (args if compiled else Held.of(args, self._loan, optimizer)), kwargs
        self._has_only_measured = self._only_measures(optimizer)
        if self._has_only_measured:
            return None
        self._attempt(self._begin_and_measure, optimizer)
        if self._loan.is_out and not compiled:
            return Held.of(args, self._loan, optimizer), kwargs
        return None

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Give back what was borrowed and count the step."""
        if torch.compiler.is_dynamo_compiling():
            self._after_untraced(self, optimizer, args, kwargs)
            return
        if self._has_nested and steps_under_way(optimizer) > 1:
            return
        self._is_stepping = self._has_nested = False
        if self._loan.is_out:
            self._loan.end_step()
        if self._is_phantom:
            return
        self._recorder.step += 1
        parameters, self._parameters = self._parameters, []
        if not self._only_counts():
            self._attempt(self._look_back, parameters)
        self.monitor.end_step()

    def _only_measures(self, optimizer: Optimizer) -> bool:
        """Measure the gradients if nothing else is due in this step; return whether that was done.

        Most steps of a run that is only watched are such ones, and small: what they cost is the
        Python around them. Where the gradients are refused, or measuring them fails,
        `_begin_and_measure` comes next: what it meets, it reports.
        """
        recorder, clipper = self._recorder, self._clipper
        if (
            not self._only_watches
            or clipper.acts
            or self._accumulation.is_following
            or recorder.wants_weights
            or self._probes.under_way is not None
            or self._probes.is_due(recorder.step + 1)
            or getattr(optimizer, "found_inf", None) is not None
        ):
            return False
        try:
            recorder.begin(())
            if recorder.is_recording:
                self._is_refused = not self._measures(optimizer)
        except Exception:
            return False
        return not self._is_refused

    def _begin(self, optimizer: Optimizer) -> None:
        if self._accumulation.is_following:
            self._accumulation.look()
        self._recorder.begin(self._parameters)
        step = self._recorder.step + 1
        # The replays of a captured graph would write into one probe again and again.
        if self._probes.is_due(step) and not is_capturing():
            names = self.watched.names
            self._probes.begin(step, names, self._parameters, optimizer.param_groups)
            if self.watched.model is not None:
                self.watched.others.note(self.watched.model, optimizer.param_groups)

    def _begin_and_measure(self, optimizer: Optimizer) -> None:
        self._begin(optimizer)
        self._measure_and_clip(optimizer)

    def _measured(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        def measured_closure() -> Any:
            self._loan.give_back()
            loss = closure()
            self._attempt(self._measure_and_clip, optimizer)
            return loss

        return measured_closure

    def _only_counts(self) -> bool:
        """Count the step for the activations if nothing else is to do after it; return whether."""
        step, activations = self._recorder.step, self._activations
        if (
            not self._has_only_measured
            or step >= self.alarms.next_look
            or self._accumulation.is_due(step)
            or self._overflows.scaler is not None
        ):
            return False
        return activations is None or activations.only_counts_step()

    def _look_back(self, parameters: list[Tensor]) -> None:
        """Measure what the step has done."""
        recorder = self._recorder
        if self._overflows.scaler is not None:
            self._overflows.look()
        if recorder.wants_updates:
            recorder.finish(parameters)
        if self._probes.under_way is not None:
            self._probes.finish(parameters)
        if self._accumulation.is_due(recorder.step):
            self._accumulation.follow(parameters)
        if self._activations is not None:
            self._activations.step()
        if self._clipper.may_skip:
            self.alarms.look_at_skips(recorder.step, self._skipped, self._clipper.state)
        window = recorder.window
        is_due = recorder.is_recording and recorder.step >= self.alarms.next_look
        if is_due and window is not None and window.steps:
            first = self.alarms.look_at_norms(window)
            recorder.first_nonfinite = recorder.first_nonfinite or first

    def _attempt(self, action: Callable[[T], None], argument: T) -> None:
        """Do something, and give up watching rather than stop a run that is only watched."""
        if self._has_failed:
            return
        was_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # a tenth of the time of the context manager
        try:
            action(argument)
        except Exception as error:
            if not self._only_watches:
                raise
            self._has_failed = True
            warn_user(
                f"gradstat stops watching this optimizer: {error}. Training goes on; "
                "gradstat.detach(optimizer) silences this"
            )
        finally:
            torch._C._set_grad_enabled(was_enabled)

    def _measure_and_clip(self, optimizer: Optimizer) -> None:
        """Measure these gradients and do with them what the policy says."""
        recorder, clipper, parameters = self._recorder, self._clipper, self._parameters
        overflow = grad_scale = None
        if getattr(optimizer, "found_inf", None) is not None:
            overflow = amp_scalar(optimizer, "found_inf")
        if overflow is not None:
            self._overflows.heard(overflow)
        is_probed = self._probes.under_way is not None
        is_looked_at = recorder.is_recording or is_probed
        only_measures = self._only_watches and not clipper.acts
        if only_measures and not is_looked_at:
            return
        if only_measures and not self._is_refused and self._measures(optimizer):
            return
        batch = _kernels.gather(parameters, take_grad=True, name_of=self._name_of)
        if batch.is_empty:
            self.alarms.no_gradients()
            return
        device = batch.device
        if recorder.bind(self.watched.names, device):
            clipper.bind(self.watched.names, device)
        table, out = recorder.rows()
        is_host = _is_host(device)
        if getattr(optimizer, "grad_scale", None) is not None:
            grad_scale = amp_scalar(optimizer, "grad_scale", device)
        found_inf = None if is_host else self._found_inf_for(optimizer, device)
        bins = clipper.measure(
            batch,
            table,
            out,
            grad_scale=grad_scale,
            found_inf=found_inf,
            histogram=recorder.wants_histogram,
        )
        if bins is not None:
            recorder.histogram = Histogram(bins, grad_scale)
        recorder.keep()
        if grad_scale is not None and (is_looked_at or clipper.has_rest):
            recorder.unscale(table, grad_scale)
        if is_probed:
            self._probes.put_gradients(table, parameters)
        if only_measures:
            return
        may_stop = clipper.may_skip or self._on_nonfinite == "raise"
        if found_inf is not None:
            self._skipped = None
            self._loan.lend_found_inf(optimizer, found_inf)
        elif is_host or may_stop:
            decision = out.tolist()  # waits for a CUDA device
            if decision[_kernels.OUT_SKIP]:
                self._skipped = True
                self._loan.set_aside(optimizer)
                return
            if not decision[_kernels.OUT_FINITE]:
                self._meet_nonfinite(batch, table, decision[_kernels.OUT_NORM], overflow)
        if self._on_nonfinite == "zero" and not is_host:
            _zero_nonfinite(batch)
        clipper.apply(batch, out, self._name_of)
        if clipper.has_rest:
            clipper.apply_rest(batch, table, parameters, self._name_of, grad_scale)

    def _measures(self, optimizer: Optimizer) -> bool:
        """Measure these gradients at once, as can be done in most steps; return whether it was."""
        recorder = self._recorder
        if (
            (recorder.histogram_every is not None and recorder.wants_histogram)
            or getattr(optimizer, "grad_scale", None) is not None
            or not recorder.measure(self._parameters, self.watched.names, self._clipper.program)
        ):
            return False
        if self._probes.under_way is not None and recorder.window is not None:
            window = recorder.window
            self._probes.put_gradients(window.tables[window.newest], self._parameters)
        return True

    def _found_inf_for(self, optimizer: Optimizer, device: torch.device) -> Tensor | None:
        """Return where the kernel is to say that the step is skipped, if the step looks there."""
        if (
            not self._clipper.may_skip
            or self._on_nonfinite == "raise"
            or not is_fused(optimizer)
            or makes_momentum(optimizer)
        ):
            return None
        if self._found_inf is None or self._found_inf.device != device:
            self._found_inf = torch.zeros((), dtype=torch.float32, device=device)
        return self._found_inf

    def _meet_nonfinite(
        self, batch: _kernels.Batch, table: Tensor, norm: float, overflow: Tensor | None
    ) -> None:
        if self._on_nonfinite == "zero":
            _zero_nonfinite(batch)
        # An overflow under loss scaling is in the nature of it: the scaler drops the step.
        if self._on_nonfinite == "raise" and not (overflow is not None and overflow.item() > 0):
            raise NonFiniteNormError(
                f'gradients must be finite with on_nonfinite="raise", got a total norm of {norm} '
                f"at step {self._recorder.step + 1}, with NaN or Inf in {self._bad_layers(table)}; "
                "nothing was changed. Skip the step, or look at optimizer.gradstat.last"
            )

    def _bad_layers(self, table: Tensor) -> str:
        bad = table[:-1, NANS : INFS + 1].nan_to_num().sum(1).nonzero()
        names = [self.watched.names[index] for index in bad.flatten().tolist()]
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    def _name_of(self, index: int) -> str:
        return repr(self.watched.names[index])

    # ---- checkpoints -----------------------------------------------------------------------------

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        del optimizer
        state_dict[STATE_KEY] = self.monitor.state_dict()

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        del optimizer
        self._saved = state_dict.get(STATE_KEY)

    def _after_load(self, optimizer: Optimizer) -> None:
        saved, self._saved = self._saved, None
        if saved is None:
            return
        parameters = self.watched.parameters(optimizer.param_groups)
        if self._recorder.window is None and parameters:
            # The first gradients move it if they lie elsewhere.
            device = parameters[0].device
            self._recorder.bind(self.watched.names, device)
            self._clipper.bind(self.watched.names, device)
        self.monitor.load_state_dict(saved)


def _is_host(device: torch.device) -> bool:
    """Whether a decision on this device can be read without waiting."""
    return device.type == "cpu"


def _untraced(function: CallableT) -> CallableT:
    untraced: CallableT = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return untraced


def _zero_nonfinite(batch: _kernels.Batch) -> None:
    for tensor in batch.tensors():
        if tensor.layout is torch.strided:
            tensor.nan_to_num_(0.0, 0.0, 0.0)
        elif tensor.layout is torch.sparse_coo:
            tensor._values().nan_to_num_(0.0, 0.0, 0.0)
        else:
            tensor.values().nan_to_num_(0.0, 0.0, 0.0)


def _is_phantom(optimizer: Optimizer, kwargs: dict[str, Any], parameters: Sequence[Tensor]) -> bool:
    """Whether this is the step by which distributed checkpointing makes an optimizer's state.

    torch.distributed.checkpoint.state_dict calls ``step(closure=None)`` once on an optimizer
    without state, with gradients of zeros and a lr of 0 on the host. Without that keyword nothing
    else is asked: a step of an ordinary loop does not get as far as looking at its gradients.
    """
    if kwargs["closure"] is not None or optimizer.state:
        return False
    for group in optimizer.param_groups:
        lr = group.get("lr", 0.0)
        if (isinstance(lr, Tensor) and lr.device.type != "cpu") or float(lr) != 0:
            return False
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return bool(gradients) and not any(bool(gradient.any()) for gradient in gradients)
