"""What a torch function call is to the watcher: an activation, or attention."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from gradstat.activations.kinds import ALIASES, KINDS, Bounds, Kind

_UNWATCHED = ("identity", "threshold")
ACTIVATIONS: dict[str, Kind] = {
    name: kind for key, kind in KINDS.items() if key not in _UNWATCHED for name in (key, f"{key}_")
}
ACTIVATIONS |= {
    "threshold": KINDS["threshold"],
    "threshold_": KINDS["threshold"],
    "_threshold": KINDS["threshold"],
    "log_sigmoid": KINDS[ALIASES["log_sigmoid"]],
    "special_expit": KINDS["sigmoid"],
    "special_softmax": KINDS["softmax"],
    "softmin": KINDS["softmax"],
    "gumbel_softmax": KINDS["softmax"],
    "special_log_softmax": KINDS["log_softmax"],
    "_softmax": KINDS["softmax"],
    "_log_softmax": KINDS["log_softmax"],
}
_CLAMPS = ("clamp", "clamp_", "clamp_min", "clamp_min_", "clip", "clip_")
ACTIVATIONS |= dict.fromkeys(_CLAMPS, KINDS["relu"])
"""Kinds by `name_of` the torch functions and tensor methods that compute them."""

Arguments = Mapping[str, Any]


def name_of(function: Callable[..., Any]) -> str:
    """Return a torch function's ``__name__``, of an operator such as ``aten.relu.default`` too."""
    name: str = getattr(function, "__name__", "")
    return name.partition(".")[0]


def is_activation(name: str, args: Sequence[Any], kwargs: Arguments, output: Any) -> bool:
    """Whether a call of a function of this name is one of an activation.

    A function of a parameter makes no activation but another parameter. A clamp is a ReLU where its
    one limit is 0 and a gradient passes; others are as often arithmetic with boxes, norms, ratios.
    """
    if name not in ACTIVATIONS or not isinstance(output, Tensor) or output.is_nested:
        return False
    given = args[0] if args else kwargs.get("input")
    if _is_parameter(given) or _is_parameter(getattr(given, "_base", None)):
        return False
    if name not in _CLAMPS:
        return True
    low, high = (*args[1:3], None, None)[:2]
    low, high = kwargs.get("min", low), kwargs.get("max", high)
    return output.requires_grad and isinstance(low, int | float) and low == 0 and high is None


def _is_parameter(value: object) -> bool:
    # Of what it mostly is, the type is seen at once; torch's check is a function of Python.
    return type(value) not in (Tensor, type(None)) and isinstance(value, nn.Parameter)


def bounds_of(kind: Kind, args: Sequence[Any], kwargs: Arguments) -> tuple[Kind, Bounds]:
    """Return the bounds of an activation called with these arguments, and its kind.

    ``nn.ReLU6`` calls ``hardtanh`` with limits of 0 and 6, and is told by them.
    """
    values = []
    for place, (name, default) in enumerate(kind.parameters, start=1):
        value = args[place] if len(args) > place else kwargs.get(name, default)
        values.append(float(value) if isinstance(value, int | float) else default)
    if kind.name == "hardtanh" and values == [0.0, 6.0]:
        kind, values = KINDS["relu6"], []
    return kind, kind.bounds(*values)


def summed_dim(output: Tensor, args: Sequence[Any], kwargs: Arguments) -> int:
    """Return the dimension that a call of softmax has made to sum to 1, counted from 0."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(dim, int):  # as torch.nn.functional chooses it where none is given
        dim = 0 if output.dim() in (0, 1, 3) else 1
    return dim % max(output.dim(), 1)


def _of_multi_head(function: Callable[..., Any], args: Sequence[Any], kwargs: Arguments) -> Tensor:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.arguments.update(
        need_weights=True, average_attn_weights=False, training=False, dropout_p=0.0
    )
    probabilities: Tensor = function(*bound.args, **bound.kwargs)[1]
    return probabilities


def _of_scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    del value, dropout_p
    if query.is_nested or type(attn_mask) not in (type(None), Tensor, nn.Parameter):
        return None  # no such product, and a mask that computes itself
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
    scale = 1.0 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1)


def attention_probabilities(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Arguments, output: Any
) -> Tensor | None:
    """Return the probabilities inside of torch's attention functions, computed once more.

    They do not keep them. Shape (..., heads, queries, keys), before dropout; those of a query that
    may see no key are 0 where ``output``, what the function gave, is a number. Draws no random
    number. `None` of any other function, of nested tensors and of a mask that is no plain tensor.
    """
    name = getattr(function, "__name__", "")
    if name not in ("multi_head_attention_forward", "scaled_dot_product_attention"):
        return None
    # Modes that cache by the order of calls, as selective checkpointing, would give back the wrong.
    with _disable_current_modes():
        if name == "multi_head_attention_forward":
            probabilities: Tensor | None = _of_multi_head(function, args, kwargs)
            output = output[0].movedim(0, -2).unsqueeze(-3)  # queries came first
        else:
            probabilities = _of_scaled_dot_product(*args, **kwargs)
        if probabilities is None:
            return None
        is_number = output.isfinite().all(-1, keepdim=True)
        return probabilities.masked_fill(probabilities.isnan() & is_number, 0.0)
