"""The gradient noise scale against gradients whose covariance is known."""

from __future__ import annotations

import math

import pytest
import torch
from probe_models import classes, everything, generator, same, state_of
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import gradstat
from gradstat import NoiseScale, noise_scale

pytestmark = pytest.mark.usefixtures("one_torch_thread")

FEATURES = 20


def linear_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Each row's gradient by the weights is the row itself."""
    del targets
    return outputs.mean()


def rows(n: int, *, seed: int, mean: float = 0.5, deviation: float = 2.0) -> Tensor:
    return mean + deviation * torch.randn(n, FEATURES, generator=generator(seed)).double()


def model() -> nn.Module:
    return nn.Linear(FEATURES, 1, bias=False).double()


def test_a_known_covariance():
    estimates = [
        noise_scale(model(), linear_loss, (x := rows(2048, seed=seed), x[:, 0]), splits=16)
        for seed in range(8)
    ]
    signal = sum(estimate.signal for estimate in estimates) / 8
    noise = sum(estimate.noise for estimate in estimates) / 8
    assert signal == pytest.approx(FEATURES * 0.5**2, rel=0.1)
    assert noise == pytest.approx(FEATURES * 2.0**2, rel=0.1)
    assert noise / signal == pytest.approx(16, rel=0.15)


def test_it_is_the_unbiased_variance_of_the_parts():
    inputs = rows(48, seed=3)
    found = noise_scale(model(), linear_loss, (inputs, inputs[:, 0]), splits=4)
    means = inputs.view(4, 12, FEATURES).mean(1)
    noise = 12 * means.var(0, correction=1).sum().item()
    whole = inputs.mean(0)
    assert found.noise == pytest.approx(noise, rel=1e-9)
    assert found.signal == pytest.approx((whole @ whole).item() - noise / 48, rel=1e-9)
    assert found.batch_size == 48
    assert found.scale == found.noise / found.signal


def test_norms_that_training_gives_are_enough():
    inputs = rows(48, seed=3)
    micro = inputs.view(4, 12, FEATURES).mean(1)
    small = micro.square().sum(1).mean().sqrt().item()
    big = inputs.mean(0).norm().item()
    found = noise_scale(model(), linear_loss, (inputs, inputs[:, 0]), splits=4)
    by_hand = NoiseScale.from_norms(small, big, 12, 48)
    assert by_hand.signal == pytest.approx(found.signal)
    assert by_hand.noise == pytest.approx(found.noise)


def test_rows_that_agree_have_no_noise():
    inputs = rows(1, seed=0).expand(32, -1)
    found = noise_scale(model(), linear_loss, (inputs, inputs[:, 0]))
    assert found.noise == pytest.approx(0.0, abs=1e-9)
    assert found.finding is None


def test_leftover_rows_are_left_out_and_dicts_do():
    inputs = rows(50, seed=3)
    found = noise_scale(model(), batch={"x": inputs}, step=lambda m, b: m(b["x"]).mean(), splits=4)
    assert found == noise_scale(model(), linear_loss, (inputs[:48], inputs[:48, 0]), splits=4)


def test_nothing_is_changed():
    trained, (inputs, targets) = everything(), classes()
    before = state_of(trained)
    noise_scale(trained, F.cross_entropy, (inputs, targets))
    assert same(before, state_of(trained))


# ---- advice -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "words"),
    [(16, "twice the batch would need nearly half the steps"), (100, None), (400, None),
     (1600, "half the batch would need hardly more steps")],
)  # fmt: skip
def test_advice_follows_the_ratio(batch_size, words):
    finding = NoiseScale(signal=0.01, noise=2.0, batch_size=batch_size).finding
    if words is None:
        assert finding is None
        return
    assert finding is not None
    assert (finding.code, finding.severity) == ("batch-size", "info")
    assert words in finding.explanation
    values = {measure.name: measure.value for measure in finding.evidence}
    assert values["steps over the least possible"] == pytest.approx(1 + 200 / batch_size)
    assert values["rows over the least possible"] == pytest.approx(1 + batch_size / 200)


def test_a_signal_lost_in_noise():
    estimate = NoiseScale(signal=-0.1, noise=2.0, batch_size=32)
    assert estimate.scale == math.inf
    assert estimate.finding is not None
    assert "lost in its noise" in estimate.finding.explanation


def test_a_monitor_averages_both_apart():
    net = nn.Linear(2, 1)
    optimizer = gradstat.attach(torch.optim.SGD(net.parameters(), lr=0.1), net, diagnose=False)
    monitor = optimizer.gradstat
    assert monitor.coverage()["batch-size"].startswith("needs gradient_signal")
    # The mean of the ratios would be far off: one signal is all but 0.
    for signal, noise in ((0.001, 8.0), (0.039, 0.0)):
        monitor.observe(**NoiseScale(signal, noise, 16).observed)
    (finding,) = monitor.diagnose()
    assert finding.code == "batch-size"
    assert finding.evidence[0].value == pytest.approx(4.0 / 0.02)
