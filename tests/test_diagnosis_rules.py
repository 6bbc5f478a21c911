"""Rules one by one: small runs that show a fault, and healthy ones that look like it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradstat
from gradstat.diagnosis import Case, Finding

LossFunction = Callable[[Tensor, Tensor], Tensor]
ROWS = 512


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def net(n_in: int = 8, n_out: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, 24), nn.Tanh(), nn.Linear(24, n_out))


def classes(n: int = 3) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, 8)
    return x, (x @ torch.randn(8, n)).argmax(1)


def numbers(n: int = 1) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, 8)
    return x, torch.tanh(x @ torch.randn(8, n))


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    loss_fn: LossFunction,
    *,
    steps: int = 120,
    optimizer: torch.optim.Optimizer | None = None,
    val: tuple[Tensor, Tensor] | None = None,
    schedule: Callable[[int], float] | None = None,
    see: tuple[str, ...] = ("inputs", "outputs", "targets", "loss"),
) -> gradstat.Monitor:
    """Train with batches of 32 and observe; validate every 12th step where there is a set."""
    chosen = optimizer or torch.optim.Adam(model.parameters(), 0.01)
    attached = gradstat.attach(chosen, model, diagnose=None)
    monitor: gradstat.Monitor = attached.gradstat  # type: ignore[attr-defined]
    base = [group["lr"] for group in chosen.param_groups]
    x, y = data
    for step in range(steps):
        if schedule is not None:
            for group, lr in zip(chosen.param_groups, base, strict=True):
                group["lr"] = lr * schedule(step)
        rows = torch.randint(len(x), (32,))
        outputs = model(x[rows])
        loss = loss_fn(outputs, y[rows])
        seen = {"inputs": x[rows], "outputs": outputs, "targets": y[rows], "loss": loss}
        monitor.observe(**{name: value for name, value in seen.items() if name in see})
        chosen.zero_grad()
        loss.backward()
        chosen.step()
        if val is not None and step % 12 == 11:
            with torch.no_grad():
                monitor.observe(val_loss=loss_fn(model(val[0]), val[1]))
    monitor._kept_alive = attached  # type: ignore[attr-defined]
    return monitor


def raised(monitor: gradstat.Monitor) -> list[str]:
    return [f.code for f in monitor.diagnose() if f.severity != "info"]


def named(monitor: gradstat.Monitor, code: str) -> list[Finding]:
    return [f for f in monitor.diagnose() if f.code == code and f.severity != "info"]


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
