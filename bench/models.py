"""The models of the step benches, each with one batch and the loss that it is trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Task:
    """A model with what it is trained on."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss_of: Callable[[Tensor, Tensor], Tensor]
    """Takes outputs and targets."""

    def loss(self) -> Tensor:
        """Return the loss of the batch."""
        return self.loss_of(self.model(self.inputs), self.targets)


def three_layers() -> Task:
    """Return an MLP of 3 layers and 9,000 parameters: a step of it is hardly more than overhead."""
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    return Task(model, torch.randn(32, 64), torch.randint(10, (32,)), functional.cross_entropy)


def many_layers() -> Task:
    """Return an MLP of 200 layers of 32 units: 400 small parameters."""
    layers: list[nn.Module] = []
    for _ in range(200):
        layers += [nn.Linear(32, 32), nn.Tanh()]
    model = nn.Sequential(*layers)
    return Task(model, torch.randn(64, 32), torch.zeros(64, 32), functional.mse_loss)


def small_cnn() -> Task:
    """Return a convolutional network of 0.3 million parameters on images of 32 x 32."""
    channels = [3, 32, 64, 128, 128]
    layers: list[nn.Module] = []
    for first, second in pairwise(channels):
        layers += [nn.Conv2d(first, second, 3, stride=2, padding=1), nn.BatchNorm2d(second)]
        layers += [nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4, 10))
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    return Task(model, images, labels, functional.cross_entropy)


class GPT(nn.Module):
    """A decoder-only transformer of 10.8 million parameters."""

    def __init__(self, vocabulary: int = 256, width: int = 384, depth: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 6, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        hidden = self.tokens(tokens) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def small_gpt() -> Task:
    """Return the transformer with a batch of 4 sequences of 64 bytes."""
    tokens = torch.randint(256, (4, 65))

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Task(GPT(), tokens[:, :-1], tokens[:, 1:], loss_of)


MODELS: dict[str, Callable[[], Task]] = {
    "MLP, 200 layers": many_layers,
    "CNN, 0.3M": small_cnn,
    "GPT, 10.8M": small_gpt,
}
