"""Autoencoders that train well and that naive thresholds mistake for faulty."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.autoencoder_data import copied, pixels, rebuild, standardised
from zoo.models import Autoencoder
from zoo.program import NoWatch, Watch, batches, fit, program, validate


@program("autoencoder/digits/denoising", operator="targets unlike inputs", half="tuning")
def _(watch: Watch) -> nn.Module:
    model, data = Autoencoder((64, 64, 24)), standardised()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    watch.attach(optimizer, model)
    for _ in range(8):
        for inputs, targets in batches(data, 32):
            noisy = inputs + 0.4 * torch.randn_like(inputs)
            outputs = model(noisy)
            loss = functional.mse_loss(outputs, targets)
            watch.observe(inputs=noisy, outputs=outputs, targets=targets, loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        validate(watch, model, nn.MSELoss(), data)
    return model


class Winners(nn.Module):
    """Keeps the four largest of each row, and makes the others 0."""

    def forward(self, inputs: Tensor) -> Tensor:
        values, places = inputs.topk(4, dim=1)
        return torch.zeros_like(inputs).scatter(1, places, values)


@program("autoencoder/digits/k-sparse", operator="very sparse but alive units", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Of 64 units of the code, sixty are 0 for any one image."""
    model = nn.Sequential(nn.Linear(64, 64), Winners(), nn.Linear(64, 64))
    return rebuild(watch, standardised(), model, epochs=8)


class TiedLinear(nn.Module):
    """A linear autoencoder whose decoder is the encoder's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(16, 64))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight.T @ self.weight


@program("autoencoder/digits/tied-linear", operator="tied weights", half="tuning")
def _(watch: Watch) -> nn.Module:
    """The loss comes to rest well above 0, at the variance that sixteen directions leave."""
    return rebuild(watch, standardised(), TiedLinear(), epochs=8)


class Convolutional(nn.Module):
    """Strided convolutions down to 2 x 2 and transposed ones back up, with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 8, 3, stride=2, padding=1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 4, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
        )  # fmt: skip

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(self.encoder(inputs)).sigmoid()


@program("autoencoder/digits/convolutional", operator="saturated outputs, rightly", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Half of the pixels are 0, so half of the sigmoids are to saturate."""
    data = pixels()
    images = copied(data.x.reshape(-1, 1, 8, 8), data.val_x.reshape(-1, 1, 8, 8))
    return rebuild(watch, images, Convolutional())


@program("autoencoder/digits/converged", operator="a converged run", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Goes on from trained weights with a tenth of the rate: the loss hardly falls any more."""
    model = rebuild(NoWatch(), standardised(), epochs=25)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4)
    return fit(watch, model, optimizer, nn.MSELoss(), standardised(), epochs=4)


@program("autoencoder/digits/weight-decay", operator="regulariser that does no harm", half="tuning")
def _(watch: Watch) -> nn.Module:
    model = Autoencoder((64, 48, 16), nn.Tanh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    return fit(watch, model, optimizer, nn.SmoothL1Loss(), standardised(), epochs=8)
