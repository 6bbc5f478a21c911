"""What the diagnosis says of networks whose depth is in time."""

from __future__ import annotations

import pytest
import torch
from diagnosed_runs import Reader, named, raised, signs, train
from torch import Tensor, nn
from torch.nn import functional

from gradstat.diagnosis import Case
from gradstat.diagnosis.recurrence import ThroughTime


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_what_came_first_is_forgotten(kind: type[nn.RNNBase]) -> None:
    """And the targets are not accused of it, though nothing is learnt."""
    model = Reader(kind)
    monitor = train(
        model, signs(60, 0), functional.cross_entropy, optimizer=sgd(model), val=signs(60, 0),
        steps=200,
    )  # fmt: skip
    first = monitor.diagnose()[0]
    assert first.code == "vanishing-gradient"
    assert "60 steps" in first.explanation
    assert first.layers == ("reader.weight_hh_l0",)
    assert first.evidence[0].side == "below"


def test_orthogonal_weights_keep_a_gradient() -> None:
    model = Reader()
    nn.init.orthogonal_(model.reader.weight_hh_l0)  # type: ignore[arg-type]
    monitor = train(model, signs(60, 0), functional.cross_entropy, optimizer=sgd(model), steps=200)
    assert named(monitor, "vanishing-gradient") == []


def test_a_forget_gate_that_is_open_is_not_known_to_forget() -> None:
    model = Reader(nn.LSTM)
    with torch.no_grad():
        model.reader.bias_ih_l0[12:24] = 3.0  # type: ignore[index]
    monitor = train(model, signs(60, 0), functional.cross_entropy, optimizer=sgd(model), steps=200)
    assert named(monitor, "vanishing-gradient") == []


def test_short_sequences_are_not_judged() -> None:
    model = Reader()
    monitor = train(model, signs(20, 0), functional.cross_entropy, optimizer=sgd(model), steps=200)
    assert list(ThroughTime().judge(Case(monitor.evidence()))) == []


def test_an_answer_at_every_step_may_go_by_what_is_near() -> None:
    class Tagger(Reader):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.reader(x)[0])
            return result

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    model = Tagger()
    x = torch.randn(512, 60, 1)
    unlearnable = torch.randint(2, (512, 60))
    monitor = train(model, (x, unlearnable), loss_fn, optimizer=sgd(model), steps=200)
    assert list(ThroughTime().judge(Case(monitor.evidence()))) == []


def test_recurrent_weights_that_multiply_are_the_cause_of_an_overflow() -> None:
    model = Reader()
    model.reader = nn.RNN(1, 12, nonlinearity="relu", batch_first=True)
    nn.init.normal_(model.reader.weight_hh_l0, 0.0, 3.0 * 12**-0.5)
    monitor = train(model, signs(120, 0), functional.cross_entropy, optimizer=sgd(model))
    assert raised(monitor)[0] == "exploding-gradient"


def test_a_growth_beyond_all_numbers_is_still_judged() -> None:
    model = Reader()
    nn.init.normal_(model.reader.weight_hh_l0, 0.0, 20.0)  # type: ignore[arg-type]
    monitor = train(model, signs(400, 0), functional.cross_entropy, optimizer=sgd(model), steps=40)
    assert monitor.diagnose()
