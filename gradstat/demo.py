"""A real training run to look at: a small network learns scikit-learn's handwritten digits."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gradstat
from gradstat.errors import import_optional
from gradstat.render import terminal_has_colours
from gradstat.table import StatTable

BATCH_SIZE = 64
LEARNING_RATE = 0.1
MAX_NORM = 1.0


@dataclass(frozen=True)
class Digits:
    """Images of shape (n, 1, 8, 8), fp32 in [0, 1], and their labels, int64 in 0..9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass
class DemoResult:
    """What a run of the demo found."""

    accuracy: float
    """Share of the test images that are classified right."""

    steps: int
    clipped_steps: int
    tables: int
    """How many times the whole table was measured."""

    seconds: float
    """Wall time of the training loop, all of the below included."""

    table_seconds: float
    """Time in ``grad_stats``, with the copy that a first read makes."""

    clip_seconds: float
    """Time in ``clip_grad_norm_``."""

    display_seconds: float
    """Time spent on formatting and printing tables."""

    def __str__(self) -> str:
        ours = self.table_seconds + self.clip_seconds
        step = 1e6 * self.clip_seconds / self.steps
        table = 1e6 * self.table_seconds / self.tables
        return (
            f"test accuracy {self.accuracy:.1%} after {self.steps} steps, "
            f"{self.clipped_steps} of them clipped to a norm of {MAX_NORM:g}\n"
            f"gradstat took {1e3 * ours:.1f} ms of {self.seconds:.2f} s "
            f"({ours / self.seconds:.1%}): clipping {step:.0f} us a step, "
            f"{self.tables} tables at {table:.0f} us\n"
            f"(printing them took {1e3 * self.display_seconds:.0f} ms)"
        )


def run_demo(
    *, epochs: int = 20, every: int = 88, seed: int = 0, plain: bool = False
) -> DemoResult:
    """Train the network, show its gradients as it learns, and return how it went.

    Args:
        epochs: Passes over the training images.
        every: A table is shown at the first step, each so many steps, and at the last.
        seed: Of the split, the initial weights and the order of the images. torch's own generator
            is left as it was.
        plain: Print every table below the last, without colours.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    digits = load_digits(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model()
        return _train(model, digits, epochs=epochs, every=every, plain=plain)


def load_digits(seed: int) -> Digits:
    """Return scikit-learn's 1797 digits, a quarter of them held out for the test.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    datasets, selection = (
        import_optional(f"sklearn.{part}", purpose="the demo", install="'gradstat[demo]'")
        for part in ("datasets", "model_selection")
    )
    pixels, labels = datasets.load_digits(return_X_y=True)
    parts = selection.train_test_split(
        pixels, labels, test_size=0.25, random_state=seed, stratify=labels
    )
    train_images, test_images = (
        torch.tensor(part / 16.0, dtype=torch.float32).reshape(-1, 1, 8, 8) for part in parts[:2]
    )
    train_labels, test_labels = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    return Digits(train_images, train_labels, test_images, test_labels)


def make_model() -> nn.Sequential:
    """Return a convolutional network of about 38,000 parameters."""
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(1, 16, 3, padding=1)),
        ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(16, 32, 3, padding=1)),
        ("relu2", nn.ReLU()),
        ("pool", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
        ("hidden", nn.Linear(512, 64)),
        ("relu3", nn.ReLU()),
        ("output", nn.Linear(64, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


def _train(model: nn.Module, digits: Digits, *, epochs: int, every: int, plain: bool) -> DemoResult:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    loss_function = nn.CrossEntropyLoss()
    norms: list[Tensor] = []
    last_step = epochs * math.ceil(len(digits.train_labels) / BATCH_SIZE) - 1
    tables = 0
    table_clock, clip_clock, display_clock = _Clock(), _Clock(), _Clock()
    start = time.perf_counter()
    with _make_display(plain) as display:
        for epoch in range(1, epochs + 1):
            for images, labels in _batches(digits):
                optimizer.zero_grad()
                loss = loss_function(model(images), labels)
                loss.backward()
                step = len(norms)
                if step % every == 0 or step == last_step:
                    with table_clock:
                        table = gradstat.grad_stats(model)
                        norm = table.total_norm
                    tables += 1
                    with display_clock:
                        display.show(
                            f"step {step + 1}, epoch {epoch} of {epochs}: loss {loss.item():.4f}, "
                            f"gradient norm {norm:.3g}",
                            table,
                        )
                with clip_clock:
                    norms.append(gradstat.clip_grad_norm_(model.parameters(), MAX_NORM))
                optimizer.step()
    seconds = time.perf_counter() - start
    result = DemoResult(
        accuracy=_accuracy(model, digits),
        steps=len(norms),
        clipped_steps=int((torch.stack(norms) > MAX_NORM).sum()),
        tables=tables,
        seconds=seconds,
        table_seconds=table_clock.seconds,
        clip_seconds=clip_clock.seconds,
        display_seconds=display_clock.seconds,
    )
    print(result)
    return result


def _batches(digits: Digits) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(digits.train_labels))
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        yield digits.train_images[chosen], digits.train_labels[chosen]


@torch.no_grad()
def _accuracy(model: nn.Module, digits: Digits) -> float:
    guesses = model(digits.test_images).argmax(dim=1)
    return float((guesses == digits.test_labels).double().mean())


class _Clock:
    """Adds up the wall time spent inside ``with`` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


class _PrintDisplay:
    """Prints each table below the last one."""

    def show(self, headline: str, table: StatTable) -> None:
        print(f"{headline}\n{table.render(plain=True)}\n", flush=True)


class _LiveDisplay:
    """Redraws the table in place."""

    def __init__(self, live: Any, group: Any) -> None:
        self._live = live
        self._group = group

    def show(self, headline: str, table: StatTable) -> None:
        self._live.update(self._group(headline, "", table, ""), refresh=True)


@contextmanager
def _make_display(plain: bool) -> Iterator[_PrintDisplay | _LiveDisplay]:
    if plain or not terminal_has_colours():
        yield _PrintDisplay()
        return
    live = import_optional("rich.live", purpose="a live display", install="rich")
    console = import_optional("rich.console", purpose="a live display", install="rich")
    with live.Live(auto_refresh=False) as display:
        yield _LiveDisplay(display, console.Group)
