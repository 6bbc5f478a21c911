"""`measure_overhead`: the mechanics, never how long anything takes."""

from __future__ import annotations

import json
import random
import statistics
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import hook_counts, same_bits
from torch import nn

import gradstat
from gradstat.errors import ArgumentTypeError, ArgumentValueError
from gradstat.overhead import blocks, measure, sides
from gradstat.overhead.blocks import Block, DeviceClock, HostClock, Side, Work
from gradstat.overhead.report import OverheadReport, estimate, figures

pytestmark = pytest.mark.usefixtures("one_torch_thread")


class Net(nn.Module):
    """Has buffers that a forward pass writes, one in place and one anew, and draws numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2)
        )
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("shared", torch.zeros(1).expand(3))
        self.layers[1].eval()

    def forward(self, inputs: Any) -> Any:
        self.calls = self.calls + 1
        return self.layers(inputs + 0.01 * random.random() + 0.01 * np.random.rand())  # noqa: NPY002


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-tensor-lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


class Training:
    """A model that has been trained for a while, with a schedule."""

    def __init__(self, optimizer: str = "adamw", trained: int = 3) -> None:
        seed(0)
        self.model = Net()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        self.steps = 0
        for _ in range(trained):
            self.step()

    def step(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.model(torch.ones(5, 4)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.steps += 1
        return loss.detach()

    def measure(self, **options: Any) -> OverheadReport:
        quick = {"steps": 1, "rounds": 2, "activations": {"every": 4}, "log_every": 4}
        quick["also"] = [self.scheduler]
        return gradstat.measure_overhead(self.step, self.optimizer, self.model, **quick | options)

    def state(self) -> dict[str, Any]:
        return {
            "parameters": [(id(p), p.clone()) for p in self.model.parameters()],
            "gradients": [
                (id(p.grad), None if p.grad is None else p.grad.clone())
                for p in self.model.parameters()
            ],
            "buffers": [(name, id(b), b.clone()) for name, b in self.model.named_buffers()],
            "training": [module.training for module in self.model.modules()],
            "state": {
                id(p): {name: (id(v), torch.as_tensor(v).clone()) for name, v in entries.items()}
                for p, entries in self.optimizer.state.items()
            },
            "groups": [
                {**{k: torch.as_tensor(v) if isinstance(v, float) else v for k, v in group.items()},
                 "params": [id(p) for p in group["params"]]}
                for group in self.optimizer.param_groups
            ],
            "lr": [(id(group["lr"]), float(group["lr"])) for group in self.optimizer.param_groups],
            "schedule": self.scheduler.state_dict(),
            "hooks": hook_counts(self.optimizer),
            "forward_hooks": [len(module._forward_hooks) for module in self.model.modules()],
            "random": (random.getstate(), np.random.get_state()[1].tolist(),  # noqa: NPY002
                       torch.get_rng_state()),
        }  # fmt: skip


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [part for key in value for part in [torch.tensor(hash(key)), *flat(value[key])]]
    if isinstance(value, list | tuple):
        return [part for entry in value for part in flat(entry)]
    if isinstance(value, str | type(None)):
        return [torch.tensor(hash(value))]
    return [torch.as_tensor(value).detach()]


# ---- nothing is left behind ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "trained"), [("adamw", 0), *((name, 3) for name in OPTIMIZERS)]
)
def test_everything_is_as_before(optimizer, trained):
    training = Training(optimizer, trained)
    before = training.state()
    training.measure()
    after = training.state()
    for name in before:
        if name == "lr" and optimizer != "adamw-tensor-lr":  # floats have no identity to keep
            before[name], after[name] = ([v for _, v in s[name]] for s in (before, after))
        assert same_bits(flat(before[name]), flat(after[name])), name
    assert not hasattr(training.optimizer, "gradstat")


def test_what_comes_next_is_what_would_have_come():
    measured, other = Training(), Training()
    seed(1)
    measured.measure()
    for _ in range(5):
        measured.step()
    seed(1)
    for _ in range(5):
        other.step()
    assert same_bits(list(measured.model.parameters()), list(other.model.parameters()))


def test_a_step_that_fails_leaves_nothing_either():
    training = Training()
    before = training.state()

    def step() -> None:
        training.step()
        if training.steps == 30:
            raise ZeroDivisionError("as users do")

    with pytest.raises(ZeroDivisionError, match="as users do"):
        gradstat.measure_overhead(
            step, training.optimizer, training.model, rounds=2, also=[training.scheduler]
        )
    assert same_bits(flat(before), flat(training.state()))
    assert not hasattr(training.optimizer, "gradstat")


def test_a_change_would_be_seen():
    training = Training()
    before = training.state()
    training.step()
    after = training.state()
    same = [name for name in before if same_bits(flat(before[name]), flat(after[name]))]
    assert set(same) <= {"training", "hooks", "forward_hooks", "groups", "lr"}
    training.model.layers[1].train()
    assert training.state()["training"] != before["training"]


def test_every_block_starts_from_the_same_place():
    training = Training()
    losses: list[float] = []

    def step() -> torch.Tensor:
        loss = training.step()
        losses.append(float(loss))
        return loss

    report = gradstat.measure_overhead(
        step,
        training.optimizer,
        training.model,
        steps=1,
        rounds=2,
        also=[training.scheduler],
        activations=False,
        log=False,
        clip=None,
    )
    block = measure.WARMUP + report.steps
    tried = measure.WARMUP + 4 * (measure.WARMUP + 2)  # a trial, and a short block of four sides
    assert len(losses) == tried + (2 * 4 + 1) * block
    starts = losses[tried::block]
    assert starts == [losses[0]] * 9
    assert losses[tried : tried + block] == losses[-block:]
    assert len(set(losses)) > block / 2


# ---- the order and the arithmetic ---------------------------------------------------------------


class FakeClock:
    """A step of a side takes what it is said to take; the first round is slow."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.side = ""
        self.order: list[str] = []
        self.ran = 0

    def side_of(self, name: str) -> Side:
        @contextmanager
        def installed():
            self.side = name

            def step() -> None:
                self.ran += 1

            yield Work(step)
            self.side = ""

        return Side(name, installed)

    def block(self, work: Work, steps: int) -> Block:
        for _ in range(steps):
            work.step()
        self.order.append(self.side)
        slow = 10.0 if len(self.order) <= len(self.seconds) else 1.0
        return Block(slow * steps * self.seconds[self.side], slow * self.seconds[self.side] / 2)


def test_sides_take_turns_and_every_other_round_goes_backwards():
    clock = FakeClock({"nothing": 1.0, "clip": 2.0, "lean": 3.0, "full": 4.0})
    told: list[tuple[int, int]] = []
    names = list(clock.seconds)
    found = measure.run_rounds(
        [clock.side_of(name) for name in names], clock, 3, 5, lambda *now: told.append(now)
    )
    assert clock.order == [*names, *names[::-1], *names]
    assert clock.ran == 12 * (measure.WARMUP + 5)
    assert told == [(done, 12) for done in range(1, 13)]
    assert [block.total for block in found["full"]] == [200.0, 20.0, 20.0]


def test_figures():
    clock = FakeClock({"nothing": 1.0, "clip": 2.0, "lean": 1.1, "full": 1.5})
    names = list(clock.seconds)
    found = measure.run_rounds(
        [clock.side_of(name) for name in names], clock, 3, 4, lambda *_: None
    )
    result = figures(names, found, 4)
    plain, clip, ours = result["sides"]
    assert (plain.name, plain.typical_seconds, plain.mean_seconds) == ("nothing", 0.5, 1.0)
    assert (clip.name, clip.mean_seconds) == ("clip", 2.0)
    assert (ours.name, ours.mean_seconds) == ("gradstat", 1.5)
    against_nothing, against_clip = result["ratios"]
    assert against_nothing.mean == pytest.approx((1.5, 1.5, 1.5))  # a slow round hits all alike
    assert (against_clip.against, against_clip.typical) == ("clip", 0.75)
    lean, full = result["parts"]
    assert lean.seconds.value == pytest.approx(0.1)
    assert (full.name, full.share) == ("full", pytest.approx(0.4))
    assert full.seconds.high == pytest.approx(4.0)  # the slow round


def test_an_interval_holds_its_median_and_narrows_with_more_rounds():
    generator = np.random.default_rng(3)
    few, many = (estimate(generator.normal(1.0, 0.1, size).tolist()) for size in (6, 600))
    for found in (few, many):
        assert found.low <= found.value <= found.high
    assert many.high - many.low < (few.high - few.low) / 3
    values = [1.0, 1.1, 1.2, 5.0]
    assert estimate(values) == estimate(values)
    assert estimate(values).value == statistics.median(values)


def test_the_host_clock_adds_single_steps_up(monkeypatch):
    ticks = count(0, 2)
    monkeypatch.setattr(blocks.time, "perf_counter", lambda: float(next(ticks)))
    ran = []
    work = Work(lambda: ran.append("step"), lambda: ran.append("finish"))
    assert HostClock().block(work, 5) == Block(12.0, 2.0)  # the wait at the end counts
    assert ran == ["step"] * 5 + ["finish"]


def test_a_device_is_waited_for_around_a_block_and_never_within(monkeypatch):
    told: list[str] = []
    ticks = count(0, 5)

    class Event:
        def __init__(self, device: Any, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("record")
            self.at = len(told)

        def elapsed_time(self, end: Any) -> float:
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda _: told.append("wait"))
    monkeypatch.setattr(blocks.time, "perf_counter", lambda: float(next(ticks)))
    work = Work(lambda: told.append("step"), lambda: told.append("finish"))
    assert DeviceClock(torch.device("cuda")).block(work, 2) == Block(5.0, 2.0)
    assert told == ["wait", "record", "step", "record", "step", "record", "finish", "wait"]


@pytest.mark.needs_cuda
def test_everything_is_as_before_on_a_device():
    training = Training()
    training.model.cuda()
    inputs = torch.ones(64, 4, device="cuda")
    optimizer = torch.optim.AdamW(training.model.parameters(), fused=True)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = training.model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step()
    before = [p.clone() for p in training.model.parameters()]
    moments = {p: entries["exp_avg"].clone() for p, entries in optimizer.state.items()}
    random_state = torch.cuda.get_rng_state()
    report = gradstat.measure_overhead(step, optimizer, training.model, rounds=2)
    assert report.machine["device"] == torch.cuda.get_device_name()
    assert all(side.mean_seconds > 0 and side.typical_seconds > 0 for side in report.sides)
    assert same_bits(before, list(training.model.parameters()))
    assert all(torch.equal(optimizer.state[p]["exp_avg"], old) for p, old in moments.items())
    assert torch.equal(random_state, torch.cuda.get_rng_state())


@pytest.mark.parametrize(
    ("steps", "options", "log", "expected"),
    [
        (1, {}, False, 40),
        (40, {}, True, 40),
        (41, {}, True, 80),
        (50, {"activations": {"every": 3}}, False, 72),
        (1, {"activations": {"every": 16}, "every": 5}, False, 80),
        (1, {"activations": {"every": 16}, "every": 3, "log_every": 5}, True, 240),
        (100, {"activations": False, "every": 3}, False, 120),
    ],
)
def test_blocks_hold_whole_periods(steps, options, log, expected):
    assert measure.whole_blocks(steps, options, log) == expected


def test_as_many_rounds_as_fit():
    assert measure.rounds_within(60.0, 7.0) == 8
    assert measure.rounds_within(60.0, 60.0) == measure.MIN_ROUNDS
    assert measure.rounds_within(60.0, 0.001) == measure.MAX_ROUNDS
    assert measure.MIN_ROUNDS % 2 == measure.MAX_ROUNDS % 2 == 0


# ---- the sides ----------------------------------------------------------------------------------


def kept(training: Training) -> sides.Training:
    return sides.Training(
        training.step,
        training.optimizer,
        training.model,
        measure.Kept(training.optimizer, training.model),
    )


def test_each_side_has_one_part_more():
    training = Training(trained=0)
    found = sides.our_sides(kept(training), {"clip": "auto"}, log=True)
    probed, sampled, logged = [], [], []
    for side in found:
        with side.installed() as work:
            for _ in range(measure.WARMUP):
                work.step()
            work.finish()
            monitor = training.optimizer.gradstat
            assert monitor.step == measure.WARMUP
            assert "loss" in monitor.evidence().curves
            probed.append(len(monitor.evidence().probes.steps))
            sampled.append(monitor.activations is not None)
            if monitor.log is not None:
                (sink,) = monitor.log.sinks
                with gradstat.open_run(sink.path) as run:
                    logged.append((side.name, run.steps["step"].tolist()))
        assert not hasattr(training.optimizer, "gradstat")
    assert [side.name for side in found] == [
        "statistics and clipping", "probes of the diagnosis", "activations", "logging",
    ]  # fmt: skip
    assert probed == [0, 5, 5, 5]
    assert sampled == [False, False, True, True]
    assert logged == [("logging", list(range(1, measure.WARMUP + 1)))]
    assert not Path(sink.path).exists()


def test_without_a_model_there_are_no_activations():
    training = Training(trained=0)
    report = gradstat.measure_overhead(
        training.step, training.optimizer, steps=1, rounds=2, log=False
    )
    assert [part.name for part in report.parts] == [
        "statistics and clipping", "probes of the diagnosis",
    ]  # fmt: skip
    assert report.work == "parameters: 56 parameters in 6 tensors, AdamW"


def test_torch_clips_before_each_step(monkeypatch):
    training = Training(trained=0)
    clipped: list[Any] = []
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda p, limit: clipped.append((len(p), limit))
    )
    with sides.torch_side(kept(training)).installed() as work:
        work.step()
        work.step()
    assert clipped == [(6, sides.NEVER_REACHED)] * 2
    assert hook_counts(training.optimizer)[0] == 0


# ---- what is asked for --------------------------------------------------------------------------


def test_bad_arguments():
    training = Training()
    with pytest.raises(ArgumentTypeError, match="step_fn must be a function .* got int"):
        gradstat.measure_overhead(3, training.optimizer)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="optimizer must be a torch.optim.*got Net"):
        gradstat.measure_overhead(training.step, training.model)  # type: ignore[arg-type]
    with pytest.raises(ArgumentValueError, match="rounds must be at least 2, got 1"):
        training.measure(rounds=1)
    with pytest.raises(ArgumentValueError, match="steps must be at least 1, got 0"):
        training.measure(steps=0)
    with pytest.raises(ArgumentValueError, match=r"must call optimizer.step\(\), got 8 calls"):
        gradstat.measure_overhead(lambda: None, training.optimizer)
    with pytest.raises(ArgumentValueError, match="on_nonfinite must be"):
        training.measure(on_nonfinite="never")

    def careless() -> None:
        training.optimizer.gradstat.observe(loss=training.step())

    with pytest.raises(ArgumentValueError, match="must do without optimizer.gradstat"):
        gradstat.measure_overhead(careless, training.optimizer)
    gradstat.attach(training.optimizer)
    with pytest.raises(ArgumentValueError, match=r"not have gradstat attached.*gradstat.detach"):
        training.measure()


def test_the_report_in_80_columns_and_as_json(monkeypatch):
    monkeypatch.setattr(measure, "machine", lambda _: {"device": "cpu", "threads": 2})
    report = Training().measure()
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "Net: 56 parameters in 6 tensors, AdamW"
    assert lines[1] == "cpu, 2 threads; 2 rounds of 8 steps"
    for word in ("nothing", "clip_grad_norm_", "gradstat", "activations", "logging", "one look"):
        assert any(line.startswith(word) for line in lines)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["ratios"][0]["mean"]["low"] == report.ratios[0].mean.low
    assert plain["machine"] == {"device": "cpu", "threads": 2}
    assert report.render(plain=True) == str(report)
    pytest.importorskip("rich")
    coloured = report.render(plain=False)
    assert "\x1b[1m" in coloured
    assert len(coloured.splitlines()) == len(lines)
