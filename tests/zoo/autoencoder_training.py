"""Autoencoders whose layers, weights, optimizer or loop are at fault."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.autoencoder_data import pixels, rebuild, standardised
from zoo.models import Autoencoder
from zoo.program import Watch, batches, fit, program, validate


def descend(watch: Watch, lr: float, model: nn.Module | None = None) -> nn.Module:
    model = model or Autoencoder((64, 48, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return fit(watch, model, optimizer, nn.MSELoss(), standardised(), epochs=6)


@program("autoencoder/digits/sgd", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    return descend(watch, 0.1)


@program(
    "autoencoder/digits/sgd-lr-x200",
    causes=("lr-too-high", "diverging-loss"),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return descend(watch, 20.0)


@program(
    "autoencoder/digits/loss-maximised",
    causes=("diverging-loss",),
    operator="change optimisation function: it climbs",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = Autoencoder((64, 48, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, maximize=True)
    return fit(watch, model, optimizer, nn.MSELoss(), standardised(), epochs=6)


@program(
    "autoencoder/digits/sgd-lr-1e-6",
    causes=("lr-too-low",),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return descend(watch, 1e-6)


@program(
    "autoencoder/digits/code-of-one",
    causes=("underfitting",),
    operator="model too small",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return rebuild(watch, standardised(), Autoencoder((64, 3, 1)))


@program(
    "autoencoder/digits/deep-and-narrow-relu",
    causes=("dead-units", "bad-initialization"),
    operator="add layers, change bias initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = Autoencoder((64, 4, 4, 3, 3))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.bias, -0.5)
    return rebuild(watch, standardised(), model)


@program(
    "autoencoder/digits/twelve-sigmoid-layers",
    causes=("vanishing-gradient",),
    operator="change activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return descend(watch, 0.1, Autoencoder((64, 48, 32, 32, 32, 32, 16), nn.Sigmoid))


@program(
    "autoencoder/digits/deep-linear-gain-1.2",
    causes=("exploding-gradient", "bad-initialization", "lr-too-high"),
    operator="remove activation function, change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = Autoencoder((64, 48, 32, 32, 32, 16), nn.Identity)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight, gain=1.2)
    return descend(watch, 0.01, model)


@program(
    "autoencoder/digits/saddle-at-zero",
    causes=("plateau", "bad-initialization", "vanishing-gradient"),
    operator="change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """At weights near 0 every layer's gradient is a product of the others, which are near 0."""
    model = Autoencoder((64, 32, 16, 8), nn.Identity)
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            nn.init.normal_(parameter, std=5e-3)
    return descend(watch, 0.05, model)


@program(
    "autoencoder/digits/no-zero-grad",
    causes=("gradient-accumulation",),
    operator="zero_grad removed",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model, data = Autoencoder((64, 48, 16)), standardised()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    watch.attach(optimizer, model)
    for _ in range(6):
        for inputs, targets in batches(data, 32):
            outputs = model(inputs)
            loss = functional.mse_loss(outputs, targets)
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            loss.backward()
            optimizer.step()
        validate(watch, model, nn.MSELoss(), data)
    return model


class Detached(Autoencoder):
    """Hands the code over without its graph, so that the encoder never learns."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(self.encoder(inputs).detach())


@program(
    "autoencoder/digits/code-detached",
    causes=("parameters-not-updating",),
    operator="detach in the forward pass",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return rebuild(watch, standardised(), Detached((64, 48, 4)))


class Variational(nn.Module):
    """A variational autoencoder: returns the image's logits, the code's mean and log-variance."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 64))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(inputs).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(code), mean, log_variance


def encode(watch: Watch, weight: float) -> nn.Module:
    """Train with the negative evidence bound, the divergence of the code weighted."""
    model, data = Variational(), pixels()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    watch.attach(optimizer, model)
    for _ in range(8):
        for inputs, targets in batches(data, 32):
            logits, mean, log_variance = model(inputs)
            image = functional.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
            divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum()
            loss = (image + weight * divergence) / len(inputs)
            watch.observe(inputs=inputs, outputs=logits, targets=targets, loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@program("autoencoder/digits/variational", operator="noisy latent variable", half="tuning")
def _(watch: Watch) -> nn.Module:
    return encode(watch, 0.5)


@program(
    "autoencoder/digits/code-collapsed",
    causes=("constant-predictions", "underfitting"),
    operator="add regulariser: divergence weighted a hundredfold",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """The code holds nothing, and every image is rebuilt as the mean image."""
    return encode(watch, 100.0)


@program(
    "autoencoder/digits/momentum-0.995",
    causes=("oscillating-loss", "lr-too-high"),
    operator="change optimisation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = Autoencoder((64, 48, 16), nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.995)
    return fit(watch, model, optimizer, nn.MSELoss(), standardised(), epochs=8)
