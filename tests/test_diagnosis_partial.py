"""What the diagnosis says where little is observed, or a run looks as if it learnt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diagnosed_runs import ROWS, classes, named, net, numbers, raised, train
from torch import Tensor, nn
from torch.nn import functional

import gradstat
from gradstat.diagnosis import Finding
from gradstat.diagnosis.causes import rank


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def deep(activation: Callable[[], nn.Module], depth: int, width: int = 16) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(8, width), activation()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def sgd(model: nn.Module, lr: float = 0.1, momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum=momentum)


def test_a_loss_that_falls_to_an_offset_does_not_hide_layers_that_stand_still() -> None:
    x, y = numbers(3)
    model = deep(nn.Sigmoid, 12)
    monitor = train(model, (x, y + 2), functional.mse_loss, optimizer=sgd(model), see=("loss",))
    assert raised(monitor)[0] == "vanishing-gradient"


def test_a_deep_plain_net_of_small_weights_vanishes_before_its_units_die() -> None:
    """torch's default is a gain of 0.58: what reaches the last layers is their biases."""
    model = deep(nn.ReLU, 20)
    monitor = train(model, classes(), functional.cross_entropy, optimizer=sgd(model))
    codes = raised(monitor)
    assert codes[0] == "vanishing-gradient"
    assert "dead-units" in codes


def test_units_killed_after_the_first_steps_are_told_by_gradients_that_died() -> None:
    """Without any observation; the window of the activations still holds steps when they lived."""
    model = deep(nn.ReLU, 3)
    x = torch.rand(ROWS, 8)
    adam = torch.optim.Adam(model.parameters(), 0.5)
    monitor = train(model, (x, torch.randint(3, (ROWS,))), functional.cross_entropy,
                    optimizer=adam, see=())  # fmt: skip
    assert raised(monitor)[0] in ("dead-units", "lr-too-high")


def test_a_schedule_that_ends_early_is_named_though_something_was_learnt() -> None:
    x, y = classes(8)
    model = net(n_out=8)
    monitor = train(model, (x, y), functional.cross_entropy, optimizer=sgd(model, 0.5),
                    schedule=lambda step: 0.7**step, steps=200, val=(x, y))  # fmt: skip
    assert raised(monitor)[0] == "lr-too-low"


def test_a_start_next_to_the_saddle_at_zero_is_not_the_rate_s_fault() -> None:
    x, y = numbers()
    model = deep(nn.Tanh, 6)
    model[-1] = nn.Linear(16, 1)
    for layer in model[::2]:
        nn.init.normal_(layer.weight, 0.0, 0.022)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    monitor = train(model, (x, y / y.std()), functional.mse_loss, optimizer=sgd(model), steps=200)
    assert raised(monitor)[0] == "bad-initialization"


def test_swings_by_a_momentum_near_one_are_named_though_the_loss_falls() -> None:
    x = torch.linspace(-3, 3, 64)[:, None]
    y = torch.sin(2 * x)
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 1))
    monitor = train(model, (x, y), functional.mse_loss, optimizer=sgd(model, 0.05, 0.999),
                    steps=800, val=(x, y), see=("loss",))  # fmt: skip
    assert set(raised(monitor)[:1]) <= {"oscillating-loss", "lr-too-high", "diverging-loss"}
    assert raised(monitor)


def test_signals_that_grow_a_thousandfold_are_named_though_the_loss_falls() -> None:
    model = deep(nn.ReLU, 7, width=64)
    for layer in model[::2]:
        nn.init.normal_(layer.weight)  # type: ignore[arg-type]
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    monitor = train(model, classes(), functional.cross_entropy, optimizer=adam, see=("loss",))
    assert raised(monitor)[0] in ("bad-initialization", "exploding-gradient")


def test_a_loss_without_end_below_zero_diverges_whatever_its_last_steps_do() -> None:
    model = net(n_out=1)
    adam = torch.optim.Adam(model.parameters(), 0.1)
    monitor = train(model, numbers(), lambda o, t: -((o - t) ** 4).sum(), optimizer=adam,
                    steps=200)  # fmt: skip
    assert raised(monitor)[0] == "diverging-loss"


def test_a_normalisation_of_one_feature_lets_nothing_in() -> None:
    x = torch.rand(ROWS, 1) * 6
    model = nn.Sequential(nn.LayerNorm(1), nn.Linear(1, 32), nn.ReLU(), nn.Linear(32, 1))
    monitor = train(model, (x, torch.sin(x)), functional.mse_loss, steps=200)
    assert raised(monitor)[0] == "constant-predictions"


def test_targets_that_stand_for_a_missing_value_are_named() -> None:
    x, y = numbers()
    y = torch.where(torch.rand_like(y) < 0.05, -9999.0, y)
    assert raised(train(net(n_out=1), (x, y), functional.mse_loss))[0] == "bad-targets"


def test_a_softmax_over_the_rows_is_named() -> None:
    model = nn.Sequential(*net(), nn.Softmax(0))
    monitor = train(model, classes(), functional.cross_entropy)
    assert raised(monitor)[0] == "loss-output-mismatch"


def test_xor_on_a_plateau_is_no_fault_of_its_targets() -> None:
    """The same rows in each batch, of two classes that are not in blocks: no critic of a GAN."""
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
    attached = sgd(model)
    monitor = gradstat.attach(attached, model).gradstat  # type: ignore[attr-defined]
    for _ in range(600):
        outputs: Tensor = model(x)
        loss = functional.mse_loss(outputs, y)
        monitor.observe(inputs=x, outputs=outputs, targets=y, loss=loss)
        attached.zero_grad()
        loss.backward()
        attached.step()
    assert named(monitor, "flat-loss")
    assert raised(monitor)[0] != "bad-targets"


def test_text_that_is_its_own_target_is_found_in_a_flattened_loss_too() -> None:
    tokens = torch.randint(12, (ROWS, 6))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(12, 16), nn.Linear(16, 12)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.table(x)).flatten(0, 1)
            return result

    model = Model()
    adam = torch.optim.Adam(model.parameters(), 0.01)
    monitor = gradstat.attach(adam, model).gradstat  # type: ignore[attr-defined]
    for step in range(80):
        x = tokens[step * 4 % ROWS :][:32]
        outputs = model(x)
        loss = functional.cross_entropy(outputs, x.flatten())
        monitor.observe(inputs=x, outputs=outputs, targets=x.flatten(), loss=loss)
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert raised(monitor)[0] == "zero-loss"


def test_a_gradient_that_spoils_the_weights_comes_before_the_loss_that_it_spoils() -> None:
    """Told of the first such step when the window has long forgotten it."""
    x, y = numbers()
    x[40] = 0.0

    def root(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) ** 2).mean() + 1e-3 * outputs.abs().sqrt().mean()

    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 1, bias=False))
    monitor = train(model, (x, y), root, steps=400, see=("loss",))
    assert monitor.evidence().loss is not None
    assert monitor.evidence().first_nonfinite is not None
    assert raised(monitor)[:2] == ["nonfinite-gradient", "nonfinite-loss"]


def test_branches_that_start_at_zero_and_wake_are_no_bad_start() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Linear(8, 8)
            nn.init.zeros_(self.branch.weight)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(self.branch(x))

    model = nn.Sequential(*(Block() for _ in range(10)), nn.Linear(8, 3))
    assert raised(train(model, classes(), functional.cross_entropy, see=())) == []


def test_a_spike_of_the_rate_between_two_probes_is_seen_by_what_it_left() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    x, y = classes()
    monitor = train(model, (x, y), functional.cross_entropy, optimizer=sgd(model, 0.05, 0.8),
                    schedule=lambda step: 3e4 if 10 <= step < 13 else 1.0, steps=200)  # fmt: skip
    assert raised(monitor)[0] in ("lr-too-high", "dead-units")
    assert "lr-too-high" in raised(monitor)


@pytest.mark.parametrize(
    ("by_design", "first"), [(0.85, "constant-predictions"), (0.75, "plateau")]
)
def test_constant_outputs_cause_a_plateau_where_they_are_so_by_design(
    by_design: float, first: str
) -> None:
    findings = [
        Finding(code, "warning", confidence, "It is so.", ("do this",))
        for code, confidence in (("plateau", 0.76), ("constant-predictions", by_design))
    ]
    assert rank(findings)[0].code == first


def test_a_run_far_above_a_guess_has_not_overfitted() -> None:
    x, y = numbers()
    model = nn.Linear(8, 1)
    nn.init.constant_(model.weight, 30.0)
    monitor = train(model, (x, y), functional.mse_loss, optimizer=sgd(model, 5e-4),
                    val=(3 * x, y), steps=200)  # fmt: skip
    assert named(monitor, "overfitting") == []


@pytest.mark.parametrize("large", [False, True])
def test_without_a_model_a_table_is_told_from_a_layer_that_starts_too_large(large: bool) -> None:
    model = nn.Sequential(nn.Embedding(12, 32), nn.Flatten(), nn.Linear(192, 32), nn.ReLU(),
                          nn.Linear(32, 12))  # fmt: skip
    if large:
        for layer in (model[2], model[4]):
            nn.init.normal_(layer.weight, std=2.0)
    adam = torch.optim.Adam(model.parameters(), 0.003)
    monitor = gradstat.attach(adam).gradstat  # type: ignore[attr-defined]
    tokens = torch.randint(12, (ROWS, 6))
    for step in range(60):
        x = tokens[step * 16 % ROWS :][:32]
        loss = functional.cross_entropy(model(x), x[:, 0])
        monitor.observe(loss=loss)
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert bool(named(monitor, "bad-initialization")) == large
