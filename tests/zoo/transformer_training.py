"""Transformers whose weights, optimizer, precision or loop are at fault."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from zoo.data import text
from zoo.models import Transformer
from zoo.program import Watch, batches, fit, program, validate
from zoo.rnn_data import next_character, rows
from zoo.transformer_data import classify, reader, warm_up, write, writer


@program("transformer/text/warm-up", operator="LR warm-up from 0", half="tuning")
def _(watch: Watch) -> nn.Module:
    model = writer(norm_first=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    return fit(watch, model, optimizer, next_character, text(), epochs=6, schedule=warm_up)


@program(
    "transformer/text/lr-x60-no-warm-up",
    causes=("lr-too-high",),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = writer(norm_first=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    return fit(watch, model, optimizer, next_character, text(), epochs=4)


@program(
    "transformer/rows/sgd-lr-30",
    causes=("lr-too-high", "diverging-loss"),
    operator="change learning rate",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = reader()
    optimizer = torch.optim.SGD(model.parameters(), lr=30.0)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), rows(), epochs=3)


@program(
    "transformer/text/endless-warm-up",
    causes=("lr-too-low",),
    operator="change learning rate: warm-up far longer than the run",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    def schedule(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return LambdaLR(optimizer, lambda step: min(1.0, step / 1_000_000))

    model = writer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return fit(watch, model, optimizer, next_character, text(), epochs=5, schedule=schedule)


@program(
    "transformer/text/weights-x15",
    causes=("bad-initialization",),
    operator="change weights initialisation",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model = writer()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(15)
    return write(watch, text(), model)


@program(
    "transformer/rows/dropout-0.97",
    causes=("underfitting",),
    operator="add regulariser",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return classify(watch, rows(), Transformer(nn.Linear(8, 32), 8, 10, dropout=0.97))


@program(
    "transformer/rows/no-zero-grad",
    causes=("gradient-accumulation",),
    operator="zero_grad removed",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model, data, loss_fn = reader(), rows(), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    watch.attach(optimizer, model)
    for _ in range(5):
        for inputs, targets in batches(data, 32):
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            loss.backward()
            optimizer.step()
        validate(watch, model, loss_fn, data)
    return model


@program(
    "transformer/rows/cleared-before-the-step",
    causes=("parameters-not-updating", "flat-loss"),
    operator="zero_grad between backward and step",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    model, data, loss_fn = reader(), rows(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch.attach(optimizer, model)
    for _ in range(4):
        for inputs, targets in batches(data, 32):
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            loss.backward()
            optimizer.zero_grad(set_to_none=False)
            optimizer.step()
        validate(watch, model, loss_fn, data)
    return model


class Detached(Transformer):
    """Computes its states without a graph, so that only the head can learn."""

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            states = self.embedding(inputs) + self.positions
            for block in self.blocks:
                states = block(states)
        return self.head(self.norm(states).mean(dim=1))


@program(
    "transformer/rows/encoder-without-graph",
    causes=("parameters-not-updating",),
    operator="no_grad left in the forward pass",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    return classify(watch, rows(), Detached(nn.Linear(8, 32), 8, 10))


@program(
    "transformer/rows/bfloat16-weights",
    causes=("parameters-not-updating", "lr-too-low"),
    operator="update lost to rounding",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """Nearly every update is less than half of what separates neighbouring weights."""
    model = reader().to(torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    data = rows().map(lambda x: x.to(torch.bfloat16))
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), data, epochs=3)


@program(
    "transformer/text/fixed-loss-scale",
    causes=("nonfinite-gradient",),
    operator="float16 overflow",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """The loss is scaled by a constant that float16 gradients cannot hold, and no one looks."""
    model, data, scale = writer(), text(), 2.0**22
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    watch.attach(optimizer, model)
    for _ in range(3):
        for inputs, targets in batches(data, 32):
            with torch.autocast("cpu", dtype=torch.float16):
                outputs = model(inputs)
                loss = next_character(outputs, targets)
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            optimizer.zero_grad()
            (scale * loss).backward()
            for parameter in model.parameters():
                parameter.grad /= scale
            optimizer.step()
        validate(watch, model, next_character, data)
    return model


@program(
    "transformer/rows/decayed-to-zero-by-step-5",
    causes=("parameters-not-updating", "lr-too-low"),
    operator="learning rate 0",
    half="tuning",
)
def _(watch: Watch) -> nn.Module:
    """A linear decay whose total was taken for the count of epochs: 0 from the fifth step on."""
    model = reader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def schedule(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 5))

    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), rows(), epochs=5, schedule=schedule)
