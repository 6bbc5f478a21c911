"""`check`: each fault is found, healthy models pass, in all ways to call it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from probe_models import classes, generator, mlp, numbers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import gradstat

pytestmark = pytest.mark.usefixtures("one_torch_thread")

Case = tuple[nn.Module, Callable[..., Any], Any]


def look(case: Case, **options: Any) -> gradstat.CheckReport:
    model, loss_fn, batch = case
    return gradstat.check(model, loss_fn, batch, **{"overfit_steps": 0, **options})


def with_(model: nn.Module, change: Callable[[nn.Module], Any]) -> nn.Module:
    with torch.no_grad():
        change(model)
    return model


class Through(nn.Module):
    """Calls a function of a module and its input."""

    def __init__(self, inner: nn.Module, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self.inner, inputs)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = mlp(), nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.used(inputs)
        return outputs


class Residual(nn.Module):
    """A branch whose last layer starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.branch = nn.Linear(12, 24), nn.Linear(24, 24)
        self.last, self.head = nn.Linear(24, 24), nn.Linear(24, 4)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).relu()
        outputs: Tensor = self.head(hidden + self.last(self.branch(hidden).relu()))
        return outputs


class Tagger(nn.Module):
    """Classes of the positions of a sequence."""

    def __init__(self, *, batch_first: bool = True, causal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 16)
        self.lstm = nn.LSTM(16, 32, batch_first=batch_first, bidirectional=not causal)
        self.head = nn.Linear(32 if causal else 64, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.lstm(self.embedding(tokens))[0])
        return outputs


class LastState(Tagger):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)[:, -1]


def sequences(*, rows: int = 16, length: int = 6) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 20, (rows, length), generator=generator(4))
    return tokens, tokens.roll(1, dims=1)


def by_position(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 2, 32, batch_first=True, dropout=0.0)
    return nn.Sequential(
        nn.Unflatten(1, (4, 3)), nn.Linear(3, 12), layer, nn.Flatten(), nn.Linear(48, 4)
    )


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(32, 3, 8, 8, generator=generator(5)), classes(32)[1]


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8),
        nn.ReLU(), nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip


CE, MSE = F.cross_entropy, F.mse_loss


def scaled(batch: tuple[Tensor, Tensor], by: float) -> tuple[Tensor, Tensor]:
    return batch[0] * by, batch[1]


def zero_weights(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.zero_()


def equal_rows(model: nn.Module) -> None:
    """Units of the first layer alike, though its weights are not constant."""
    model[0].weight[:] = model[0].weight[:1].clone()
    model[0].bias.zero_()
    model[2].weight[:] = model[2].weight[:, :1].clone()


def deep(activation: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(12, 24), activation()]
    for _ in range(9):
        layers += [nn.Linear(24, 24), activation()]
    return nn.Sequential(*layers, nn.Linear(24, 4))


FAULTY: dict[str, tuple[Callable[[], Case], str, str]] = {
    "double_softmax": (
        lambda: (mlp(nn.Softmax(-1)), CE, classes()),
        "loss-output-mismatch", "softmax of them once more",
    ),
    "double_sigmoid": (
        lambda: (mlp(nn.Sigmoid(), outputs=1), F.binary_cross_entropy_with_logits,
                 (classes()[0], (classes()[1] > 1).float()[:, None])),
        "loss-output-mismatch", "sigmoid of them once more",
    ),
    "logits_into_nll": (
        lambda: (mlp(), F.nll_loss, classes()), "loss-output-mismatch", "no log-probabilities",
    ),
    "softmax_of_one": (
        lambda: (mlp(nn.Softmax(-1), outputs=1), MSE, numbers()),
        "loss-output-mismatch", "softmax over one unit",
    ),
    "broadcast": (
        lambda: (mlp(outputs=1), lambda o, t: ((o - t) ** 2).mean(),
                 (numbers()[0], numbers()[1][:, 0])),
        "loss-output-mismatch", "broadcast to a square",
    ),
    "inputs_unscaled": (lambda: (mlp(), CE, scaled(classes(), 200)), "bad-inputs", "in size"),
    "inputs_tiny": (lambda: (mlp(), CE, scaled(classes(), 1e-5)), "bad-inputs", "so small"),
    "inputs_alike": (lambda: (mlp(), CE, scaled(classes(), 0)), "bad-inputs", "is the same"),
    "inputs_nan": (
        lambda: (mlp(), CE, scaled(classes(), math.nan)), "bad-inputs", "hold NaN or Inf",
    ),
    "targets_unscaled": (
        lambda: (mlp(outputs=1), MSE, (numbers()[0], numbers()[1] * 1e3)), "bad-targets", "in size",
    ),
    "targets_all_one_class": (
        lambda: (mlp(), CE, (classes()[0], torch.ones(64).long())),
        "bad-targets", "every target of the batch",
    ),
    "loss_nan": (
        lambda: (mlp(), lambda o, t: CE(o, t) * math.nan, classes()),
        "nonfinite-loss", "NaN or Inf",
    ),
    "initial_loss": (
        lambda: (with_(mlp(), lambda m: m[4].weight.mul_(60)), CE, classes()),
        "bad-initialization", "starts at",
    ),
    "weights_large": (
        lambda: (with_(mlp(), lambda m: [m[i].weight.mul_(20) for i in (0, 2, 4)]), CE, classes()),
        "bad-initialization", "times the size",
    ),
    "weights_zero": (
        lambda: (with_(mlp(), zero_weights), CE, classes()),
        "bad-initialization", "compute the same for ever",
    ),
    "rows_equal": (
        lambda: (with_(mlp(), equal_rows), CE, classes()),
        "bad-initialization", "compute the same for ever",
    ),
    "dead": (
        lambda: (with_(mlp(), lambda m: m[2].bias.fill_(-50)), CE, classes()),
        "dead-units", "zero for every sample",
    ),
    "saturated": (
        lambda: (nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 4), nn.LogSoftmax(-1)),
                 F.nll_loss, scaled(classes(), 100)),
        "saturated-activation", "flat ends",
    ),
    "vanishing": (lambda: (deep(nn.Sigmoid), CE, classes()), "vanishing-gradient", "first layers"),
    "frozen": (
        lambda: (mlp().requires_grad_(False), CE, classes()),
        "parameters-not-updating", "no parameter of the model requires",
    ),
    "loss_detached": (
        lambda: (mlp(), lambda o, t: CE(o.detach(), t), classes()),
        "parameters-not-updating", "does not depend on any parameter",
    ),
    "body_detached": (
        lambda: (Through(mlp(), lambda m, x: m[4](m[:4](x).detach())), CE, classes()),
        "parameters-not-updating", "no gradient comes back",
    ),
    "unused": (lambda: (Unused(), CE, classes()), "parameters-not-updating", "never called"),
    "rounded": (
        lambda: (mlp(outputs=1), lambda o, t: MSE(o.round(), t), numbers()),
        "parameters-not-updating", "exactly 0",
    ),
    "mean_over_batch": (
        lambda: (Through(mlp(), lambda m, x: m(x - x.mean(0))), CE, classes()),
        "mixed-rows", "other rows",
    ),
    "softmax_over_batch": (
        lambda: (mlp(nn.LogSoftmax(0)), F.nll_loss, classes()), "mixed-rows", "other rows",
    ),
    "view_for_transpose": (
        lambda: (Through(mlp(), lambda m, x: m(x.t().reshape(64, 12))), CE, classes()),
        "mixed-rows", "other rows",
    ),
    "batch_first_forgotten": (
        lambda: (LastState(batch_first=False), CE, (sequences()[0], sequences()[1][:, 0])),
        "mixed-rows", "other rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "code", "words"), FAULTY.values(), ids=FAULTY)
def test_a_fault_is_found(make, code, words):
    report = look(make())
    found = [finding for finding in report.findings if finding.code == code]
    assert any(words in finding.explanation for finding in found), str(report)
    assert not report.ok


HEALTHY: dict[str, Callable[[], Case]] = {
    "mlp": lambda: (mlp(), CE, classes()),
    "regression": lambda: (mlp(outputs=1), MSE, numbers()),
    "sigmoid_autoencoder": lambda: (
        mlp(nn.Sigmoid(), outputs=12),
        F.binary_cross_entropy,
        (classes()[0].sigmoid(), classes()[0].sigmoid()),
    ),
    "cnn": lambda: (cnn(), CE, images()),
    "transformer": lambda: (encoder(), CE, classes()),
    "tagger": lambda: (Tagger(), by_position, sequences()),
    "tagger_of_both_directions": lambda: (Tagger(causal=False), by_position, sequences()),
    "zero_branch": lambda: (Residual(), CE, classes()),
    "zero_head": lambda: (with_(mlp(), lambda m: zero_weights(m[4])), CE, classes()),
    "log_probabilities": lambda: (mlp(nn.LogSoftmax(-1)), F.nll_loss, classes()),
    "deep_tanh": lambda: (deep(nn.Tanh), CE, classes()),
    "batch_norm_first": lambda: (nn.Sequential(nn.BatchNorm1d(12), mlp()), CE, classes()),
    "dropout": lambda: (mlp(nn.Dropout(0.2)), CE, classes()),
    "evaluation_mode": lambda: (mlp().eval(), CE, classes()),
}


@pytest.mark.parametrize("make", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_model_passes(make):
    report = look(make(), overfit_steps=120)
    assert report.ok, str(report)
    assert not [finding for finding in report.findings if finding.code == "underfitting"]


def test_a_frozen_backbone_is_information():
    model = mlp()
    model[0].requires_grad_(False)
    report = look((model, CE, classes()))
    assert report.ok
    (finding,) = report.findings
    assert finding.layers == ("0.weight", "0.bias")
    assert "frozen" in finding.explanation


def test_parameters_are_named():
    (finding,) = look((Unused(), CE, classes())).findings
    assert finding.layers == ("spare.weight", "spare.bias")


# ---- one batch learnt by heart ------------------------------------------------------------------


def test_inputs_that_do_not_get_through_cannot_be_learnt():
    blind = Through(mlp(), lambda m, x: m(torch.ones_like(x)))
    report = look((blind, CE, classes()), overfit_steps=60)
    (finding,) = [finding for finding in report.findings if finding.code == "underfitting"]
    assert finding.severity == "error"
    assert "not even this one batch" in finding.explanation


def test_a_model_smaller_than_its_batch_need_not_learn_it():
    inputs = torch.randn(256, 12, generator=generator(1))
    noise = torch.randn(256, 1, generator=generator(2))
    report = look((nn.Linear(12, 1), MSE, (inputs, noise)), overfit_steps=40)
    assert report.ok
    assert "fewer parameters" in report.findings[0].explanation


@pytest.mark.parametrize(
    ("last", "shift"), [(nn.ReLU(), -0.2), (nn.Sigmoid(), 1.0), (nn.Tanh(), 2.0)], ids=str
)
def test_targets_out_of_reach_of_the_last_activation(last, shift):
    inputs, targets = numbers()
    report = look((mlp(last, outputs=1), MSE, (inputs, targets + shift)), overfit_steps=100)
    found = [f.explanation for f in report.findings if f.code == "loss-output-mismatch"]
    assert any("can never be met" in text for text in found), str(report)


def test_a_model_that_refuses_nan_is_merely_bad():
    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        if not outputs.isfinite().all():
            raise ValueError("not a distribution")
        return CE(outputs, targets)

    explosive = Through(mlp(), lambda m, x: m(x).pow(9).exp())
    look((explosive, loss_fn, scaled(classes(), 1e-3)), overfit_steps=30)


# ---- ways to call it ----------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        outputs: Tensor = self.body(torch.cat([left, right], 1))
        return outputs


@pytest.mark.parametrize(
    "batch",
    [
        lambda a, b, t: (a, b, t),
        lambda a, b, t: ((a, b), t),
        lambda a, b, t: [{"right": b, "left": a}, t],
    ],
    ids=["flat", "nested", "keywords"],
)
def test_several_inputs(batch):
    inputs, targets = classes()
    report = look((TwoInputs(), CE, batch(inputs[:, :6], inputs[:, 6:], targets)))
    assert report.ok
    assert report.not_judged == {"overfitting one batch": "overfit_steps is 0"}


def test_a_step_for_batches_of_any_kind():
    inputs, targets = classes()
    batch = {"x": inputs, "labels": targets}
    bad = mlp(nn.Softmax(-1))

    def loss_alone(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return CE(model(batch["x"]), batch["labels"])

    def all_of_it(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        outputs = model(batch["x"])
        return CE(outputs, batch["labels"]), outputs, batch["labels"]

    less = gradstat.check(bad, batch=batch, step=loss_alone, overfit_steps=0)
    assert "targets" in less.not_judged
    assert "initial loss" in less.not_judged
    more = gradstat.check(bad, batch=batch, step=all_of_it, overfit_steps=0)
    assert [finding.code for finding in more.findings] == ["loss-output-mismatch"]


def test_time_may_come_first():
    tokens, targets = sequences()
    model, batch = Tagger(batch_first=False), (tokens.t(), targets.t())
    assert look((model, by_position, batch), batch_dim=1).ok
    assert look((model, by_position, batch)).ok  # it may be either
    # Rows are dimension 0, it was said: then the model mixes them.
    report = look((LastState(batch_first=False), CE, (tokens, targets[:, 0])), batch_dim=0)
    assert "mixed-rows" in [finding.code for finding in report.findings]


def test_batch_norm_is_excepted_and_said_so():
    report = look((cnn(), CE, images()))
    assert "running statistics" in report.not_judged["independence of rows in BatchNorm"]
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.ReLU(),
                          nn.Linear(8, 4))  # fmt: skip
    report = look((model, CE, classes()))
    assert report.ok
    assert "without running statistics" in report.not_judged["independence of rows"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, by torch
def test_a_compiled_model_is_looked_at_inside():
    inner = mlp()
    assert look((torch.compile(inner), CE, classes())).ok  # nothing is compiled for it


def test_one_row_is_no_batch_of_equal_rows():
    inputs, targets = classes()
    report = look((mlp(), CE, (inputs[:1], targets[:1])))
    assert report.ok
    assert report.not_judged["scale of the inputs"] == "needs a batch of 2 rows"


# ---- the report ---------------------------------------------------------------------------------


def test_the_report_reads_well():
    report = look((mlp(nn.Softmax(-1)), CE, classes()))
    text = str(report)
    assert text.startswith("check: 1 found\nloss-output-mismatch (error")
    assert "measured: ln C 1.39" in text
    assert "not judged: overfitting one batch (overfit_steps is 0)" in text
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["ok"] is False
    assert plain["findings"][0]["code"] == "loss-output-mismatch"
    assert str(look((mlp(), CE, classes()))).startswith("check: nothing wrong was found\n")


def test_a_report_of_nan_is_strict_json():
    report = look((mlp(), lambda outputs, targets: CE(outputs, targets) * math.nan, classes()))
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    values = {measure["name"]: measure["value"] for measure in plain["measures"]}
    assert values["initial loss"] is None


def test_causes_come_before_symptoms():
    report = look((mlp(), CE, scaled(classes(), 300)))
    assert report.findings[0].code == "bad-inputs"
    assert {f.caused_by for f in report.findings[1:]} == {"bad-inputs"}
