"""What the rules say of steps and weights that are out of size, and of runs that look so."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from diagnosed_runs import ROWS, Reader, classes, fit, named, net, numbers, raised, signs, train
from torch import Tensor, nn
from torch.nn import functional

import gradstat
from gradstat.diagnosis import Case
from gradstat.diagnosis.evidence import Curve

cross_entropy = functional.cross_entropy
mse_loss = functional.mse_loss


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def sgd(model: nn.Module, lr: float, **more: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr, **more)


# ---- steps ---------------------------------------------------------------------------------------


def test_first_steps_that_sweep_the_weights_away_are_named_by_the_loss_alone() -> None:
    model = Reader(nn.LSTM, 32)
    optimizer = torch.optim.Adam(model.parameters(), 0.6)
    found = raised(train(model, signs(6, 0), cross_entropy, optimizer=optimizer, see=("loss",)))
    assert found[0] == "lr-too-high"


def test_weights_that_begin_small_may_grow() -> None:
    model = net()
    for parameter in model.parameters():
        parameter.data *= 0.02
    monitor = train(model, classes(), cross_entropy, steps=300, see=("loss",))
    assert raised(monitor) == []


def test_a_loss_that_grows_into_nan_is_a_rate_that_is_too_high() -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 1))
    optimizer = sgd(model, 0.9, momentum=0.9)
    assert raised(train(model, numbers(), mse_loss, optimizer=optimizer))[0] == "lr-too-high"


def test_losses_that_are_mostly_0_and_sometimes_huge_are_not_learnt() -> None:
    """Of batches of one row: most are far on the right side, others far on the wrong one."""
    evidence = train(net(), classes(), cross_entropy).evidence()
    assert Case(evidence).learns
    loss = evidence.curves["loss"]
    values = np.where(np.arange(len(loss)) % 10 == 9, 1e6, 0.0) + 1e-9 * loss.values
    values[:40] = loss.values[:40]
    wild = dataclasses.replace(evidence, curves={"loss": Curve(loss.steps, values)})
    assert Case(wild).is_wild
    assert Case(wild).learns is False


def test_a_first_step_that_overwhelms_the_weights_is_a_rate_that_is_too_high() -> None:
    """The gradients are as large as the targets, which nobody has shown."""
    x, y = numbers()
    model = net(n_out=1)
    monitor = train(model, (x, 1e6 * y), mse_loss, optimizer=sgd(model, 0.01), see=())
    assert raised(monitor)[0] == "lr-too-high"


# ---- what is hardly moved ------------------------------------------------------------------------


def bags(n_words: int) -> tuple[Tensor, Tensor]:
    """Sets of words, and whether most of them are of the second half."""
    words = torch.randint(n_words, (ROWS, 9))
    return words, ((words >= n_words // 2).sum(1) > 4).long()


class Bags(nn.Module):
    def __init__(self, n_words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(n_words, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))

    def forward(self, words: Tensor) -> Tensor:
        answer: Tensor = self.body(self.words(words).mean(1))
        return answer


def test_an_embedding_that_sgd_hardly_moves_is_named() -> None:
    model = Bags(1500)
    monitor = train(model, bags(1500), cross_entropy, optimizer=sgd(model, 0.1), steps=500)
    assert raised(monitor)[0] == "sparse-gradients"


def test_one_that_adam_moves_is_not() -> None:
    assert raised(train(Bags(1500), bags(1500), cross_entropy, steps=500)) == []


# ---- weights -------------------------------------------------------------------------------------


def test_decay_is_judged_with_the_momentum_that_multiplies_it() -> None:
    model = net(n_out=8)
    optimizer = sgd(model, 0.05, momentum=0.9, weight_decay=0.2)
    monitor = train(model, classes(8), cross_entropy, optimizer=optimizer, steps=300)
    assert raised(monitor)[0] == "underfitting"


def test_a_deep_stack_that_makes_signals_larger_is_named_though_it_learns() -> None:
    layers: list[nn.Module] = []
    for _ in range(9):
        layer = nn.Linear(32, 32)
        nn.init.normal_(layer.weight, std=2.8 / math.sqrt(32))
        layers += [layer, nn.ReLU()]
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), *layers, nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    monitor = train(model, numbers(), mse_loss, optimizer=optimizer, steps=300, see=("loss",))
    assert raised(monitor)[0] == "bad-initialization"


def test_attention_that_starts_saturated_is_named() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.scores = nn.Linear(1, 16), nn.Linear(16, 32)
            self.values, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
            nn.init.normal_(self.scores.weight, std=6.0)

        def forward(self, x: Tensor) -> Tensor:
            h = self.into(x)
            q, k = self.scores(h).chunk(2, -1)
            mixed = functional.softmax(q @ k.mT, -1) @ self.values(h)
            answer: Tensor = self.head(mixed.mean(1))
            return answer

    x = torch.randn(ROWS, 12, 1)
    y = (x[:, :, 0] > 0).sum(1).clamp(4, 7) - 4
    model = Attends()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    monitor = train(model, (x, y), cross_entropy, optimizer=optimizer, steps=200)
    assert "bad-initialization" in raised(monitor)


@pytest.mark.parametrize(("scale", "is_named"), [(8.0, True), (1.0, False)])
def test_a_first_loss_far_above_a_guess_is_named_though_the_run_learns(
    scale: float, is_named: bool
) -> None:
    x = torch.randn(ROWS, 8)
    y = (x @ torch.randn(8, 6) + 4 * torch.randn(ROWS, 6)).argmax(1)  # a part is chance
    model = net(n_out=6)
    model[2].weight.data *= 5 * scale
    monitor = train(model, (x, y), cross_entropy, steps=400)
    assert bool(named(monitor, "bad-initialization")) is is_named


def test_recurrent_weights_that_multiply_what_they_hold_are_named() -> None:
    model = Reader(nn.RNN, 24)
    nn.init.orthogonal_(model.reader.weight_hh_l0, 1.8)
    x = torch.randn(ROWS, 40, 1)
    y = (x[:, :, 0].sign().prod(1) > 0).long()  # which nothing learns
    assert named(train(model, (x, y), cross_entropy), "exploding-gradient")


@pytest.mark.parametrize("steps", [40, 400])
def test_a_run_that_ends_as_its_loss_begins_to_fall_is_underfitted(steps: int) -> None:
    x, y = classes(6)
    model = net(n_out=6)
    optimizer = gradstat.attach(sgd(model, 0.03), model, diagnose=None)
    monitor: gradstat.Monitor = optimizer.gradstat  # type: ignore[attr-defined]
    for _ in range(steps):  # whole batches: one step an epoch
        loss = cross_entropy(model(x), y)
        monitor.observe(loss=loss, val_loss=loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert raised(monitor) == (["underfitting"] if steps == 40 else [])


def test_decay_that_erases_weights_is_seen_by_the_loss_alone() -> None:
    model = net(n_out=8)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, weight_decay=0.3)
    monitor = train(model, classes(8), cross_entropy, optimizer=optimizer, steps=300, see=("loss",))
    assert raised(monitor)[0] == "underfitting"


def test_steps_lost_to_16_bits_are_named_by_the_steps_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 3)).bfloat16()
    for parameter in model.parameters():
        parameter.data *= 2.4
    x, y = classes()
    optimizer = torch.optim.Adam(model.parameters(), 2e-4)
    monitor = train(model, (x.bfloat16(), y), cross_entropy, optimizer=optimizer, steps=300, see=())
    assert raised(monitor)[0] == "parameters-not-updating"


def test_clipping_to_next_to_nothing_is_a_rate_that_is_too_low() -> None:
    x, y = classes()
    model = net()
    optimizer = sgd(model, 0.05)
    optimizer.register_step_pre_hook(
        lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 0.005) and None
    )
    with pytest.warns(RuntimeWarning, match="already clipped"):
        monitor = train(model, (x, y), cross_entropy, optimizer=optimizer, steps=200)
    assert raised(monitor)[0] == "lr-too-low"


# ---- what is compared ----------------------------------------------------------------------------


def test_validation_rows_that_are_not_standardised_are_named() -> None:
    x, y = classes()
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
    monitor = train(model, (x, y), cross_entropy, val=(40 * x + 100, y), steps=300)
    assert raised(monitor)[0] == "bad-inputs"


def test_a_rare_class_that_a_weighted_loss_finds_is_no_imbalance() -> None:
    x = torch.randn(4 * ROWS, 8)
    y = (x[:, 0] > 1.9).long()
    weight = torch.tensor([0.52, 17.0])
    monitor = train(
        net(n_out=2),
        (x, y),
        lambda outputs, targets: cross_entropy(outputs, targets, weight),
        steps=400,
    )
    assert raised(monitor) == []


def test_a_loss_that_has_come_to_nothing_is_still_recognised() -> None:
    x = torch.randn(ROWS, 8)
    y = x @ torch.randn(8, 1)
    model = nn.Linear(8, 1)
    monitor = train(model, (x, y), mse_loss, optimizer=sgd(model, 0.1), steps=500)
    assert raised(monitor) == []


@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_inputs_that_nobody_shows_are_told_by_the_first_gradients(scale: float) -> None:
    x, y = classes()
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
    see = ("loss", "outputs", "targets")
    optimizer = sgd(model, 0.3)
    monitor = train(model, (scale * (x + 1), y), cross_entropy, optimizer=optimizer, see=see)
    assert ("bad-inputs" in raised(monitor)) is (scale > 1)


def test_a_column_of_outputs_that_the_loss_squeezes_is_compared_row_by_row() -> None:
    x, y = classes(2)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(outputs.squeeze(1), targets)

    monitor = train(net(n_out=1), (x, y.float()), loss_fn, steps=200)
    evidence = monitor.evidence()
    assert all(batch.is_paired for batch in evidence.batches)
    assert (Case(evidence).skill or 0.0) > 0.8
    assert raised(monitor) == []


def test_rows_learnt_by_heart_are_named_though_validation_hardly_rises() -> None:
    x = torch.randn(ROWS, 30)
    y = (x @ torch.randn(30, 6) + 2 * torch.randn(ROWS, 6)).argmax(1)
    model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 6))
    few = (x[:40], y[:40])
    monitor = train(model, few, cross_entropy, val=(x, y), steps=200)
    assert raised(monitor)[0] == "overfitting"


def test_soft_targets_are_no_numbers_to_be_met() -> None:
    """Mixed rows: the loss varies with the share of each, and logits are far from shares."""
    x, y = classes()
    soft = functional.one_hot(y, 3).float()
    part = torch.distributions.Beta(0.4, 0.4).sample((ROWS, 1))
    other = torch.randperm(ROWS)
    mixed = (part * x + (1 - part) * x[other], part * soft + (1 - part) * soft[other])
    model = net()
    monitor = train(model, mixed, cross_entropy, optimizer=sgd(model, 0.1, momentum=0.9), steps=280)
    assert Case(monitor.evidence()).skill is None
    assert raised(monitor) == []


# ---- what must not disturb or mislead ------------------------------------------------------------


def test_an_empty_batch_is_no_sample() -> None:
    x, y = classes()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return (x, y) if step % 16 else (x[:0], y[:0])

    monitor = fit(net(), cross_entropy, batch, 60)
    evidence = monitor.evidence()
    assert evidence.batches
    assert all(batch.inputs is not None and len(batch.inputs) for batch in evidence.batches)


def test_decay_of_a_model_without_matrices_is_judged_without_a_crash() -> None:
    model = nn.LayerNorm(8)
    optimizer = sgd(model, 0.1, weight_decay=1.0)
    x = torch.randn(ROWS, 8)
    found = raised(train(model, (x, x), mse_loss, optimizer=optimizer, see=("loss",)))
    assert found == ["diverging-loss"]


def test_weights_that_begin_at_0_are_not_overwhelmed() -> None:
    model = nn.Linear(8, 3)
    nn.init.zeros_(model.weight)
    assert raised(train(model, classes(), cross_entropy, see=())) == []


def test_a_column_of_noisy_outputs_beside_many_rows_is_no_broadcast() -> None:
    x = torch.randn(4 * ROWS, 8)
    y = x[:, 0] + 2 * torch.randn(4 * ROWS)
    rows = [torch.randint(len(x), (ROWS,)) for _ in range(60)]
    monitor = fit(
        net(n_out=1),
        lambda outputs, targets: mse_loss(outputs.squeeze(1), targets),
        lambda step: (x[rows[step]], y[rows[step]]),
        60,
    )
    assert named(monitor, "loss-output-mismatch") == []


def test_an_embedding_that_has_hardly_been_visited_is_not_judged() -> None:
    monitor = train(Bags(5000), bags(5000), cross_entropy, steps=16)
    assert named(monitor, "sparse-gradients") == []
