"""Transformers that train well and that naive thresholds mistake for faulty."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from zoo.data import VOCABULARY, Split, text
from zoo.models import Transformer
from zoo.program import NoWatch, Watch, batches, fit, program, validate
from zoo.rnn_data import next_character, rows
from zoo.transformer_data import classify, reader, writer


@program("transformer/text/unseen-rows", operator="embedding with unseen rows", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Of 2000 tokens that the embedding knows, sixteen are ever seen."""
    model = Transformer(nn.Embedding(2000, 32), 24, len(VOCABULARY), causal=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    data = text().map(lambda x: 131 * x)
    return fit(watch, model, optimizer, next_character, data, epochs=3)


@program("transformer/text/cosine-to-zero", operator="learning rate decays to 0", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Warm-up, then a cosine down to a rate of nothing at the end of the run."""
    epochs = 4
    steps = epochs * math.ceil(len(text().x) / 32)

    def schedule(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return LambdaLR(
            optimizer,
            lambda step: min(step / 10, 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))),
        )

    model = writer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    return fit(watch, model, optimizer, next_character, text(), epochs=epochs, schedule=schedule)


@program("transformer/rows/fine-tuning", operator="small fine-tuning rate", half="tuning")
def _(watch: Watch) -> nn.Module:
    """A trained model with a small loss adapts to fainter images by small steps."""
    model = classify(NoWatch(), rows(), epochs=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    faint = rows().map(lambda x: 0.6 * x)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), faint, epochs=4)


@program("transformer/rows/frozen-encoder", operator="frozen backbone", half="tuning")
def _(watch: Watch) -> nn.Module:
    """An encoder trained on the digits 0 to 4 stays; a new head learns all ten."""
    data = rows()
    model = classify(NoWatch(), data.rows(data.y < 5), epochs=4)
    model.requires_grad_(False)
    model.head = nn.Linear(32, 10)
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-2)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), data, epochs=6)


@program("transformer/rows/converged", operator="a converged run", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Goes on with a small rate from weights that classify nearly all images."""
    model = classify(NoWatch(), rows(), epochs=9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    return fit(watch, model, optimizer, nn.CrossEntropyLoss(), rows(), epochs=3)


@program("transformer/rows/two-tasks", operator="multi-task loss", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Classes and, with a Huber loss, the amount of ink, from one model of eleven outputs."""

    def both(outputs: Tensor, targets: Tensor) -> Tensor:
        classes = functional.cross_entropy(outputs[:, :10], targets[:, 0].long())
        return classes + functional.huber_loss(outputs[:, 10], targets[:, 1])

    def tasks(x: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y.float(), 4 * x.mean(dim=(1, 2))], dim=1)

    data = rows()
    data = Split(data.x, tasks(data.x, data.y), data.val_x, tasks(data.val_x, data.val_y))
    return classify(watch, data, reader(11), both)


@program("transformer/rows/accumulated-batches", operator="accumulation on purpose", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Two batches make one clipped step, and the gradient is then cleared."""
    model, data, loss_fn = reader(), rows(), nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    watch.attach(optimizer, model)
    for _ in range(5):
        for count, (inputs, targets) in enumerate(batches(data, 16), start=1):
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            (loss / 2).backward()
            if count % 2 == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        validate(watch, model, loss_fn, data)
    return model
