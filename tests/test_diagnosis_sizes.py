"""What the rules say of steps and weights that are out of size, and of runs that look so."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from diagnosed_runs import ROWS, Reader, classes, named, net, numbers, raised, signs, train
from torch import Tensor, nn
from torch.nn import functional

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
