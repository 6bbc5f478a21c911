"""Held out: autoencoders of digits, plain and variational, and a U-Net that outlines shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim import Optimizer

from zoo.data import digits_raw
from zoo.program import Watch, program

Act = Callable[[], nn.Module]


def encoder_decoder(
    sizes: tuple[int, ...], act: Act = nn.ReLU, last: Act = nn.Identity
) -> nn.Sequential:
    layers: list[nn.Module] = []
    path = (*sizes, *sizes[-2::-1])
    for index in range(len(path) - 1):
        layers += [nn.Linear(path[index], path[index + 1]), act()]
    return nn.Sequential(*layers[:-1], last())


def compress(
    watch: Watch,
    model: nn.Module,
    make: Callable[..., Optimizer],
    *,
    prepare: Callable[[Tensor], Tensor] = lambda x: x / 16,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    noise: float = 0.0,
    rows: int = 1200,
    epochs: int = 10,
    batch: int = 100,
    clear: bool = True,
    everything: bool = True,
) -> nn.Module:
    x = prepare(digits_raw().x)
    optimizer = make(model.parameters())
    watch.attach(optimizer, model)
    for _ in range(epochs):
        for part in torch.randperm(rows).split(batch):
            clean = x[part]
            seen = clean + noise * torch.randn_like(clean)
            output = model(seen)
            loss = criterion(output, clean)
            if everything:
                watch.observe(inputs=seen, outputs=output, targets=clean, loss=loss)
            else:
                watch.observe(loss=loss)
            if clear:
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            watch.observe(val_loss=criterion(model(x[1200:]), x[1200:]))
    return model


def adam(lr: float = 3e-3) -> Callable[..., Optimizer]:
    return lambda parameters: torch.optim.Adam(parameters, lr=lr)


def sgd(lr: float, momentum: float = 0.9) -> Callable[..., Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=momentum)


@program("autoencoder/scans/noise-adam", operator="noisy inputs", half="held-out")
def _(watch: Watch) -> nn.Module:
    return compress(watch, encoder_decoder((64, 48, 16)), adam(), noise=0.2)


@program("autoencoder/scans/absolute-adagrad", operator="absolute error", half="held-out")
def _(watch: Watch) -> nn.Module:
    return compress(
        watch,
        encoder_decoder((64, 40, 20), nn.GELU, nn.Sigmoid),
        lambda p: torch.optim.Adagrad(p, lr=0.03),
        criterion=F.l1_loss,
    )


@program("autoencoder/scans/sum-of-squares", operator="huge loss, only loss seen", half="held-out")
def _(watch: Watch) -> nn.Module:
    return compress(
        watch,
        encoder_decoder((64, 32)),
        adam(5e-3),
        prepare=lambda x: x * 16,
        criterion=lambda output, x: F.mse_loss(output, x, reduction="sum"),
        epochs=20,
        everything=False,
    )


@program(
    "autoencoder/scans/tanh-of-0-to-16",
    causes=("loss-output-mismatch", "bad-targets"),
    operator="add activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return compress(watch, encoder_decoder((64, 32, 16), last=nn.Tanh), adam(), prepare=lambda x: x)


@program(
    "autoencoder/scans/six-sigmoids",
    causes=("vanishing-gradient",),
    operator="change activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return compress(
        watch, encoder_decoder((64, 48, 32, 24, 16, 12), nn.Sigmoid), sgd(2.0), epochs=12
    )


@program(
    "autoencoder/scans/code-biased-off",
    causes=("dead-units", "bad-initialization", "constant-predictions"),
    operator="change bias initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    model = encoder_decoder((64, 32, 12))
    nn.init.constant_(model[2].bias, -8.0)
    return compress(watch, model, adam())


@program(
    "autoencoder/scans/sgd-lr-100",
    causes=("lr-too-high", "diverging-loss", "exploding-gradient"),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return compress(watch, encoder_decoder((64, 32, 16)), sgd(100.0), everything=False)


@program(
    "autoencoder/scans/adam-lr-2e-7",
    causes=("lr-too-low",),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return compress(watch, encoder_decoder((64, 32, 16)), adam(2e-7), everything=False)


@program(
    "autoencoder/scans/one-number",
    causes=("underfitting",),
    operator="change number of neurons",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return compress(watch, encoder_decoder((64, 1), nn.Identity), adam(), epochs=25)


@program(
    "autoencoder/scans/fifteen-scans",
    causes=("overfitting",),
    operator="delete training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return compress(
        watch, encoder_decoder((64, 256, 128)), adam(1e-3), rows=15, batch=15, epochs=400
    )


@program(
    "autoencoder/scans/zero-grad-forgotten",
    causes=("gradient-accumulation",),
    operator="missing zero_grad",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return compress(watch, encoder_decoder((64, 32, 16)), sgd(0.5), clear=False, epochs=15)


@program(
    "autoencoder/scans/similarity-maximised",
    causes=("diverging-loss", "exploding-gradient", "loss-output-mismatch"),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """A product without normalisation has no largest value."""
    return compress(
        watch,
        encoder_decoder((64, 32, 16)),
        adam(1e-2),
        criterion=lambda output, x: -(output * x).sum(1).mean(),
    )


@program(
    "autoencoder/scans/linear-from-zero",
    causes=("plateau", "bad-initialization", "vanishing-gradient", "lr-too-low"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    model = encoder_decoder((64, 20, 10), nn.Identity)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=1e-3)
    return compress(watch, model, sgd(0.1), prepare=lambda x: (x - 4.9) / 6)


@program(
    "autoencoder/scans/tanh-weights-x50",
    causes=("saturated-activation", "bad-initialization"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    model = encoder_decoder((64, 32, 16), nn.Tanh)
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.weight *= 50
    return compress(watch, model, sgd(1.0), epochs=8)


# ---- variational --------------------------------------------------------------------------------


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 48)
        self.mean, self.logvar = nn.Linear(48, 8), nn.Linear(48, 8)
        self.decode = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(self.hidden(x))
        mean, logvar = self.mean(h), self.logvar(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        return self.decode(z), mean, logvar


def variational(
    watch: Watch, *, beta: float = 1.0, pixels: float = 16.0, lr: float = 3e-3
) -> nn.Module:
    x = digits_raw().x / pixels
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    watch.attach(optimizer, model)
    for _ in range(10):
        for part in torch.randperm(1200).split(60):
            logits, mean, logvar = model(x[part])
            error = F.binary_cross_entropy_with_logits(logits, x[part], reduction="sum")
            divergence = -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum()
            loss = (error + beta * divergence) / 60
            watch.observe(inputs=x[part], outputs=logits, targets=x[part], loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@program("autoencoder/scans/vae-adam", operator="variational, loss far from zero", half="held-out")
def _(watch: Watch) -> nn.Module:
    return variational(watch)


@program(
    "autoencoder/scans/vae-beta-300",
    causes=("constant-predictions", "underfitting"),
    operator="add weights regularisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return variational(watch, beta=300.0)


@program(
    "autoencoder/scans/vae-exponent-overflow",
    causes=("bad-inputs", "nonfinite-loss", "bad-targets", "exploding-gradient"),
    operator="exponential overflow",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return variational(watch, pixels=16 / 4000)
