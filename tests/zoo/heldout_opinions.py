"""Held out: transformer encoders that judge reviews."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim import Optimizer

from zoo.heldout_data import reviews
from zoo.program import Watch, program


class Encoder(nn.Module):
    def __init__(self, words: int, outputs: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, 24)
        layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.score = nn.Linear(24, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.score(self.encoder(self.embed(tokens)).mean(1))


def appraise(
    watch: Watch,
    *,
    words: int = 120,
    make: Callable[..., Optimizer] = lambda p: torch.optim.RAdam(p, lr=3e-3),
    keep: int = 1,
    epochs: int = 6,
    shape: Callable[[Tensor], Tensor] = lambda y: y.unsqueeze(1),
    criterion: Callable[[Tensor, Tensor], Tensor] = F.binary_cross_entropy_with_logits,
) -> nn.Module:
    tokens, kind = reviews(words)
    chosen = (kind == 1) | (torch.arange(1000) % keep == 0)
    tokens, kind = tokens[chosen], kind[chosen]
    model = Encoder(words)
    optimizer = make(model.parameters())
    watch.attach(optimizer, model)
    for _ in range(epochs):
        for index in torch.randperm(len(kind)).split(50):
            scores, y = model(tokens[index]), shape(kind[index])
            loss = criterion(scores, y)
            watch.observe(outputs=scores, targets=y, loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@program("transformer/opinions/radam", operator="post-norm, no validation", half="held-out")
def _(watch: Watch) -> nn.Module:
    return appraise(watch)


@program(
    "transformer/opinions/hardly-a-complaint",
    causes=("class-imbalance", "constant-predictions"),
    operator="unbalance training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return appraise(watch, keep=60, epochs=10, make=lambda p: torch.optim.Adam(p, lr=1e-3))


@program(
    "transformer/opinions/thirty-thousand-words",
    causes=("sparse-gradients", "lr-too-low", "underfitting"),
    operator="rows that hardly ever occur",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return appraise(
        watch, words=30_000, make=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), epochs=4
    )


@program(
    "transformer/opinions/cosine-of-one-number",
    causes=("flat-loss", "loss-output-mismatch", "vanishing-gradient"),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Two numbers' cosine is their signs' product: it has no slope."""
    return appraise(
        watch,
        shape=lambda y: 2 * y.unsqueeze(1) - 1,
        criterion=lambda scores, y: 1 - F.cosine_similarity(scores, y, dim=1).mean(),
    )


@program(
    "transformer/opinions/heavy-momentum",
    causes=("oscillating-loss", "lr-too-high", "diverging-loss"),
    operator="change optimisation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return appraise(watch, make=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.99), epochs=9)
