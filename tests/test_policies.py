"""The policies at work in trainings: through `attach`, bad steps and checkpoints."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from policy_calls import Halving
from torch import Tensor, nn

import gradstat
from gradstat import _kernels
from gradstat.clipping.policy import Policy
from gradstat.clipping.resolve import AUTO

POLICIES: dict[str, Callable[[], object]] = {
    "auto": lambda: "auto",
    "global": lambda: gradstat.GlobalNorm(0.5),
    "per-layer": lambda: gradstat.PerLayer(0.2),
    "autoclip": lambda: gradstat.AutoClip(window=20),
    "zclip": lambda: gradstat.ZClip(warmup_steps=5),
    "adagc": lambda: gradstat.AdaGC(warmup_steps=5),
    "skip": lambda: gradstat.SkipOnSpike(sigma=3, window=20, min_history=5) | AUTO,
    "chain": lambda: [gradstat.ZClip(warmup_steps=5), gradstat.PerLayer(0.3), gradstat.AGC(0.1)],
    "value": lambda: gradstat.Value(0.01),
    "agc": lambda: gradstat.AGC(0.05),
    "own": Halving,
}


class Training:
    """A small network and its batches, stepping with gradients that a test may spoil."""

    def __init__(
        self, clip: object = None, *, kind: type[torch.optim.Optimizer] = torch.optim.SGD
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2)).double()
        self.optimizer = kind(self.model.parameters(), lr=0.05)  # type: ignore[call-arg]
        gradstat.attach(self.optimizer, self.model, clip=clip)  # type: ignore[arg-type]
        self.batches = torch.Generator().manual_seed(4)

    def backward(self) -> None:
        inputs = torch.randn(8, 6, dtype=torch.float64, generator=self.batches)
        self.optimizer.zero_grad()
        (self.model(inputs) - inputs[:, :2].sin()).square().mean().backward()

    def step(self, times: float = 1.0) -> None:
        self.backward()
        for gradient in self.gradients():
            gradient.mul_(times)
        self.optimizer.step()

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    @property
    def monitor(self) -> gradstat.Monitor:
        return self.optimizer.gradstat  # type: ignore[attr-defined,no-any-return]


def same(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_bad_steps_change_nothing_and_a_later_spike_is_still_held(name: str, bad: float) -> None:
    clean, dirty = Training(POLICIES[name]()), Training(POLICIES[name]())
    for step in range(30):
        clean.step()
        dirty.step()
        if step % 7 == 3:
            before = dirty.weights()
            dirty.step(times=bad)
            assert same(before, dirty.weights())
            clean.backward()  # draws the same batches
    assert same(clean.weights(), dirty.weights())
    assert dirty.monitor.skipped_steps - clean.monitor.skipped_steps == 4
    before = dirty.weights()
    dirty.step(times=1e6)
    moved = math.hypot(
        *(float((a - b).norm()) for a, b in zip(before, dirty.weights(), strict=True))
    )
    if name != "own":  # it only halves
        assert moved < 0.1


def test_all_zero_step_is_no_spike_and_no_skip() -> None:
    for policy in POLICIES.values():
        training = Training(policy())
        for step in range(12):
            training.step(times=0.0 if step % 3 == 0 else 1.0)
        assert training.monitor.skipped_steps == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", POLICIES)
def test_resumed_training_ends_where_the_uninterrupted_one_does(
    name: str, kind: type[torch.optim.Optimizer]
) -> None:
    whole = Training(POLICIES[name](), kind=kind)
    for _ in range(15):
        whole.step(times=2.0)
    resumed = Training(POLICIES[name](), kind=kind)
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    resumed.batches.set_state(whole.batches.get_state())
    for step in range(15):
        times = 50.0 if step == 10 else 1.0
        whole.step(times)
        resumed.step(times)
    assert same(whole.weights(), resumed.weights())
    assert resumed.monitor.clip_rate == whole.monitor.clip_rate
    assert resumed.monitor.skipped_steps == whole.monitor.skipped_steps


def test_global_norm_trains_as_torch_does() -> None:
    ours, torchs = Training(gradstat.GlobalNorm(0.3)), Training()
    for _ in range(20):
        ours.step()
        torchs.backward()
        norm = nn.utils.clip_grad_norm_(torchs.model.parameters(), 0.3)
        torchs.optimizer.step()
        assert ours.monitor.total_norm == pytest.approx(norm.item(), rel=1e-12)
    for a, b in zip(ours.weights(), torchs.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_value_trains_as_torch_does() -> None:
    ours, torchs = Training(gradstat.Value(0.01)), Training()
    for _ in range(20):
        ours.step()
        torchs.backward()
        nn.utils.clip_grad_value_(torchs.model.parameters(), 0.01)
        torchs.optimizer.step()
    assert same(ours.weights(), torchs.weights())
    assert ours.monitor.clip_rate == 1


def test_list_and_bar_mean_the_same() -> None:
    parts = (gradstat.PerLayer(0.1), gradstat.GlobalNorm(0.1), gradstat.Value(0.02))
    barred, listed = Training(parts[0] | parts[1] | parts[2]), Training(list(parts))
    for _ in range(10):
        barred.step()
        listed.step()
    assert same(barred.weights(), listed.weights())


def test_parameter_without_a_gradient_keeps_out_of_it() -> None:
    policies: list[Policy] = [gradstat.AdaGC(warmup_steps=2), gradstat.AGC(), gradstat.Value(0.1)]
    for policy in policies:
        training = Training(policy)
        for step in range(8):
            training.backward()
            training.model[2].bias.grad = None if step % 2 else training.model[2].bias.grad
            training.optimizer.step()
        assert math.isfinite(training.monitor.total_norm)


def test_new_parameter_group_leaves_what_adagc_knows_of_the_others() -> None:
    training = Training(gradstat.AdaGC(warmup_steps=3))
    for _ in range(6):
        training.step()
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    before = training.optimizer.state_dict()["gradstat"]["clipper"]
    training.optimizer.add_param_group({"params": [extra]})
    training.backward()
    extra.grad = torch.full((2,), 7.0, dtype=torch.float64)
    training.optimizer.step()
    after = training.optimizer.state_dict()["gradstat"]["clipper"]
    assert after["names"] == [*before["names"], "group1.param0"]
    counters = _kernels.NUM_CLIP_COUNTERS
    old, new = before["state"][counters:].tolist(), after["state"][counters:].tolist()
    assert new[0] == old[0] + 1
    assert new[-1] == pytest.approx(math.hypot(7, 7))
    np.testing.assert_allclose(new[1:5], old[1:], rtol=0.3)  # one step of the moving average
