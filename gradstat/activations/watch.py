"""The watcher: sees the torch functions that a model calls, for the time of one call of it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradstat._names import modules_of
from gradstat.activations.calls import (
    ACTIVATIONS,
    attention_probabilities,
    bounds_of,
    is_activation,
    name_of,
    summed_dim,
)
from gradstat.activations.kinds import KINDS
from gradstat.activations.layers import Layers
from gradstat.activations.windows import Call
from gradstat.errors import UnsupportedTensorError

_MODULE_CALL = nn.Module._call_impl.__code__
_FUSED_IN_INFERENCE = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


class Watcher(TorchFunctionMode):
    """Counts the activations of one call of a model.

    Functions are seen once, at their outermost call, with nothing installed on any module but those
    that may have to run unseen (see `_Unseen`). Which module called is read off the stack of Python
    frames.

    Args:
        model: The model, or a replica of it.
        count: Takes each activation, at once.
        on_error: Takes what goes wrong in watching; nothing is watched after it.
        unit_dim: The dimension of units, or `None` for that of the layer before.
        attention: Also count attention probabilities.
    """

    def __init__(
        self,
        model: nn.Module,
        count: Callable[[Call], None],
        on_error: Callable[[Exception], None],
        *,
        unit_dim: int | None,
        attention: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self._count = count
        self._on_error = on_error
        self._unit_dim = unit_dim
        self._attention = attention
        self._is_off = False
        modules = modules_of(model)
        self._modules = [module for _, module in modules]
        # A replica of data parallelism is another module with the same dict of hooks.
        self._names: dict[int, str] = {
            id(module.__dict__.get("_forward_hooks")): prefix[:-1] for prefix, module in modules
        }
        self._layers = Layers(modules)
        self._calls: Counter[str] = Counter()
        self._opaque: list[_Unseen] = []
        self.depth = 0
        """Calls of the model inside of the one that is watched."""

    # ---- the time of the call --------------------------------------------------------------------

    def start(self) -> None:
        """Begin to see functions, and let the parts that must not be seen through run unseen.

        Ends what is left in this thread of calls that were interrupted.
        """
        for mode in _function_modes():
            if isinstance(mode, Watcher) and not calls_under_way(mode.model):
                mode.stop()
        dynamo = sys.modules.get("torch._dynamo")  # nothing is compiled where nobody imported it
        opaque = _FUSED_IN_INFERENCE + ((dynamo.OptimizedModule,) if dynamo is not None else ())
        self._opaque = [
            _Unseen(self, module)
            for module in self._modules
            if isinstance(module, opaque) or module.__dict__.get("_compiled_call_impl") is not None
        ]
        for call in self._opaque:
            vars(call.module)["_compiled_call_impl"] = call
        _push(self)

    def stop(self) -> None:
        """End it, and leave every module as it was."""
        for call in self._opaque:
            if call.before is None:
                del vars(call.module)["_compiled_call_impl"]
            else:
                vars(call.module)["_compiled_call_impl"] = call.before
        self._opaque = []
        self._is_off = True
        modes = _function_modes()
        if self in modes:
            inner = [_pop() for _ in modes[modes.index(self) + 1 :]]
            _pop()
            for mode in reversed(inner):
                _push(mode)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Leave out what this thread does in this block."""
        if not self._is_innermost():  # another thread, or inside of a mode of somebody else
            yield
            return
        _pop()
        try:
            yield
        finally:
            _push(self)

    def _is_innermost(self) -> bool:
        return _function_modes()[-1:] == [self]

    # ---- what is seen ----------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function as it would have been, and count its output if it is an activation."""
        del types
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not (self._is_off or torch.compiler.is_compiling()):
            try:
                with torch._C.DisableTorchFunction():  # no mode around this one sees of it
                    self._see(func, args, kwargs, output)
            except Exception as error:  # a run that is only watched must go on
                self._is_off = True
                self._on_error(error)
        return output

    def _see(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        name = name_of(func)
        if is_activation(name, args, kwargs, output):
            if not in_backward():
                self._see_activation(name, args, kwargs, output)
        elif self._attention and not in_backward():
            with torch.no_grad():
                probabilities = attention_probabilities(func, args, kwargs, output)
            if probabilities is not None:
                self._count_softmax("softmax", probabilities, probabilities.dim() - 1, heads=True)
        self._layers.see(name, args, kwargs, output)

    def _see_activation(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        kind, bounds = bounds_of(ACTIVATIONS[name], args, kwargs)
        layer = self._layers.before(args, kwargs)
        n_dims = output.dim()
        if kind.by_position:
            if kwargs.get("hard"):  # of gumbel_softmax: one-hot, whatever went in
                return
            dim = summed_dim(output, args, kwargs)
            is_attention = layer is not None and layer.is_scores and dim == n_dims - 1
            if self._attention or not is_attention:
                self._count_softmax(kind.name, output, dim, heads=is_attention)
            return
        chosen = self._unit_dim
        if chosen is None and layer is not None:
            chosen = layer.unit_dim
        if chosen is None or not -n_dims <= chosen < n_dims:
            chosen = 1 if n_dims > 1 else 0
        units = output.size(chosen) if n_dims else 1
        weight = None
        if layer is not None and layer.rows == units:
            is_its_dim = (chosen - layer.unit_dim) % max(n_dims, 1) == 0
            weight = layer.weight if is_its_dim else None
        self._hand_over(lambda site: Call(site, kind, bounds, output, chosen, 0, weight), kind.name)

    def _count_softmax(self, kind_name: str, output: Tensor, dim: int, *, heads: bool) -> None:
        """Count probabilities: units are the heads of an attention, else what they are over."""
        kind = KINDS[kind_name]
        positions = output.numel() // max(output.size(dim) if output.dim() else 1, 1)
        unit_dim = dim
        if heads and output.dim() > 3:
            unit_dim = output.dim() - 3
        elif heads:  # the number of keys may change from call to call
            output, unit_dim = output.unsqueeze(0), 0
        self._hand_over(
            lambda site: Call(site, kind, kind.bounds(), output, unit_dim, positions), kind_name
        )

    def _hand_over(self, make: Callable[[str], Call], function: str) -> None:
        module = self._calling_module()
        if module is None:  # left over from a call that was interrupted
            self._is_off = True
            return
        site = f"{module}/{function}" if module else function
        number = self._calls[site]
        self._calls[site] += 1
        try:
            self._count(make(f"{site}#{number}"))
        except UnsupportedTensorError:
            return  # inside of vmap, on the meta device and the like there is nothing to read

    def _calling_module(self) -> str | None:
        for module in modules_in_call():
            name = self._names.get(id(vars(module).get("_forward_hooks")))
            if name is not None:
                return name
        return None


def modules_in_call() -> Iterator[nn.Module]:
    """Yield the modules whose call is under way in this thread, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _MODULE_CALL:
            yield frame.f_locals["self"]
        frame = frame.f_back


def calls_under_way(model: nn.Module) -> int:
    """Return how many calls of a model this thread is in."""
    return sum(module is model for module in modules_in_call())


def in_backward() -> bool:
    """Whether this runs inside of a backward pass, as recomputation for checkpointing does."""
    return bool(torch._C._current_graph_task_id() != -1)


class _Unseen:
    """Stands in for the call of a module that may have to run as if nobody watched."""

    def __init__(self, watcher: Watcher, module: nn.Module) -> None:
        self.module = module
        self.before = vars(module).get("_compiled_call_impl")
        self.is_compiled = is_compiled(module)
        self._watcher = watcher

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.before or self.module._call_impl
        if not (self.is_compiled or is_fused(self.module)):
            return call(*args, **kwargs)
        with self._watcher.suspended():
            return call(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled as a whole: it would be once more for a watched call."""
    call = vars(module).get("_compiled_call_impl")
    if isinstance(call, _Unseen):  # of another watcher
        return call.is_compiled
    dynamo = sys.modules.get("torch._dynamo")  # nothing is compiled where nobody imported it
    return call is not None or (dynamo is not None and isinstance(module, dynamo.OptimizedModule))


def is_fused(module: nn.Module) -> bool:
    """Whether torch may call a module's fused form now, and another where functions are seen.

    The other one rounds otherwise.
    """
    return (
        isinstance(module, _FUSED_IN_INFERENCE)
        and not module.training
        and not (torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()))
    )


def _push(mode: TorchFunctionMode) -> None:
    torch.overrides._push_mode(mode)  # type: ignore[no-untyped-call]


def _pop() -> TorchFunctionMode:
    mode: TorchFunctionMode = torch.overrides._pop_mode()  # type: ignore[no-untyped-call]
    return mode


def _function_modes() -> list[TorchFunctionMode]:
    """Return the modes of this thread, the innermost last."""
    return list(torch.overrides._get_current_function_mode_stack())  # type: ignore[no-untyped-call]
