"""Runs whose steps are too small, too large, or held back: told apart from those that are well."""

from __future__ import annotations

import dataclasses
from itertools import repeat

import numpy as np
import pytest
import torch
from diagnosed_runs import (
    ROWS,
    Reader,
    classes,
    fit,
    named,
    net,
    numbers,
    raised,
    signs,
    told,
    train,
)
from torch import Tensor, nn
from torch.nn import functional

import gradstat
from gradstat.diagnosis import Case
from gradstat.diagnosis.data import UnseenInputs
from gradstat.diagnosis.evidence import Curve
from gradstat.diagnosis.flow import Exploding
from gradstat.diagnosis.rates import TooHigh
from gradstat.diagnosis.targets import RandomTargets


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def sgd(model: nn.Module, lr: float, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum)


def deep(n_out: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(),
                         nn.Linear(32, n_out))  # fmt: skip


# ---- too small -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "is_low"), [(1e-3, True), (0.05, False)])
def test_a_validation_loss_that_falls_by_next_to_nothing_tells_a_rate_that_is_too_low(
    lr: float, is_low: bool
) -> None:
    model, data = deep(), classes()
    monitor = train(model, data, functional.cross_entropy, optimizer=sgd(model, lr), val=data,
                    see=("loss",))  # fmt: skip
    assert raised(monitor)[:1] == (["lr-too-low"] if is_low else [])


@pytest.mark.parametrize("falls", [True, False])
def test_targets_are_not_blamed_where_validation_falls_throughout_however_little(
    falls: bool,
) -> None:
    x, y = torch.randn(ROWS, 8), torch.arange(ROWS) % 3
    monitor = train(net(), (x, y), functional.cross_entropy, val=(x[:32], y[:32]), steps=240)
    run = monitor.evidence()
    losses = 1.2 - 1e-4 * np.arange(10) if falls else 1.2 + 1e-2 * (np.arange(10) % 3)
    curves = {**run.curves, "val_loss": Curve(np.arange(10) * 24, losses)}
    case = Case(dataclasses.replace(run, curves=curves))
    assert bool(list(RandomTargets().judge(case))) != falls


def test_a_loss_that_stays_next_to_a_guess_and_falls_tells_it_without_validation() -> None:
    model = deep()
    adagrad = torch.optim.Adagrad(model.parameters(), 5e-4)
    monitor = train(model, classes(), functional.cross_entropy, optimizer=adagrad, steps=300,
                    see=("outputs", "targets", "loss"))  # fmt: skip
    assert raised(monitor)[0] == "lr-too-low"


def test_a_trained_model_may_be_polished_with_the_smallest_steps() -> None:
    model, data = deep(), classes()
    nn.init.orthogonal_(model[2].weight, 1.5)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(model[0].weight)  # type: ignore[arg-type]
    train(model, data, functional.cross_entropy, steps=100)
    gentle = torch.optim.AdamW(model.parameters(), 1e-5)
    monitor = train(model, data, functional.cross_entropy, optimizer=gentle, val=data,
                    see=("loss",))  # fmt: skip
    assert raised(monitor) == []


def clipped(chosen: type[torch.optim.Optimizer], lr: float, norm: float) -> gradstat.Monitor:
    """A run of 150 steps whose gradients the script itself clips to a norm."""
    model, (x, y) = deep(10), classes(10)
    optimizer = gradstat.attach(chosen(model.parameters(), lr=lr), model, diagnose=False)  # type: ignore[call-arg]
    monitor: gradstat.Monitor = optimizer.gradstat  # type: ignore[attr-defined]
    for _ in range(150):
        rows = torch.randint(len(x), (32,))
        outputs = model(x[rows])
        loss = functional.cross_entropy(outputs, y[rows])
        monitor.observe(outputs=outputs, targets=y[rows], loss=loss)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
    monitor._kept_alive = optimizer  # type: ignore[attr-defined]
    return monitor


@pytest.mark.filterwarnings("ignore:gradients seem to be already clipped")
@pytest.mark.parametrize(("norm", "is_told"), [(0.004, True), (0.5, False)])
def test_a_norm_that_gradients_are_clipped_to_may_be_why_a_loss_still_falls(
    norm: float, is_told: bool
) -> None:
    assert bool(named(clipped(torch.optim.SGD, 5.0, norm), "lr-too-low")) == is_told


@pytest.mark.parametrize("dropout", [0.8, 0.5])
def test_dropout_keeps_a_loss_above_that_of_validation(dropout: float) -> None:
    x, y = classes(5)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 64),
                          nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 5))  # fmt: skip
    adam = torch.optim.Adam(model.parameters(), 5e-4)
    monitor = train(model, (x, y), functional.cross_entropy, optimizer=adam, val=(x, y),
                    steps=220, see=("loss",))  # fmt: skip
    assert bool(named(monitor, "underfitting")) == (dropout > 0.7)


# ---- too large -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("lr", "swings"), [(1e-6, False), (1e-2, True)])
def test_steps_that_hardly_change_the_weights_make_no_loss_swing(lr: float, swings: bool) -> None:
    losses = [1.0] * 8 + [0.2 if step // 5 % 2 else 0.95 for step in range(120)] + [0.95] * 16
    monitor = told(losses, (1.0, 0.2, 0.9, 0.2, 0.8), repeat(lr))
    assert bool(named(monitor, "oscillating-loss")) == swings


@pytest.mark.parametrize(("lr", "is_high"), [(0.08, True), (0.003, False)])
def test_a_first_step_that_sweeps_the_weights_away_is_told_though_a_good_part_is_learnt(
    lr: float, is_high: bool
) -> None:
    """RMSprop's first steps are ten times the rate: its average begins at 0."""
    x, y = torch.randn(ROWS, 12, 1), torch.arange(ROWS) % 2
    x += y.reshape(-1, 1, 1) * 0.45
    model = Reader(nn.LSTM, 32)
    rmsprop = torch.optim.RMSprop(model.parameters(), lr)
    monitor = train(model, (x, y), functional.cross_entropy, optimizer=rmsprop, steps=200,
                    see=("outputs", "targets", "loss"))  # fmt: skip
    assert bool(list(TooHigh().judge(Case(monitor.evidence())))) == is_high


@pytest.mark.parametrize(("lr", "is_high"), [(0.1, True), (1e-3, False)])
def test_a_validation_loss_that_swings_is_made_by_steps_that_are_large(
    lr: float, is_high: bool
) -> None:
    val_losses = [0.6, 0.9] * 6
    monitor = told([0.7, 0.6, 0.65] * 40, val_losses, repeat(lr))
    assert bool(named(monitor, "lr-too-high")) == is_high


@pytest.mark.parametrize(("peak", "lr", "is_high"), [(200.0, 200.0, True), (1.4, 0.01, False)])
def test_a_validation_loss_is_low_beside_what_the_loss_began_with_not_beside_harm(
    peak: float, lr: float, is_high: bool
) -> None:
    losses = [1.4, *(peak * 0.9**step for step in range(20)), *[1.1] * 80]
    monitor = told(losses, (peak / 20, 1.3, 1.2, 1.15, 1.1), [lr, *[1e-4] * 100])
    assert bool(named(monitor, "lr-too-high")) == is_high


@pytest.mark.parametrize("gain", [1.15, 0.7])
def test_a_gradient_that_is_large_before_any_step_has_grown_through_time(gain: float) -> None:
    model = Reader(nn.RNN, 32)
    model.reader = nn.RNN(1, 32, nonlinearity="relu", batch_first=True)
    with torch.no_grad():
        model.reader.weight_hh_l0.copy_(gain * torch.eye(32))
    monitor = train(model, signs(40, 0), functional.cross_entropy, see=(),
                    optimizer=sgd(model, 0.02))  # fmt: skip
    assert (raised(monitor)[:1] == ["exploding-gradient"]) == (gain > 1)


# ---- large inputs --------------------------------------------------------------------------------


@pytest.mark.parametrize("is_scaled", [False, True])
def test_large_inputs_are_told_where_the_loss_has_only_come_down(is_scaled: bool) -> None:
    x = torch.randn(ROWS, 8) + (0.0 if is_scaled else 1000.0)
    model = deep(10)
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    monitor = train(model, (x, torch.arange(ROWS) % 10), functional.cross_entropy, steps=300,
                    optimizer=adam, see=("inputs", "loss"))  # fmt: skip
    assert bool(named(monitor, "bad-inputs")) != is_scaled


@pytest.mark.parametrize(("lr", "is_told"), [(0.02, True), (0.002, False)])
def test_inputs_that_nobody_shows_are_told_by_the_first_step_where_it_loses_the_weights(
    lr: float, is_told: bool
) -> None:
    x, y = classes()
    model = deep()
    monitor = train(model, (300 * x, y), functional.cross_entropy, optimizer=sgd(model, lr),
                    see=("outputs", "targets", "loss"))  # fmt: skip
    run = monitor.evidence()
    assert (Case(run).total_update_ratio[0] > 0.5) == is_told
    gradients = run.probes.gradients.copy()
    gradients[2, 1] *= 1e6  # the bias's, of weights that the steps before have lost
    probes = dataclasses.replace(run.probes, gradients=gradients)
    case = Case(dataclasses.replace(run, probes=probes))
    assert bool(list(UnseenInputs().judge(case))) == is_told


@pytest.mark.parametrize("scale", [60.0, 1.0])
def test_large_inputs_are_told_though_a_part_is_learnt(scale: float) -> None:
    x = torch.randn(ROWS, 8)
    noisy = torch.where(torch.rand(ROWS) < 0.12, torch.randint(3, (ROWS,)), classes()[1])
    x[:, :3] += 3 * functional.one_hot(noisy, 3)
    noisy = torch.where(torch.rand(ROWS) < 0.12, torch.randint(3, (ROWS,)), noisy)
    model = net()
    monitor = train(model, (scale * x, noisy), functional.cross_entropy, steps=200)
    left = Case(monitor.evidence()).left
    assert left is not None
    assert left > 0.25
    assert bool(named(monitor, "bad-inputs")) == (scale > 1)


# ---- weights as the run begins -------------------------------------------------------------------


@pytest.mark.parametrize("size", [2000.0, 0.02])
def test_a_table_of_places_that_drowns_what_it_is_added_to(size: float) -> None:
    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(size * torch.randn(16, 8))
            layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.ReLU())]
            self.layers = nn.Sequential(*layers, nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            answers: Tensor = self.layers(functional.layer_norm(x[:, None] + self.table, (8,)))
            return answers.mean(1)

    model = Placed()
    monitor = train(model, classes(), functional.cross_entropy, optimizer=sgd(model, 0.05),
                    steps=200)  # fmt: skip
    assert raised(monitor)[:1] == (["bad-initialization"] if size > 1 else [])


@pytest.mark.parametrize("gain", [12.0, 0.6])
def test_a_state_that_large_weights_keep_at_its_ends_is_worth_a_warning(gain: float) -> None:
    model = Reader(nn.RNN, 32)
    with torch.no_grad():
        for weight in (model.reader.weight_ih_l0, model.reader.weight_hh_l0):
            weight.mul_(gain / 0.577)
        model.reader.weight_ih_l0.mul_(5)
    x = torch.randn(ROWS, 6, 1)
    y = (x.sum(1).squeeze(1) > 0).long()
    monitor = train(model, (x, y), functional.cross_entropy, steps=100)
    assert bool(named(monitor, "bad-initialization")) == (gain > 1)


def test_a_state_that_is_dead_is_no_matter_of_the_rate() -> None:
    model = Reader(nn.RNN, 16)
    model.reader = nn.RNN(1, 16, nonlinearity="relu", batch_first=True)
    nn.init.constant_(model.reader.bias_hh_l0, -20.0)
    codes = raised(train(model, signs(6, 5), functional.cross_entropy))
    assert codes[0] in ("dead-units", "bad-initialization")
    assert "lr-too-low" not in codes


# ---- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize(("dim", "fits"), [(1, False), (2, True)])
def test_a_softmax_along_the_places_of_a_sequence_does_not_fit(
    dim: int, fits: bool, is_flat: bool
) -> None:
    x = torch.randn(ROWS, 20, 3)
    y = (x @ torch.randn(3, 4)).argmax(-1)
    tagger = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 4), nn.LogSoftmax(dim))
    if is_flat:
        tagger.append(nn.Flatten(0, 1))

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(ROWS, (32,))
        return x[rows], y[rows].flatten() if is_flat else y[rows]

    monitor = fit(
        tagger, lambda o, t: functional.cross_entropy(o.reshape(-1, 4), t.flatten()), batch
    )
    assert raised(monitor)[:1] == ([] if fits else ["loss-output-mismatch"])


def test_logits_that_are_all_cut_to_0_do_not_fit_before_they_are_constant() -> None:
    model = nn.Sequential(*net(n_out=6), nn.ReLU())
    nn.init.constant_(model[2].bias, -2.0)  # type: ignore[arg-type]
    x, y = numbers(6)
    monitor = train(model, (x, (y > 0).float()), functional.binary_cross_entropy_with_logits)
    assert raised(monitor)[0] in ("loss-output-mismatch", "dead-units")
    assert named(monitor, "loss-output-mismatch")


@pytest.mark.parametrize("is_square", [True, False])
def test_a_cross_entropy_written_by_hand_lets_shapes_be_broadcast(is_square: bool) -> None:
    x, y = numbers()
    wanted = (y > 0).float()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return (functional.softplus(outputs) - outputs * targets).mean()

    model = net(n_out=1)
    monitor = train(model, (x, wanted.squeeze(1) if is_square else wanted), loss_fn,
                    optimizer=sgd(model, 1e-4 if is_square else 0.1))  # fmt: skip
    assert raised(monitor)[:1] == (["loss-output-mismatch"] if is_square else [])


# ---- what looks like these faults and is none ----------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_was_never_finite_may_have_validation_losses(value: float) -> None:
    monitor = told([value] * 60, (1.0, 1.1, 0.9, 1.0))
    assert raised(monitor)[0] == "nonfinite-loss"


def test_a_recurrent_weight_may_be_a_vector() -> None:
    class Decaying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_hh, self.bias = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight_hh).sum(-1, keepdim=True) + self.bias

    x, y = numbers()
    assert train(Decaying(), (x, 10 * y), functional.mse_loss, see=()).diagnose() == []


def test_a_recurrent_weight_may_begin_at_nothing() -> None:
    """Then any gradient is many times as large as it."""
    model = Reader(nn.RNN, 16)
    nn.init.zeros_(model.reader.weight_hh_l0)
    run = train(model, signs(6, 5), functional.cross_entropy, see=()).evidence()
    hidden, head = (
        next(i for i, layer in enumerate(run.layers) if layer.name == name)
        for name in ("reader.weight_hh_l0", "head.weight")
    )
    gradients = run.probes.gradients.copy()
    gradients[0, hidden] = 9 * gradients[0, head]  # of a norm that is nine times the head's
    probes = dataclasses.replace(run.probes, gradients=gradients)
    assert probes.gradient_rms[0, hidden] > 2 * probes.gradient_rms[0, head] > 0
    assert list(Exploding().judge(Case(dataclasses.replace(run, probes=probes)))) == []


def test_a_loss_that_has_come_down_to_the_noise_of_its_targets_is_well() -> None:
    x = 20 * torch.randn(ROWS, 5)
    y = x @ torch.randn(5, 1) + torch.randn(ROWS, 1)
    model = nn.Linear(5, 1)
    monitor = train(model, (x, y), functional.mse_loss, optimizer=sgd(model, 2e-4, 0.0), steps=400,
                    see=("inputs", "loss"))  # fmt: skip
    assert raised(monitor) == []


def test_a_new_model_whose_loss_is_small_by_its_unit_was_not_trained_before() -> None:
    model, (x, y) = deep(1), numbers()
    for layer in model[::2]:
        nn.init.xavier_normal_(layer.weight)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    data = (x, 0.3 * y)
    monitor = train(model, data, functional.mse_loss, optimizer=sgd(model, 1e-6), val=data,
                    see=("loss",), steps=300)  # fmt: skip
    assert raised(monitor)[0] == "lr-too-low"


@pytest.mark.filterwarnings("ignore:gradients seem to be already clipped")
def test_adam_takes_steps_of_the_same_size_whatever_it_is_clipped_to() -> None:
    assert not named(clipped(torch.optim.Adam, 2e-4, 0.01), "lr-too-low")


def test_logits_of_as_many_places_as_classes_may_be_read_either_way() -> None:
    x = torch.randn(ROWS, 5, 4)
    y = (x @ torch.randn(4, 5)).argmax(-1)
    tagger = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 5))
    monitor = train(
        tagger, (x, y), lambda o, t: functional.cross_entropy(o.reshape(-1, 5), t.reshape(-1))
    )
    assert not named(monitor, "loss-output-mismatch")
