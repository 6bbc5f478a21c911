"""Generated data of the held-out programs; each set is made once and is the same for every seed."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor

ALPHABET = ".abcdefghijklmnopqrstuvwxyz"
RHYME = (
    "one for sorrow, two for joy, three for a girl, four for a boy, five for silver, six for gold, "
    "seven for a secret never to be told. the north wind doth blow, and we shall have snow, and "
    "what will the robin do then, poor thing? he will sit in a barn, and keep himself warm, and "
    "hide his head under his wing, poor thing. "
) * 6
LETTERS = sorted(set(RHYME))


@functools.cache
def spirals() -> tuple[Tensor, Tensor]:
    """Three interleaved arms: ``[450, 2]`` within the unit disc, int64 classes 0 to 2."""
    random = np.random.default_rng(10)
    radius = np.tile(np.linspace(0.05, 1, 150), 3)
    label = np.repeat(np.arange(3), 150)
    angle = 4 * radius + label * 2 * math.pi / 3 + random.normal(0, 0.05, 450)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    return torch.tensor(points, dtype=torch.float32), torch.tensor(label)


@functools.cache
def customers() -> tuple[Tensor, Tensor, Tensor]:
    """Two categorical columns ``[2000, 2]`` below 12 and 5, five numeric ones in units of about 1,
    and whether a customer left (float32, 30 %), which the columns tell only in part."""
    random = np.random.default_rng(11)
    kinds = np.stack([random.integers(0, 12, 2000), random.integers(0, 5, 2000)], 1)
    numbers = random.normal(0.5, 1, (2000, 5))
    score = random.normal(0, 1, 12)[kinds[:, 0]] + 0.8 * random.normal(0, 1, 5)[kinds[:, 1]]
    score += numbers[:, 0] - numbers[:, 1] * (numbers[:, 2] > 0)
    left = score + random.logistic(0, 1.0, 2000) > np.quantile(score, 0.72)
    return (
        torch.tensor(kinds),
        torch.tensor(numbers, dtype=torch.float32),
        torch.tensor(left, dtype=torch.float32),
    )


@functools.cache
def prices() -> tuple[Tensor, Tensor]:
    """Friedman's first function as house prices: ``[800, 10]`` in [0, 1], dollars ``[800, 1]``
    from about 20,000 to 600,000."""
    x, y = datasets.make_friedman1(800, noise=1.0, random_state=12)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(
        y[:, None] * 20_000, dtype=torch.float32
    )


@functools.cache
def names() -> tuple[Tensor, Tensor, Tensor]:
    """Surnames of three invented tongues: letters ``[900, 12]`` with 0 for padding, lengths and
    int64 classes."""
    random = np.random.default_rng(13)
    parts = (
        ("ka", "to", "mi", "ya", "shi", "ro", "na"),
        ("ov", "sky", "iv", "an", "pet", "dra", "ich"),
        ("bel", "lo", "ri", "ni", "gio", "van", "etti"),
    )
    rows, sizes, labels = [], [], []
    for index in range(900):
        name = "".join(str(random.choice(parts[index % 3])) for _ in range(random.integers(2, 5)))
        name = name[:12]
        rows.append([ALPHABET.index(letter) for letter in name.ljust(12, ".")])
        sizes.append(len(name))
        labels.append(index % 3)
    return torch.tensor(rows), torch.tensor(sizes), torch.tensor(labels)


@functools.cache
def load_curve() -> tuple[Tensor, Tensor]:
    """An electricity grid's load in megawatts (about 8,000 +- 1,500): the last 24 hours
    ``[1200, 24, 1]`` and the next hour ``[1200, 1]``."""
    random = np.random.default_rng(14)
    hours = np.arange(1224)
    load = 8000 + 1500 * np.sin(hours * 2 * math.pi / 24) + 700 * np.sin(hours * 2 * math.pi / 168)
    load = load + random.normal(0, 150, 1224)
    windows = np.stack([load[start : start + 25] for start in range(1199)])
    values = torch.tensor(windows, dtype=torch.float32)
    return values[:, :24, None], values[:, 24:]


def standard(values: Tensor) -> Tensor:
    """Return values of mean 0 and deviation 1."""
    return (values - values.mean()) / values.std()


@functools.cache
def reviews(words: int = 120) -> tuple[Tensor, Tensor]:
    """Short reviews, int64 ``[1000, 16]`` below ``words``, and float32 whether most of their words
    are kind (even)."""
    random = np.random.default_rng(15)
    tone = random.random(1000)[:, None] < 0.5
    kind = random.random((1000, 16)) < np.where(tone, 0.72, 0.28)
    tokens = 2 * random.integers(1, words // 2, (1000, 16)) + np.where(kind, 0, 1)
    return torch.tensor(np.minimum(tokens, words - 1)), torch.tensor(tone[:, 0].astype(np.float32))


@functools.cache
def shapes() -> tuple[Tensor, Tensor, Tensor]:
    """Noisy pictures ``[600, 1, 16, 16]`` of a disc, a square or a cross, int64 classes, and masks
    of the shape."""
    random = np.random.default_rng(16)
    rows, columns = np.mgrid[:16, :16]
    masks = []
    for index in range(600):
        y, x = random.integers(5, 11, 2)
        size = random.integers(3, 5)
        down, across = np.abs(rows - y), np.abs(columns - x)
        masks.append(
            (
                down**2 + across**2 <= size**2,
                np.maximum(down, across) <= size - 1,
                (np.minimum(down, across) == 0) & (np.maximum(down, across) <= size),
            )[index % 3]
        )
    mask = torch.tensor(np.array(masks)[:, None], dtype=torch.float32)
    noise = torch.tensor(random.normal(0, 0.15, mask.shape), dtype=torch.float32)
    return mask + noise, torch.arange(600) % 3, mask


@functools.cache
def ratings() -> tuple[Tensor, Tensor, Tensor]:
    """What 60 users gave 80 films: int64 users and films ``[2400]``, stars from about 1 to 5."""
    random = np.random.default_rng(17)
    taste, style = random.normal(0, 0.7, (60, 3)), random.normal(0, 0.7, (80, 3))
    user, film = random.integers(0, 60, 2400), random.integers(0, 80, 2400)
    stars = 3.2 + (taste[user] * style[film]).sum(1) + random.normal(0, 0.2, 2400)
    return torch.tensor(user), torch.tensor(film), torch.tensor(stars, dtype=torch.float32)


@functools.cache
def skip_grams(words: int) -> tuple[Tensor, Tensor]:
    """Centre and context words ``[4000]`` of texts on eight topics, each word of one topic."""
    random = np.random.default_rng(18)
    topic = random.integers(0, 8, 4000)
    centre, context = (topic + 8 * (random.integers(0, words // 8, 4000)) for _ in range(2))
    return torch.tensor(centre), torch.tensor(context)
