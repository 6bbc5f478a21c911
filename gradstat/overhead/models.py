"""Models to measure with where the user has none at hand, and in the benches."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


def many_layers(width: int = 32, depth: int = 200) -> nn.Sequential:
    """Return an MLP of many small layers: 400 parameters of up to 32 x 32."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers)


def small_cnn() -> nn.Sequential:
    """Return a convolutional network of 0.3 million parameters for images of 3 x 32 x 32."""
    channels = [3, 32, 64, 128, 128]
    layers: list[nn.Module] = []
    for first, second in pairwise(channels):
        layers += [nn.Conv2d(first, second, 3, stride=2, padding=1), nn.BatchNorm2d(second)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4, 10))


class GPT(nn.Module):
    """A decoder-only transformer for up to 64 tokens, of 10.8 million parameters by default."""

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
        """Return logits of shape (batch, tokens, vocabulary)."""
        length = tokens.shape[1]
        hidden = self.tokens(tokens) + self.positions.weight[:length]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        for block in self.blocks:
            hidden = block(hidden, src_mask=mask, is_causal=True)
        logits: Tensor = self.head(self.norm(hidden))
        return logits
