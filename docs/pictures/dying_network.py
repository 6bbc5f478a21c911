"""Draw docs/pictures/dying_network.png: dead units by layer and step, with and without BatchNorm.

Needs matplotlib and scikit-learn: ``python docs/pictures/dying_network.py``.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

import gradstat
from gradstat.demo import load_digits

LAYERS, WIDTH, STEPS, EVERY = 33, 32, 200, 4


def network(norm: bool) -> nn.Sequential:
    """Return 33 ReLU layers of 32 units with He's initial weights, and an output layer."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for n_in, n_out in pairwise([64, *[WIDTH] * LAYERS]):
        linear = nn.Linear(n_in, n_out)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.zeros_(linear.bias)
        parts += [linear, *([nn.BatchNorm1d(n_out)] if norm else []), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(WIDTH, 10))


def dead_shares(norm: bool, lr: float) -> np.ndarray:
    """Train on the digits and return the share of dead units, (layers, sampled steps)."""
    digits = load_digits(0)
    images, labels = digits.train_images.flatten(1), digits.train_labels
    model = network(norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    gradstat.attach(optimizer, model, activations={"every": EVERY, "window": 4})
    generator = torch.Generator().manual_seed(0)
    columns = []
    for step in range(STEPS):
        chosen = torch.randint(len(images), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        if step % EVERY == 0:
            columns.append([row.dead_fraction for row in optimizer.gradstat.activations.table()])
    return np.array(columns).T


def main() -> None:
    """Train both and draw them side by side."""
    torch.set_num_threads(1)  # the layers are small
    runs = {
        "34 layers, ReLU, SGD with lr 1": dead_shares(norm=False, lr=1.0),
        "the same with BatchNorm, lr 0.1": dead_shares(norm=True, lr=0.1),
    }
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (title, shares) in zip(axes, runs.items(), strict=True):
        image = axis.imshow(
            100 * shares, vmin=0, vmax=100, cmap="magma", aspect="auto", origin="lower",
            extent=(0, STEPS, 0.5, LAYERS + 0.5), interpolation="nearest",
        )  # fmt: skip
        axis.set(title=title, xlabel="step")
    axes[0].set_ylabel("hidden layer")
    figure.colorbar(image, ax=axes, label="dead units, %")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
