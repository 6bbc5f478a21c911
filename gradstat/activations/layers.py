"""Which layer made what an activation is given: where the units lie, and whose rows they are."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

_FEATURES = (
    "linear", "bilinear", "embedding", "embedding_bag", "addmm",
    "lstm", "gru", "rnn_tanh", "rnn_relu",
    "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
    "scaled_dot_product_attention", "multi_head_attention_forward",
)  # fmt: skip
_SCORES = ("matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "baddbmm", "einsum")
"""Products: of an activation with a parameter they make features, of two activations scores."""

_CONVOLUTIONS = {
    f"conv{transposed}{dims}d": dims for transposed in ("", "_transpose") for dims in (1, 2, 3)
}
"""Dimensions that each is over, by ``__name__`` of the torch function."""

_MAKERS = frozenset((*_FEATURES, *_SCORES, *_CONVOLUTIONS))

_CHANNEL_NORMS = ("batch_norm", "group_norm", "instance_norm")
_HAS_ROWS_OF_UNITS = ("linear", "conv1d", "conv2d", "conv3d")


class Layer(NamedTuple):
    """What is known of the features that a tensor holds."""

    unit_dim: int
    """The last for features; channels are counted from the front, where pooling leaves them."""

    weight: str | None = None
    """Name of the weight that has a row for each unit."""

    rows: int = 0
    """Rows of that weight."""

    is_scores: bool = False
    """Whether they are products of two activations."""


class Layers:
    """Follows the outputs of layers through the operations of one call of a model.

    Keeps none of them alive.

    Args:
        modules: Those of the model, or of a replica of it, with the start of their weights' names.
    """

    def __init__(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        self._weights: dict[int, str] = {}
        for prefix, module in modules:
            # A replica of data parallelism has copies in the place of its parameters.
            own: Mapping[str, Tensor | None] = (
                module.__dict__.get("_former_parameters") or module._parameters
            )
            for name, weight in own.items():
                if weight is not None:
                    self._weights.setdefault(id(weight), prefix + name)
        self._of: dict[int, tuple[weakref.ref[Tensor], Layer]] = {}
        self._last: Layer | None = None

    def see(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: object
    ) -> None:
        """Take note of what one function, of this ``__name__``, has made of its arguments."""
        for made in _tensors((output,)):
            layer = self._made_by(name, args, kwargs, made) if name in _MAKERS else None
            if layer is not None:
                self._last = layer
            elif name in _CHANNEL_NORMS:
                layer = self._passed_on(_tensors((*args, *kwargs.values())), made) or Layer(1)
                layer = layer._replace(unit_dim=1)
            elif self._layer_of(made) is None:
                layer = self._passed_on(_tensors((*args, *kwargs.values())), made)
            if layer is not None:
                self._of[id(made)] = weakref.ref(made), layer

    def before(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layer | None:
        """Return the layer that made an activation's input.

        Where the way from there was out of sight it is the one called last, without its weight.
        """
        for tensor in _tensors((*args, *kwargs.values())):
            layer = self._layer_of(tensor)
            if layer is not None:
                return layer
        return self._last and self._last._replace(weight=None)

    def _layer_of(self, tensor: Tensor) -> Layer | None:
        known = self._of.get(id(tensor))
        return known[1] if known is not None and known[0]() is tensor else None

    def _made_by(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], made: Tensor
    ) -> Layer:
        if name in _SCORES:
            has_parameter = any(map(self._is_of_parameter, _tensors((*args, *kwargs.values()))))
            return Layer(-1, is_scores=not has_parameter)
        unit_dim = made.dim() - 1 - _CONVOLUTIONS[name] if name in _CONVOLUTIONS else -1
        if name in _HAS_ROWS_OF_UNITS:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            known = self._weights.get(id(weight))
            if known is not None and isinstance(weight, Tensor):
                return Layer(unit_dim, known, weight.size(0))
        return Layer(unit_dim)

    def _is_of_parameter(self, tensor: Tensor) -> bool:
        """Whether it is a parameter, or a view of one as a tied weight's transpose is."""
        return id(tensor) in self._weights or id(tensor._base) in self._weights

    def _passed_on(self, inputs: Iterable[Tensor], made: Tensor) -> Layer | None:
        """Return the layer of an operation's input: of those that are broadcast only if of none."""
        first: Layer | None = None
        for tensor in inputs:
            layer = self._layer_of(tensor)
            if layer is not None and tensor.shape == made.shape:
                return layer
            first = first or layer
        return first


def _tensors(values: Sequence[object]) -> list[Tensor]:
    """Return the tensors among values and in lists of them, but no nested one: it has no shape."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_nested:
                found.append(value)
        elif isinstance(value, (list, tuple)):  # as a union it would be made anew at each call
            found += _tensors(value)
    return found
