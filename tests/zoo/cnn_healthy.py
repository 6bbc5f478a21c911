"""Convolutional networks that train well and that naive thresholds mistake for faulty."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.cnn_data import sgd
from zoo.data import Split, digit_images
from zoo.models import cnn
from zoo.program import NoWatch, Watch, batches, fit, program, validate


def trained(data: Split, model: nn.Module) -> nn.Module:
    return fit(NoWatch(), model, sgd(model), nn.CrossEntropyLoss(), data, epochs=4)


def low(data: Split) -> Split:
    return data.rows(data.y < 5)


@program("cnn/digits/frozen-backbone", operator="frozen backbone", half="tuning")
def _(watch: Watch) -> nn.Module:
    """The layers learnt on the digits 0 to 4 stay; a new head learns all ten."""
    data = digit_images()
    model = trained(low(data), cnn(batch_norm=True))
    model.requires_grad_(False)
    model[-1] = nn.Linear(64, 10)
    optimizer = torch.optim.Adam(filter(lambda p: p.requires_grad, model.parameters()), lr=3e-3)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), data, epochs=6)


@program("cnn/digits/frozen-in-the-optimizer", operator="frozen backbone", half="tuning")
def _(watch: Watch) -> nn.Module:
    """As above, but the optimizer was given the frozen parameters too, which get no gradient."""
    data = digit_images()
    model = trained(low(data), cnn(batch_norm=True))
    model[-1] = nn.Linear(64, 10)
    model[:-1].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), data, epochs=6)


@program("cnn/digits/fine-tuning", operator="small fine-tuning rate", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Trained on clean digits, it adapts to less contrast by small steps; the loss falls."""
    data = digit_images()
    model = trained(data, cnn((16, 32), batch_norm=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    faint = data.map(lambda x: 0.3 + 0.4 * x)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), faint, epochs=6)


@program("cnn/digits/sparse-relu", operator="very sparse but alive ReLU", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Each of 256 hidden units is on for about one image in ten, and none is always off."""
    norm = nn.BatchNorm1d(256)
    nn.init.constant_(norm.bias, -2.0)
    model = cnn(outputs=256).extend([norm, nn.ReLU(), nn.Linear(256, 10)])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), digit_images(), epochs=6)


@program("cnn/digits/grad-scaler", operator="GradScaler's first skipped steps", half="tuning")
def _(watch: Watch) -> nn.Module:
    """The scale starts far too high, so the first steps overflow and are skipped."""
    model, data, loss_fn = cnn(batch_norm=True), digit_images(), nn.CrossEntropyLoss()
    optimizer = sgd(model)
    watch.attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    for _ in range(4):
        for inputs, targets in batches(data, 32):
            with torch.autocast("cpu", dtype=torch.float16):
                outputs = model(inputs)
                loss = loss_fn(outputs, targets)
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        validate(watch, model, loss_fn, data)
    return model


@program("cnn/digits/converged", operator="a converged run", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Goes on from weights that classify every training image: tiny gradients, a flat loss."""
    data, model = digit_images(), cnn((16, 32))
    for _ in range(5):
        trained(data, model)
    return fit(watch, model, sgd(model, 0.01), nn.CrossEntropyLoss(), data, epochs=4)


@program("cnn/digits/label-smoothing", operator="loss that cannot reach zero", half="tuning")
def _(watch: Watch) -> nn.Module:
    data, model = digit_images(), cnn()
    return fit(watch, model, sgd(model), nn.CrossEntropyLoss(label_smoothing=0.2), data, epochs=6)


@program("cnn/digits/dropout-augmented", operator="noisy training loss", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Dropout and shifted images: the training loss stays above the validation loss."""
    model = cnn((16, 32), batch_norm=True)
    model.insert(len(model) - 1, nn.Dropout(0.4))
    data, loss_fn = digit_images(), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    watch.attach(optimizer, model)
    for _ in range(6):
        for inputs, targets in batches(data, 32):
            left = int(torch.randint(-1, 2, ()))
            inputs = inputs.roll(left, dims=3) + 0.1 * torch.randn_like(inputs)  # noqa: PLW2901
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        validate(watch, model, loss_fn, data)
    return model


class Residual(nn.Module):
    """``x + f(x)`` with two convolutions, the last one starting from 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.last(functional.relu(self.first(functional.relu(inputs))))


@program("cnn/digits/eight-residual-blocks", operator="deep with small gradients", half="tuning")
def _(watch: Watch) -> nn.Module:
    """The first layers of the residual branches have a zero gradient in the first step."""
    blocks = [Residual(8) for _ in range(8)]
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), *blocks, nn.Flatten(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), digit_images(), epochs=5)


@program("cnn/digits/accumulated-batches", operator="accumulation on purpose", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Four small batches make one step, and the gradient is then cleared."""
    model, data, loss_fn = cnn(), digit_images(), nn.CrossEntropyLoss()
    optimizer = sgd(model)
    watch.attach(optimizer, model)
    for _ in range(6):
        for count, (inputs, targets) in enumerate(batches(data, 8), start=1):
            outputs = model(inputs)
            loss = loss_fn(outputs, targets) / 4
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            loss.backward()
            if count % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()
        validate(watch, model, loss_fn, data)
    return model


@program("cnn/digits/has-digits-multi-label", operator="rare positives, learnt", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Ten yes-or-no questions an image, one of which is yes: nine targets in ten are 0."""
    data = digit_images().map(targets=lambda y: functional.one_hot(y, 10).float())
    model = cnn(batch_norm=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, nn.BCEWithLogitsLoss(), data, epochs=6)
