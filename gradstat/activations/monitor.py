"""`ActivationMonitor`: the activations of a model's sampled steps."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gradstat._capture import is_capturing
from gradstat._warnings import warn_user
from gradstat.activations.table import ActivationTable
from gradstat.activations.watch import (
    Watcher,
    calls_under_way,
    in_backward,
    is_compiled,
    is_fused,
)
from gradstat.activations.windows import Call, Windows
from gradstat.errors import ArgumentTypeError, ArgumentValueError, GradstatError


class ActivationMonitor:
    """Counts dead and saturated units of a model's activations on every n-th step.

    Finds ``nn.ReLU`` and the like, and calls such as ``F.gelu(x)`` or ``x.tanh()``, and names each
    by the module that called it: ``encoder.2/relu#0``, the number telling apart the calls within
    one forward pass. What is seen, and what is not, stands in docs/activations.md.

    A step is a call of the model, until `step` is called for the first time: from then on `step`
    counts them, and of the calls of a sampled step all those that record gradients are watched.
    With ``gradstat.attach(..., activations=True)`` each step of the optimizer calls it.

    On other steps a call of the model costs a test of one integer, and nothing where `step` counts
    them: there are no hooks on the model then. Nothing of a run is changed, no activation is kept,
    and what goes wrong ends in one warning. A copy (`copy.deepcopy`, pickle)
    keeps its table and watches nothing.

    Memory on the activations' device: 48 bytes for each unit and 192 for each site; from the first
    table that is read on, as much on the host.

    Args:
        model: The model; of one inside of `DataParallel` and the like the inner one is watched.
        every: Steps from one sampled step to the next; the first is sampled.
        window: Sampled steps that a table covers: at least half of them, at most all.
        unit_dim: The dimension of units in every activation. `None`: where the layer that made the
            input has its own, features after ``linear`` and channels after a convolution.
        attention: Also count attention probabilities. Those of torch's own attention functions are
            computed once more, in full.

    Raises:
        ArgumentTypeError: An argument has the wrong type.
        ArgumentValueError: An argument has a value that does not fit.

    Example:
        >>> with gradstat.ActivationMonitor(model, every=10) as monitor:
        ...     train(model)
        >>> print(monitor.table())
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 10,
        *,
        window: int = 20,
        unit_dim: int | None = None,
        attention: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}; for one tensor use "
                "gradstat.activation_stats(x)"
            )
        for name, number in (("every", every), ("window", window)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ArgumentValueError(
                    f"{name} must be a whole number of at least 1, got {number!r}; use {name}=1 or "
                    "more"
                )
        if unit_dim is not None and (not isinstance(unit_dim, int) or isinstance(unit_dim, bool)):
            raise ArgumentTypeError(
                f"unit_dim must be an int or None, got {type(unit_dim).__name__}; leave it out for "
                "the dimension of each layer"
            )
        self._every = every
        self._unit_dim = unit_dim
        self._attention = attention
        self._windows = Windows(window)
        self._counts_calls = True
        self._wait = 0  # steps until the next sampled one
        self._steps = 0
        self._local = threading.local()
        self._busy = threading.Lock()
        self._has_ended = False
        self._has_run = False  # of the hooks: those that were compiled never do, and stay on
        model = _inner(model)
        if isinstance(model, torch.jit.ScriptModule):
            raise ArgumentTypeError(
                f"model must be a module that runs in Python, got {type(model).__name__}, in whose "
                "calls nothing is seen; watch a plain module that calls it, or no activations"
            )
        if is_compiled(model):
            warn_user(
                "gradstat sees no activation of a model that is compiled as a whole; compile its "
                "parts instead, and the activations between them are seen"
            )
        self._model: Callable[[], nn.Module | None] = weakref.ref(model)
        self._handles: list[RemovableHandle] = []
        self._put_on()

    # ---- what the training script calls ----------------------------------------------------------

    @property
    def every(self) -> int:
        """Steps from one sampled step to the next."""
        return self._every

    @property
    def steps(self) -> int:
        """Finished steps."""
        return self._steps

    def table(self) -> ActivationTable:
        """Return the counts over the window, one row a site, in the order of the first calls.

        Does not synchronise; the first number that is read does.
        """
        return self._windows.table()

    def step(self) -> None:
        """Count a step; calls of the model are not counted any more. Does not synchronise."""
        if self.only_counts_step():
            return
        if getattr(self._local, "watcher", None) is not None:
            self._end_interrupted()
        if self._counts_calls:
            self.count_steps()
        self._tick()
        if self._wait:
            if self._handles and self._has_run:
                self._take_off()
        elif not self._handles and not self._has_ended:
            self._put_on()

    def only_counts_step(self) -> bool:
        """Count a step if nothing is on the model, nor will be in the next; return whether."""
        if self._wait <= 1 or self._handles or self._counts_calls:
            return False
        self._steps += 1
        self._wait -= 1
        return True

    def count_steps(self) -> None:
        """Let steps be what `step` counts, from the one under way. Does not synchronise."""
        if self._counts_calls:
            self._counts_calls = False
            self._wait = self._steps = 0

    def remove(self) -> None:
        """Stop watching and take the hooks off the model; the table stays. Does not synchronise."""
        self._has_ended = True
        self._end_interrupted()
        self._take_off()

    def __enter__(self) -> ActivationMonitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "_has_ended": True,
            "_handles": [],
            "_local": None,
            "_busy": None,
            "_model": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_local": threading.local(), "_busy": threading.Lock()}

    def __repr__(self) -> str:
        return f"ActivationMonitor(every={self._every}, steps={self._steps})"

    # ---- around a call of the model --------------------------------------------------------------

    def _before(self, model: nn.Module) -> None:
        if self._wait:
            return
        self._has_run = True
        try:
            self._begin(model)
        except Exception as error:  # a run that is only watched must go on
            self._fail(error)

    def _after(self, model: nn.Module) -> None:
        watcher = getattr(self._local, "watcher", None)
        if watcher is not None:
            if watcher.depth:
                watcher.depth -= 1
                return
            self._end()
        if self._has_ended or (self._wait and not self._counts_calls):
            if sys.exc_info()[0] is None:  # else torch is in a loop over the hooks
                self._take_off()
        elif self._counts_calls and not in_backward():
            self._tick()

    def _begin(self, model: nn.Module) -> None:
        watcher = getattr(self._local, "watcher", None)
        if watcher is not None:
            if calls_under_way(watcher.model) > 1:
                watcher.depth += 1
                return
            self._end()  # its call was interrupted
        if (
            self._has_ended
            or in_backward()
            or is_compiled(model)
            or is_fused(model)
            or _is_recorded()
            or not (self._counts_calls or torch.is_grad_enabled())
        ):
            return
        # Replicas of data parallelism are called side by side; of one model, one call is watched.
        if not _is_replica(model) and not self._busy.acquire(blocking=False):
            return
        self._local.watcher = watcher = Watcher(
            model,
            self._count,
            self._fail,
            unit_dim=self._unit_dim,
            attention=self._attention,
        )
        watcher.start()

    def _end(self) -> None:
        watcher = self._local.watcher
        self._local.watcher = None
        watcher.stop()
        if not _is_replica(watcher.model):
            self._busy.release()

    def _tick(self) -> None:
        self._steps += 1
        self._wait = self._wait - 1 if self._wait else self._every - 1

    def _count(self, call: Call) -> None:
        if torch.is_inference_mode_enabled() or torch._C._len_torch_dispatch_stack():
            # The windows outlive inference mode; and modes that trace or cache see nothing of this.
            with (
                torch.inference_mode(False),
                torch.utils._python_dispatch._disable_current_modes(),
                torch.no_grad(),
            ):
                self._windows.add(self._steps, call)
            return
        was_enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # a tenth of the time of the context manager
        try:
            self._windows.add(self._steps, call)
        finally:
            torch._C._set_grad_enabled(was_enabled)

    def _fail(self, error: Exception) -> None:
        self._has_ended = True
        warn_user(
            f"gradstat stops watching activations: {error}. Training goes on; "
            "ActivationMonitor.remove() before it silences this"
        )

    def _end_interrupted(self) -> None:
        """End the watching of a call that has ended without its hook, as on `KeyboardInterrupt`."""
        watcher = getattr(self._local, "watcher", None)
        if watcher is not None and not calls_under_way(watcher.model):
            self._end()

    def _put_on(self) -> None:
        model = self._model()
        if model is not None:
            self._has_run = False
            self._handles = [
                model.register_forward_pre_hook(_Hook(self._before)),
                # Of two monitors the one that began last ends first.
                model.register_forward_hook(_Hook(self._after), prepend=True, always_call=True),
            ]

    def _take_off(self) -> None:
        if getattr(self._local, "watcher", None) is not None or self._busy.locked():
            return  # the end of the watched call, in this thread or another, comes back here
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Hook:
    """A hook of the model; a copy of it, as in a copied or saved model, does nothing."""

    def __init__(self, function: Callable[[nn.Module], None]) -> None:
        self._function = function

    def __call__(self, model: nn.Module, *_: Any) -> None:
        """Run it, outside of a compiled model."""
        if not torch.compiler.is_compiling():
            self._function(model)

    @property
    def __name__(self) -> str:
        """Asked for by nobody but `torch.jit.script`, which cannot take a hook of Python."""
        raise _UnscriptableError(
            "a model must not be watched when torch.jit.script takes it, got one whose activations "
            "are counted; script it before gradstat.attach, or end the watching first: "
            "optimizer.gradstat.activations.remove()"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class _UnscriptableError(GradstatError, AttributeError):
    """An `AttributeError`, so that those who ask for a name with a default get the default."""


def _inner(model: nn.Module) -> nn.Module:
    """Return the model inside of wrappers, which is the one whose call the replicas share."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    return model


def runs_in_python(model: nn.Module) -> bool:
    """Whether a call of a model can be watched: it is neither compiled as a whole nor scripted."""
    model = _inner(model)
    return not (is_compiled(model) or isinstance(model, torch.jit.ScriptModule))


def _is_replica(model: nn.Module) -> bool:
    return bool(vars(model).get("_is_replica", False))


def _is_recorded() -> bool:
    """Whether a CUDA graph is captured, whose replays would count again and again, or a trace."""
    return torch._C._get_tracing_state() is not None or is_capturing()
