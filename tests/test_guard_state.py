"""Snapshots: a run that went back equals one that was never disturbed; files are whole or none."""

from __future__ import annotations

import logging
import math
import os
import random
import signal
import subprocess
import sys
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from small_training import (
    OPTIMIZERS,
    backward,
    make_model,
    monitor_of,
    optimizer_tensors,
    same_bits,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler

import gradstat
from gradstat import CutLR, Guard, RollBack
from gradstat.guard.schedules import scale_rates
from gradstat.guard.snapshots import DiskRing, read
from gradstat.guard.state import RunState

STEPS = 30


class Net(nn.Module):
    """Has buffers of all kinds, one that `state_dict` leaves out, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_model()
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        out: Tensor = self.body(self.dropout(self.norm(x)))
        return out


SCHEDULERS: dict[str, Any] = {
    "step": lambda o: lr_scheduler.StepLR(o, 5, 0.7),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [4, 12, 17], 0.5),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.97),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 50, eta_min=0.001),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7, eta_min=0.001),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.02, 4, cycle_momentum=False),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(
        o, 0.05, total_steps=60, cycle_momentum=False, three_phase=True
    ),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 60),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=6), lr_scheduler.StepLR(o, 5)], [6]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 9), lr_scheduler.ExponentialLR(o, 0.98)], o
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, min_lr=1e-4),
}


class Run:
    """A training in which all that has a state takes part."""

    def __init__(self, make: Any, schedule: Any, *, amp: bool = True, **options: Any) -> None:
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002
        torch.manual_seed(1)
        self.model = Net()
        self.optimizer = gradstat.attach(make(self.model.parameters()), self.model, clip="auto")
        self.scheduler = schedule(self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=4, enabled=amp)
        self.rates: list[float] = []
        self.guard = Guard(
            monitor_of(self.optimizer),
            [RollBack(rest=0)],
            scheduler=self.scheduler,
            scaler=self.scaler,
            **options,
        )

    def train(self, until: int, *, loss_told: float = 1.0) -> None:
        """Go on to this step; the monitor's count says which one is next."""
        for _ in range(until - monitor_of(self.optimizer).step):
            self.one_step(loss_told)

    def one_step(self, loss_told: float = 1.0) -> None:
        noise = random.random() + float(np.random.rand())  # noqa: NPY002
        self.optimizer.zero_grad()
        loss = self.model(torch.randn(8, 6) + noise).square().mean()
        monitor_of(self.optimizer).observe(loss=loss_told)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.after_step()
        self.rates.append(self.optimizer.param_groups[0]["lr"])

    def after_step(self) -> None:
        self.scaler.update()
        if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(1.0)
        else:
            self.scheduler.step()

    def everything(self) -> list[Any]:
        numbers = [random.random(), float(np.random.rand())]  # noqa: NPY002
        monitor = monitor_of(self.optimizer)
        return [
            *self.model.parameters(),
            *self.model.buffers(),
            *optimizer_tensors(self.optimizer),
            torch.rand(2),
            torch.tensor([*numbers, self.optimizer.param_groups[0]["lr"]]),
            torch.tensor([self.scaler.get_scale(), self.scaler._get_growth_tracker()]),
            torch.from_numpy(monitor.window),
            torch.tensor([monitor.step, monitor.clip_rate]),
        ]


def calm_and_disturbed(make: Any, schedule: Any, **options: Any) -> tuple[list[Any], list[Any]]:
    """Return all there is at the end of a run, and of one that went back from step 15 to 11."""
    calm = Run(make, schedule, snapshot_every=10, **options)
    calm.train(STEPS)
    expected = calm.everything()
    run = Run(make, schedule, snapshot_every=10, **options)
    run.train(12)
    for _ in range(3):
        run.one_step(math.nan)
    [action] = run.guard.actions
    assert (action.before["step"], action.after["step"]) == (15, 11)
    run.train(STEPS)
    return expected, run.everything()


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("make", [OPTIMIZERS["adamw-fused"], OPTIMIZERS["sgd-loop"]])
def test_going_back_leaves_no_trace(make, where, tmp_path):
    options = {"directory": tmp_path} if where == "disk" else {}
    assert same_bits(*calm_and_disturbed(make, SCHEDULERS["one cycle"], **options))


@pytest.mark.needs_cuda
@pytest.mark.parametrize("make", [OPTIMIZERS["adamw-fused"], OPTIMIZERS["sgd-foreach"]])
def test_going_back_on_a_device_leaves_no_trace(make):
    results = []
    for disturbed in (False, True):
        torch.manual_seed(1)
        model = Net().cuda()
        optimizer = gradstat.attach(make(model.parameters()), model)
        guard = Guard(monitor_of(optimizer), [RollBack(rest=0)], every=1, snapshot_every=10)
        while monitor_of(optimizer).step < STEPS:
            lost = disturbed and not guard.actions and monitor_of(optimizer).step >= 12
            loss = model(torch.randn(8, 6, device="cuda")).square().mean()
            monitor_of(optimizer).observe(loss=loss * math.nan if lost else loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert len(guard.actions) == disturbed
        state = [*model.parameters(), *model.buffers(), *optimizer_tensors(optimizer)]
        results.append([*state, torch.rand(2, device="cuda")])
    assert same_bits(*results)


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_every_scheduler_goes_back(schedule):
    assert same_bits(*calm_and_disturbed(OPTIMIZERS["sgd-fused"], schedule))


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_cut_scales_the_rest_of_a_schedule(schedule):
    calm, run = (Run(OPTIMIZERS["sgd-fused"], schedule) for _ in range(2))
    for this in (calm, run):
        this.train(5)
    scale_rates(run.optimizer, [run.scheduler], 0.25)
    assert run.scheduler.get_last_lr() == pytest.approx([run.optimizer.param_groups[0]["lr"]])
    for this in (calm, run):
        this.train(STEPS)
    assert run.rates[:5] == calm.rates[:5]
    assert run.rates[5:] == pytest.approx([rate * 0.25 for rate in calm.rates[5:]])


def test_a_learning_rate_in_a_tensor_stays_that_tensor():
    model = make_model()
    lr = torch.tensor(0.1)
    optimizer = gradstat.attach(torch.optim.SGD(model.parameters(), lr=lr, foreach=False), model)
    guard = Guard(monitor_of(optimizer), [RollBack(rest=0), CutLR(rest=0)])
    for told in (1.0, 1.0, math.nan, math.nan, math.nan):
        backward(model)
        monitor_of(optimizer).observe(loss=told)
        optimizer.step()
    assert [action.action for action in guard.actions] == ["roll-back", "cut-lr"]
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.05)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    make, schedule = OPTIMIZERS["adamw-loop"], SCHEDULERS["cosine"]
    calm = Run(make, schedule, amp=False, snapshot_every=10, directory=tmp_path)
    calm.train(13)
    calm.guard.lr_factor = 0.5
    calm.train(STEPS)
    expected = calm.everything()
    run = Run(make, schedule, amp=False, snapshot_every=10, directory=tmp_path)
    assert run.guard.resume() == 21
    run.after_step()
    assert run.guard.lr_factor == 0.5
    run.train(STEPS)
    assert same_bits(expected, run.everything())


def test_damaged_files_are_passed_over(tmp_path, caplog):
    run = Run(OPTIMIZERS["adamw-loop"], SCHEDULERS["step"], snapshot_every=5, keep=4,
              directory=tmp_path)  # fmt: skip
    run.train(18)
    paths = sorted(tmp_path.iterdir())
    assert [path.name[9:-3].lstrip("0") for path in paths] == ["1", "6", "11", "16"]
    whole = paths[3].read_bytes()
    paths[3].write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(paths[2]) as archive:
        member = next(name for name in archive.namelist() if name.endswith("data/0"))
        data = archive.read(member)
    paths[2].write_bytes(paths[2].read_bytes().replace(data, bytes(len(data))))
    assert torch.load(paths[2], weights_only=True)["step"] == 11  # torch does not see it
    (tmp_path / "snapshot-000000000099.pt.partial").write_bytes(whole[:100])
    fresh = Run(OPTIMIZERS["adamw-loop"], SCHEDULERS["step"], directory=tmp_path)
    with caplog.at_level(logging.WARNING, "gradstat"):
        assert fresh.guard.resume() == 6
    texts = sorted(record.getMessage() for record in caplog.records)
    for text, path in zip(texts, paths[2:], strict=True):
        assert f"{path} cannot be read and is ignored" in text
    assert not list(tmp_path.glob("*.partial"))


def test_an_empty_directory_resumes_nothing(tmp_path):
    run = Run(OPTIMIZERS["sgd-loop"], SCHEDULERS["step"], directory=tmp_path / "new")
    assert run.guard.resume() is None


def test_a_snapshot_of_another_model_changes_nothing(tmp_path):
    Run(OPTIMIZERS["sgd-loop"], SCHEDULERS["step"], directory=tmp_path).train(2)
    model = make_model()
    optimizer = gradstat.attach(OPTIMIZERS["sgd-loop"](model.parameters()), model)
    guard = Guard(monitor_of(optimizer), directory=tmp_path)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(gradstat.ArgumentValueError, match=r"differs in '0.weight'"):
        guard.resume()
    assert same_bits(before, list(model.parameters()))


def same_model(make: Any, schedulers: Any = ()) -> tuple[nn.Module, RunState]:
    model = make_model()
    optimizer = make(model)
    return model, RunState(lambda: optimizer, model, [s(optimizer) for s in schedulers], None)


def of_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def in_two_groups(model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)


@pytest.mark.parametrize(
    ("make", "schedulers", "words"),
    [
        (lambda model: torch.optim.Adam(model.parameters()), (), "Adam"),
        (in_two_groups, (), r"\[1, 3\]"),
        (of_sgd, (SCHEDULERS["step"],), "StepLR"),
    ],
    ids=["optimizer", "groups", "scheduler"],
)
def test_a_snapshot_of_another_program_changes_nothing(make, schedulers, words):
    _, written = same_model(of_sgd)
    model, state = same_model(make, schedulers)
    with torch.no_grad():
        model[0].weight.fill_(7.0)
    with pytest.raises(gradstat.ArgumentValueError, match=words):
        state.restore(written.take())
    assert (model[0].weight == 7).all()


def test_a_snapshot_of_another_layout_is_refused():
    _, state = same_model(of_sgd)
    with pytest.raises(gradstat.ArgumentValueError, match="must be of layout 2, got 1"):
        state.restore(state.take() | {"version": 1})


@pytest.mark.parametrize("content", [{"a": 1}, [1.0]])
def test_a_file_that_is_no_snapshot_is_passed_over(content, tmp_path, caplog):
    torch.save(content, tmp_path / "snapshot-000000000099.pt")
    run = Run(OPTIMIZERS["sgd-loop"], SCHEDULERS["step"], directory=tmp_path)
    assert run.guard.resume() is None
    assert "holds something else than a snapshot" in caplog.text


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
def test_a_full_disk_costs_the_newest_snapshots_and_not_the_guard(tmp_path, caplog):
    import resource

    run = Run(OPTIMIZERS["sgd-loop"], SCHEDULERS["step"], directory=tmp_path, snapshot_every=5)
    run.train(2)
    limits, told = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    try:
        run.train(8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, told)
    assert "no snapshot could be written after step 6" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot-000000000001.pt"]
    run.train(12)
    assert len(list(tmp_path.iterdir())) == 2
    for _ in range(3):
        run.one_step(math.nan)
    assert [action.action for action in run.guard.actions] == ["roll-back"]


def test_a_parameter_outside_of_the_model_goes_back():
    model, scale = make_model(), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
    state = RunState(lambda: optimizer, model, (), None)
    taken = state.take()
    with torch.no_grad():
        scale.fill_(7.0)
    state.restore(taken)
    assert scale.tolist() == [1.0, 1.0]


def test_the_ring_on_disk_holds_no_more_than_it_should(tmp_path):
    ring = DiskRing(tmp_path, keep=2)
    for step in (1, 2, 3, 3):
        ring.put({"step": step})
    assert [read(path)["step"] for path in sorted(tmp_path.iterdir())] == [2, 3]
    ring.drop_newest()
    assert len(ring) == 1
    state = ring.newest()
    assert state is not None
    assert state["step"] == 2


# Forks a training that writes a snapshot after every step, kills it at a random moment, and loads
# what it finds, fifty times, and then until one has died while writing: torch is imported once.
KILLED = """
import os, random, signal, sys, time, torch, gradstat
from pathlib import Path

def train(directory, steps, begun=lambda: None):
    model = torch.nn.Linear(64, 64)
    optimizer = gradstat.attach(torch.optim.Adam(model.parameters()), model, diagnose=False)
    rules = [gradstat.RollBack()]
    gradstat.Guard(optimizer.gradstat, rules, directory=directory, snapshot_every=1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.ones(4, 64)).square().mean()
        optimizer.gradstat.observe(loss=loss)
        loss.backward()
        optimizer.step()
        begun()

torch.set_num_threads(1)
train(Path(sys.argv[1]) / "first", 3)  # imports what torch imports late
loaded = partial = 0
for round in range(1000):
    if round >= 50 and partial:
        break
    directory = Path(sys.argv[1]) / str(round)
    directory.mkdir()
    tells, told = os.pipe()
    child = os.fork()
    if child == 0:
        train(directory, 10**6, lambda: os.write(told, b".") if round % 2 else None)
    os.close(told)
    if round % 2:  # half of them have written one, however slow the machine is
        os.read(tells, 1)
    time.sleep(random.uniform(0.0, 0.08))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(tells)
    for path in directory.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert path.name == f"snapshot-{state['step']:012d}.pt"
        assert all(t.isfinite().all() for t in state["parameters"].values())
        loaded += 1
    partial += len(list(directory.glob("*.partial")))
print(loaded, partial)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_a_whole_snapshot_or_none(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded, partial = map(int, done.stdout.split())
    assert loaded >= 20  # most had time for one
    assert partial >= 1  # and some died while writing: that is what was tried
