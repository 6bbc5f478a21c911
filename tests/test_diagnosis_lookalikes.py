"""For each rule a healthy run that looks like what it warns of."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from diagnosed_runs import (
    ROWS,
    LossFunction,
    Reader,
    binary,
    classes,
    fit,
    net,
    numbers,
    raised,
    signs,
    train,
)
from torch import Tensor, nn
from torch.nn import functional

import gradstat
from gradstat.diagnosis import RULES

Run = Callable[[], gradstat.Monitor]
cross_entropy: LossFunction = functional.cross_entropy
mse_loss: LossFunction = functional.mse_loss
bce_logits: LossFunction = functional.binary_cross_entropy_with_logits
_runs: list[tuple[str, Run]] = []


def like(rule: str) -> Callable[[Run], Run]:
    """Register a healthy run that looks like what a rule warns of."""

    def register(run: Run) -> Run:
        _runs.append((rule, run))
        return run

    return register


def adam(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr)


# ---- data ----------------------------------------------------------------------------------------


@like("NonfiniteInputs")
def _() -> gradstat.Monitor:
    """Rows without a target: -100 is left out."""
    x, y = classes()
    return train(net(), (x, torch.where(torch.rand(ROWS) < 0.3, -100, y)), cross_entropy)


@like("InputScale")
def _() -> gradstat.Monitor:
    """Pixels up to 255 before a normalisation."""
    x, y = classes()
    pixels = (x * 50 + 128).clamp(0, 255)
    return train(nn.Sequential(nn.BatchNorm1d(8), *net()), (pixels, y), cross_entropy)


@like("InputScale")
def _() -> gradstat.Monitor:
    """Small inputs beside weights that make up for it."""
    x, y = classes()
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(200)  # type: ignore[operator, union-attr]
    return train(model, (x * 5e-3, y), cross_entropy)


@like("HardlyDiffer")
def _() -> gradstat.Monitor:
    """Pixels of which a few in the middle differ, beside weights that make up for it."""
    x, y = classes()
    model = net()
    with torch.no_grad():
        model[0].weight.mul_(20)  # type: ignore[operator, union-attr]
    return train(model, (1 + 0.03 * x, y), cross_entropy, steps=400)


@like("OneToken")
def _() -> gradstat.Monitor:
    """Short words in long rows of padding, and what they say is learnt."""
    words = torch.where(torch.arange(12) < 3, torch.randint(1, 20, (ROWS, 12)), 0)
    model = nn.Sequential(nn.EmbeddingBag(20, 16, mode="sum", padding_idx=0), nn.Linear(16, 2))
    return train(model, (words, (words[:, 0] > 9).long()), cross_entropy, steps=400)


@like("WrongAxis")
def _() -> gradstat.Monitor:
    """Recordings, each standardised by itself."""
    phase = torch.rand(ROWS, 1) * math.tau
    x = torch.sin(torch.arange(24) * 0.5 * torch.randint(1, 4, (ROWS, 1)) + phase)
    y = (x[:, 0] > 0).long()
    return train(net(24, 2), ((x - x.mean(1, True)) / x.std(1, keepdim=True), y), cross_entropy)


@like("UnseenInputs")
def _() -> gradstat.Monitor:
    """A bias that the normalisation behind it leaves without a gradient."""
    body = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3))
    return train(body, classes(), cross_entropy, see=("loss", "outputs", "targets"))


@like("Unshuffled")
def _() -> gradstat.Monitor:
    """Batches of two classes of six, as for metric learning."""
    x, y = classes(6)
    by_class = [(y == i).nonzero()[:16, 0] for i in range(6)]

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rows = torch.cat([by_class[step % 6], by_class[(step * 5 + 1) % 6]])
        return x[rows], y[rows]

    return fit(net(n_out=6), cross_entropy, batch)


@like("TargetScale")
def _() -> gradstat.Monitor:
    """Targets around 30, and a last bias that is set to it."""
    x, y = numbers()
    model = net(n_out=1)
    nn.init.constant_(model[-1].bias, 30.0)  # type: ignore[arg-type]
    return train(model, (x, y + 30), mse_loss)


@like("Leak")
def _() -> gradstat.Monitor:
    """A text with a tenth of its letters hidden, which are to be found."""
    text = torch.arange(12).repeat(ROWS, 2)[:, :12] + torch.randint(4, (ROWS, 1))
    hidden = torch.where(torch.rand(text.shape) < 0.1, 19, text)
    model = nn.Sequential(nn.Embedding(20, 16), nn.Conv1d(12, 12, 3, padding=1), nn.Linear(16, 20))
    loss_fn: LossFunction = lambda o, t: cross_entropy(o.flatten(0, 1), t.flatten())  # noqa: E731
    return train(model, (hidden, text), loss_fn)


@like("ConstantTargets")
def _() -> gradstat.Monitor:
    """A generator that is to pass for real before a critic that does not give in."""
    model = net(n_out=1)
    loss_fn: LossFunction = lambda o, t: bce_logits(o - o.mean().detach(), t)  # noqa: E731
    return train(model, (torch.randn(ROWS, 8), torch.ones(ROWS, 1)), loss_fn)


@like("Imbalance")
def _() -> gradstat.Monitor:
    """Nine of ten are of one class, and the tenth is found."""
    x = torch.randn(ROWS, 8)
    return train(net(n_out=2), (x, (x[:, 0] > 1.3).long()), cross_entropy, steps=300)


# ---- fit -----------------------------------------------------------------------------------------


@like("ProbabilitiesAsLogits")
def _() -> gradstat.Monitor:
    """A sigmoid before the loss that takes it."""
    model = nn.Sequential(*net(n_out=1), nn.Sigmoid())
    return train(model, binary(), functional.binary_cross_entropy)


@like("CutLogits")
def _() -> gradstat.Monitor:
    """Rectified features below the last layer."""
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
    return train(model, classes(), cross_entropy)


@like("Rearranged")
def _() -> gradstat.Monitor:
    """Logits of each step, transposed to what the loss takes."""
    x = torch.randn(ROWS, 4, 8)
    y = (x @ torch.randn(8, 3)).argmax(-1)
    return train(net(), (x, y), lambda o, t: cross_entropy(o.transpose(1, 2), t))


@like("TargetsBeyondProbability")
def _() -> gradstat.Monitor:
    """Targets between 0.05 and 0.95."""
    x, y = binary()
    return train(net(n_out=1), (x, 0.05 + 0.9 * y), bce_logits)


@like("LogitsAsLogProbabilities")
def _() -> gradstat.Monitor:
    return train(nn.Sequential(*net(), nn.LogSoftmax(-1)), classes(), functional.nll_loss)


@like("Maximised")
@like("HardlyBegun")
def _() -> gradstat.Monitor:
    """What is left of the loss is a constant that nothing can take away."""
    x, y = numbers()
    return train(net(n_out=1), (x, y), lambda o, t: mse_loss(o, t) + 9, val=(x, y), see=("loss",))


@like("Diverging")
def _() -> gradstat.Monitor:
    """A likelihood of numbers, whose logarithm has any sign."""
    x, y = numbers()

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.gaussian_nll_loss(outputs[:, :1], targets, outputs[:, 1:].exp())

    return train(net(n_out=2), (x, y), loss_fn, steps=300)


@like("OneUnitSoftmax")
def _() -> gradstat.Monitor:
    return train(net(n_out=1), binary(), bce_logits)


@like("Broadcast")
def _() -> gradstat.Monitor:
    """Outputs (n, 1) and targets (n,) that the loss brings side by side."""
    x, y = numbers()
    return train(net(n_out=1), (x, y[:, 0]), lambda o, t: mse_loss(o[:, 0], t))


@like("OutputRange")
def _() -> gradstat.Monitor:
    """A rectified output for targets that are never negative."""
    x, y = numbers()
    return train(nn.Sequential(*net(n_out=1), nn.ReLU()), (x, y.relu() + 0.1), mse_loss)


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
    "run", [pytest.param(run, id=f"{rule}-{i}") for i, (rule, run) in enumerate(_runs)]
)
def test_a_healthy_run_that_looks_ill_is_left_alone(run: Run) -> None:
    torch.manual_seed(0)
    assert raised(run()) == []


def test_every_rule_has_a_healthy_run_that_looks_like_its_fault() -> None:
    advisers = {"BatchSize"}  # gives advice alone
    assert {type(rule).__name__ for rule in RULES} - advisers == {rule for rule, _ in _runs}
