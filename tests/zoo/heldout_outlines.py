"""Held out: a small U-Net that outlines shapes in noisy pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim import Optimizer

from zoo.heldout_data import shapes
from zoo.program import Watch, program


class UNet(nn.Module):
    def __init__(self, last: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, 8, 3, padding=1)
        self.down2 = nn.Conv2d(8, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge = nn.Conv2d(16, 8, 3, padding=1)
        self.final = nn.Conv2d(8, 1, 1)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        first = F.leaky_relu(self.down1(x))
        second = F.leaky_relu(self.down2(F.max_pool2d(first, 2)))
        merged = torch.cat([first, self.up(second)], 1)
        return self.last(self.final(F.leaky_relu(self.merge(merged))))


def dice(logits: Tensor, mask: Tensor) -> Tensor:
    p = torch.sigmoid(logits)
    return 1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)


def bce_and_dice(logits: Tensor, mask: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, mask) + dice(logits, mask)


def segment(
    watch: Watch,
    *,
    net: nn.Module | None = None,
    make: Callable[..., Optimizer] = lambda p: torch.optim.AdamW(p, lr=5e-3),
    criterion: Callable[[Tensor, Tensor], Tensor] = bce_and_dice,
    picture: Callable[[Tensor], Tensor] = lambda x: x,
    outline: Callable[[Tensor], Tensor] = lambda mask: mask,
    frozen: bool = False,
    epochs: int = 4,
) -> nn.Module:
    x, _, mask = shapes()
    x, mask = picture(x), outline(mask)
    net = net or UNet()
    if frozen:
        for parameter in net.parameters():
            parameter.requires_grad_(False)
        net.final.bias.requires_grad_(True)
    optimizer = make(net.parameters())
    watch.attach(optimizer, net)
    for _ in range(epochs):
        for batch in torch.randperm(500).split(25):
            logits = net(x[batch])
            loss = criterion(logits, mask[batch])
            watch.observe(inputs=x[batch], outputs=logits, targets=mask[batch], loss=loss)
            optimizer.zero_grad(set_to_none=False)
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            watch.observe(val_loss=criterion(net(x[500:]), mask[500:]))
    return net


@program("autoencoder/outlines/unet-dice", operator="none", half="held-out")
def _(watch: Watch) -> nn.Module:
    return segment(watch)


@program(
    "autoencoder/outlines/bodies-not-thawed",
    causes=("parameters-not-updating",),
    operator="frozen by mistake",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return segment(watch, frozen=True)


@program(
    "autoencoder/outlines/one-pixel-each",
    causes=("class-imbalance", "constant-predictions"),
    operator="unbalance training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Only one pixel in 256 is marked, and at random within its shape."""

    def outline(mask: Tensor) -> Tensor:
        chosen = (mask.flatten(1) * torch.rand(600, 256)).argmax(1)
        return F.one_hot(chosen, 256).float().view(600, 1, 16, 16)

    return segment(watch, outline=outline, criterion=F.binary_cross_entropy_with_logits)


@program(
    "autoencoder/outlines/contrast-of-blank-pictures",
    causes=("nonfinite-gradient", "nonfinite-loss"),
    operator="square root at zero",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    class Contrast(UNet):
        def forward(self, x: Tensor) -> Tensor:
            first = F.relu(self.down1(x))
            spread = first.var((2, 3), keepdim=True).sqrt()
            second = F.relu(self.down2(F.max_pool2d(first / (spread + 1e-3), 2)))
            return self.final(F.relu(self.merge(torch.cat([first, self.up(second)], 1))))

    blank = (torch.arange(600) % 100 == 7).float().view(600, 1, 1, 1)
    return segment(watch, net=Contrast(), picture=lambda x: x * (1 - blank))


@program(
    "autoencoder/outlines/targets-0-to-255",
    causes=("bad-targets", "loss-output-mismatch", "diverging-loss"),
    operator="targets not scaled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return segment(
        watch, outline=lambda mask: 255 * mask, criterion=F.binary_cross_entropy_with_logits
    )


@program(
    "autoencoder/outlines/thresholded",
    causes=("flat-loss", "vanishing-gradient", "parameters-not-updating"),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Clamped before the loss, by an offset that leaves every pixel outside."""
    return segment(watch, net=UNet(lambda x: (x - 12.0).clamp(0, 1)), criterion=F.mse_loss)


@program(
    "autoencoder/outlines/sign-steps",
    causes=("oscillating-loss", "lr-too-high"),
    operator="change optimisation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return segment(
        watch, make=lambda p: torch.optim.Rprop(p, lr=0.1, etas=(0.999, 1.001)), epochs=6
    )
