"""What `Guard` is given, checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gradstat.errors import ArgumentTypeError, ArgumentValueError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from gradstat.monitor import Monitor


def check_counts(**counts: object) -> None:
    """Refuse what is no whole number of at least 1."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ArgumentValueError(
                f"{name} must be a whole number of at least 1, got {count!r}; use for example "
                f"{name}=2"
            )


def optimizer_of(monitor: Monitor) -> Callable[[], Optimizer | None]:
    """Return what gives the optimizer while it lives."""
    if not hasattr(monitor, "on_step"):
        raise ArgumentTypeError(
            f"monitor must be a gradstat.Monitor, got {type(monitor).__name__}; pass "
            "optimizer.gradstat"
        )
    source = monitor._source
    if not callable(source) or source() is None:
        raise ArgumentValueError(
            "monitor must be that of a living optimizer, got a copy or one whose optimizer is "
            "gone; pass optimizer.gradstat"
        )
    return source


def checked_schedulers(scheduler: Any) -> tuple[Any, ...]:
    """Return the schedulers, one or several."""
    if scheduler is None:
        return ()
    schedulers = tuple(scheduler) if isinstance(scheduler, list | tuple) else (scheduler,)
    for one in schedulers:
        if not hasattr(one, "load_state_dict"):
            raise ArgumentTypeError(
                f"scheduler must be a torch scheduler or a list of them, got {type(one).__name__}; "
                "leave it out where there is none"
            )
    return schedulers
