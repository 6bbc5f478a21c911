"""What a guard refuses, and in what words."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
from small_training import make_model, monitor_of, sgd

import gradstat
from gradstat import ArgumentTypeError, ArgumentValueError, CutLR, Guard, RollBack, TightenClip

LIVING: list[Any] = []
"""Optimizers whose monitors are asked for."""


def monitor(with_model: bool = True, clip: Any = None) -> gradstat.Monitor:
    model = make_model()
    optimizer = gradstat.attach(sgd(model), model if with_model else None, clip=clip)
    LIVING.append(optimizer)
    return monitor_of(optimizer)


# The call, the error, and the words that its text must hold, in order.
REFUSED: dict[str, tuple[Callable[[], object], type[Exception], list[str]]] = {
    "an_optimizer": (
        lambda: Guard(sgd(make_model())),  # type: ignore[arg-type]
        ArgumentTypeError,
        ["monitor must be a gradstat.Monitor", "got SGD", "pass optimizer.gradstat"],
    ),
    "a_copy_of_a_monitor": (
        lambda: Guard(copy.deepcopy(monitor())),
        ArgumentValueError,
        ["monitor must be that of a living optimizer", "got a copy or one whose optimizer is gone"],
    ),
    "a_rule_by_name": (
        lambda: Guard(monitor(), ["roll-back"]),  # type: ignore[list-item]
        ArgumentTypeError,
        ["rules must hold rules of a guard", "got str", "gradstat.RollBack()"],
    ),
    "a_rule_alone": (
        lambda: Guard(monitor(), 3),  # type: ignore[arg-type]
        ArgumentTypeError,
        ["rules must hold rules of a guard", "got int"],
    ),
    "a_scheduler_by_name": (
        lambda: Guard(monitor(), scheduler="cosine"),
        ArgumentTypeError,
        ["scheduler must be a torch scheduler or a list of them", "got str", "leave it out"],
    ),
    "no_looks": (
        lambda: Guard(monitor(), every=0),
        ArgumentValueError,
        ["every must be a whole number of at least 1", "got 0", "every=2"],
    ),
    "no_snapshots": (
        lambda: Guard(monitor(), [RollBack()], keep=0),
        ArgumentValueError,
        ["keep must be a whole number of at least 1", "got 0"],
    ),
    "no_model_to_go_back_to": (
        lambda: Guard(monitor(with_model=False), [RollBack()]),
        ArgumentValueError,
        ["monitor must know the model", "got one without", "gradstat.attach(optimizer, model)"],
    ),
    "nothing_to_resume_from": (
        lambda: Guard(monitor(), [RollBack()]).resume(),
        ArgumentValueError,
        ["directory must be given to resume from", "got None", 'directory="snapshots"'],
    ),
    "codes_in_a_word": (
        lambda: CutLR(on="lr-too-high"),  # type: ignore[arg-type]
        ArgumentValueError,
        ["CutLR: on must be a tuple of codes", "got 'lr-too-high'", 'on=("diverging-loss",)'],
    ),
    "never": (
        lambda: RollBack(at_most=0),
        ArgumentValueError,
        ["RollBack: at_most must be a whole number of at least 1", "got 0", "at_most=3"],
    ),
    "a_rest_before_the_start": (
        lambda: RollBack(rest=-1),
        ArgumentValueError,
        ["RollBack: rest must be a whole number of at least 0", "got -1", "rest=50"],
    ),
    "a_cut_that_raises": (
        lambda: CutLR(factor=2.0),
        ArgumentValueError,
        ["CutLR: factor must lie between 0 and 1", "got 2.0", "factor=0.5"],
    ),
    "a_ceiling_that_shuts": (
        lambda: TightenClip(factor=0),
        ArgumentValueError,
        ["TightenClip: factor must lie between 0 and 1", "got 0", "factor=0.5"],
    ),
    "a_ceiling_below_zero": (
        lambda: setattr(monitor()._clipper, "ceiling", -1.0),
        ArgumentValueError,
        ["max_norm must be positive", "got -1.0"],
    ),
    "a_ceiling_without_room": (
        lambda: setattr(monitor(clip=[gradstat.GlobalNorm(1.0)] * 4)._clipper, "ceiling", 1.0),
        ArgumentValueError,
        ["a ceiling must find room beside the fused policies", "got 4 of at most 4", "drop one"],
    ),
}


@pytest.mark.parametrize(("call", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert re.search(".*".join(map(re.escape, words)), str(caught.value)), caught.value


def test_a_refused_guard_leaves_the_run_alone():
    watched = monitor()
    with pytest.raises(ArgumentValueError):
        Guard(watched, keep=0)
    assert watched._callbacks == []
