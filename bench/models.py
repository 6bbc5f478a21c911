"""The models of the step bench: each gives itself and a function that computes its loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from gradstat.overhead import models

Made = tuple[nn.Module, Callable[[], Tensor]]


def many_layers() -> Made:
    """Return the MLP with a batch of 64."""
    model = models.many_layers()
    inputs = torch.randn(64, 32)
    return model, lambda: model(inputs).square().mean()


def small_cnn() -> Made:
    """Return the convolutional network with a batch of 32 images."""
    model = models.small_cnn()
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    return model, lambda: functional.cross_entropy(model(images), labels)


def small_gpt() -> Made:
    """Return the transformer with a batch of 4 sequences of 64 bytes."""
    model = models.GPT()
    tokens = torch.randint(256, (4, 65))
    return model, lambda: functional.cross_entropy(
        model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    )


MODELS: dict[str, Callable[[], Made]] = {
    "MLP, 200 layers": many_layers,
    "CNN, 0.3M": small_cnn,
    "GPT, 10.8M": small_gpt,
}
