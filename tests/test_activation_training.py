"""Real runs: networks that die, saturate, are merely sparse, or are rescued."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import gradstat
from gradstat.demo import load_digits

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    pytest.importorskip("sklearn")
    data = load_digits(0)
    return data.train_images.flatten(1), data.train_labels


def batches(digits: tuple[Tensor, Tensor], steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(digits[0]), (64,), generator=generator)
        yield digits[0][chosen], digits[1][chosen]


def fit(
    model: nn.Module, digits: tuple[Tensor, Tensor], *, steps: int, lr: float, scale: float = 1.0
) -> gradstat.Monitor:
    """Train; activations cover the last 11 to 20 steps, and gradients the last 10."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    gradstat.attach(optimizer, model, window=10, activations={"every": 1, "window": 20})
    monitor: gradstat.Monitor = optimizer.gradstat  # type: ignore[attr-defined]
    for images, labels in batches(digits, steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images * scale), labels)
        loss.backward()
        optimizer.step()
        monitor.observe(loss=loss)
    return copy.deepcopy(monitor)  # the optimizer ends here


def table_of(monitor: gradstat.Monitor) -> gradstat.ActivationTable:
    assert monitor.activations is not None
    return monitor.activations.table()


def deep(activation: type[nn.Module], *, layers: int, width: int, norm: bool) -> nn.Sequential:
    """Return a net of this many hidden layers and an output layer, with He's initial weights."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for n_in, n_out in pairwise([64, *[width] * layers]):
        linear = nn.Linear(n_in, n_out)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        parts += [linear, *([nn.BatchNorm1d(n_out)] if norm else []), activation()]
    return nn.Sequential(*parts, nn.Linear(width, 10))


def test_a_deep_relu_net_dies_and_batch_norm_rescues_it(digits):
    dying = fit(deep(nn.ReLU, layers=33, width=32, norm=False), digits, steps=80, lr=1.0)
    rows = list(table_of(dying))
    assert len(rows) == 33
    assert rows[-1].dead_fraction > 0.9
    assert sum(row.dead_units for row in rows) > 0.4 * 33 * 32
    assert all(row.saturated_fraction == 0.0 for row in rows)
    for witness, row in zip(dying.dead_units, rows, strict=True):
        assert (witness.site, witness.dead_units) == (row.name, row.dead_units)
        # A unit that never fires has a gradient row of zeros in every step.
        assert witness.dead_rows is not None
        assert witness.dead_rows >= row.dead_units
    assert "dead-units" in {finding.code for finding in dying.diagnose()}

    rescued = fit(deep(nn.ReLU, layers=33, width=32, norm=True), digits, steps=80, lr=0.1)
    rows = list(table_of(rescued))
    assert len(rows) == 33
    assert sum(row.dead_units for row in rows) < 0.03 * 33 * 32
    assert all(row.dead_fraction < 0.3 for row in rows)
    assert "dead-units" not in {finding.code for finding in rescued.diagnose()}


def test_sigmoids_saturate_on_inputs_that_are_not_scaled(digits):
    def shares(scale: float) -> list[float]:
        model = deep(nn.Sigmoid, layers=2, width=32, norm=False)
        with torch.no_grad():
            model[0].weight *= 3.0
        monitor = fit(model, digits, steps=40, lr=0.1, scale=scale)
        return [row.saturated_fraction for row in table_of(monitor)]

    unscaled, scaled = shares(255.0), shares(1.0)
    assert unscaled[0] > 0.9
    assert max(scaled) < 0.15


def test_sparse_is_not_dead(digits):
    """A layer of 90 % zeros, of which every unit fires for some image, has no finding."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(96).requires_grad_(False)
    nn.init.constant_(norm.bias, -1.3)  # a tenth of a normal distribution lies above
    model = nn.Sequential(nn.Linear(64, 96), norm, nn.ReLU(), nn.Linear(96, 10))
    monitor = fit(model, digits, steps=200, lr=0.3)
    row = table_of(monitor)["2/relu#0"]
    assert 0.88 < row.zero_fraction < 0.92
    assert row.dead_units == 0
    assert row.active_counts.min() > 0
    assert row.saturated_fraction == 0.0
    assert monitor.dead_units[0].dead_rows == 0
    losses = [observation.value for observation in monitor.observed("loss")]
    assert losses[-1] < 0.2 * losses[0]
    assert monitor.diagnose() == []


def test_leaky_units_do_not_die(digits):
    monitor = fit(deep(nn.LeakyReLU, layers=33, width=16, norm=False), digits, steps=60, lr=0.5)
    assert sum(row.dead_units for row in table_of(monitor)) == 0
