"""What the rules say of what inputs, targets and logits hold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from diagnosed_runs import ROWS, Reader, classes, fit, net, numbers, raised, signs, train
from torch import Tensor, nn
from torch.nn import functional

import gradstat
from gradstat.diagnosis import diagnose
from gradstat.diagnosis.evidence import Curve

cross_entropy = functional.cross_entropy


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# ---- inputs --------------------------------------------------------------------------------------


def test_inputs_divided_by_their_range_twice_are_named() -> None:
    x, y = classes()
    monitor = train(net(), ((x.clamp(0, 1) / 255 - 0.5) / 0.5, y), cross_entropy)
    assert raised(monitor)[0] == "bad-inputs"


def test_words_that_are_all_unknown_are_named() -> None:
    words = torch.randint(1, 20, (ROWS, 8))
    y = (words[:, 0] > 9).long()
    model = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(64, 2))
    few = torch.where(torch.rand(words.shape) < 0.95, 1, words)
    assert raised(train(model, (few, y), cross_entropy))[0] == "bad-inputs"


def test_a_table_standardised_row_by_row_is_named() -> None:
    x, y = classes()
    table = x * torch.logspace(-2, 2, 8) + torch.logspace(-1, 3, 8)
    rows = (table - table.mean(1, True)) / table.std(1, keepdim=True)
    assert raised(train(net(), (rows, y), cross_entropy, steps=200))[0] == "bad-inputs"


# ---- targets -------------------------------------------------------------------------------------


def test_rows_that_come_again_with_another_class_are_named() -> None:
    x, y = classes()
    both = (x.repeat(2, 1), torch.cat([y, (y + 1) % 3]))
    found = raised(train(net(), both, cross_entropy, steps=200))
    assert found[0] == "bad-targets"


def test_labels_random_in_half_are_named_though_validation_is_right() -> None:
    x, y = classes()
    noisy = torch.where(torch.rand(ROWS) < 0.6, torch.randint(3, (ROWS,)), y)
    monitor = train(net(), (x, noisy), cross_entropy, val=(x, y), steps=300)
    assert raised(monitor)[0] == "bad-targets"


def test_pairs_that_all_match_are_constant_targets() -> None:
    """They are learnt at once: everything is given the same embedding."""
    x = torch.randn(ROWS, 8)

    def loss_fn(outputs: Tensor, same: Tensor) -> Tensor:
        distance = (outputs - outputs.roll(1, 0)).pow(2).sum(1)
        return (same * distance + (1 - same) * (1 - distance).relu()).mean()

    monitor = train(net(n_out=4), (x, torch.ones(ROWS)), loss_fn, steps=300)
    assert raised(monitor)[0] == "bad-targets"


@pytest.mark.parametrize(("last", "severity"), [(4.0, "error"), (0.5, "warning")])
def test_rows_in_order_are_told_by_validation_where_each_batch_is_right(
    last: float, severity: str
) -> None:
    x, y = classes()
    order = y.argsort()
    batches = list(zip(x[order].split(35), y[order].split(35), strict=True))
    monitor = fit(net(), cross_entropy, lambda step: batches[step % len(batches)], steps=300)
    run = monitor.evidence()
    assert raised(monitor) == []  # whatever is right in each batch
    steps = np.arange(10, 300, 30)
    val = Curve(steps, np.linspace(1.5, last, len(steps)))
    (found,) = [
        finding
        for finding in diagnose(dataclasses.replace(run, curves=run.curves | {"val_loss": val}))
        if finding.caused_by is None and finding.severity != "info"
    ]
    assert (found.code, found.severity) == ("oscillating-loss", severity)


def test_pixels_of_which_one_in_a_hundred_counts_are_class_imbalance() -> None:
    """What is learnt is how many there are and where, which leaves most of a guess's loss."""
    x = torch.randn(ROWS, 8)
    y = (torch.rand(ROWS, 64) < torch.linspace(0, 0.06, 64)).float()
    monitor = train(net(n_out=64), (x, y), functional.binary_cross_entropy_with_logits, steps=300)
    assert raised(monitor)[0] == "class-imbalance"


# ---- logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [nn.ReLU(), nn.Tanh()])
def test_a_last_activation_that_cuts_logits_is_named(last: nn.Module) -> None:
    x, y = classes(6)
    monitor = train(nn.Sequential(*net(8, 6), last), (3 * x, y), cross_entropy, steps=200)
    (found,) = [f for f in monitor.diagnose() if f.code == "loss-output-mismatch"]
    assert type(last).__name__.lower() in found.explanation.lower()


@pytest.mark.parametrize("is_channel_first", [False, True])
def test_logits_read_in_another_order_are_named(is_channel_first: bool) -> None:
    x = torch.randn(ROWS, 4, 8)
    y = (x @ torch.randn(8, 3)).argmax(-1)

    class Model(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = super().forward(x)
            return logits.transpose(1, 2).contiguous() if is_channel_first else logits

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if is_channel_first:
            return cross_entropy(outputs.reshape(-1, 3), targets.flatten())
        return cross_entropy(outputs.reshape(-1, 3, 4), targets)

    monitor = train(Model(*net()), (x, y), loss_fn, steps=150)
    assert raised(monitor)[0] == "loss-output-mismatch"
    assert "another order" in monitor.diagnose()[0].explanation


# ---- steps ---------------------------------------------------------------------------------------


def test_adaptive_steps_that_lead_nowhere_in_a_still_loss_are_too_small() -> None:
    model = net()
    monitor = train(model, classes(), cross_entropy, see=("loss",),
                    optimizer=torch.optim.Adam(model.parameters(), 1e-5))  # fmt: skip
    assert raised(monitor)[0] == "lr-too-low"


def test_steps_of_a_third_of_the_weights_go_to_and_fro() -> None:
    """The loss neither rises nor falls: each step goes over the valley and the next one back."""
    x = torch.randn(64, 8)
    y = x @ torch.randn(8, 1)
    model = nn.Linear(8, 1)
    monitor = train(model, (x, y), functional.l1_loss, see=("loss",), steps=200,
                    optimizer=torch.optim.SGD(model.parameters(), 2.0))  # fmt: skip
    assert raised(monitor) == ["lr-too-high"]


def test_recurrent_weights_that_start_at_nothing_forget_short_sequences() -> None:
    model = Reader()
    nn.init.normal_(model.reader.weight_hh_l0, std=0.005)  # type: ignore[arg-type]
    monitor = train(model, signs(12, 0), cross_entropy, steps=200)
    assert raised(monitor)[0] == "vanishing-gradient"


def test_gradients_a_million_times_the_weights_are_named_though_the_loss_falls() -> None:
    x, y = numbers()
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), *(nn.Linear(24, 24) for _ in range(6)),
                          nn.Linear(24, 1))  # fmt: skip
    with torch.no_grad():
        for layer in model[2:]:  # type: ignore[union-attr]
            layer.weight.mul_(8)
    monitor = train(model, (x, y), functional.mse_loss, see=("loss",), steps=200)
    assert "exploding-gradient" in raised(monitor)


def test_few_rows_that_are_learnt_by_heart_overfit() -> None:
    """A validation loss of two fifths of a guess's is no good beside one of next to nothing."""
    x, y = classes()
    model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 3))
    monitor = train(model, (x[:24], y[:24]), cross_entropy, val=(x[24:], y[24:]), steps=400)
    assert raised(monitor) == ["overfitting"]


def test_gradients_of_which_a_share_alone_is_kept_are_sparse() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), *net(64))

    def keep_largest(gradient: Tensor) -> Tensor:
        kept = max(1, gradient.numel() // 50)
        return gradient * (gradient.abs() >= gradient.abs().flatten().topk(kept).values[-1])

    for parameter in model.parameters():
        parameter.register_hook(keep_largest)
    monitor = train(model, classes(), cross_entropy, see=("loss",), steps=200)
    assert raised(monitor) == ["sparse-gradients"]


def test_targets_a_thousand_times_too_large_are_named_though_something_is_learnt() -> None:
    """Their mean is learnt, and some of the rest: less than half."""
    x, y = numbers()
    monitor = train(net(n_out=1), (x, 1000 * y + 500), functional.mse_loss, val=(x, 1000 * y + 500),
                    steps=900)  # fmt: skip
    assert raised(monitor)[:1] == ["bad-targets"]


def test_steps_of_thrice_the_weights_are_too_large_whatever_the_loss() -> None:
    model = net()
    monitor = train(model, classes(), cross_entropy, see=(),
                    optimizer=torch.optim.AdamW(model.parameters(), 1.0))  # fmt: skip
    assert raised(monitor)[0] == "lr-too-high"


def test_gradients_zeroed_before_the_step_are_not_added_up() -> None:
    x, y = classes()
    model = net()
    attached = gradstat.attach(torch.optim.SGD(model.parameters(), 0.1), model, diagnose=None)
    monitor: gradstat.Monitor = attached.gradstat  # type: ignore[attr-defined]
    for _ in range(60):
        loss = cross_entropy(model(x), y)
        monitor.observe(loss=loss)
        loss.backward()
        attached.zero_grad(set_to_none=False)
        attached.step()
    assert raised(monitor)[0] == "parameters-not-updating"
