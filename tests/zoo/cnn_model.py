"""Convolutional networks whose layers, initial weights or loss are at fault."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.cnn_data import sgd
from zoo.data import digit_images
from zoo.models import cnn
from zoo.program import Watch, batches, fit, program, validate


def classify(watch: Watch, model: nn.Module) -> nn.Module:
    return fit(watch, model, sgd(model), nn.CrossEntropyLoss(), digit_images(), epochs=6)


def tanh_layers() -> nn.Sequential:
    """Return six convolutions that keep the size of what passes through them."""
    model = cnn((8, 16, 16, 16, 16, 16), activation=nn.Tanh)
    for weight in weights(model):
        nn.init.xavier_normal_(weight, gain=5 / 3)
    return model


def weights(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith("weight")]


@program("cnn/digits/six-layers-tanh", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    return classify(watch, tanh_layers())


@program(
    "cnn/digits/tanh-weights-x20",
    causes=("bad-initialization", "saturated-activation"),
    operator="change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = tanh_layers()
    with torch.no_grad():
        for weight in weights(model)[:-1]:
            weight.mul_(20)
    return classify(watch, model)


@program(
    "cnn/digits/tanh-bias-12",
    causes=("saturated-activation", "bad-initialization"),
    operator="change bias initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """In every second channel of the third layer and in all of the fourth tanh is flat."""
    model = tanh_layers()
    nn.init.constant_(model[6].bias[::2], 12)
    nn.init.constant_(model[8].bias, 12)
    return classify(watch, model)


@program(
    "cnn/digits/ten-sigmoid-layers",
    causes=("vanishing-gradient",),
    operator="change activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return classify(watch, cnn((8, *[16] * 9), activation=nn.Sigmoid))


@program(
    "cnn/digits/weights-zero",
    causes=("bad-initialization",),
    operator="change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = cnn()
    for weight in weights(model):
        nn.init.zeros_(weight)
    return classify(watch, model)


@program(
    "cnn/digits/weights-small",
    causes=("bad-initialization", "plateau", "vanishing-gradient", "dead-units"),
    operator="change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = cnn((8, 16, 16, 16))
    for weight in weights(model):
        nn.init.normal_(weight, std=1e-3)
    return classify(watch, model)


@program(
    "cnn/digits/bias-minus-10",
    causes=("dead-units", "bad-initialization"),
    operator="change bias initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = cnn()
    nn.init.constant_(model[3].bias, -10)
    return classify(watch, model)


@program(
    "cnn/digits/weights-x8",
    causes=("bad-initialization", "exploding-gradient"),
    operator="change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = cnn((8, 16, 16, 16))
    with torch.no_grad():
        for weight in weights(model):
            weight.mul_(8)
    return classify(watch, model)


@program(
    "cnn/digits/softmax-before-cross-entropy",
    causes=("loss-output-mismatch",),
    operator="add activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return classify(watch, nn.Sequential(cnn(), nn.Softmax(dim=1)))


@program(
    "cnn/digits/softmax-of-one-unit",
    causes=("loss-output-mismatch", "constant-predictions", "flat-loss"),
    operator="change activation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = nn.Sequential(cnn(outputs=1), nn.Softmax(dim=1))
    data = digit_images().map(targets=lambda y: (y < 5).float().unsqueeze(1))
    return fit(watch, model, sgd(model), nn.BCELoss(), data, epochs=4)


@program(
    "cnn/digits/confidence-mask-empty",
    causes=("zero-loss",),
    operator="change loss function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model, data = cnn(), digit_images()
    optimizer = sgd(model)
    watch.attach(optimizer, model)
    for _ in range(4):
        for inputs, targets in batches(data, 32):
            logits = model(inputs)
            sure = (logits.softmax(dim=1).amax(dim=1) > 0.95).float()
            losses = functional.cross_entropy(logits, targets, reduction="none")
            loss = (sure * losses).sum() / sure.sum().clamp(min=1)
            watch.observe(inputs=inputs, outputs=logits, targets=targets, loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        validate(watch, model, nn.CrossEntropyLoss(), data)
    return model


class PerImageScale(nn.Module):
    """Divides every feature map by its deviation, which is 0 where the map is constant."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs / inputs.std(dim=(2, 3), keepdim=True)


@program(
    "cnn/digits/scale-by-zero-deviation",
    causes=("nonfinite-loss",),
    operator="division 0 / 0 in a layer",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = cnn()
    model.insert(2, PerImageScale())
    return classify(watch, model)
