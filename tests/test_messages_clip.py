"""The texts of errors about gradients that cannot be clipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradients import Untouched, parameter, parameters
from messages import assert_words_in_order, message_of
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import gradstat
from gradstat import (
    ArgumentTypeError,
    NonFiniteNormError,
    UnsupportedTensorError,
    clip_grad_norm_,
    clip_grad_value_,
    get_total_norm,
)

INF, NAN = math.inf, math.nan


def test_the_layers_that_hold_nan_or_inf_are_named():
    bad = [torch.ones(2), torch.tensor([NAN]), torch.ones(2), torch.tensor([1.0, INF])]
    params = parameters(bad)
    untouched = Untouched(params)

    def call(source: Any) -> str:
        return message_of(
            NonFiniteNormError, lambda: clip_grad_norm_(source, 1.0, error_if_nonfinite=True)
        )

    assert_words_in_order(
        call(params),
        ["the total norm of order 2.0 must be finite for error_if_nonfinite=True", "got nan",
         "(NaN or Inf in parameter 1, parameter 3)", "no gradient was changed",
         "error_if_nonfinite=False"],
    )  # fmt: skip
    assert "(NaN or Inf in 'b', 'd')" in call(dict(zip("abcd", params, strict=True)))
    # Positions count the repeat that is left out.
    assert "(NaN or Inf in parameter 2, parameter 4)" in call([params[0], *params])
    text = message_of(NonFiniteNormError, lambda: get_total_norm(bad, error_if_nonfinite=True))
    assert "(NaN or Inf in tensor 1, tensor 3)" in text
    untouched.check()


def test_a_long_list_of_bad_layers_is_cut():
    params = parameters([torch.tensor([INF])] * 9)
    text = message_of(
        NonFiniteNormError, lambda: clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    )
    assert "got inf (NaN or Inf in parameter 0, parameter 1, parameter 2, parameter 3, " in text
    assert "parameter 4, ...)" in text


# A gradient that is refused, and the words.
REFUSED: dict[str, tuple[Callable[[], Tensor], list[str]]] = {
    "expanded": (
        lambda: torch.full((1,), 9.0).expand(3),
        ["must not overlap itself in memory", "got an expanded view of shape (3,) for parameter 2",
         "assign grad.contiguous() first"],
    ),
    "fp8": (
        lambda: torch.ones(2).to(torch.float8_e5m2),
        ["must hold", "got dtype torch.float8_e5m2 for parameter 2"],
    ),
    "meta": (lambda: torch.ones(2, device="meta"), ["got a meta tensor for parameter 2"]),
}  # fmt: skip


@pytest.mark.parametrize(
    "clip",
    [
        lambda ps: clip_grad_norm_(ps, 0.1),
        lambda ps: clip_grad_norm_(ps, 0.1, 3.0),
        lambda ps: clip_grad_value_(ps, 0.1),
    ],
    ids=["norm", "norm_of_order_3", "value"],
)
@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_one_bad_gradient_leaves_all_as_they_are(make, words, clip):
    good = parameters([torch.full((3,), 9.0), torch.full((8,), 9.0)[::2]])
    bad = parameter(make()) if make().device.type == "cpu" else nn.Parameter(make())
    bad.grad = make()
    also_good = parameter(torch.full((2,), 9.0))
    untouched = Untouched([*good, also_good])
    text = message_of(ArgumentTypeError, lambda: clip([*good, bad, also_good]))
    assert_words_in_order(text, words)
    untouched.check()


def test_complex_gradients_cannot_be_clamped():
    params = parameters([torch.full((3,), 9.0), torch.tensor([9 + 9j])])
    untouched = Untouched(params)
    text = message_of(ArgumentTypeError, lambda: clip_grad_value_(params, 1.0))
    assert_words_in_order(
        text,
        ["needs real gradients", "got torch.complex64 for parameter 1", "use clip_grad_norm_"],
    )
    untouched.check()


def test_results_need_real_memory():
    param = parameter(torch.ones(3))
    with FakeTensorMode(), pytest.raises(UnsupportedTensorError, match="outside of FakeTensorMode"):
        gradstat.grad_stats([param])


def test_an_order_that_takes_torch_names_the_culprits_too():
    bad = parameters([torch.ones(2), torch.tensor([math.nan, 1.0]), torch.ones(2)])
    with pytest.raises(gradstat.NonFiniteNormError, match=r"NaN or Inf in parameter 1\)"):
        gradstat.clip_grad_norm_(bad, 1.0, norm_type=3.0, error_if_nonfinite=True)
