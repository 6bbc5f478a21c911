"""The models of the step benches, each with one batch and the loss that it is trained with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradstat.overhead import models


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
    """Return the MLP with a batch of 64."""
    model = models.many_layers()
    return Task(model, torch.randn(64, 32), torch.zeros(64, 32), functional.mse_loss)


def small_cnn() -> Task:
    """Return the convolutional network with a batch of 32 images."""
    model = models.small_cnn()
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    return Task(model, images, labels, functional.cross_entropy)


def small_gpt() -> Task:
    """Return the transformer with a batch of 4 sequences of 64 bytes."""
    tokens = torch.randint(256, (4, 65))

    def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return Task(models.GPT(), tokens[:, :-1], tokens[:, 1:], loss_of)


MODELS: dict[str, Callable[[], Task]] = {
    "MLP, 200 layers": many_layers,
    "CNN, 0.3M": small_cnn,
    "GPT, 10.8M": small_gpt,
}
