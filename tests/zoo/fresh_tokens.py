"""Fresh: transformers that sort hands, and one that reads tables feature by feature.

Name, accept-set:

- transformer/hands/sorted-by-adamw: healthy
- transformer/hands/gated-swiglu-nadam: healthy
- transformer/hands/adapters-fine-tuning: healthy
- transformer/hands/bfloat16-autocast: healthy
- transformer/hands/post-norm-lr-x100: lr-too-high, diverging-loss, oscillating-loss
- transformer/hands/queries-of-deviation-four: bad-initialization
- transformer/hands/unnormed-and-loud: exploding-gradient, bad-initialization, lr-too-high
- transformer/hands/softmax-as-last-layer: loss-output-mismatch
- transformer/hands/padding-is-a-target: class-imbalance, bad-targets, constant-predictions
- transformer/hands/cleared-once-an-epoch: gradient-accumulation
- transformer/hands/warm-up-of-a-million: lr-too-low, parameters-not-updating
- transformer/hands/other-hands-sorted: bad-targets
- transformer/hands/body-replaced: parameters-not-updating
- transformer/biopsies/features-as-tokens: healthy
- transformer/biopsies/class-token-smoothed: healthy
- transformer/biopsies/thirty-six-patients: overfitting
- transformer/biopsies/unscaled-columns: bad-inputs
- transformer/biopsies/scores-zeroed: bad-initialization, plateau, vanishing-gradient
- transformer/biopsies/targets-of-shape-n: loss-output-mismatch
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn, optim
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from zoo.data import Split, cancer, cancer_raw
from zoo.fresh_data import shuffled_hands
from zoo.program import Watch, program

Criterion = Callable[[Tensor, Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and two layers, each added to its input; ``norm`` says what is normalised."""

    def __init__(self, width: int, *, gated: bool = False, norm: str = "pre") -> None:
        super().__init__()
        self.attention = Attention(width, 4)
        self.feed = (
            SwiGLU(width, width)
            if gated
            else nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        )
        made = nn.Identity if norm == "none" else lambda: nn.LayerNorm(width)
        self.first, self.second = made(), made()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "post":
            x = self.first(x + self.attention(x))
            return self.second(x + self.feed(x))
        x = x + self.attention(self.first(x))
        return x + self.feed(self.second(x))


class Sorter(nn.Module):
    def __init__(
        self,
        depth: int = 2,
        width: int = 32,
        *,
        values: int = 10,
        norm: str = "pre",
        gated: bool = False,
        last: Callable[[Tensor], Tensor] = lambda z: z,
    ) -> None:
        super().__init__()
        self.card = nn.Embedding(values, width)
        self.place = nn.Embedding(16, width)
        blocks = (Block(width, gated=gated, norm=norm) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.read = nn.Linear(width, values)
        self.last = last

    def forward(self, cards: Tensor) -> Tensor:
        x = self.card(cards) + self.place.weight[: cards.shape[1]]
        return self.last(self.read(self.blocks(x)))


def over_places(z: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(z.flatten(0, 1), y.flatten())


def sort(
    watch: Watch,
    net: nn.Module,
    opt: optim.Optimizer,
    data: tuple[Tensor, Tensor] | None = None,
    *,
    epochs: int = 8,
    clear: str = "step",
    schedule: Callable[[int], float] | None = None,
    autocast: bool = False,
) -> nn.Module:
    hands, ordered = data or shuffled_hands()
    watch.attach(opt, net)
    scheduler: LRScheduler | None = LambdaLR(opt, schedule) if schedule else None
    for _ in range(epochs):
        opt.zero_grad()
        for idx in torch.randperm(1000).split(40):
            x, y = hands[idx], ordered[idx]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = net(x)
                loss = over_places(out, y)
            watch.observe(inputs=x, outputs=out, targets=y, loss=loss)
            if clear == "step":
                opt.zero_grad()
            loss.backward()
            opt.step()
            if scheduler:
                scheduler.step()
        with torch.no_grad():
            watch.observe(val_loss=over_places(net(hands[1000:]), ordered[1000:]))
    return net


def linear_decay(step: int) -> float:
    """Warm up over 20 steps, then go down in a line to 0 at step 200."""
    return min((step + 1) / 20, max(0.0, (200 - step) / 180))


@program("transformer/hands/sorted-by-adamw", operator="warm-up, decay in a line", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = Sorter()
    return sort(watch, net, optim.AdamW(net.parameters(), lr=6e-3), schedule=linear_decay)


@program(
    "transformer/hands/gated-swiglu-nadam", operator="gated layers, post-norm", half="held-out"
)
def _(watch: Watch) -> nn.Module:
    net = Sorter(gated=True, norm="post")
    return sort(watch, net, optim.NAdam(net.parameters(), lr=2e-3))


class Adapted(nn.Module):
    """A layer left as it is, and a product of two narrow ones beside it (Hu et al. 2021)."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


@program(
    "transformer/hands/adapters-fine-tuning",
    operator="low-rank adapters, body frozen",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The sorter is trained unseen, then adapted, with a new last layer, to sort
    the other way round."""
    hands, ordered = shuffled_hands()
    net = Sorter()
    before = optim.AdamW(net.parameters(), lr=4e-3)
    for _ in range(150):
        idx = torch.randint(1000, (40,))
        before.zero_grad()
        over_places(net(hands[idx]), ordered[idx]).backward()
        before.step()
    net.requires_grad_(False)
    for block in net.blocks:
        block.attention.qkv = Adapted(block.attention.qkv)
        block.feed[0], block.feed[2] = Adapted(block.feed[0]), Adapted(block.feed[2])
    net.read = nn.Linear(32, 10)
    opt = optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=5e-3)
    return sort(watch, net, opt, (hands, ordered.flip(1)))


@program("transformer/hands/bfloat16-autocast", operator="mixed precision", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = Sorter(1)
    return sort(watch, net, optim.Adam(net.parameters(), lr=5e-3), autocast=True)


@program(
    "transformer/hands/post-norm-lr-x100",
    causes=("lr-too-high", "diverging-loss", "oscillating-loss"),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Sorter(norm="post")
    return sort(watch, net, optim.AdamW(net.parameters(), lr=0.3), epochs=6)


@program(
    "transformer/hands/queries-of-deviation-four",
    causes=("bad-initialization",),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Each place looks at one other and at no more, from the first step on."""
    net = Sorter()
    for block in net.blocks:
        nn.init.normal_(block.attention.qkv.weight, std=4)
    return sort(watch, net, optim.AdamW(net.parameters(), lr=2e-3))


@program(
    "transformer/hands/unnormed-and-loud",
    causes=("exploding-gradient", "bad-initialization", "lr-too-high"),
    operator="remove normalisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Sorter(8, norm="none")
    for block in net.blocks:
        for layer in (block.attention.out, block.feed[0], block.feed[2]):
            nn.init.xavier_uniform_(layer.weight, gain=2.5)
    return sort(watch, net, optim.SGD(net.parameters(), lr=0.05), epochs=4)


@program(
    "transformer/hands/softmax-as-last-layer",
    causes=("loss-output-mismatch",),
    operator="add activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Sorter(last=lambda z: z.softmax(-1))
    return sort(watch, net, optim.SGD(net.parameters(), lr=0.1, momentum=0.9))


@program(
    "transformer/hands/padding-is-a-target",
    causes=("class-imbalance", "bad-targets", "constant-predictions"),
    operator="unbalance training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Hands of one card or two are filled up to eight with a sign that the loss does not leave
    out, and most hands are empty."""
    hands, ordered = shuffled_hands()
    held = torch.arange(1200) % 12 == 0
    cards = torch.full_like(hands, 10)
    answers = torch.full_like(ordered, 10)
    cards[held, :2] = hands[held, :2]
    answers[held, :2] = hands[held, :2].sort(1).values
    net = Sorter(values=11)
    return sort(watch, net, optim.SGD(net.parameters(), lr=0.05), (cards, answers), epochs=5)


@program(
    "transformer/hands/cleared-once-an-epoch",
    causes=("gradient-accumulation",),
    operator="missing zero_grad",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Sorter()
    return sort(watch, net, optim.SGD(net.parameters(), lr=0.1, momentum=0.9), clear="epoch")


@program(
    "transformer/hands/warm-up-of-a-million",
    causes=("lr-too-low", "parameters-not-updating"),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Sorter()
    opt = optim.AdamW(net.parameters(), lr=6e-3)
    return sort(watch, net, opt, schedule=lambda step: (step + 1) / 1e7)


@program(
    "transformer/hands/other-hands-sorted",
    causes=("bad-targets",),
    operator="change labels",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The hands that were sorted are those of another draw: what is learnt is only what is usual
    at each place."""
    hands, ordered = shuffled_hands()
    generator = torch.Generator().manual_seed(12)
    other = torch.randint(10, ordered.shape, generator=generator)
    net = Sorter()
    return sort(watch, net, optim.AdamW(net.parameters(), lr=3e-3), (hands, other))


@program(
    "transformer/hands/body-replaced",
    causes=("parameters-not-updating",),
    operator="optimizer built before the model was changed",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """All but the table of places is made anew after the optimizer was."""
    net = Sorter()
    opt = optim.AdamW(net.parameters(), lr=4e-3)
    fresh = Sorter(3)
    net.card, net.blocks, net.read = fresh.card, fresh.blocks, fresh.read
    return sort(watch, net, opt)


# ---- tables -------------------------------------------------------------------------------------


class Columns(nn.Module):
    """Each column of a table is a token: its value times one vector plus another."""

    def __init__(self, *, smoothed: bool = False, width: int = 16) -> None:
        super().__init__()
        self.scale = nn.Parameter(0.3 * torch.randn(30, width))
        self.shift = nn.Parameter(0.3 * torch.randn(30, width))
        self.token = nn.Parameter(torch.zeros(1, 1, width)) if smoothed else None
        self.body = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 2 if smoothed else 1)

    def forward(self, row: Tensor) -> Tensor:
        x = row.unsqueeze(2) * self.scale + self.shift
        if self.token is None:
            return self.head(self.body(x).mean(1))
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.body(x)[:, 0])


def columns(data: Split) -> Split:
    """Return a table with float32 targets ``[N, 1]``."""
    return data.map(targets=lambda y: y.float().unsqueeze(1))


def examine(
    watch: Watch,
    net: nn.Module,
    opt: optim.Optimizer,
    data: Split,
    criterion: Criterion = functional.binary_cross_entropy_with_logits,
    *,
    epochs: int = 8,
) -> nn.Module:
    watch.attach(opt, net)
    for _ in range(epochs):
        for idx in torch.randperm(len(data.x)).split(24):
            x, y = data.x[idx], data.y[idx]
            opt.zero_grad()
            scores = net(x)
            loss = criterion(scores, y)
            watch.observe(inputs=x, outputs=scores, targets=y, loss=loss)
            loss.backward()
            opt.step()
        with torch.no_grad():
            watch.observe(val_loss=criterion(net(data.val_x), data.val_y))
    return net


@program("transformer/biopsies/features-as-tokens", operator="table as tokens", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = Columns()
    opt = optim.RAdam(net.parameters(), lr=2e-3, weight_decay=1e-3)
    return examine(watch, net, opt, columns(cancer()))


@program("transformer/biopsies/class-token-smoothed", operator="label smoothing", half="held-out")
def _(watch: Watch) -> nn.Module:
    net = Columns(smoothed=True)
    opt = optim.AdamW(net.parameters(), lr=1.5e-3)
    return examine(watch, net, opt, cancer(), nn.CrossEntropyLoss(label_smoothing=0.05))


@program(
    "transformer/biopsies/thirty-six-patients",
    causes=("overfitting",),
    operator="delete training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """A fifth of the few has been labelled wrongly, and even that is learnt by heart."""
    few = columns(cancer()).rows(slice(0, 36))
    wrong = (torch.arange(36) % 5 == 2).unsqueeze(1)
    few = Split(few.x, torch.where(wrong, 1 - few.y, few.y), few.val_x, few.val_y)
    net = Columns()
    return examine(watch, net, optim.Adam(net.parameters(), lr=3e-3), few, epochs=90)


@program(
    "transformer/biopsies/unscaled-columns",
    causes=("bad-inputs",),
    operator="inputs not scaled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Unflatten(1, (4, 16)))
    net.extend([Block(16, norm="none"), Block(16, norm="none"), nn.Flatten(), nn.Linear(64, 1)])
    opt = optim.SGD(net.parameters(), lr=0.01)
    return examine(watch, net, opt, columns(cancer_raw()))


@program(
    "transformer/biopsies/scores-zeroed",
    causes=("bad-initialization", "plateau", "vanishing-gradient"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Columns' vectors and head start next to 0: each waits for the other to grow."""
    net = Columns()
    net.body = nn.Sequential(Block(16, norm="none"))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=1e-4)
    return examine(watch, net, optim.SGD(net.parameters(), lr=0.05), columns(cancer()))


@program(
    "transformer/biopsies/targets-of-shape-n",
    causes=("loss-output-mismatch",),
    operator="outputs [N, 1] against targets [N]",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    net = Columns()
    data = cancer().map(targets=lambda y: y.float())
    return examine(watch, net, optim.Adam(net.parameters(), lr=2e-3), data, functional.mse_loss)
