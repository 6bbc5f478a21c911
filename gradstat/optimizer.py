"""`attach` puts statistics, clipping and skipping on an optimizer, and `detach` takes them off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradstat._loss_scale import OverflowCount
from gradstat._probes import Probes
from gradstat._recorder import Recorder
from gradstat._rounds import Rounds
from gradstat._seam import KERNEL_RULE, Seam
from gradstat._stack import steps_under_way
from gradstat._watched import Filter, Watched
from gradstat.activations import ActivationMonitor
from gradstat.activations.monitor import runs_in_python
from gradstat.clipping.clipper import Clipper
from gradstat.clipping.policy import Policy
from gradstat.clipping.resolve import resolve
from gradstat.errors import ArgumentTypeError, ArgumentValueError
from gradstat.runlog import Log, RunLog

OnNonfinite = Literal["skip", "raise", "zero", "propagate"]
Clip = Policy | Sequence[Policy] | Literal["auto"] | None
OptimizerT = TypeVar("OptimizerT", bound=Optimizer)

DEFAULT_EVERY = 40
"""Steps from one to the next whose activations are counted where it was not asked for."""

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
"""What an optimizer lacks that does not call ``Optimizer.__init__``, as those around another do."""


def attach(
    optimizer: OptimizerT,
    model: torch.nn.Module | None = None,
    *,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    clip: Clip = None,
    on_nonfinite: OnNonfinite | None = None,
    every: int = 1,
    filter: Filter | None = None,
    window: int = 100,
    weights: bool = False,
    updates: bool = False,
    scaler: Any = None,
    activations: bool | Mapping[str, Any] | None = None,
    diagnose: bool | int | None = None,
    log: Log | None = None,
    log_every: int = 10,
) -> OptimizerT:
    """Return the same optimizer, which from now on measures, clips and skips as asked.

    The monitor is at ``optimizer.gradstat``. Type, identity, schedulers, `GradScaler` and
    ``state_dict`` stay as they are, but for one more key ``"gradstat"`` in the latter. Copies of
    the optimizer (`copy.deepcopy`, pickle) are plain ones; attach to them anew.

    Args:
        optimizer: Any torch optimizer. One that wraps another (SAM, Lookahead) does not skip as a
            whole: attach to the inner one. Its steps come one after the other: of several threads
            that step it at once, as in Hogwild, some are missed and gradients are mixed.
        model: Gives the parameters their names, compiled or not; without it they are those that
            the optimizer knows, or ``group0.param3``.
        named_parameters: ``(name, parameter)`` pairs to take names from instead.
        clip: A policy, a list of policies, ``"auto"``, or `None` to clip nothing.
        on_nonfinite: What a NaN or Inf in a gradient does. ``"skip"``: parameters and optimizer
            state stay as they are in this step. ``"raise"``: `NonFiniteNormError`, before anything
            is changed; an overflow that a `GradScaler` drops does not count. ``"zero"``: NaN and
            Inf become 0. ``"propagate"``: nothing special. `None` means ``"skip"`` with a clip
            policy and ``"propagate"`` without one.
        every: Record the statistics of every n-th step. Clipping and skipping happen on all.
        filter: ``filter(name, parameter)`` tells whether a parameter is measured and clipped;
            by default all are. A skipped step skips them all.
        window: Recorded steps whose tables are remembered. What is observed, and what diagnosis
            looks at, has bounds of its own: see `Monitor`.
        weights: Also record the statistics of the parameters.
        updates: Also record the statistics of each recorded step's change of the parameters, for
            `Monitor.update_ratio`, and of the parameters. Copies them on recorded steps.
        scaler: The `torch.amp.GradScaler` in use, so that `Monitor.scaler_overflows` counts the
            steps that it drops before an optimizer that is not fused hears of them.
        activations: Also count dead and saturated units of ``model``, at `Monitor.activations`, or
            with what options: those of `ActivationMonitor`, as in ``{"every": 20}``. Its sampled
            steps are its own, every tenth unless said otherwise. By default they are counted on
            every 40th step, where there is a model and it is neither compiled nor scripted.
        diagnose: When to look for what is wrong while training. True: after 256, 512, 1024, ...
            steps, or as soon after that as a look takes no more than a hundredth of the time; with
            a ``log`` exactly then. A number: every so many. False: never. By default True where all
            parameters are on the CPU: a look waits for a CUDA device. See `Monitor.on_finding`.
        log: Where the run is kept as it trains: a path for an SQLite file, a sink, or several; see
            docs/runlog.md. A file that holds a run is gone on with. On one rank only.
        log_every: Recorded steps from one to the next whose layers are kept in the log; the numbers
            of a step as a whole are kept of every step.

    Returns:
        ``optimizer`` itself.

    Host synchronisation on a CUDA device: none after the first step where the optimizer is fused
    and ``on_nonfinite`` is not ``"raise"``. Otherwise one a step where one may have to be stopped:
    with ``"skip"``, ``"raise"`` or `SkipOnSpike` the decision is read.
    ``scaler`` is read once a step of an optimizer that is not fused. Gradients that are sparse, on
    several devices or on one without a kernel synchronise always. With ``"zero"`` a CUDA device
    passes over the gradients once more.

    Raises:
        ArgumentTypeError: An argument has the wrong type.
        ArgumentValueError: gradstat is attached already, or an argument has a value that does not
            fit.
        RunLogError: ``log`` cannot be written, or another process writes it.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
        >>> gradstat.attach(optimizer, model, clip="auto")
        >>> optimizer.gradstat.total_norm
    """
    _check_optimizer(optimizer)
    policy = resolve(clip, optimizer)
    if on_nonfinite is None:
        on_nonfinite = "skip" if policy is not None else "propagate"
    if on_nonfinite not in KERNEL_RULE:
        raise ArgumentValueError(
            f'on_nonfinite must be "skip", "raise", "zero" or "propagate", got {on_nonfinite!r}; '
            "leave it out for the one that fits clip"
        )
    for name, number in (("every", every), ("window", window), ("log_every", log_every)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ArgumentValueError(
                f"{name} must be a whole number of at least 1, got {number!r}; use {name}=1 or more"
            )
    seam = Seam(
        optimizer,
        watched=Watched(model, named_parameters, filter),
        clipper=Clipper(policy, KERNEL_RULE[on_nonfinite]),
        recorder=Recorder(every=every, length=window, weights=weights, updates=updates),
        probes=Probes(),
        overflows=OverflowCount(scaler),
        on_nonfinite=on_nonfinite,
        activations=_activation_monitor(model, activations),
        rounds=_rounds(optimizer, diagnose),
    )
    if log is not None:
        config = {
            "clip": None if policy is None else repr(policy),
            "on_nonfinite": on_nonfinite,
            "every": every,
            "window": window,
            "weights": weights,
            "updates": updates,
            "log_every": log_every,
        }
        try:
            seam.monitor.log = RunLog(
                seam.monitor,
                log,
                every=log_every,
                config=config,
                looks_at_end=diagnose is not False,
            )
        except BaseException:
            seam.remove()
            raise
    optimizer.gradstat = seam.monitor  # type: ignore[attr-defined]
    optimizer._gradstat_seam = seam  # type: ignore[attr-defined]
    return optimizer


def detach(optimizer: OptimizerT) -> OptimizerT:
    """Return the same optimizer, as it was before `attach`. Does not synchronise.

    Raises:
        ArgumentValueError: gradstat is not attached to it, or its step is under way.
    """
    seam = getattr(optimizer, "_gradstat_seam", None)
    if seam is None:
        raise ArgumentValueError(
            f"optimizer must have gradstat attached, got a {type(optimizer).__name__} without; "
            "gradstat.attach(optimizer, model) does that. A GradStatOptimizer gives back its "
            "optimizer with gradstat.detach(optimizer.inner)"
        )
    if steps_under_way(optimizer):  # torch goes through the hooks, and must not lose one
        raise ArgumentValueError(
            "optimizer must not be inside its step when gradstat is detached, got a call from a "
            "closure, a hook or a callback; detach after optimizer.step() has returned"
        )
    seam.remove()
    del optimizer.gradstat, optimizer._gradstat_seam  # type: ignore[attr-defined]
    return optimizer


def _activation_monitor(
    model: torch.nn.Module | None, activations: bool | Mapping[str, Any] | None
) -> ActivationMonitor | None:
    if activations is None:
        if model is None or not runs_in_python(model):
            return None
        activations = {"every": DEFAULT_EVERY}
    if not isinstance(activations, bool | Mapping):
        raise ArgumentTypeError(
            f"activations must be True, False or a dict of options, got "
            f'{type(activations).__name__}; pass for example activations={{"every": 20}}'
        )
    if activations is False:
        return None
    if model is None:
        raise ArgumentValueError(
            "activations must come with model, got model=None; use gradstat.attach(optimizer, "
            "model, activations=True)"
        )
    options = {} if activations is True else dict(activations)
    known = ("every", "window", "unit_dim", "attention")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ArgumentValueError(
            f"activations must hold options out of {', '.join(known)}; got {unknown[0]!r}; see "
            "help(gradstat.ActivationMonitor)"
        )
    monitor = ActivationMonitor(model, **options)
    monitor.count_steps()
    return monitor


def _rounds(optimizer: Optimizer, diagnose: bool | int | None) -> Rounds:
    if diagnose is None:
        parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        diagnose = all(parameter.device.type == "cpu" for parameter in parameters)
    if not isinstance(diagnose, int) or diagnose < 0:
        raise ArgumentValueError(
            f"diagnose must be True, False or a number of steps, got {diagnose!r}; use for example "
            "diagnose=500"
        )
    return Rounds(None if not diagnose else 0 if diagnose is True else diagnose)


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer) or not all(hasattr(optimizer, n) for n in _HOOKS):
        raise ArgumentTypeError(
            f"optimizer must be a torch.optim.Optimizer with its hooks, got "
            f"{type(optimizer).__name__}; if it wraps an optimizer, attach to the one inside"
        )
    if hasattr(optimizer, "gradstat"):
        raise ArgumentValueError(
            "optimizer must not have gradstat attached already; call gradstat.detach(optimizer) "
            "first, or use optimizer.gradstat"
        )
