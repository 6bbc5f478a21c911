"""Convolutional networks whose optimizer, learning rate or loop is at fault, with their twin."""

from __future__ import annotations

import torch
from torch import nn

from zoo.cnn_data import sgd
from zoo.data import digit_images
from zoo.models import cnn
from zoo.program import Watch, batches, fit, program, validate


def adam(watch: Watch, lr: float, weight_decay: float = 0.0) -> nn.Module:
    model = cnn()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), digit_images(), epochs=6)


@program("cnn/digits/adamw", operator="twin", half="tuning")
def _(watch: Watch) -> nn.Module:
    return adam(watch, 3e-3, 0.01)


@program(
    "cnn/digits/adamw-lr-x300",
    causes=("lr-too-high",),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return adam(watch, 1.0)


@program(
    "cnn/digits/adamw-lr-1e-7",
    causes=("lr-too-low",),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return adam(watch, 1e-7)


@program(
    "cnn/digits/weight-decay-100",
    causes=("underfitting", "constant-predictions"),
    operator="add weights regularisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return adam(watch, 3e-3, 100.0)


@program(
    "cnn/digits/momentum-0.99",
    causes=("oscillating-loss", "lr-too-high"),
    operator="change optimisation function",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = cnn(activation=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.99)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), digit_images(), epochs=6)


@program(
    "cnn/digits/lr-spike",
    causes=("dead-units", "lr-too-high"),
    operator="change learning rate in one step",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = cnn()

    def spike(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 3000 if step == 5 else 1)

    return fit(
        watch, model, sgd(model), nn.CrossEntropyLoss(), digit_images(), epochs=6, schedule=spike
    )


@program(
    "cnn/digits/no-zero-grad",
    causes=("gradient-accumulation",),
    operator="zero_grad removed",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model, data, loss_fn = cnn(), digit_images(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    watch.attach(optimizer, model)
    for _ in range(6):
        for inputs, targets in batches(data, 32):
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            loss.backward()
            optimizer.step()
        validate(watch, model, loss_fn, data)
    return model


@program(
    "cnn/digits/optimizer-of-the-old-model",
    causes=("parameters-not-updating",),
    operator="optimizer made before the model was replaced",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model, data, loss_fn = cnn(), digit_images(), nn.CrossEntropyLoss()
    optimizer = sgd(model)
    model = cnn(batch_norm=True)
    return fit(watch, model, optimizer, loss_fn, data, epochs=4)


@program(
    "cnn/digits/head-replaced",
    causes=("parameters-not-updating",),
    operator="optimizer made before the head was replaced",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model, data, loss_fn = cnn((8, 16, 16)), digit_images(), nn.CrossEntropyLoss()
    model.requires_grad_(False)
    optimizer = sgd(model)
    model[-1] = nn.Linear(64, 10)
    return fit(watch, model, optimizer, loss_fn, data, epochs=4)
