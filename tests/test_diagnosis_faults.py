"""Faults that are easily taken for others, and what is named first."""

from __future__ import annotations

import pytest
import torch
from diagnosed_runs import (
    ROWS,
    LossFunction,
    binary,
    classes,
    named,
    net,
    numbers,
    raised,
    told,
    train,
)
from torch import Tensor, nn
from torch.nn import functional

import gradstat
from gradstat.diagnosis import Case
from gradstat.diagnosis.progress import HardlyBegun, Oscillating


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Answer(nn.Module):
    """A recurrent network that answers by its last state."""

    def __init__(self, kind: type[nn.RNNBase], n_in: int, n_out: int) -> None:
        super().__init__()
        self.cell, self.head = kind(n_in, 16, batch_first=True), nn.Linear(16, n_out)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.cell(x)
        answer: Tensor = self.head(states[:, -1])
        return answer


def descend(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    loss_fn: LossFunction,
    lr: float,
    steps: int = 60,
    see: tuple[str, ...] = ("loss",),
) -> gradstat.Monitor:
    """A run of plain gradient descent on all rows at once."""
    sgd = torch.optim.SGD(model.parameters(), lr)
    monitor: gradstat.Monitor = gradstat.attach(sgd, model).gradstat  # type: ignore[attr-defined]
    for _ in range(steps):
        loss = loss_fn(model(data[0]), data[1])
        monitor.observe(**dict.fromkeys(see, loss))
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    monitor._kept_alive = sgd  # type: ignore[attr-defined]
    return monitor


def test_whole_numbers_beside_one_output_are_no_classes() -> None:
    x, y = binary()
    labels = y.flatten().long()
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid())

    def twice(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(outputs, targets.float()[:, None])

    assert raised(train(model, (x, labels), twice))[0] == "loss-output-mismatch"


@pytest.mark.parametrize("share", [0.99, 0.5])
def test_weights_that_are_written_back_are_told_from_those_that_are_averaged(share: float) -> None:
    model = net()
    average = [parameter.detach().clone() for parameter in model.parameters()]

    def written_back(x: Tensor) -> Tensor:
        with torch.no_grad():
            for mean, parameter in zip(average, model.parameters(), strict=True):
                mean.lerp_(parameter, 1 - share)
                parameter.copy_(mean)
        return x

    sgd = torch.optim.SGD(model.parameters(), 0.01)
    monitor = train(model, classes(), functional.cross_entropy, optimizer=sgd, distort=written_back)
    assert bool(named(monitor, "parameters-not-updating")) == (share > 0.7)


def test_a_dead_relu_at_the_end_is_an_output_that_cannot_reach_the_targets() -> None:
    x, y = numbers()
    model = nn.Sequential(net(n_out=1), nn.ReLU())
    nn.init.constant_(model[0][-1].bias, -20.0)
    assert raised(train(model, (x, y), functional.mse_loss))[0] == "loss-output-mismatch"


@pytest.mark.parametrize("n_bits", [8, 16])
def test_bits_whose_parity_is_wanted_have_targets_that_belong_to_them(n_bits: int) -> None:
    x = torch.randint(2, (ROWS, n_bits)).float()
    y = (x.sum(1) % 2)[:, None]
    sgd = torch.optim.SGD((model := net(n_bits, 1)).parameters(), 0.05)
    monitor = train(model, (x, y), functional.binary_cross_entropy_with_logits, optimizer=sgd)
    assert raised(monitor)[0] == "flat-loss"


@pytest.mark.parametrize(("kind", "first"), [(nn.RNN, "vanishing-gradient"), (nn.GRU, "flat-loss")])
def test_a_plain_network_that_learns_nothing_has_forgotten(
    kind: type[nn.RNNBase], first: str
) -> None:
    """The inputs are not observed, nor how long the sequences are."""
    x = torch.randn(ROWS, 60, 4)
    y = x[:, 0].argmax(1)
    model = Answer(kind, 4, 4)
    adam = torch.optim.Adam(model.parameters(), 0.003)
    monitor = train(model, (x, y), functional.cross_entropy, optimizer=adam,
                    see=("outputs", "targets", "loss"))  # fmt: skip
    assert first in raised(monitor)[:2]


def test_a_state_that_is_never_used_is_no_dead_unit() -> None:
    x = torch.randn(ROWS, 6, 4)

    class Forgetful(Answer):
        def forward(self, x: Tensor) -> Tensor:
            states = [self.cell(x[:, i : i + 1])[0] for i in range(x.shape[1])]
            answer: Tensor = self.head(states[-1][:, 0])
            return answer

    monitor = train(Forgetful(nn.GRU, 4, 4), (x, x[:, 0].argmax(1)), functional.cross_entropy)
    assert named(monitor, "dead-units") == []


def test_columns_that_nobody_shows_are_told_by_gradients_though_the_loss_is_lost() -> None:
    x, y = numbers()
    model = net(n_out=1)
    sgd = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    monitor = train(model, (500 + 300 * x, y), functional.mse_loss, optimizer=sgd, see=("loss",))
    assert raised(monitor)[0] == "bad-inputs"


def test_a_random_backbone_that_is_frozen_leaves_too_little_to_train() -> None:
    x = torch.randn(ROWS, 8)
    y = (x[:, :3] * x[:, 3:6]).argmax(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
                          nn.Linear(16, 3))  # fmt: skip
    for layer in (model[0], model[2]):
        layer.requires_grad_(False)
    assert raised(train(model, (x, y), functional.cross_entropy))[0] == "parameters-not-updating"


def test_a_critic_is_known_by_its_beta() -> None:
    model = net(2, 1)
    real, made = torch.randn(ROWS, 2), torch.randn(ROWS, 2)

    def critic(outputs: Tensor, targets: Tensor) -> Tensor:
        of_real = functional.softplus(-outputs).mean()
        return of_real + functional.softplus(model(made)).mean()

    def flat(betas: tuple[float, float]) -> bool:
        adam = torch.optim.Adam(model.parameters(), 1e-4, betas=betas)
        data = (real, torch.zeros(ROWS))
        return bool(named(train(model, data, critic, optimizer=adam, see=("loss",)), "flat-loss"))

    assert flat((0.9, 0.999))
    assert not flat((0.5, 0.999))


def test_steps_that_sweep_the_first_weights_away_are_named_though_a_little_is_learnt() -> None:
    x = torch.randn(ROWS, 8)
    y = torch.where(torch.rand(ROWS) < 0.4, torch.randint(2, (ROWS,)), (x[:, 0] > 0).long())
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(),
                          nn.Linear(64, 2))  # fmt: skip
    adam = torch.optim.Adam(model.parameters(), 0.1)
    monitor = train(model, (x, y), functional.cross_entropy, optimizer=adam, steps=200)
    assert raised(monitor)[0] == "lr-too-high"


def test_dead_units_come_before_the_biases_that_shut_them() -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
    nn.init.constant_(model[0].bias, -10.0)
    codes = raised(train(model, classes(), functional.cross_entropy))
    assert codes[0] == "dead-units"
    assert "bad-initialization" in codes


def test_dropout_that_leaves_nothing_is_seen_by_loss_and_validation_alone() -> None:
    """The loss comes down to that of a guess, where validation has stood all the time."""
    x, y = torch.randn(ROWS, 8), torch.arange(ROWS) % 10
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.97), nn.Linear(64, 10))
    nn.init.normal_(model[3].weight, std=0.5)
    monitor = train(model, (x, y), functional.cross_entropy, val=(0 * x, y), see=("loss",),
                    optimizer=torch.optim.Adam(model.parameters(), 0.03), steps=300)  # fmt: skip
    assert raised(monitor)[0] == "underfitting"


def test_batches_that_differ_are_no_oscillation_where_validation_stands_still() -> None:
    x = torch.randn(4 * ROWS, 8)
    y = x[:, :1] + 2 * torch.randn(4 * ROWS, 1)
    model = nn.Linear(8, 1)
    nn.init.zeros_(model.weight)
    sgd = torch.optim.SGD(model.parameters(), 0.005)
    monitor = gradstat.attach(sgd, model).gradstat  # type: ignore[attr-defined]
    for step in range(600):
        rows = torch.randint(len(x), (4,))
        outputs = model(x[rows])
        loss = functional.mse_loss(outputs, y[rows])
        monitor.observe(inputs=x[rows], outputs=outputs, targets=y[rows], loss=loss)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        if step % 20 == 19:
            with torch.no_grad():
                monitor.observe(val_loss=functional.mse_loss(model(x), y))
    case = Case(monitor.evidence())
    assert list(Oscillating(gained=0.0).judge(case))  # but for what is gained on validation
    assert not list(Oscillating().judge(case))


@pytest.mark.parametrize(("after", "is_told"), [((0.61,), False), ((0.61, 0.62), True)])
def test_one_validation_loss_that_lies_higher_may_do_so_by_chance(
    after: tuple[float, ...], is_told: bool
) -> None:
    monitor = told((0.9 * 0.97**step for step in range(60)), (0.82, 0.6, 0.52, *after))
    assert bool(named(monitor, "overfitting")) == is_told


def test_a_square_within_the_loss_is_told_by_the_loss_itself() -> None:
    x, y = numbers()

    def squared(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets.squeeze(1)) ** 2).mean()

    found = train(net(n_out=1), (x, y), squared).diagnose()[0]
    assert (found.code, found.confidence) == ("loss-output-mismatch", 0.98)
    assert "within the loss" in found.explanation


def test_recurrent_weights_that_multiply_a_signal_are_told_though_the_loss_falls() -> None:
    x = torch.randn(ROWS, 12, 4)
    y = x[:, -1, :1]
    model = Answer(nn.RNN, 4, 1)
    nn.init.normal_(model.cell.weight_hh_l0)
    monitor = train(model, (x, y), functional.mse_loss, see=("loss",), steps=200)
    assert monitor.evidence().loss is not None
    assert "exploding-gradient" in raised(monitor)


def test_attention_that_begins_with_a_single_key_is_saturated() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.value, self.out = nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            shares = torch.softmax(1000 * self.key(x) @ self.key(x[:, 0])[..., None], 1)[..., 0]
            mixed = (shares[..., None] * self.value(x)).sum(1)
            answer: Tensor = self.out(mixed)
            return answer

    x = torch.randn(ROWS, 6, 4)
    y = x[:, :, 0].sum(1).gt(0).long()
    codes = raised(train(Attention(), (x, y), functional.cross_entropy))
    assert "saturated-activation" in codes


@pytest.mark.parametrize(
    ("has_positions", "code"), [(False, "underfitting"), (True, "bad-targets")]
)
def test_attention_without_positions_does_not_see_what_is_about_order(
    has_positions: bool, code: str
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(6, 16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.head = nn.Linear(16, 2)
            if has_positions:
                self.register_buffer("places", torch.zeros(5, 16))

        def forward(self, x: Tensor) -> Tensor:
            words = self.words(x)
            answer: Tensor = self.head(self.attention(words, words, words)[0].mean(1))
            return answer

    x = torch.rand(ROWS, 6).argsort(1)[:, :5]
    y = (x[:, 0] > x[:, 1]).long()
    assert code in raised(train(Model(), (x, y), functional.cross_entropy, steps=200))


def test_a_first_loss_is_compared_with_that_of_one_who_knows_no_shares() -> None:
    x = torch.randn(ROWS, 8)
    y = torch.where(torch.rand(ROWS) < 0.97, 0, torch.randint(1, 4, (ROWS,)))
    monitor = train(net(n_out=4), (x, y), functional.cross_entropy)
    assert named(monitor, "bad-initialization") == []


@pytest.mark.parametrize(("growth", "is_told"), [(1.003, False), (1.008, True)])
def test_a_loss_that_climbs_is_told_before_it_has_doubled(growth: float, is_told: bool) -> None:
    monitor = told(growth**step + 0.02 * float(torch.randn(())) for step in range(100))
    shape = Case(monitor.evidence()).loss
    assert shape is not None
    assert shape.last < 2.0 * shape.best
    assert bool(named(monitor, "diverging-loss")) == is_told


def test_a_fall_that_is_small_and_sure_is_no_flat_loss() -> None:
    monitor = descend(net(), classes(), functional.cross_entropy, 0.002, 40, ("loss", "val_loss"))
    assert "underfitting" in raised(monitor)


@pytest.mark.parametrize("is_fresh", [True, False])
def test_a_crawl_is_told_from_fine_tuning_by_what_the_weights_began_with(is_fresh: bool) -> None:
    model = net()
    if not is_fresh:
        for layer in (model[0], model[2]):
            nn.init.xavier_normal_(layer.weight, gain=1.5)  # type: ignore[arg-type]
    monitor = descend(model, classes(), functional.cross_entropy, 0.002)
    assert bool(named(monitor, "underfitting")) == is_fresh


# ---- what looks like these faults and is none ----------------------------------------------------


def test_constraints_on_the_sum_of_weights_write_nothing_back() -> None:
    model = net()

    def centred(x: Tensor) -> Tensor:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.mean())
        return x

    monitor = train(model, classes(), functional.cross_entropy, see=(), distort=centred)
    assert named(monitor, "parameters-not-updating") == []


def test_a_lazy_buffer_that_was_never_used_has_no_rows() -> None:
    model = net()
    model.unused = nn.LazyBatchNorm1d(affine=False)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    monitor = gradstat.attach(sgd, model).gradstat  # type: ignore[attr-defined]
    assert monitor.diagnose() == []


def test_a_softmax_at_the_end_may_be_sure_from_the_start() -> None:
    x, y = classes()
    model = nn.Sequential(nn.Linear(8, 3, bias=False), nn.Softmax(-1))
    nn.init.normal_(model[0].weight, std=100.0)

    def likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.nll_loss((outputs + 1e-6).log(), targets)

    monitor = train(model, (x, y), likelihood, see=("loss",))
    assert named(monitor, "saturated-activation") == []


def test_the_bias_of_a_single_layer_cancels_in_a_large_batch() -> None:
    x = torch.randn(8192, 8)
    y = x @ torch.randn(8, 1)
    monitor = descend(nn.Linear(8, 1), (x, y), functional.mse_loss, 1e-4)
    assert named(monitor, "bad-inputs") == []


def test_a_model_without_biases_that_learns_noisy_labels_has_no_need_of_them() -> None:
    x = torch.randn(ROWS, 8)
    y = (x[:, :3] + torch.randn(ROWS, 3)).argmax(1)
    model = nn.Sequential(nn.Linear(8, 24, bias=False), nn.Tanh(), nn.Linear(24, 3, bias=False))
    adam = torch.optim.Adam(model.parameters(), 0.003)
    monitor = train(model, (x, y), functional.cross_entropy, optimizer=adam)
    assert raised(monitor) == []


def test_a_relu_that_never_fires_beside_the_path_cuts_nothing_off() -> None:
    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.relu = net(n_out=1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.body(x)
            return outputs - self.relu(outputs - 100)

    assert raised(train(Clipped(), numbers(), functional.mse_loss, see=("loss",))) == []


def test_a_sigmoid_that_only_prediction_uses_is_not_what_the_loss_is_given() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    nn.init.zeros_(model[2].weight)
    nn.init.constant_(model[2].bias, 0.3)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.sigmoid = model, nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            outputs: Tensor = self.body(x)
            return outputs

    whole = Model()
    sgd = torch.optim.SGD(whole.parameters(), 0.01)
    y = (torch.rand(ROWS, 1) < 0.57).float()
    data = (torch.randn(ROWS, 8), y)
    monitor = train(whole, data, functional.binary_cross_entropy_with_logits, optimizer=sgd)
    assert named(monitor, "loss-output-mismatch") == []


def test_a_constant_in_the_loss_does_not_hide_what_is_learnt() -> None:
    def lifted(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets) + 12

    model = net()
    adam = torch.optim.Adam(model.parameters(), 1.0)
    monitor = train(model, classes(), lifted, optimizer=adam, steps=200,
                    schedule=lambda step: 1.0 if step < 12 else 0.01)  # fmt: skip
    assert named(monitor, "lr-too-high") == []


def test_a_fall_that_has_come_to_its_end_has_not_only_begun() -> None:
    losses = [0.9 + 0.1 * 0.95**step for step in range(100)]
    case = Case(told(losses, losses[::20]).evidence())
    assert list(HardlyBegun(of_all=0.0).judge(case))
    assert not list(HardlyBegun().judge(case))


# ---- and more of them ----------------------------------------------------------------------------


def test_a_whole_layer_that_was_dead_from_the_start_is_told_though_the_loss_falls() -> None:
    x = torch.randn(ROWS, 8)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    nn.init.constant_(model[0].bias, -20.0)
    monitor = train(model, (x, x + 3), functional.mse_loss, see=("loss",), steps=200)
    assert raised(monitor)[0] == "dead-units"


def test_right_answers_at_the_loss_of_a_guess_are_a_flat_loss() -> None:
    """A temperature of a hundred: outputs that hardly differ are in the right order."""
    x = torch.randn(ROWS, 8)
    y = x[:, :4].argmax(1)
    model = nn.Linear(8, 4)
    with torch.no_grad():
        model.weight.copy_(torch.eye(8)[:4] / 100)
        model.bias.zero_()
    sgd = torch.optim.SGD(model.parameters(), 1e-4)
    monitor = train(model, (x, y), functional.cross_entropy, optimizer=sgd)
    assert Case(monitor.evidence()).learns
    assert named(monitor, "flat-loss")


def test_outputs_that_are_alike_by_design_come_before_units_that_are_dead_for_all() -> None:
    x, y = classes()

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(0, keepdim=True).expand_as(x)

    model = nn.Sequential(Mean(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    nn.init.constant_(model[1].bias[:11], -1.0)
    assert raised(train(model, (x, y), functional.cross_entropy))[0] == "constant-predictions"


def test_a_model_without_any_bias_is_said_to_have_none() -> None:
    x = torch.randn(ROWS, 2)
    y = (x.norm(dim=1) > 1.2).long()
    model = nn.Sequential(nn.Linear(2, 24, bias=False), nn.Tanh(), nn.Linear(24, 2, bias=False))
    (found,) = named(train(model, (x, y), functional.cross_entropy), "underfitting")
    assert "bias" in found.explanation


class Attention(nn.Module):
    """Attention over tokens, with a table of places that may go unused."""

    def __init__(self, places: bool) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(8, 16), nn.Embedding(12, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 2)
        self.uses_places = places

    def forward(self, x: Tensor) -> Tensor:
        states = self.tokens(x)
        if self.uses_places:
            states = states + self.places.weight
        seen, _ = self.attention(states, states, states)
        answer: Tensor = self.head(seen.mean(1))
        return answer


@pytest.mark.parametrize("places", [False, True])
def test_attention_whose_places_go_unused_sees_no_order(places: bool) -> None:
    x = torch.randint(8, (ROWS, 12))
    model = Attention(places)
    monitor = train(model, (x, (x[:, 0] > x[:, 1]).long()), functional.cross_entropy, steps=20)
    assert Case(monitor.evidence()).sees_no_order != places
