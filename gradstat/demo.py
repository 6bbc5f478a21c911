"""The tour: a network that does not learn, what gradstat says of it, and the same one mended."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradstat
from gradstat.diagnosis import Finding
from gradstat.errors import GradstatError, import_optional
from gradstat.render import terminal_has_colours
from gradstat.report import compare_runs, make_report

BATCH_SIZE = 64
LEARNING_RATE = 0.05
DEPTH = 8
WIDTH = 64


@dataclass(frozen=True)
class Digits:
    """Images of shape (n, 1, 8, 8), fp32 in [0, 1], and their labels, int64 in 0..9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Attempt:
    """One training run of the tour."""

    log: Path
    """Its run log."""

    accuracy: float
    """Share of the test images that are classified right."""

    table: str
    """The gradients of its last step, layer by layer."""

    findings: list[Finding]
    """What is wrong with it, the likeliest cause first."""


@dataclass(frozen=True)
class DemoResult:
    """What the tour leaves behind."""

    before: Attempt
    after: Attempt
    pages: tuple[Path, ...]
    """Reports on both runs, and their comparison."""


def run_demo(folder: Path, *, epochs: int = 20, seed: int = 0, plain: bool = False) -> DemoResult:
    """Train a deep network of sigmoids, have it diagnosed, apply the remedy, and train it again.

    Args:
        folder: Where run logs and reports go; made where missing. Those of an earlier tour are
            replaced.
        epochs: Passes over the training images, in each run.
        seed: Of the split, the initial weights and the order of the images. torch's own generator
            is left as it was.
        plain: Print lines, without colours and a progress bar.

    Raises:
        MissingPackageError: scikit-learn or a package for the reports is not installed.
        GradstatError: The diagnosis names nothing that the tour knows how to mend.
    """
    digits = load_digits(seed)
    for package in ("plotly", "jinja2"):
        import_optional(package, purpose="the demo", install="'gradstat[demo]'")
    folder.mkdir(parents=True, exist_ok=True)

    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        print(f"1. {DEPTH} layers of sigmoids learn handwritten digits, with gradstat attached.\n")
        recipe = Recipe()
        model = make_model(recipe)
        before = _train(model, digits, folder / "before.db", epochs, plain)
        print(f"\n{before.table}\n\ntest accuracy {before.accuracy:.1%}.\n")

        print("2. What gradstat says of it:\n")
        if not before.findings:
            raise GradstatError(
                "the diagnosis must find what is wrong, got nothing; train longer, with --epochs 20"
            )
        cause, *others = before.findings
        print(cause)
        print(f"\nalso seen: {', '.join(finding.code for finding in others) or 'nothing'}\n")
        recipe, advice = _remedied(recipe, cause)
        print(f"3. Its advice is taken: {'; '.join(advice)}.\n")
        torch.manual_seed(seed)
        model = make_model(recipe)
        after = _train(model, digits, folder / "after.db", epochs, plain)
        print(
            f"\n{after.table}\n\ntest accuracy {after.accuracy:.1%}, was {before.accuracy:.1%}.\n"
        )

    pages = (
        make_report(before.log).save(folder / "before.html"),
        make_report(after.log).save(folder / "after.html"),
        compare_runs(before.log, after.log).save(folder / "comparison.html"),
    )
    print("4. Left behind, to look at:\n")
    for page in pages:
        print(f"  {page}")
    for attempt in (before, after):
        print(f"  gradstat show {attempt.log}")
    return DemoResult(before, after, pages)


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


@dataclass(frozen=True)
class Recipe:
    """How the network is built."""

    activation: Callable[[], nn.Module] = nn.Sigmoid
    is_normalised: bool = False


REMEDIES: dict[str, dict[str, Any]] = {
    "ReLU": {"activation": nn.ReLU},
    "normalisation": {"is_normalised": True},
}
"""By a word in a finding's remedy, what the tour changes in its recipe."""


def make_model(recipe: Recipe) -> nn.Sequential:
    """Return a deep network of fully connected layers, with torch's own initialisation."""
    layers: list[tuple[str, nn.Module]] = [("flatten", nn.Flatten())]
    for number in range(1, DEPTH + 1):
        layers.append((f"hidden{number}", nn.Linear(WIDTH, WIDTH)))
        if recipe.is_normalised:
            layers.append((f"norm{number}", nn.BatchNorm1d(WIDTH)))
        layers.append((f"act{number}", recipe.activation()))
    return nn.Sequential(OrderedDict([*layers, ("output", nn.Linear(WIDTH, 10))]))


def _remedied(recipe: Recipe, finding: Finding) -> tuple[Recipe, list[str]]:
    """Return the recipe with what a finding advises, and the advice that was taken.

    Raises:
        GradstatError: None of it can be taken here.
    """
    taken = []
    for advice in finding.remedy:
        for word, change in REMEDIES.items():
            if word in advice:
                recipe = replace(recipe, **change)
                taken.append(advice)
    if not taken:
        raise GradstatError(
            f"the diagnosis must advise what the tour can change, got {finding.code}: "
            f"{'; '.join(finding.remedy)}; train longer, with --epochs 20, or take another --seed"
        )
    return recipe, taken


def _train(model: nn.Module, digits: Digits, log: Path, epochs: int, plain: bool) -> Attempt:
    for name in (log.name, f"{log.name}-wal", f"{log.name}-shm"):
        log.with_name(name).unlink(missing_ok=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    gradstat.attach(optimizer, model, clip="auto", log=log, activations={"every": 10})
    monitor = optimizer.gradstat  # type: ignore[attr-defined]
    loss_function = nn.CrossEntropyLoss()
    with _progress(epochs, plain) as tell, _quiet_logger():
        for epoch in range(1, epochs + 1):
            for images, labels in _batches(digits):
                outputs = model(images)
                loss = loss_function(outputs, labels)
                monitor.observe(inputs=images, outputs=outputs, targets=labels, loss=loss)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            accuracy = _accuracy(model, digits)
            monitor.observe(val_accuracy=accuracy)
            tell(
                f"epoch {epoch} of {epochs}: loss {loss.item():.3f}, "
                f"gradient norm {monitor.total_norm:.3g}, accuracy {accuracy:.1%}"
            )
    attempt = Attempt(log, accuracy, monitor.last.render(plain=plain or None), monitor.diagnose())
    gradstat.detach(optimizer)
    return attempt


@contextmanager
def _one_thread() -> Iterator[None]:
    """Layers this small gain nothing from a second thread, and on a busy machine wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _batches(digits: Digits) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(len(digits.train_labels))
    for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        yield digits.train_images[chosen], digits.train_labels[chosen]


@torch.no_grad()
def _accuracy(model: nn.Module, digits: Digits) -> float:
    guesses = model(digits.test_images).argmax(dim=1)
    return float((guesses == digits.test_labels).double().mean())


@contextmanager
def _progress(epochs: int, plain: bool) -> Iterator[Callable[[str], None]]:
    """Give what tells of each epoch: on a bar, or on a line each."""
    if plain or not terminal_has_colours():
        yield lambda text: print(text, flush=True)
        return
    progress = import_optional("rich.progress", purpose="a progress bar", install="rich")
    with progress.Progress(
        *progress.Progress.get_default_columns()[1:], "{task.description}"
    ) as bar:
        task = bar.add_task("", total=epochs)
        yield lambda text: bar.update(task, advance=1, description=text)


@contextmanager
def _quiet_logger() -> Iterator[None]:
    """Keep findings off stderr, where they go unless logging is set up: the tour prints them."""
    logger, handler = logging.getLogger("gradstat"), logging.NullHandler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
