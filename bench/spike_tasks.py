"""The trainings of bench_spikes: digits with a multi-layer perceptron, text with a transformer."""

from __future__ import annotations

import enum
import functools
import math
import random
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class Bad(enum.Enum):
    """What is wrong with a batch."""

    LARGE_INPUTS = "inputs x 100"
    WRONG_LABELS = "random labels"
    INF = "an Inf in the inputs"


class Task(Protocol):
    """A model, its batches and its clean held-out data."""

    steps: int
    loss_of_ignorance: float
    learning_rates: dict[str, tuple[float, ...]]

    def model(self) -> nn.Module: ...

    def loss(self, model: nn.Module, batches: torch.Generator, bad: Bad | None) -> Tensor: ...

    def held_out_loss(self, model: nn.Module) -> Tensor: ...


class Digits:
    """scikit-learn's 8 x 8 digits, 1000 to train on and 797 held out."""

    steps = 300
    batch = 32
    loss_of_ignorance = math.log(10)
    learning_rates = {  # noqa: RUF012
        "adamw": (0.0025, 0.005, 0.01, 0.02, 0.04),
        "sgd": (0.025, 0.05, 0.1, 0.2, 0.4),
    }

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self._images = torch.tensor(images, dtype=torch.float32)[order] / 16
        self._labels = torch.tensor(labels)[order]

    def model(self) -> nn.Module:
        layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        return nn.Sequential(*layers)

    def loss(self, model: nn.Module, batches: torch.Generator, bad: Bad | None) -> Tensor:
        chosen = torch.randint(0, 1000, (self.batch,), generator=batches)
        images, labels = self._images[chosen], self._labels[chosen]
        if bad is Bad.LARGE_INPUTS:
            images = images * 100
        elif bad is Bad.INF:
            images[0, 0] = math.inf
        elif bad is Bad.WRONG_LABELS:
            labels = labels[torch.randperm(len(labels), generator=batches)]
        return functional.cross_entropy(model(images), labels)

    def held_out_loss(self, model: nn.Module) -> Tensor:
        return functional.cross_entropy(model(self._images[1000:]), self._labels[1000:])


class Text:
    """Sentences of a small grammar, letter by letter, for a transformer of two blocks."""

    steps = 300
    batch = 16
    length = 32
    learning_rates = {  # noqa: RUF012
        "adamw": (0.0025, 0.005, 0.01, 0.02, 0.04),
        "sgd": (0.1, 0.2, 0.4, 0.8, 1.6),
    }

    def __init__(self) -> None:
        text = sentences(60_000, seed=0)
        letters = sorted(set(text))
        codes = torch.tensor([letters.index(letter) for letter in text])
        self._train, held_out = codes[:50_000], codes[50_000:]
        whole = (len(held_out) - 1) // self.length * self.length
        self._held_out = held_out[:whole].view(-1, self.length)
        self._next = held_out[1 : whole + 1].view(-1, self.length)
        self._n_letters = len(letters)
        self.loss_of_ignorance = math.log(len(letters))

    def model(self) -> nn.Module:
        return Transformer(self._n_letters, self.length)

    def loss(self, model: nn.Module, batches: torch.Generator, bad: Bad | None) -> Tensor:
        starts = torch.randint(
            0, len(self._train) - self.length, (self.batch, 1), generator=batches
        )
        places = starts + torch.arange(self.length)
        letters, labels = self._train[places], self._train[places + 1]
        if bad is Bad.WRONG_LABELS:
            labels = torch.randint(0, self._n_letters, labels.shape, generator=batches)
        inputs_times = {Bad.LARGE_INPUTS: 100.0, Bad.INF: math.inf}
        scores = model(letters, 1.0 if bad is None else inputs_times.get(bad, 1.0))
        return functional.cross_entropy(scores.flatten(0, 1), labels.flatten())

    def held_out_loss(self, model: nn.Module) -> Tensor:
        scores = model(self._held_out, 1.0)
        return functional.cross_entropy(scores.flatten(0, 1), self._next.flatten())


class Transformer(nn.Module):
    """A decoder with pre-norm blocks; its input is the sum of letter and place."""

    def __init__(self, n_letters: int, length: int, width: int = 32, n_heads: int = 2) -> None:
        super().__init__()
        self.letter = nn.Embedding(n_letters, width)
        self.place = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, n_heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_letters)

    def forward(self, letters: Tensor, times: float) -> Tensor:
        hidden = self.letter(letters) * times + self.place
        for block in self.blocks:
            hidden = block(hidden)
        scores: Tensor = self.head(self.norm(hidden))
        return scores


class Block(nn.Module):
    """Causal attention, then two layers on each place."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        n, length, width = hidden.shape
        heads = self.qkv(self.norm_1(hidden)).view(n, length, 3, self.n_heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        result: Tensor = hidden + self.down(functional.gelu(self.up(self.norm_2(hidden))))
        return result


def sentences(n_letters: int, seed: int) -> str:
    """Return text of so many letters: who does what to whom, and sometimes why."""
    draw = random.Random(seed)
    people = ["anna", "the old baker", "a tired sailor", "my brother", "the quiet queen", "ivo"]
    verbs = ["sees", "carries", "paints", "forgets", "repairs", "follows"]
    things = ["a red boat", "the clock", "seven apples", "the long letter", "a stone house"]
    reasons = ["because it rains", "before the night", "while nobody looks", "for the third time"]
    parts: list[str] = []
    size = 0
    while size < n_letters:
        words = [draw.choice(people), draw.choice(verbs), draw.choice(things)]
        if draw.random() < 0.4:
            words.append(draw.choice(reasons))
        sentence = " ".join(words) + ". "
        parts.append(sentence)
        size += len(sentence)
    return "".join(parts)[:n_letters]


TASKS = {"digits": functools.cache(Digits), "text": functools.cache(Text)}
