"""The zoo's data: scikit-learn's bundled sets and a few generated ones, as float32 tensors.

A set is made once and the same for every seed; programs must not write into its tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from sklearn.model_selection import train_test_split
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Training inputs and targets, and those for validation, which may have no rows."""

    x: Tensor
    y: Tensor
    val_x: Tensor
    val_y: Tensor

    def map(
        self,
        inputs: Callable[[Tensor], Tensor] = lambda x: x,
        targets: Callable[[Tensor], Tensor] = lambda y: y,
    ) -> Split:
        """Return the split with functions applied to all inputs and to all targets."""
        return Split(inputs(self.x), targets(self.y), inputs(self.val_x), targets(self.val_y))

    def rows(self, rows: Tensor | slice) -> Split:
        """Return the split with some of the training rows, and all those for validation."""
        return Split(self.x[rows], self.y[rows], self.val_x, self.val_y)


def _split(x: Any, y: Any, *, stratify: bool) -> Split:
    x, val_x, y, val_y = train_test_split(
        x, y, test_size=0.25, random_state=0, stratify=y if stratify else None
    )
    return Split(*(torch.as_tensor(np.ascontiguousarray(part)) for part in (x, y, val_x, val_y)))


def standardised(data: Split) -> Split:
    """Return the split with inputs of mean 0 and deviation 1 over the training rows; a feature
    that never changes becomes 0."""
    mean, deviation = data.x.mean(0), data.x.std(0)
    return data.map(lambda x: (x - mean) / deviation.where(deviation > 0, 1))


def _classes(load: Callable[[], Any]) -> Split:
    bunch = load()
    return _split(bunch.data.astype(np.float32), bunch.target.astype(np.int64), stratify=True)


@functools.cache
def digits_raw() -> Split:
    """Handwritten digits: ``[1347, 64]`` grey values from 0 to 16, int64 classes 0 to 9."""
    return _classes(datasets.load_digits)


@functools.cache
def digits() -> Split:
    """`digits_raw` less the mean of all pixels, over their deviation: values from -0.8 to 1.9."""
    raw = digits_raw()
    return raw.map(lambda x: (x - raw.x.mean()) / raw.x.std())


@functools.cache
def digit_images() -> Split:
    """`digits_raw` as ``[1347, 1, 8, 8]`` images with values from 0 to 1."""
    return digits_raw().map(lambda x: x.reshape(-1, 1, 8, 8) / 16)


@functools.cache
def wine_raw() -> Split:
    """Wines: ``[133, 13]`` measurements in their units (up to 1680), int64 classes 0 to 2."""
    return _classes(datasets.load_wine)


@functools.cache
def wine() -> Split:
    """`wine_raw`, standardised."""
    return standardised(wine_raw())


@functools.cache
def cancer_raw() -> Split:
    """Breast cancer: ``[426, 30]`` measurements in their units (up to 4254), int64 classes 0, 1."""
    return _classes(datasets.load_breast_cancer)


@functools.cache
def cancer() -> Split:
    """`cancer_raw`, standardised."""
    return standardised(cancer_raw())


@functools.cache
def iris() -> Split:
    """Irises: ``[112, 4]``, standardised, int64 classes 0 to 2."""
    return standardised(_classes(datasets.load_iris))


@functools.cache
def diabetes_raw() -> Split:
    """Diabetes: ``[331, 10]``, standardised, float32 targets ``[331, 1]`` from 25 to 346."""
    bunch = datasets.load_diabetes()
    y = bunch.target.astype(np.float32).reshape(-1, 1)
    return standardised(_split(bunch.data.astype(np.float32), y, stratify=False))


@functools.cache
def diabetes() -> Split:
    """`diabetes_raw` with targets of mean 0 and deviation 1."""
    raw = diabetes_raw()
    return raw.map(targets=lambda y: (y - raw.y.mean()) / raw.y.std())


@functools.cache
def waves() -> Split:
    """A smooth function of two variables: ``[768, 2]`` in [-1, 1], targets ``[768, 1]`` of mean
    0.03 and deviation 0.8, with noise of deviation 0.05."""
    random = np.random.default_rng(0)
    x = random.uniform(-1, 1, (1024, 2))
    y = 1.3 * np.sin(math.pi * x[:, :1]) * np.cos(2 * x[:, 1:]) + x[:, 1:]
    y += random.normal(0, 0.05, y.shape)
    return _split(x.astype(np.float32), y.astype(np.float32), stratify=False)


@functools.cache
def adding(length: int = 16) -> Split:
    """The adding problem (Hochreiter and Schmidhuber 1997, section 5.4): ``[1536, length, 2]``
    values in [0, 1] and marks, two of which are 1; targets ``[1536, 1]``: the marked values' sum,
    from 0 to 2."""
    random = np.random.default_rng(1)
    values = random.uniform(0, 1, (2048, length))
    marks = np.zeros_like(values)
    half = length // 2
    rows = np.arange(len(marks))
    marks[rows, random.integers(0, half, len(marks))] = 1
    marks[rows, random.integers(half, length, len(marks))] = 1
    y = (values * marks).sum(1, keepdims=True)
    x = np.stack([values, marks], axis=2)
    return _split(x.astype(np.float32), y.astype(np.float32), stratify=False)


@functools.cache
def text(length: int = 24) -> Split:
    """Sentences of a small grammar, for predicting the next character: int64 inputs and targets
    ``[768, length]``, targets one place ahead; `VOCABULARY` has the characters."""
    random = np.random.default_rng(2)
    words = (("the ", "a "), ("cat ", "dog ", "old man "), ("sees ", "likes "), ("it. ", "me. "))
    stream = ""
    while len(stream) < 1024 * length + 1:
        stream += "".join(str(random.choice(choices)) for choices in words)
    codes = np.array([VOCABULARY.index(letter) for letter in stream[: 1024 * length + 1]])
    x, y = codes[:-1].reshape(-1, length), codes[1:].reshape(-1, length)
    return _split(x, y, stratify=False)


VOCABULARY = sorted(set("the a cat dog old man sees likes it. me. "))


@functools.cache
def ids() -> Split:
    """Bags of ids: int64 ``[1536, 3]`` below 1000; class 1 if most of the three ids are odd, so
    that each has to be learnt by itself."""
    random = np.random.default_rng(3)
    x = random.integers(0, 1000, (2048, 3))
    return _split(x, (x % 2).mean(1).round().astype(np.int64), stratify=False)


@functools.cache
def parity() -> Split:
    """All words of ten bits: ``[768, 10]`` of -1 and 1, float32 targets ``[768, 1]``: whether the
    number of ones among the first four is odd."""
    x = (np.arange(1024)[:, None] >> np.arange(10)) & 1
    y = x[:, :4].sum(1, keepdims=True) % 2
    return _split((2 * x - 1).astype(np.float32), y.astype(np.float32), stratify=True)
