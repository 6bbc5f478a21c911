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


@dataclass(frozen=True)
class Digits:
    """Images of shape (n, 1, 8, 8), fp32 in [0, 1], and their labels, int64 in 0..9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class DemoResult:
    """What a run of the demo found."""

    accuracy: float
    """Share of the test images that are classified right."""

    steps: int
    clip_rate: float
    """Share of the steps that were clipped."""

    seconds: float
    """Wall time of the training loop, without what was spent on showing tables."""

    gradstat_seconds: float
    """Time in what `attach` adds to the steps: statistics and clipping on every one of them."""

    def __str__(self) -> str:
        step = 1e6 * self.gradstat_seconds / self.steps
        return (
            f"test accuracy {self.accuracy:.1%} after {self.steps} steps, "
            f"{self.clip_rate:.0%} of them clipped\n"
            f"gradstat took {1e3 * self.gradstat_seconds:.1f} ms of {self.seconds:.2f} s "
            f"({self.gradstat_seconds / self.seconds:.1%}): {step:.0f} us a step for the whole "
            "table and clipping"
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
    before, after = _Clock(), _Clock()
    optimizer.register_step_pre_hook(before.start)
    optimizer.register_step_post_hook(after.start)
    gradstat.attach(optimizer, model, clip="auto")
    optimizer.register_step_pre_hook(before.stop)
    optimizer.register_step_post_hook(after.stop)
    monitor = optimizer.gradstat  # type: ignore[attr-defined]

    loss_function = nn.CrossEntropyLoss()
    last_step = epochs * math.ceil(len(digits.train_labels) / BATCH_SIZE)
    showing = _Clock()
    start = time.perf_counter()
    with _make_display(plain) as display:
        for epoch in range(1, epochs + 1):
            for images, labels in _batches(digits):
                optimizer.zero_grad()
                loss = loss_function(model(images), labels)
                loss.backward()
                optimizer.step()
                if monitor.step % every == 1 % every or monitor.step == last_step:
                    showing.start()
                    display.show(
                        f"step {monitor.step}, epoch {epoch} of {epochs}: loss {loss.item():.4f}, "
                        f"gradient norm {monitor.total_norm:.3g}, clipped to at most "
                        f"{monitor.clip_threshold:.3g}",
                        monitor.last,
                    )
                    showing.stop()
    seconds = time.perf_counter() - start - showing.seconds
    result = DemoResult(
        accuracy=_accuracy(model, digits),
        steps=monitor.step,
        clip_rate=monitor.clip_rate,
        seconds=seconds,
        gradstat_seconds=before.seconds + after.seconds,
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
    """Adds up the wall time from each `start` to the next `stop`; both may be optimizer hooks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def start(self, *_: object) -> None:
        self._started = time.perf_counter()

    def stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


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
