"""`lr_range_test`: its curve, what it suggests, and that it leaves everything as it was."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from probe_models import classes, everything, generator, mlp, optimizer_state, same, state_of
from small_training import monitor_of
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

import gradstat
from gradstat.lr_range import _result

pytestmark = pytest.mark.usefixtures("one_torch_thread")

CE = F.cross_entropy


def loader(rows: int = 256, **options: Any) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*classes(rows)), batch_size=32, shuffle=True, **options)


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


# ---- the curve ----------------------------------------------------------------------------------


def test_rates_rise_geometrically_and_the_loss_falls_then_bursts():
    model = mlp()
    found = gradstat.lr_range_test(model, sgd(model), CE, loader())
    assert len(found.lrs) == len(found.losses) == len(found.smoothed) < 100  # it stops early
    assert found.lrs[0] == pytest.approx(1e-7)
    np.testing.assert_allclose(found.lrs[1:] / found.lrs[:-1], 1e8 ** (1 / 99))
    assert found.suggestion is not None
    assert found.largest is not None
    assert 1e-3 < found.suggestion < found.largest < 1
    last = found.losses[-1]
    assert not math.isfinite(last) or found.losses[-5:].mean() > 3.9 * found.smoothed.min()


def test_the_suggestion_trains_and_ten_times_the_largest_does_not():
    model = mlp()
    found = gradstat.lr_range_test(model, sgd(model), CE, loader())

    def loss_after(lr: float) -> float:
        model = mlp()
        optimizer = sgd(model, lr=lr)
        inputs, targets = classes(256)
        for _ in range(60):
            optimizer.zero_grad()
            CE(model(inputs), targets).backward()
            optimizer.step()
        return CE(model(inputs), targets).item()

    assert loss_after(found.suggestion) < 0.5 * math.log(4)
    worse = loss_after(30 * found.largest)
    assert not worse < 0.5 * math.log(4)


def test_steepest_descent_of_a_known_curve():
    lrs = np.geomspace(1e-5, 1.0, 100)
    falls = 2 - np.tanh(np.log10(lrs / 1e-2))  # steepest at 1e-2
    bursts = falls + (lrs / 0.3) ** 4
    found = _result(lrs, bursts)
    assert found.suggestion == pytest.approx(1e-2, rel=0.15)
    assert found.largest == pytest.approx(lrs[bursts.argmin()], rel=0.3)


def test_noise_alone_suggests_nothing():
    losses = 2 + 0.1 * torch.randn(100, generator=generator(0)).double().numpy()
    found = _result(np.geomspace(1e-7, 10, 100), losses)
    assert found.suggestion is None
    assert found.largest is None
    assert str(found).startswith("lr_range_test: no rate lowers the loss clearly (100 rates")


def test_a_loss_that_is_not_finite_ends_it():
    model, seen = mlp(), []

    def step(model: nn.Module, batch: Any) -> Tensor:
        seen.append(None)
        return CE(model(batch[0]), batch[1]) * (math.nan if len(seen) == 20 else 1)

    found = gradstat.lr_range_test(model, sgd(model), loader=loader(), step=step)
    assert len(found.losses) == 20
    assert math.isnan(found.losses[-1])
    assert np.isfinite(found.smoothed).all()


def test_groups_keep_their_ratios():
    model = mlp()
    seen = []

    class Watching(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append([float(group["lr"]) for group in self.param_groups])
            return super().step(closure)

    optimizer = Watching(
        [{"params": model[0].parameters(), "lr": 0.01},
         {"params": model[2].parameters(), "lr": torch.tensor(0.1)}], lr=1.0
    )  # fmt: skip
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)  # warms up from 0
    gradstat.lr_range_test(model, optimizer, CE, loader(), steps=10, end=1e-3)
    np.testing.assert_allclose([low / high for low, high in seen], 0.1, rtol=1e-5)
    assert seen[0][1] == pytest.approx(1e-7)
    assert optimizer.param_groups[1]["lr"].item() == 0.0


def test_a_short_loader_is_gone_through_again_and_an_iterator_is_not():
    model = mlp()
    found = gradstat.lr_range_test(model, sgd(model), CE, [classes(8)], steps=20, end=1e-3)
    assert len(found.lrs) == 20
    batches = iter([classes(8)] * 12)
    found = gradstat.lr_range_test(model, sgd(model), CE, batches, steps=20, end=1e-3)
    assert len(found.lrs) == 12


def test_a_model_in_evaluation_mode_is_trained_in_training_mode():
    model = mlp().eval()
    modes = []

    def step(copy: nn.Module, batch: Any) -> Tensor:
        modes.append(copy.training)
        return CE(copy(batch[0]), batch[1])

    gradstat.lr_range_test(model, sgd(model), loader=loader(), step=step, steps=10, end=1e-3)
    assert all(modes)
    assert not model.training


# ---- nothing is changed -------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_model_optimizer_and_random_numbers_stay_as_they_are(fails, attached):
    model = everything()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    if attached:
        gradstat.attach(optimizer, model, clip=gradstat.GlobalNorm(1.0))
    for _ in range(3):
        optimizer.step()
        scheduler.step()
    own = generator(9)
    batches = loader(generator=own)
    passes = []

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        passes.append(None)
        if fails and len(passes) == 4:
            raise RuntimeError("out of luck")
        return CE(outputs, targets)

    before, known = state_of(model), optimizer_state(optimizer)
    drawn, history = own.get_state(), attached and monitor_of(optimizer).state_dict()
    if fails:
        with pytest.raises(RuntimeError, match="out of luck"):
            gradstat.lr_range_test(model, optimizer, loss_fn, batches)
    else:
        gradstat.lr_range_test(model, optimizer, loss_fn, batches, steps=20)
    assert len(passes) >= 4
    assert same(before, state_of(model))
    assert same(known, optimizer_state(optimizer))
    assert torch.equal(drawn, own.get_state())
    if attached:
        monitor = monitor_of(optimizer)
        assert monitor.step == 3
        assert same(history, monitor.state_dict())
        assert monitor.activations is None or monitor.activations.steps == 3
    optimizer.step()
    scheduler.step()  # no warning: the scheduler has not seen anything either


def test_the_wrapper_and_a_scaler_are_left_alone():
    model = mlp()
    optimizer = gradstat.GradStatOptimizer(sgd(model), model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before, scale = state_of(model), scaler.state_dict()
    found = gradstat.lr_range_test(model, optimizer, CE, loader(), steps=40, scaler=scaler)
    assert found.suggestion is not None or len(found.lrs) == 40
    assert same(before, state_of(model))
    assert scaler.state_dict() == scale
    assert optimizer.gradstat.step == 0


# ---- the result ---------------------------------------------------------------------------------


def test_it_prints_what_to_try():
    lrs = np.geomspace(1e-5, 1.0, 100)
    found = _result(lrs, 2 - np.tanh(np.log10(lrs / 1e-2)) + (lrs / 0.3) ** 4)
    assert str(found).startswith("lr_range_test: try lr=0.0")
    assert str(found).endswith("(100 rates from 1e-05 to 1)")


class Axes:
    """Takes note of what is drawn."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.calls.append(name)


def test_it_draws_on_axes_and_asks_for_matplotlib(monkeypatch):
    lrs = np.geomspace(1e-5, 1.0, 100)
    found = _result(lrs, 2 - np.tanh(np.log10(lrs / 1e-2)) + (lrs / 0.3) ** 4)
    axes = Axes()
    assert found.plot(axes) is axes
    assert axes.calls == ["plot", "plot", "axvline", "axvline", "set", "legend"]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(gradstat.MissingPackageError, match="pip install matplotlib"):
        found.plot()
