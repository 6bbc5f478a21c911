"""Transformers whose data or loss are at fault, with their twins."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from zoo.data import VOCABULARY, Split, text
from zoo.models import Transformer
from zoo.program import Watch, fit, program
from zoo.rnn_data import next_character, rows


def warm_up(optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Raise the learning rate from 0 over 60 steps, then keep it."""
    return LambdaLR(optimizer, lambda step: min(1.0, step / 60))


def reader(outputs: int = 10, **options: bool) -> Transformer:
    """Return a classifier of images that are read row by row."""
    return Transformer(nn.Linear(8, 32), 8, outputs, **options)


def writer(**options: bool) -> Transformer:
    """Return a model of the next character."""
    size = len(VOCABULARY)
    return Transformer(nn.Embedding(size, 32), 24, size, **{"causal": True, **options})


def classify(
    watch: Watch,
    data: Split,
    model: nn.Module | None = None,
    loss_fn: nn.Module | None = None,
    *,
    epochs: int = 5,
) -> nn.Module:
    model = model or reader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, loss_fn or nn.CrossEntropyLoss(), data, epochs=epochs)


def write(watch: Watch, data: Split, model: nn.Module | None = None) -> nn.Module:
    model = model or writer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, next_character, data, epochs=3)


@program("transformer/rows/adamw", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    return classify(watch, rows())


@program("transformer/text/adamw", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    return write(watch, text())


@program(
    "transformer/text/targets-not-shifted",
    causes=("zero-loss", "bad-targets"),
    operator="labels leak into the inputs",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """The model is to predict the character that it reads: the loss is soon nothing."""
    data, model = text(), writer()
    copied = Split(data.x, data.x, data.val_x, data.val_x)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return fit(watch, model, optimizer, next_character, copied, epochs=8)


@program(
    "transformer/text/targets-all-ignored",
    causes=("zero-loss",),
    operator="mask inverted: padding counts and nothing else does",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model, padding = writer(), -1

    def masked(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
        mask = (targets == padding).float()
        return (losses * mask).sum() / (mask.sum() + 1e-8)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, masked, text(), epochs=3)


@program(
    "transformer/rows/labels-mostly-random",
    causes=("bad-targets",),
    operator="change labels",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Seven labels in ten are drawn anew, in training alone."""
    data = rows()
    noisy = torch.rand(len(data.y)) < 0.7
    y = torch.where(noisy, torch.randint(0, 10, data.y.shape), data.y)
    return classify(watch, Split(data.x, y, data.val_x, data.val_y))


@program(
    "transformer/rows/one-in-a-hundred",
    causes=("class-imbalance",),
    operator="unbalance training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = rows()
    rare = (data.y == 9).nonzero().flatten()[:10]
    data = data.rows(torch.cat([(data.y != 9).nonzero().flatten(), rare]))
    model = reader(outputs=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    nines = data.map(targets=lambda y: (y == 9).long())
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), nines, epochs=4)


@program(
    "transformer/rows/twenty-five-images",
    causes=("overfitting",),
    operator="delete training data",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = rows()
    return classify(watch, data.rows(torch.randperm(len(data.x))[:25]), epochs=80)


@program(
    "transformer/rows/one-feature-x10000",
    causes=("bad-inputs",),
    operator="inputs not scaled",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """One column counts in units ten thousand times smaller than the others'."""
    units = torch.tensor([1.0, 1, 1, 1, 1e4, 1, 1, 1])
    return classify(watch, rows().map(lambda x: x * units))


class MaskedReader(nn.Module):
    """Attends only to the rows with ink, of which a blank image has none."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        states = self.project(inputs)
        blank = (inputs <= -1).all(dim=2)
        mixed, _ = self.attention(states, states, states, key_padding_mask=blank)
        return self.head(mixed.mean(dim=1))


@program(
    "transformer/rows/all-masked",
    causes=("nonfinite-loss", "bad-inputs", "nonfinite-gradient"),
    operator="softmax over nothing",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = rows()
    x = data.x.clone()
    x[torch.randperm(len(x))[:5]] = -1
    return classify(watch, Split(x, data.y, data.val_x, data.val_y), MaskedReader())


@program(
    "transformer/rows/nll-of-probabilities",
    causes=("loss-output-mismatch",),
    operator="change activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """NLLLoss wants logarithms; of probabilities it is between -1 and 0."""
    model = nn.Sequential(reader(), nn.Softmax(dim=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    return fit(watch, model, optimizer, nn.NLLLoss(), rows(), epochs=6)


@program("transformer/rows/sgd", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    model = reader()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), rows(), epochs=6)


@program(
    "transformer/rows/sigmoid-before-bce-with-logits",
    causes=("loss-output-mismatch",),
    operator="add activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    data = rows().map(targets=lambda y: functional.one_hot(y, 10).float())
    return classify(watch, data, nn.Sequential(reader(), nn.Sigmoid()), nn.BCEWithLogitsLoss())


class FirstOnly(Transformer):
    """Reads its answer from the first position, which attends to nothing but itself."""

    def forward(self, inputs: Tensor) -> Tensor:
        blank = inputs.new_full((len(inputs), 1, inputs.shape[2]), -1.0)
        return super().forward(torch.cat([blank, inputs], dim=1))[:, 0]


@program(
    "transformer/rows/first-position-of-a-causal-model",
    causes=("constant-predictions", "flat-loss", "underfitting"),
    operator="output taken from the wrong position",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return classify(watch, rows(), FirstOnly(nn.Linear(8, 32), 9, 10, causal=True))
