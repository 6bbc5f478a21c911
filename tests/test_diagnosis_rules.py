"""Rules one by one: small runs that show a fault."""

from __future__ import annotations

import pytest
import torch
from diagnosed_runs import ROWS, LossFunction, classes, named, net, numbers, raised, train
from torch import Tensor, nn
from torch.nn import functional

import gradstat
from gradstat.diagnosis import Case


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# ---- which loss ----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.25, 1.0, 9.0])
def test_a_loss_is_known_by_any_constant_multiple(factor: float) -> None:
    loss_fn: LossFunction = lambda o, t: factor * functional.cross_entropy(o, t)  # noqa: E731
    monitor = train(net(), classes(), loss_fn)
    task = Case(monitor.evidence()).task
    assert task.loss is not None
    assert task.loss.name == "cross-entropy"
    assert task.loss.factor == pytest.approx(factor, rel=1e-3)
    assert task.chance is not None
    assert 0.9 < task.chance / factor < 1.1
    assert raised(monitor) == []


def test_a_loss_that_is_maximised_is_said_to_be() -> None:
    monitor = train(net(), classes(), lambda o, t: -functional.cross_entropy(o, t))
    assert raised(monitor)[0] == "diverging-loss"


def test_a_loss_without_a_lower_bound_is_told_by_outputs_that_grow() -> None:
    linear: LossFunction = lambda o, t: (o * (t - 0.5)).mean()  # noqa: E731
    model = net(n_out=1)
    adam = torch.optim.Adam(model.parameters(), 0.1)
    monitor = train(model, numbers(), linear, steps=300, optimizer=adam)
    assert raised(monitor)[0] == "diverging-loss"


# ---- outputs that do not fit ---------------------------------------------------------------------


def test_a_sigmoid_before_the_cross_entropy_is_named() -> None:
    loss_fn: LossFunction = functional.cross_entropy
    monitor = train(nn.Sequential(*net(), nn.Sigmoid()), classes(), loss_fn)
    assert raised(monitor)[0] == "loss-output-mismatch"


@pytest.mark.parametrize("columns", [(0.3, 0.05, 0.2), (0.9, 0.8, 0.85)])
def test_logits_that_lie_between_0_and_1_by_chance_are_no_probabilities(
    columns: tuple[float, ...],
) -> None:
    model = nn.Linear(8, 3)
    with torch.no_grad():
        model.weight.mul_(0.01)
        model.bias.copy_(torch.tensor(columns))
    slow = torch.optim.SGD(model.parameters(), 1e-5)
    monitor = train(model, classes(), functional.cross_entropy, optimizer=slow)
    assert named(monitor, "loss-output-mismatch") == []


def test_a_softmax_where_several_labels_hold_is_named() -> None:
    x, y = numbers(5)
    model = nn.Sequential(*net(n_out=5), nn.Softmax(-1))
    monitor = train(model, (x, (y > 0).float()), functional.binary_cross_entropy)
    assert raised(monitor)[0] == "loss-output-mismatch"
    well = train(net(n_out=5), (x, (y > 0).float()), functional.binary_cross_entropy_with_logits)
    assert raised(well) == []


def test_outputs_far_from_0_are_not_taken_for_rectified() -> None:
    x, y = numbers()
    model = net(n_out=1)
    nn.init.constant_(model[-1].bias, 20.0)  # type: ignore[arg-type]
    sgd = torch.optim.SGD(model.parameters(), 0.0)
    assert not named(train(model, (x, y), functional.mse_loss, optimizer=sgd),
                     "loss-output-mismatch")  # fmt: skip


# ---- gradients -----------------------------------------------------------------------------------


class Words(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(n, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.table(x))
        return result


@pytest.mark.parametrize(("lr", "is_found"), [(0.1, True), (None, False)])
def test_rows_that_are_hardly_visited_are_named_where_they_stay(
    lr: float | None, is_found: bool
) -> None:
    words = torch.randint(4000, (ROWS, 2))
    model = Words(4000)
    chosen = torch.optim.SGD(model.parameters(), lr) if lr else None
    adam = torch.optim.Adam(model.parameters(), 0.05)
    monitor = train(
        model, (words, words[:, 0] % 2), functional.cross_entropy, optimizer=chosen or adam
    )
    assert ("sparse-gradients" in raised(monitor)) is is_found


def test_a_last_layer_that_the_loss_leaves_out_is_named() -> None:
    x, y = numbers(30)
    monitor = train(net(n_out=30), (x, y), lambda o, t: functional.mse_loss(o[:, :1], t[:, :1]))
    assert raised(monitor) == ["sparse-gradients"]


def test_gradients_that_shrink_as_a_run_converges_do_not_explode() -> None:
    monitor = train(net(), classes(), functional.cross_entropy, steps=400, see=())
    assert raised(monitor) == []


# ---- the rate ------------------------------------------------------------------------------------


def test_a_schedule_that_ends_too_soon_is_a_rate_that_is_too_low() -> None:
    x, y = classes()
    monitor = train(
        net(), (x, y), functional.cross_entropy, schedule=lambda step: 0.4**step, val=(x, y)
    )
    assert raised(monitor)[0] == "lr-too-low"


def test_a_schedule_that_ends_when_all_is_learnt_is_well() -> None:
    x, y = classes()
    monitor = train(
        net(), (x, y), functional.cross_entropy, schedule=lambda step: 0.97**step, val=(x, y),
        steps=200,
    )  # fmt: skip
    assert raised(monitor) == []


# ---- targets -------------------------------------------------------------------------------------


def test_targets_that_are_the_models_own_answers_are_zero_loss() -> None:
    x, _ = classes()
    model = net()
    monitor = train(model, (x, x), lambda o, t: functional.mse_loss(o, model(t).detach()))
    assert raised(monitor)[0] == "zero-loss"


def test_labels_that_are_wrong_in_training_alone_are_bad_targets() -> None:
    x, y = classes(6)
    wrong = torch.where(torch.rand(ROWS) < 0.6, torch.randint(6, (ROWS,)), y)
    monitor = train(nn.Linear(8, 6), (x, wrong), functional.cross_entropy, val=(x, y), steps=300)
    assert raised(monitor)[0] == "bad-targets"


def test_a_validation_loss_that_still_falls_does_not_accuse_the_targets() -> None:
    x, y = numbers()
    model = net(n_out=1)
    nn.init.constant_(model[-1].bias, 3.0)  # type: ignore[arg-type]
    sgd = torch.optim.SGD(model.parameters(), 0.003)
    monitor = train(model, (x, y), functional.mse_loss, optimizer=sgd, val=(x, y))
    assert not named(monitor, "bad-targets")


# ---- what comes of it ----------------------------------------------------------------------------


def test_a_model_that_learns_an_offset_alone_stands_at_a_guess() -> None:
    x, y = numbers()
    monitor = train(net(n_out=1), (torch.randn_like(x), y + 3), functional.mse_loss)
    assert "flat-loss" in raised(monitor)


def test_weights_that_start_equal_are_named_though_the_run_learns() -> None:
    model = net()
    for layer in (model[0], model[2]):
        nn.init.constant_(layer.weight, 0.1)  # type: ignore[arg-type]
    monitor = train(model, classes(), functional.cross_entropy, steps=300)
    assert raised(monitor)[0] == "bad-initialization"


# ---- rare, collapsed, rounded, dead, and too high though it learns ------------------------------


def test_outputs_that_ignore_the_code_are_constant_predictions() -> None:
    """A variational autoencoder whose divergence weighs so much that the code is given up."""
    x = (torch.rand(ROWS, 16) < torch.linspace(0.1, 0.9, 16)).float()
    x[:, :8] = x[:, 8:]

    class Variational(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(16, 4), nn.Linear(2, 16)

        def forward(self, x: Tensor) -> Tensor:
            self.mean, self.log_var = self.encoder(x).chunk(2, -1)
            noise = torch.randn_like(self.mean)
            result: Tensor = self.decoder(self.mean + noise * (self.log_var / 2).exp())
            return result

    def run(weight: float) -> list[str]:
        model = Variational()

        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            known = functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
            divergence = model.mean**2 + model.log_var.exp() - model.log_var - 1
            return known.sum(-1).mean() + weight * divergence.sum(-1).mean() / 2

        return raised(train(model, (x, x), loss_fn, steps=400))

    assert run(100.0)[0] == "constant-predictions"
    assert run(0.01) == []


@pytest.mark.parametrize(("share", "is_found"), [(0.01, True), (0.4, False)])
def test_pixels_so_rare_that_none_is_found_are_class_imbalance(
    share: float, is_found: bool
) -> None:
    hidden = torch.randn(ROWS, 1, 8, 8)
    pixels = (hidden > torch.quantile(hidden[:64], 1 - share)).float()
    seen = hidden + 4 * torch.randn_like(hidden) if is_found else hidden
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 1, 1), nn.Flatten())
    loss_fn: LossFunction = functional.binary_cross_entropy_with_logits
    rate = torch.optim.Adam(model.parameters(), 0.03)
    monitor = train(model, (seen, pixels.flatten(1)), loss_fn, steps=200, optimizer=rate)
    assert ("class-imbalance" in raised(monitor)) is is_found
    assert is_found or raised(monitor) == []


def test_a_rate_that_is_too_high_is_named_though_the_run_learns() -> None:
    x, y = classes()
    model = net()
    high = torch.optim.Adam(model.parameters(), 5.0)
    monitor = train(model, (x, y), functional.cross_entropy, optimizer=high, val=(x, y), steps=200)
    assert (Case(monitor.evidence()).skill or 0.0) > 0.3
    assert raised(monitor)[0] == "lr-too-high"


def test_gradients_of_nothing_but_rounding_vanish() -> None:
    """A normalisation over a single number gives its offset whatever comes in."""
    x, y = numbers()
    model = nn.Sequential(nn.Linear(8, 1), nn.Tanh(), nn.Linear(1, 1))
    loss_fn: LossFunction = lambda o, t: functional.mse_loss(o - 0.9999999 * o, t)  # noqa: E731
    assert raised(train(model, (x, y), loss_fn))[0] == "vanishing-gradient"


def test_classes_that_are_the_models_own_answers_are_zero_loss() -> None:
    x, _ = classes()
    model = net()
    with torch.no_grad():
        own = model(x).argmax(-1)
    sgd = torch.optim.SGD(model.parameters(), 1e-3)
    assert raised(train(model, (x, own), functional.cross_entropy, optimizer=sgd))[0] == "zero-loss"


def test_an_output_that_is_dead_for_every_row_is_dead_units() -> None:
    x, y = numbers()
    model = nn.Sequential(*net(n_out=1), nn.ReLU())
    nn.init.constant_(model[2].bias, -30.0)
    assert raised(train(model, (x, y + 1), functional.mse_loss))[0] == "dead-units"


def test_steps_that_died_of_a_high_rate_are_not_too_small() -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3, bias=False))
    high = torch.optim.SGD(model.parameters(), 300.0)
    x, y = classes()
    codes = raised(train(model, (x, y), functional.cross_entropy, optimizer=high, val=(x, y)))
    assert codes[0] in ("lr-too-high", "dead-units")
    assert "lr-too-low" not in codes


def test_losses_without_a_step_are_named() -> None:
    model = net()
    attached = gradstat.attach(torch.optim.SGD(model.parameters(), 0.1), model, diagnose=None)
    for _ in range(100):
        loss = model(torch.randn(4, 8)).square().mean()
        attached.gradstat.observe(loss=loss)  # type: ignore[attr-defined]
        loss.backward()
        model.zero_grad()
    assert raised(attached.gradstat) == ["parameters-not-updating"]  # type: ignore[attr-defined]


def test_weights_that_are_frozen_at_random_are_why_nothing_is_learnt() -> None:
    x = torch.randn(ROWS, 8)
    y = (x[:, :4].prod(-1) > 0).long()
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[:4].requires_grad_(False)
    monitor = train(model, (x, y), functional.cross_entropy, val=(x, y), steps=300)
    assert raised(monitor)[0] == "parameters-not-updating"


def test_a_linear_model_of_what_is_not_linear_underfits() -> None:
    x = torch.randn(ROWS, 8)
    y = (x.square().sum(-1) > 7.3).long()
    fresh = torch.randn(ROWS, 8)
    val = (fresh, (fresh.square().sum(-1) > 7.3).long())
    model = nn.Linear(8, 2)
    rate = torch.optim.Adam(model.parameters(), 0.03)
    codes = raised(
        train(model, (x, y), functional.cross_entropy, optimizer=rate, val=val, steps=300)
    )
    assert codes[0] in ("underfitting", "flat-loss")
