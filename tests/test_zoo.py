"""The zoo itself: names, balance, what a watch is told, and that training repeats bit by bit."""

from __future__ import annotations

import functools
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from zoo import Program, programs, run
from zoo.program import ARCHITECTURES, CODES
from zoo.program import program as register

PROGRAMS = {program.name: program for program in programs()}
FAULTY = [program for program in PROGRAMS.values() if not program.healthy]
HEALTHY = [program for program in PROGRAMS.values() if program.healthy]

# Two quick programs of each architecture, a faulty and a healthy one.
SAMPLE = [
    next(program for program in group if program.architecture == architecture)
    for architecture in ARCHITECTURES
    for group in (FAULTY, HEALTHY)
]

by_name = pytest.mark.parametrize("program", SAMPLE, ids=lambda program: program.name)


class Recorder:
    """Keeps what a program tells."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.losses: list[float] = []

    def attach(self, optimizer: Optimizer, model: nn.Module) -> None:
        assert all(state["step"] == 0 for state in optimizer.state.values())
        assert list(model.parameters())
        self.events.append("attach")

    def observe(self, **values: Any) -> None:
        assert values.keys() <= {"inputs", "outputs", "targets", "loss", "val_loss"}
        self.events.append("observe")
        if "loss" in values:
            assert values["loss"].requires_grad
            self.losses.append(values["loss"].item())


# ---- balance ------------------------------------------------------------------------------------


def test_names_begin_with_an_architecture():
    assert {program.architecture for program in PROGRAMS.values()} == set(ARCHITECTURES)
    assert all(name.count("/") == 2 for name in PROGRAMS)


def test_a_name_given_twice_is_refused():
    taken = next(iter(PROGRAMS))
    with pytest.raises(ValueError, match=f"must be unique, but '{taken}' was given twice"):
        register(taken, operator="none", half="tuning")(lambda watch: nn.Identity())


def test_causes_are_codes():
    assert {cause for program in FAULTY for cause in program.causes} <= CODES
    assert all(len(set(program.causes)) == len(program.causes) for program in FAULTY)


@pytest.mark.parametrize("code", sorted(CODES))
@pytest.mark.parametrize("half", ["tuning", "held-out"])
def test_every_code_has_programs_of_two_architectures_in_each_half(code: str, half: str):
    programs = [program for program in FAULTY if program.half == half and code in program.causes]
    assert len({program.architecture for program in programs}) >= 2


def test_what_is_a_first_cause_in_one_half_is_one_in_the_other():
    first = {
        half: {program.causes[0] for program in FAULTY if program.half == half}
        for half in ("tuning", "held-out")
    }
    assert first["tuning"] == first["held-out"]


@pytest.mark.parametrize("half", ["tuning", "held-out"])
def test_each_half_is_large_enough_to_judge_by(half: str):
    assert sum(program.half == half for program in FAULTY) >= 60
    assert sum(program.half == half for program in HEALTHY) >= 30


# ---- runs ---------------------------------------------------------------------------------------


def weights(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


@functools.cache
def watched(program: Program) -> tuple[Recorder, list[Tensor]]:
    """Return what a program tells when run from seed 5, and the weights it ends with."""
    recorder = Recorder()
    return recorder, weights(run(program, 5, recorder))


@by_name
def test_a_seed_decides_the_run_and_a_watch_does_not_change_it(program: Program):
    _, first_run = watched(program)
    for first, second in zip(first_run, weights(run(program, 5)), strict=True):
        # By their bytes, since a faulty program may end in NaN.
        assert first.dtype == second.dtype
        assert torch.equal(first.flatten().view(torch.uint8), second.flatten().view(torch.uint8))


@by_name
def test_a_watch_is_attached_once_and_first(program: Program):
    recorder, _ = watched(program)
    assert recorder.events[0] == "attach"
    assert recorder.events.count("attach") == 1
    assert 60 <= len(recorder.losses) <= 1200


# Their docstrings say why the loss of these need not fall.
LEVEL = ("gan", "policy-gradient", "converged", "fine-tuning", "noisy")


@pytest.mark.parametrize(
    "program",
    [program for program in HEALTHY if not program.name.endswith(LEVEL)][::5],
    ids=lambda program: program.name,
)
def test_a_healthy_program_learns(program: Program):
    recorder, _ = watched(program)
    tenth = len(recorder.losses) // 10
    assert median(recorder.losses[-tenth:]) < 0.8 * median(recorder.losses[:tenth])
