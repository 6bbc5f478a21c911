"""The texts of errors: what must hold, what was received and from where, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import Untouched, parameter, parameters
from messages import assert_words_in_order, message_of
from torch import nn

import gradstat
from gradstat import (
    ArgumentTypeError,
    ArgumentValueError,
    clip_grad_norm_,
    clip_grad_value_,
    get_total_norm,
    grad_stats,
    tensor_stats,
)

INF, NAN = math.inf, math.nan


ONE = torch.ones(1)

# The call, the error, and the words that the text must hold, in order.
BAD_SOURCES: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "non_tensor_in_a_list": (
        lambda: grad_stats([parameter(ONE), "x"]),
        ArgumentTypeError,
        ["every item must be a torch.Tensor", "got str for 'param1'", "pass parameters"],
    ),
    "non_tensor_in_a_dict": (
        lambda: grad_stats({"a": ONE, "head.bias": 3}),
        ArgumentTypeError,
        ["every item must be a torch.Tensor", "got int for 'head.bias'", "dict of tensors"],
    ),
    "non_tensor_in_pairs": (
        lambda: grad_stats([("a", parameter(ONE)), ("head.bias", [1.0])]),
        ArgumentTypeError,
        ["every item must be a torch.Tensor", "got list for 'head.bias'"],
    ),
    "non_tensor_when_clipping": (
        lambda: clip_grad_norm_([parameter(ONE), "x"], 1.0),
        ArgumentTypeError,
        ["every item must be a torch.Tensor", "got str for parameter 1"],
    ),
    "non_tensor_in_a_norm": (
        lambda: get_total_norm([ONE, 2.0]),
        ArgumentTypeError,
        ["every item must be a torch.Tensor", "got float for tensor 1"],
    ),
    "a_pair_and_then_a_tensor": (
        lambda: grad_stats([("a", ONE), ONE]),
        ArgumentTypeError,
        ["model_or_params must hold (name, tensor) pairs throughout", "got Tensor at position 1",
         "pass model.named_parameters()"],
    ),
    "a_tensor_and_then_a_pair": (
        lambda: grad_stats([ONE, ("a", ONE)]),
        ArgumentTypeError,
        ["every item must be a torch.Tensor", "got tuple for 'param1'"],
    ),
    "a_pair_without_a_name": (
        lambda: tensor_stats([(0, ONE)]),
        ArgumentTypeError,
        ["tensors must hold (name, tensor) pairs throughout", "got tuple at position 0"],
    ),
    "a_string": (
        lambda: grad_stats("model"),
        ArgumentTypeError,
        ["model_or_params must be a module, tensors, (name, tensor) pairs or a dict", "got str",
         "pass for example model"],
    ),
    "a_number": (lambda: tensor_stats(3), ArgumentTypeError, ["tensors must be", "got int"]),
    "a_method": (
        lambda: clip_grad_norm_(nn.Linear(1, 1).parameters, 1.0),
        ArgumentTypeError,
        ["parameters must be", "got method"],
    ),
    "a_module_to_clip": (
        lambda: clip_grad_norm_(nn.Linear(1, 1), 1.0),
        ArgumentTypeError,
        ["parameters must be tensors", "got the module Linear", "pass module.parameters()"],
    ),
    "a_module_to_clamp": (
        lambda: clip_grad_value_(nn.Linear(1, 1), 1.0),
        ArgumentTypeError,
        ["parameters must be tensors", "got the module Linear", "pass module.parameters()"],
    ),
    "a_module_to_get_total_norm": (
        lambda: get_total_norm(nn.Linear(1, 1)),
        ArgumentTypeError,
        ["tensors must be tensors", "got the module Linear",
         "pass [p.grad for p in module.parameters() if p.grad is not None]"],
    ),
    "names_too_many": (
        lambda: tensor_stats([ONE], ["a", "b"]),
        ArgumentValueError,
        ["names must hold one name for each tensor", "got 2 names for 1 tensors", "same length"],
    ),
    "names_beside_a_dict": (
        lambda: tensor_stats({"a": ONE}, ["a"]),
        ArgumentValueError,
        ["names must be left out", "got both", "list(tensors.values())"],
    ),
    "names_beside_a_module": (
        lambda: tensor_stats(nn.Linear(1, 1), ["a", "b"]),
        ArgumentValueError,
        ["names must be left out", "got both"],
    ),
    "names_as_a_string": (
        lambda: tensor_stats([ONE, ONE], "ab"),
        ArgumentTypeError,
        ["names must be a sequence of str", "got 'ab'", "names=['a', 'b']"],
    ),
    "names_as_a_number": (
        lambda: tensor_stats([ONE], 3),
        ArgumentTypeError,
        ["names must be a sequence of str", "got 3"],
    ),
    "names_that_are_no_strings": (
        lambda: tensor_stats([ONE, ONE], ["a", 1]).names,
        ArgumentTypeError,
        ["names[1] must be a str", "got int"],
    ),
    "names_twice": (
        lambda: tensor_stats([ONE, ONE], ["a", "a"])["a"],
        ArgumentValueError,
        ["names must differ from each other", "got 'a' twice"],
    ),
    "pairs_with_a_name_twice": (
        lambda: grad_stats([("a", parameter(ONE)), ("a", parameter(ONE))]).names,
        ArgumentValueError,
        ["names must differ from each other", "got 'a' twice"],
    ),
}  # fmt: skip


def used_up() -> Any:
    params = nn.Linear(1, 1).parameters()
    list(params)
    return params


for _name, _call in {
    "grad_stats": grad_stats,
    "clip_grad_norm_": lambda params: clip_grad_norm_(params, 1.0),
    "clip_grad_value_": lambda params: clip_grad_value_(params, 1.0),
    "get_total_norm": get_total_norm,
}.items():
    BAD_SOURCES[f"used_up_generator_for_{_name}"] = (
        lambda call=_call: call(used_up()),
        ArgumentValueError,
        [
            "must yield at least one item",
            "a generator that yields none",
            "list(model.parameters())",
        ],
    )


@pytest.mark.parametrize(("call", "error", "words"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_what_is_measured(call, error, words):
    assert_words_in_order(message_of(error, call), words)


NUMBER = 'use float("inf") to disable clipping'
BAD_NUMBERS: dict[str, tuple[Callable[[Any], object], type[Exception], list[str]]] = {
    "max_norm_nan": (
        lambda ps: clip_grad_norm_(ps, NAN),
        ArgumentValueError,
        ["max_norm must be zero or positive", "got nan", NUMBER],
    ),
    "max_norm_negative": (
        lambda ps: clip_grad_norm_(ps, -1),
        ArgumentValueError,
        ["max_norm must be zero or positive", "got -1.0", NUMBER],
    ),
    "max_norm_minus_inf": (
        lambda ps: clip_grad_norm_(ps, -INF),
        ArgumentValueError,
        ["max_norm must be zero or positive", "got -inf"],
    ),
    "max_norm_word": (
        lambda ps: clip_grad_norm_(ps, "large"),
        ArgumentTypeError,
        ["max_norm must be a number", "got str", NUMBER],
    ),
    "max_norm_none": (
        lambda ps: clip_grad_norm_(ps, None),
        ArgumentTypeError,
        ["max_norm must be a number", "got NoneType", NUMBER],
    ),
    "max_norm_two_numbers": (
        lambda ps: clip_grad_norm_(ps, torch.ones(2)),
        ArgumentTypeError,
        ["max_norm must be a number", "got Tensor"],
    ),
    "max_norm_complex": (
        lambda ps: clip_grad_norm_(ps, 1j),
        ArgumentTypeError,
        ["max_norm must be a number", "got complex"],
    ),
    "norm_type_nan": (
        lambda ps: clip_grad_norm_(ps, 1.0, NAN),
        ArgumentValueError,
        ["norm_type must not be NaN", "got nan", "use 2.0 or math.inf"],
    ),
    "norm_type_word": (
        lambda ps: clip_grad_norm_(ps, 1.0, "two"),
        ArgumentTypeError,
        ["norm_type must be a number", "got 'two'", "use 2.0 or math.inf"],
    ),
    "norm_type_none": (
        lambda ps: get_total_norm([p.grad for p in ps], None),
        ArgumentTypeError,
        ["norm_type must be a number", "got None"],
    ),
    "norm_type_two_numbers": (
        lambda ps: get_total_norm([p.grad for p in ps], torch.ones(2)),
        ArgumentTypeError,
        ["norm_type must be a number", "got tensor"],
    ),
    "clip_value_negative": (
        lambda ps: clip_grad_value_(ps, -0.5),
        ArgumentValueError,
        ["clip_value must be zero or positive", "got -0.5", NUMBER],
    ),
    "clip_value_nan": (
        lambda ps: clip_grad_value_(ps, NAN),
        ArgumentValueError,
        ["clip_value must be zero or positive", "got nan"],
    ),
    "clip_value_word": (
        lambda ps: clip_grad_value_(ps, "x"),
        ArgumentTypeError,
        ["clip_value must be a number", "got str"],
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), BAD_NUMBERS.values(), ids=BAD_NUMBERS)
def test_numbers(call, error, words):
    params = parameters([torch.tensor([3.0, 4.0]), torch.tensor([NAN, 1e9])])
    untouched = Untouched(params)
    assert_words_in_order(message_of(error, lambda: call(params)), words)
    untouched.check()


def test_one_except_clause_catches_them_all():
    for call, error, _ in BAD_SOURCES.values():
        assert issubclass(error, gradstat.GradstatError)
        with pytest.raises((ValueError, TypeError)):
            call()
