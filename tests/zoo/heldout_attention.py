"""Held out: transformers that write a rhyme and look at patches of digits."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from zoo.data import digits_raw
from zoo.heldout_data import LETTERS, RHYME
from zoo.program import Watch, program


class Block(nn.Module):
    def __init__(self, width: int, *, causal: bool, p: float) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(p)
        )
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(y.transpose(1, 2).reshape(n, t, c))
        return x + self.mlp(self.ln2(x))


class TinyGPT(nn.Module):
    def __init__(self, width: int = 32, context: int = 24, *, tied: bool = False) -> None:
        super().__init__()
        self.wte = nn.Embedding(len(LETTERS), width)
        self.wpe = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, causal=True, p=0.0) for _ in range(2)))
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(LETTERS), bias=False)
        if tied:
            nn.init.normal_(self.wte.weight, std=0.1)
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        return self.head(self.ln(self.blocks(x)))


def warm_cosine(step: int) -> float:
    return step / 20 if step < 20 else 0.5 * (1 + math.cos(math.pi * (step - 20) / 140))


def rhyme(
    watch: Watch,
    *,
    model: nn.Module | None = None,
    lr: float = 5e-3,
    factor: Callable[[int], float] = warm_cosine,
    make: Callable[..., Optimizer] | None = None,
    target: Callable[[Tensor], Tensor] = lambda y: y,
    steps: int = 160,
    clear: bool = True,
    max_norm: float = 1.0,
) -> nn.Module:
    letters = torch.tensor([LETTERS.index(letter) for letter in RHYME])
    model = model or TinyGPT()
    optimizer = (
        make(model.parameters())
        if make
        else torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    )
    watch.attach(optimizer, model)
    scheduler = LambdaLR(optimizer, factor)
    for _ in range(steps):
        starts = torch.randint(0, len(letters) - 25, (16,))
        chunk = torch.stack([letters[start : start + 25] for start in starts.tolist()])
        logits = model(chunk[:, :-1])
        logits, y = logits.view(-1, logits.shape[-1]), target(chunk[:, 1:].reshape(-1))
        loss = F.cross_entropy(logits, y)
        watch.observe(outputs=logits, targets=y, loss=loss)
        if clear:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        scheduler.step()
    return model


@program("transformer/rhyme/gpt-warm-cosine", operator="warm-up, cosine to zero", half="held-out")
def _(watch: Watch) -> nn.Module:
    return rhyme(watch)


@program("transformer/rhyme/gpt-tied-early", operator="tied weights, short run", half="held-out")
def _(watch: Watch) -> nn.Module:
    """Stopped while the loss is far from zero and still falling."""
    return rhyme(watch, model=TinyGPT(tied=True), factor=lambda step: min(1.0, step / 20))


@program(
    "transformer/rhyme/lambda-returns-the-rate",
    causes=("lr-too-low",),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The scheduler's function returns a learning rate where a factor is meant."""
    return rhyme(watch, factor=lambda step: 3e-4 if step < 100 else 1e-4)


@program(
    "transformer/rhyme/adam-lr-0.3",
    causes=("lr-too-high", "oscillating-loss"),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return rhyme(watch, make=lambda p: torch.optim.Adam(p, lr=0.3), factor=lambda step: 1.0)


@program(
    "transformer/rhyme/head-of-deviation-thirty",
    causes=("bad-initialization",),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    model = TinyGPT()
    nn.init.normal_(model.head.weight, std=30.0)
    return rhyme(watch, model=model, lr=1e-3)


@program(
    "transformer/rhyme/text-of-another-file",
    causes=("bad-targets",),
    operator="change labels",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return rhyme(watch, target=lambda y: torch.randint_like(y, len(LETTERS)))


@program(
    "transformer/rhyme/sgd-keeps-its-gradients",
    causes=("gradient-accumulation",),
    operator="missing zero_grad",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return rhyme(
        watch,
        make=lambda p: torch.optim.SGD(p, lr=0.5),
        factor=lambda step: 1.0,
        clear=False,
        max_norm=1e9,
    )


# ---- vision -------------------------------------------------------------------------------------


class ViT(nn.Module):
    def __init__(self, *, width: int = 32, depth: int = 2, p: float = 0.0) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, 2, stride=2)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(Block(width, causal=False, p=p) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1) + self.pos
        return self.head(self.blocks(tokens)[:, 0])


def look(
    watch: Watch,
    *,
    model: nn.Module | None = None,
    make: Callable[..., Optimizer] = lambda p: torch.optim.AdamW(p, lr=4e-3, weight_decay=0.05),
    picture: Callable[[Tensor], Tensor] = lambda x: x,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    rows: int = 1347,
    epochs: int = 5,
    optimized: nn.Module | None = None,
) -> nn.Module:
    raw = digits_raw()
    x, val_x = (picture(part.reshape(-1, 1, 8, 8) / 8 - 0.6) for part in (raw.x, raw.val_x))
    model = model or ViT()
    optimizer = make((optimized or model).parameters())
    watch.attach(optimizer, model)
    for _ in range(epochs):
        for index in torch.randperm(rows).split(50):
            logits = model(x[index])
            loss = criterion(logits, raw.y[index])
            watch.observe(inputs=x[index], outputs=logits, targets=raw.y[index], loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            watch.observe(val_loss=criterion(model(val_x[:150]), raw.val_y[:150]))
        model.train()
    return model


@program("transformer/patches/vit-smoothed", operator="label smoothing", half="held-out")
def _(watch: Watch) -> nn.Module:
    return look(watch, criterion=nn.CrossEntropyLoss(label_smoothing=0.1))


@program(
    "transformer/patches/forty-pictures",
    causes=("overfitting",),
    operator="delete training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return look(watch, rows=40, epochs=90)


@program(
    "transformer/patches/missing-pixels",
    causes=("bad-inputs", "nonfinite-loss"),
    operator="NaN in the inputs",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    def picture(x: Tensor) -> Tensor:
        broken = torch.rand(len(x)) < 0.004
        return torch.where(broken.view(-1, 1, 1, 1) & (x > 0), torch.nan, x)

    return look(watch, picture=picture)


@program(
    "transformer/patches/optimizer-of-a-copy",
    causes=("parameters-not-updating",),
    operator="optimizer of another model",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """A second model was made for the optimizer, as by calling the class again."""
    return look(watch, model=ViT(), optimized=ViT())


@program(
    "transformer/patches/own-log-of-softmax",
    causes=("nonfinite-loss", "bad-initialization", "nonfinite-gradient"),
    operator="logarithm of zero",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    model = ViT()
    nn.init.normal_(model.head[1].weight, std=8.0)

    def criterion(logits: Tensor, y: Tensor) -> Tensor:
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        return -(F.one_hot(y, 10) * p.log()).sum(1).mean()

    return look(watch, model=model, criterion=criterion)


@program(
    "transformer/patches/dropped-nearly-all",
    causes=("underfitting", "constant-predictions"),
    operator="change dropout rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    class Dropped(ViT):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.98, self.training))

    return look(watch, model=Dropped())
