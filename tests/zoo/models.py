"""Builders of the zoo's models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

Layer = Callable[[], nn.Module]


def mlp(widths: Sequence[int], activation: Layer = nn.ReLU) -> nn.Sequential:
    """Return linear layers of the given widths, input and output included, with an activation
    between them and none after the last."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), activation()]
    return nn.Sequential(*layers[:-1])


def cnn(
    channels: Sequence[int] = (8, 16),
    *,
    outputs: int = 10,
    activation: Layer = nn.ReLU,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Return 3 x 3 convolutions for ``[N, 1, 8, 8]`` images and a linear layer; the first two
    convolutions halve the image."""
    layers: list[nn.Module] = []
    side = 8
    for index, (n_in, n_out) in enumerate(pairwise((1, *channels))):
        layers.append(nn.Conv2d(n_in, n_out, 3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(n_out))
        layers.append(activation())
        if index < 2:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * side * side, outputs))


class Recurrent(nn.Module):
    """A recurrent stack and a linear head on its last state, or on every state.

    Attributes:
        cell: `nn.RNN`, `nn.LSTM` or `nn.GRU`.
        n_in: Features of a step; with ``tokens``, the size of the vocabulary.
        hidden: Width of the state.
        outputs: Width of the head.
        layers: Depth of the stack.
        tokens: Inputs are int64 tokens ``[N, T]`` and are embedded first.
        every_step: Outputs are ``[N, T, outputs]`` instead of ``[N, outputs]``.
    """

    def __init__(
        self,
        cell: type[nn.RNNBase],
        n_in: int,
        hidden: int,
        outputs: int,
        *,
        layers: int = 1,
        tokens: bool = False,
        every_step: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_in, hidden) if tokens else nn.Identity()
        self.recurrent = cell(hidden if tokens else n_in, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, outputs)
        self.every_step = every_step

    def forward(self, inputs: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embedding(inputs))
        return self.head(states if self.every_step else states[:, -1])


class Transformer(nn.Module):
    """A transformer with learnt positions over embedded tokens or projected features.

    Attributes:
        embedding: Maps ``[N, T]`` or ``[N, T, features]`` to ``[N, T, width]``.
        length: Longest sequence.
        outputs: Width of the head.
        causal: Positions see only those before, and each has an output (``[N, T, outputs]``);
            otherwise the mean over the positions has one (``[N, outputs]``).
    """

    def __init__(
        self,
        embedding: nn.Embedding | nn.Linear,
        length: int,
        outputs: int,
        *,
        width: int = 32,
        depth: int = 2,
        dropout: float = 0.0,
        causal: bool = False,
        norm_first: bool = True,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, dropout, batch_first=True, norm_first=norm_first
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        self.causal = causal

    def forward(self, inputs: Tensor) -> Tensor:
        length = inputs.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length) if self.causal else None
        states = self.embedding(inputs) + self.positions[:length]
        for block in self.blocks:
            states = block(states, src_mask=mask, is_causal=self.causal)
        states = self.norm(states)
        return self.head(states if self.causal else states.mean(dim=1))


class Autoencoder(nn.Module):
    """Linear layers down to a code, and the same widths back up.

    Attributes:
        widths: From the data's to the code's.
        output: What the decoder ends with.
    """

    def __init__(
        self, widths: Sequence[int], activation: Layer = nn.ReLU, output: Layer = nn.Identity
    ) -> None:
        super().__init__()
        self.encoder = mlp(widths, activation)
        self.decoder = nn.Sequential(mlp(widths[::-1], activation), output())

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(self.encoder(inputs))
