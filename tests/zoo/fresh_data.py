"""Generated data of the fresh programs; each set is made once and is the same for every seed.

The programs of ``fresh_*.py`` were written by an outside examiner who had not read the rules.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from sklearn import datasets
from torch import Tensor

TOPICS = 4
LENGTH = 40


def _float(*arrays: np.ndarray) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(array, dtype=torch.float32) for array in arrays)


@functools.cache
def visits(base: float = 0.6) -> tuple[Tensor, Tensor]:
    """Visits to a surgery: ``[1200, 8]`` of deviation 1 and counts ``[1200, 1]``, Poisson with a
    median rate of ``exp(base)``."""
    random = np.random.default_rng(30)
    x = random.normal(0, 1, (1200, 8))
    log_rate = base + 0.6 * x[:, 0] - 0.5 * x[:, 1] + 0.5 * np.sin(2 * x[:, 2]) * (x[:, 3] > 0)
    return _float(x, random.poisson(np.exp(log_rate))[:, None])


@functools.cache
def rents() -> tuple[Tensor, Tensor]:
    """Flats: ``[1000, 6]`` of deviation 1 and rents in euros ``[1000, 1]``, about 900 +- 300, whose
    spread grows with the first column."""
    random = np.random.default_rng(31)
    x = random.normal(0, 1, (1000, 6))
    spread = 40 * np.exp(0.5 * x[:, 0])
    rent = 900 + 180 * x[:, 0] + 120 * np.tanh(x[:, 1] + x[:, 2]) - 90 * x[:, 3] * (x[:, 4] > 0)
    return _float(x, (rent + random.normal(0, 1, 1000) * spread)[:, None])


@functools.cache
def grades() -> tuple[Tensor, Tensor]:
    """Tasted oils: ``[900, 11]`` of deviation 1 and int64 grades 0 to 5 in order."""
    random = np.random.default_rng(32)
    x = random.normal(0, 1, (900, 11))
    taste = x[:, 0] + 0.8 * x[:, 1] - 0.6 * np.abs(x[:, 2]) + 0.5 * x[:, 3] * x[:, 4]
    taste += random.normal(0, 0.25, 900)
    grade = np.searchsorted(np.quantile(taste, [0.1, 0.3, 0.5, 0.75, 0.92]), taste)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(grade)


@functools.cache
def rings() -> tuple[Tensor, Tensor]:
    """A ring around a disc: ``[800, 2]`` of deviation about 0.6, ``[800, 1]`` of 0 and 1."""
    x, y = datasets.make_circles(800, noise=0.08, factor=0.5, random_state=33)
    return _float(x, y[:, None])


@functools.cache
def crescents() -> tuple[Tensor, Tensor]:
    """Two crescents: ``[900, 2]``, standardised, int64 classes 0 and 1."""
    x, y = datasets.make_moons(900, noise=0.12, random_state=34)
    return torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32), torch.tensor(y)


@functools.cache
def tickets(words: int = 400, topics: int = TOPICS, rows: int = 1200) -> tuple[Tensor, Tensor]:
    """Support tickets of 12 words: int64 ``[rows, 12]`` below ``words``, int64 topics. Two words in
    three belong to the ticket's topic, the others to any."""
    random = np.random.default_rng(35)
    topic = random.integers(0, topics, rows)
    own = random.random((rows, 12)) < 0.66
    kind = np.where(own, topic[:, None], random.integers(0, topics, (rows, 12)))
    tokens = kind + topics * random.integers(0, words // topics, (rows, 12))
    return torch.tensor(tokens), torch.tensor(topic)


@functools.cache
def strands() -> tuple[Tensor, Tensor]:
    """Strands of 40 bases, one-hot ``[1000, 4, 40]``, and whether one holds a motif of seven
    (float32 ``[1000, 1]``)."""
    random = np.random.default_rng(36)
    bases = random.integers(0, 4, (1000, LENGTH))
    found = np.arange(1000) % 2
    for row in np.flatnonzero(found):
        start = random.integers(0, LENGTH - 7)
        bases[row, start : start + 7] = (0, 3, 3, 1, 2, 0, 3)
    x = np.eye(4)[bases].transpose(0, 2, 1)
    return _float(x, found[:, None])


@functools.cache
def tones() -> tuple[Tensor, Tensor]:
    """Recordings ``[800, 1, 64]`` within about +-1 of a sine, a square, a sawtooth or a decaying
    tone, int64 classes 0 to 3."""
    random = np.random.default_rng(37)
    label = random.integers(0, 4, 800)
    turns = np.linspace(0, 1, 64) * random.uniform(2, 5, (800, 1)) + random.random((800, 1))
    sine = np.sin(2 * np.pi * turns)
    waves = np.stack([sine, np.sign(sine), 2 * (turns % 1) - 1, sine * np.exp(-2 * turns)])
    sound = 0.8 * waves[label, np.arange(800)] + random.normal(0, 0.1, (800, 64))
    return torch.tensor(sound[:, None], dtype=torch.float32), torch.tensor(label)


@functools.cache
def chaos() -> tuple[Tensor, Tensor]:
    """The Mackey-Glass series (delay 17), standardised: windows ``[900, 20, 1]`` and the value six
    steps on ``[900, 1]``."""
    series = [1.2] * 18
    for _ in range(2000):
        late = series[-18]
        series.append(0.9 * series[-1] + 0.2 * late / (1 + late**10))
    values = np.array(series[200:])
    values = (values - values.mean()) / values.std()
    x = np.stack([values[i : i + 20] for i in range(900)])[:, :, None]
    return _float(x, values[25 : 25 + 900, None])


@functools.cache
def gestures() -> tuple[Tensor, Tensor]:
    """Accelerations ``[720, 24, 3]`` of deviation about 1 for three gestures, int64 classes."""
    random = np.random.default_rng(38)
    label = np.arange(720) % 3
    time = np.linspace(0, 1, 24)
    speed, phase = random.uniform(0.8, 1.2, 720), random.uniform(0, 1, 720)
    angle = 2 * np.pi * (speed[:, None] * time * (1 + label[:, None]) + phase[:, None])
    x = np.stack([np.sin(angle), np.cos(angle), np.sin(angle * 0.5)], 2)
    return (
        torch.tensor(x + random.normal(0, 0.5, x.shape), dtype=torch.float32),
        torch.tensor(label),
    )


@functools.cache
def shuffled_hands(length: int = 8, values: int = 10) -> tuple[Tensor, Tensor]:
    """Hands of cards to be sorted: int64 ``[1200, length]`` below ``values``, and in order."""
    random = np.random.default_rng(39)
    hands = random.integers(0, values, (1200, length))
    return torch.tensor(hands), torch.tensor(np.sort(hands, 1))


@functools.cache
def sensors() -> tuple[Tensor, Tensor]:
    """A plant's 20 sensors driven by four hidden causes: ``[900, 20]``, standardised, and the same
    in the sensors' own units, from volts of about 1 to pascals of about 100,000."""
    random = np.random.default_rng(40)
    x = np.tanh(random.normal(0, 1, (900, 4)) @ random.normal(0, 0.7, (4, 20)))
    x += random.normal(0, 0.1, x.shape)
    x = (x - x.mean(0)) / x.std(0)
    return _float(x, (3 + x) * np.logspace(0, 4.5, 20))


@functools.cache
def tagged() -> tuple[Tensor, Tensor]:
    """Songs ``[1000, 16]`` of deviation 1 with any of eight tags, float32 ``[1000, 8]``, each given
    to about 40 %."""
    random = np.random.default_rng(41)
    x = random.normal(0, 1, (1000, 16))
    score = x @ random.normal(0, 1, (16, 8)) + np.abs(x @ random.normal(0, 0.7, (16, 8)))
    return _float(x, score > np.quantile(score, 0.6, axis=0))


@functools.cache
def regimes() -> tuple[Tensor, Tensor]:
    """A line with a slope of its own in each of six stretches: ``[1200, 1]`` in [-1, 1], targets
    ``[1200, 1]`` of deviation about 1."""
    random = np.random.default_rng(42)
    x = random.uniform(-1, 1, (1200, 1))
    stretch = np.clip(((x + 1) * 3).astype(int), 0, 5)
    y = np.array([6, -5, 7, -6, 5, -7])[stretch] * (x - (stretch - 2.5) / 3)
    y = (y - y.mean()) / y.std() + random.normal(0, 0.05, x.shape)
    return _float(x, y)
