"""A network with gradients, and the table that these must have."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import assert_table
from torch import Tensor, nn

import gradstat
from gradstat import tensor_stats


class Network(nn.Module):
    """A convolution, a norm, a word table and two heads, the last of which is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.words = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 4)
        self.unused = nn.Linear(6, 2)

    def forward(self, image: Tensor, word: Tensor) -> Tensor:
        seen = torch.relu(self.norm(self.conv(image))).mean((2, 3))
        return self.head(seen + self.words(word))


def trained(dtype: torch.dtype = torch.float32) -> Network:
    """Return a network after one backward pass."""
    torch.manual_seed(0)
    model = Network().to(dtype)
    image, word = torch.randn(5, 3, 8, 8, dtype=dtype), torch.tensor([1, 1, 2, 7, 10])
    model(image, word).square().sum().backward()
    return model


def names_of(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, _ in model.named_parameters())


def row_of(tensor: Tensor) -> gradstat.StatRow:
    return tensor_stats([tensor])[0]


def assert_model_table(table: gradstat.StatTable, model: nn.Module) -> None:
    grads = [p.grad for p in model.parameters()]
    assert_table(table.data, grads)
    assert table.kind == "gradient"
    expected = nn.utils.get_total_norm([grad.double() for grad in grads if grad is not None])
    assert table.total_norm == pytest.approx(expected.item(), rel=1e-6)
