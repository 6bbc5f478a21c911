"""`GradStatOptimizer`: `attach` in the shape of a wrapper class."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from gradstat.monitor import Monitor
from gradstat.optimizer import attach

_COPIED_OPTIONS = (
    "clip",
    "on_nonfinite",
    "every",
    "window",
    "weights",
    "updates",
    "diagnose",
)

_CHECKPOINT_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class _OfInner:
    """An attribute that lives on the inner optimizer, where its step looks for it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, wrapper: Any, owner: type) -> Any:
        return self if wrapper is None else getattr(wrapper.inner, self._name)

    def __set__(self, wrapper: Any, value: Any) -> None:
        setattr(wrapper.inner, self._name, value)

    def __delete__(self, wrapper: Any) -> None:
        delattr(wrapper.inner, self._name)


class GradStatOptimizer(Optimizer):
    """An optimizer around another one, for those who prefer a wrapper to `attach`.

    Groups, state, defaults, checkpoints and further methods are the inner optimizer's. It is a real
    `torch.optim.Optimizer`, so schedulers and `GradScaler` take it; give them either the wrapper or
    the inner optimizer, not both. Synchronises as `attach` does.

    A copy (`copy.deepcopy`, pickle) watches its own parameters with the same options and starts
    with an empty history and the names of before; ``model``, ``activations``, ``filter``,
    ``scaler`` and callbacks stay behind. To go on with them, `detach` from its inner optimizer and
    attach anew.

    Args:
        optimizer: The optimizer that does the steps.
        **options: As for `attach`: ``model``, ``clip``, ``on_nonfinite``, ``every``, ...

    Raises:
        ArgumentTypeError: See `attach`.
        ArgumentValueError: See `attach`.

    Example:
        >>> optimizer = gradstat.GradStatOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1), model=model, clip=gradstat.ZClip()
        ... )
    """

    param_groups = _OfInner()
    state = _OfInner()
    defaults = _OfInner()
    gradstat: Monitor = _OfInner()  # type: ignore[assignment]
    # GradScaler asks for the first and sets the others, which a fused step reads.
    _step_supports_amp_scaling = _OfInner()
    grad_scale = _OfInner()
    found_inf = _OfInner()

    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        self.inner = attach(optimizer, **options)
        self._options = {name: options[name] for name in _COPIED_OPTIONS if name in options}
        # Optimizer.__init__ would make groups of its own; this makes the step hooks and no more.
        # Hooks on checkpoints run where the checkpoint is made: in the inner optimizer.
        super().__setstate__({name: getattr(optimizer, name) for name in _CHECKPOINT_HOOKS})

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Measure, clip and step; return what the inner optimizer returns."""
        return self.inner.step(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients."""
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer."""
        self.inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimizer's state, with the monitor's under ``"gradstat"``."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class, of an attached optimizer, or of a plain one."""
        self.inner.load_state_dict(state_dict)

    def __getattr__(self, name: str) -> Any:
        """Return what else the inner optimizer has: ``train()`` of a schedule-free one, ..."""
        if name.startswith("_") or name == "inner":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.inner, name)

    def __getstate__(self) -> dict[str, Any]:
        seam: Any = self.inner._gradstat_seam  # type: ignore[attr-defined]
        names = seam.watched.all_names(self.inner.param_groups)
        return {"inner": self.inner, "options": self._options, "names": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        inner: Optimizer = state["inner"]
        parameters = [p for group in inner.param_groups for p in group["params"]]
        names = zip(state["names"], parameters, strict=True)
        self.__init__(inner, named_parameters=names, **state["options"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"GradStatOptimizer({self.inner!r}, {getattr(self.inner, 'gradstat', 'detached')!r})"
