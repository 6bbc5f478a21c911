"""For each rule a healthy run that looks like what it warns of."""

from __future__ import annotations

import math

import pytest
import torch
from diagnosed_runs import (
    ROWS,
    LossFunction,
    Reader,
    classes,
    fit,
    net,
    numbers,
    raised,
    signs,
    train,
)
from healthy_lookalikes import Run, adam, bce_logits, cross_entropy, like, mse_loss, runs
from torch import Tensor, nn
from torch.nn import functional

import gradstat
from gradstat.diagnosis import RULES

# ---- updates -------------------------------------------------------------------------------------


@like("NoGradient")
def _() -> gradstat.Monitor:
    """A frozen first layer."""
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 3))
    model[0].requires_grad_(False)
    return train(model, classes(), cross_entropy, steps=200)


@like("NoStep")
@like("NotZeroed")
def _() -> gradstat.Monitor:
    """Each step adds up the gradients of eight batches."""
    x, y = classes()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(ROWS, (16,))
        return x[rows], y[rows]

    return fit(net(), lambda o, t: cross_entropy(o, t) / 8, batch, steps=480, each=8)


@like("NoUpdate")
def _() -> gradstat.Monitor:
    """A warm-up from 0."""
    return train(
        net(), classes(), cross_entropy, schedule=lambda step: min(1, max(0, step - 3) / 40)
    )


@like("WrittenBack")
def _() -> gradstat.Monitor:
    """Weights that are kept within a box, as of a critic, and whose norms are kept after a step."""

    class Boxed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.clamp_(-0.2, 0.2)
                self.weight.div_(self.weight.norm(dim=1, keepdim=True).clamp(min=0.5) * 2)
            return super().forward(x)

    return train(nn.Sequential(Boxed(8, 32), nn.ReLU(), nn.Linear(32, 3)), classes(), cross_entropy)


# ---- weights -------------------------------------------------------------------------------------


@like("Initialization")
def _() -> gradstat.Monitor:
    """A last layer that starts at 0."""
    model = net()
    nn.init.zeros_(model[-1].weight)  # type: ignore[arg-type]
    return train(model, classes(), cross_entropy)


@like("FirstLoss")
def _() -> gradstat.Monitor:
    """A first loss of thrice a guess's."""
    model = net()
    with torch.no_grad():
        model[-1].weight.mul_(8)  # type: ignore[operator, union-attr]
    return train(model, classes(), cross_entropy)


# ---- flow ----------------------------------------------------------------------------------------


@like("Vanishing")
@like("Plateau")
def _() -> gradstat.Monitor:
    """Targets that are met, so that gradients end at nothing."""
    x = torch.randn(ROWS, 8)
    return train(nn.Linear(8, 1), (x, x @ torch.randn(8, 1)), mse_loss, steps=1200)


@like("Exploding")
def _() -> gradstat.Monitor:
    return train(net(), classes(), cross_entropy, steps=400, see=())


@like("ThroughTime")
def _() -> gradstat.Monitor:
    """Recurrent weights that forget, and a target that depends on the last steps alone."""
    return train(Reader(), signs(40, -3), cross_entropy, steps=300)


@like("Nonfinite")
def _() -> gradstat.Monitor:
    """One batch in two hundred whose loss is Inf, though its gradient is not."""
    x, y = classes()
    count = iter(range(1000))

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        loss = functional.cross_entropy(outputs, targets)
        return loss + math.inf if next(count) == 60 else loss

    return train(net(), (x, y), loss_fn, steps=200)


@like("SparseGradients")
def _() -> gradstat.Monitor:
    """A table of words most of which a batch does not hold."""
    words = torch.randint(400, (ROWS, 6))
    words[:, 0] = torch.randint(20, (ROWS,))
    model = nn.Sequential(nn.EmbeddingBag(400, 16), nn.Linear(16, 2))
    return train(model, (words, (words[:, 0] > 9).long()), cross_entropy,
                 optimizer=adam(model, 0.05), steps=250)  # fmt: skip


# ---- rates ---------------------------------------------------------------------------------------


@like("TooHigh")
def _() -> gradstat.Monitor:
    """Steps of a tenth of the weights at first, which come down."""
    model = net()
    return train(model, classes(), cross_entropy, optimizer=adam(model, 0.1),
                 schedule=lambda step: 0.98**step, steps=250)  # fmt: skip


@like("TooLow")
def _() -> gradstat.Monitor:
    """Fine-tuning: small steps from where the task is already learnt."""
    x, y = classes()
    model = net()
    chosen = adam(model)
    for _ in range(300):
        chosen.zero_grad()
        cross_entropy(model(x), y).backward()
        chosen.step()
    return train(model, (x, y), cross_entropy, optimizer=torch.optim.SGD(model.parameters(), 1e-5))


# ---- units ---------------------------------------------------------------------------------------


@like("DeadUnits")
def _() -> gradstat.Monitor:
    """Rectified units that fire for few rows."""
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
    nn.init.constant_(model[0].bias, -0.8)  # type: ignore[arg-type]
    return train(model, classes(), cross_entropy, steps=300)


@like("Saturated")
def _() -> gradstat.Monitor:
    """Gates that are open or shut, and right."""
    x, y = classes()
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(4)  # type: ignore[operator, union-attr]
    return train(model, (x, y), cross_entropy, steps=300)


# ---- the loss ------------------------------------------------------------------------------------


@like("ZeroLoss")
def _() -> gradstat.Monitor:
    """A model that comes in trained, and sure of its right answers."""
    x, y = classes()
    model = net()
    chosen = adam(model, 0.05)
    for _ in range(600):
        chosen.zero_grad()
        cross_entropy(model(x), y).backward()
        chosen.step()
    return train(model, (x, y), cross_entropy, optimizer=adam(model, 1e-4))


@like("FlatLoss")
def _() -> gradstat.Monitor:
    """A critic that a good generator keeps at a guess: real rows first, then made ones."""
    model = net(n_out=1)
    targets = torch.cat([torch.ones(16, 1), torch.zeros(16, 1)])
    return fit(model, bce_logits, lambda step: (torch.randn(32, 8), targets))


@like("Oscillating")
def _() -> gradstat.Monitor:
    """A policy's loss, which has mean 0 whatever is learnt."""
    loss_fn: LossFunction = lambda o, t: (o.log_softmax(-1)[:, 0] * torch.randn(32)).mean()  # noqa: E731
    return train(net(), classes(), loss_fn, see=("inputs", "loss"))


# ---- what comes of it ----------------------------------------------------------------------------


@like("ConstantPredictions")
def _() -> gradstat.Monitor:
    """Outputs that hardly differ, as do the targets."""
    x, y = numbers()
    model = net(n_out=1)
    nn.init.constant_(model[-1].bias, 5.0)  # type: ignore[arg-type]
    return train(model, (x, 5 + 0.05 * y), mse_loss, optimizer=adam(model, 0.003), steps=500)


@like("RandomTargets")
def _() -> gradstat.Monitor:
    """Much noise, and some that can be learnt."""
    x, y = numbers()
    noisy = y + torch.randn_like(y)
    return train(net(n_out=1), (x, noisy), mse_loss, val=(x, noisy), steps=300)


@like("NoisyTraining")
def _() -> gradstat.Monitor:
    """Rows that augmentation makes hard, anew each time."""
    x, y = classes(6)
    return train(nn.Linear(8, 6), (x, y), cross_entropy, val=(x, y), steps=400,
                 distort=lambda x: x + torch.randn_like(x))  # fmt: skip


@like("NoisyTraining")
def _() -> gradstat.Monitor:
    """Rows mixed with others, beside the label of the larger part."""
    x, y = classes(6)
    return train(nn.Linear(8, 6), (x, y), cross_entropy, val=(x, y), steps=400,
                 distort=lambda x: 0.6 * x + 0.4 * x.roll(1, 0))  # fmt: skip


@like("Contradictions")
def _() -> gradstat.Monitor:
    """A few labels in a hundred that change, as after a second opinion."""
    x, y = classes(6)
    other = torch.where(torch.rand(ROWS) < 0.05, torch.randint(6, (ROWS,)), y)
    return train(nn.Linear(8, 6), (x.repeat(2, 1), torch.cat([y, other])), cross_entropy)


@like("NothingComesIn")
def _() -> gradstat.Monitor:
    """A last layer that starts at 0, so that the first layer gets no gradient in the first step."""
    model = net()
    nn.init.zeros_(model[-1].weight)  # type: ignore[arg-type]
    return train(model, classes(), cross_entropy)


@like("MissingTargets")
def _() -> gradstat.Monitor:
    """Prices that were cut at a limit."""
    x, y = numbers()
    return train(net(n_out=1), (x, (3 * y).clamp(-2, 2)), mse_loss, steps=300)


@like("ValidationScale")
def _() -> gradstat.Monitor:
    """Validation rows of another scale that the model normalises away."""
    x, y = classes()
    model = nn.Sequential(nn.LayerNorm(8), net())
    return train(model, (x, y), cross_entropy, val=(40 * x, y))


@like("Overfitting")
def _() -> gradstat.Monitor:
    """A validation loss above the training loss, that stays where it is."""
    x, y = classes()
    val = (x + 0.3 * torch.randn(ROWS, 8), y)
    return train(nn.Linear(8, 3), (x, y), cross_entropy, val=val, steps=400)


@like("Underfitting")
def _() -> gradstat.Monitor:
    """A linear model where half of the variance is noise."""
    x = torch.randn(ROWS, 8)
    y = x @ nn.functional.normalize(torch.randn(8, 1), dim=0) + torch.randn(ROWS, 1)
    return train(nn.Linear(8, 1), (x, y), mse_loss, val=(x, y), steps=300)


@pytest.mark.parametrize(
    "run", [pytest.param(run, id=f"{rule}-{i}") for i, (rule, run) in enumerate(runs)]
)
def test_a_healthy_run_that_looks_ill_is_left_alone(run: Run) -> None:
    torch.manual_seed(0)
    assert raised(run()) == []


def test_every_rule_has_a_healthy_run_that_looks_like_its_fault() -> None:
    advisers = {"BatchSize"}  # gives advice alone
    assert {type(rule).__name__ for rule in RULES} - advisers == {rule for rule, _ in runs}
