"""Held out: recurrent networks that judge reviews and turn sequences around."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from zoo.heldout_data import reviews
from zoo.program import Watch, program


class Sentiment(nn.Module):
    def __init__(self, words: int, *, deviation: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 16)
        nn.init.normal_(self.embedding.weight, std=deviation)
        self.lstm = nn.LSTM(16, 24, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(48, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        out, _ = self.lstm(self.embedding(tokens))
        return self.fc(self.dropout(out.mean(1))).squeeze(1)


def adam(parameters) -> Optimizer:
    return torch.optim.Adam(parameters, lr=5e-3)


def judge(
    watch: Watch,
    *,
    words: int = 120,
    deviation: float = 1.0,
    dropout: float = 0.0,
    make: Callable[..., Optimizer] = adam,
    keep: Callable[[Tensor], Tensor] | None = None,
    epochs: int = 6,
    criterion: nn.Module | None = None,
    sort: bool = False,
) -> nn.Module:
    tokens, kind = reviews(words)
    train = torch.arange(800)
    if keep is not None:
        train = train[keep(kind[:800])]
    if sort:
        train = train[kind[train].argsort(stable=True)]
    model = Sentiment(words, deviation=deviation, dropout=dropout)
    optimizer = make(model.parameters())
    watch.attach(optimizer, model)
    criterion = criterion or nn.BCEWithLogitsLoss()
    for _ in range(epochs):
        order = torch.arange(len(train)) if sort else torch.randperm(len(train))
        for some in order.split(40):
            x, y = tokens[train[some]], kind[train[some]]
            optimizer.zero_grad()
            score = model(x)
            loss = criterion(score, y)
            watch.observe(inputs=x, outputs=score, targets=y, loss=loss)
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            watch.observe(val_loss=criterion(model(tokens[800:]), kind[800:]).item())
        model.train()
    return model


@program("rnn/reviews/bidirectional-dropout", operator="dropout 0.5", half="held-out")
def _(watch: Watch) -> nn.Module:
    return judge(watch, dropout=0.5, deviation=0.3, epochs=5)


@program("rnn/reviews/four-to-one", operator="80:20 imbalance that is learnt", half="held-out")
def _(watch: Watch) -> nn.Module:
    return judge(
        watch,
        keep=lambda y: (y == 0) | (torch.arange(len(y)) % 4 == 0),
        criterion=nn.BCEWithLogitsLoss(pos_weight=torch.tensor(2.0)),
        deviation=0.3,
        epochs=5,
    )


@program(
    "rnn/reviews/forty-reviews",
    causes=("overfitting",),
    operator="delete training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return judge(watch, keep=lambda y: torch.arange(len(y)) < 40, epochs=120)


@program(
    "rnn/reviews/two-complaints-in-a-hundred",
    causes=("class-imbalance", "constant-predictions"),
    operator="unbalance training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return judge(
        watch,
        keep=lambda y: (y == 1) | (torch.arange(len(y)) % 50 == 0),
        deviation=0.3,
        make=lambda p: torch.optim.Adam(p, lr=1e-3),
        epochs=7,
    )


@program(
    "rnn/reviews/twenty-thousand-words",
    causes=("sparse-gradients", "lr-too-low", "overfitting", "underfitting"),
    operator="rows that hardly ever occur",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return judge(
        watch, words=20_000, deviation=0.3, make=lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9)
    )


@program(
    "rnn/reviews/embeddings-x400",
    causes=("saturated-activation", "bad-initialization"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return judge(watch, deviation=400.0, make=lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9))


@program(
    "rnn/reviews/bad-ones-then-good-ones",
    causes=("bad-inputs", "oscillating-loss", "bad-targets", "class-imbalance"),
    operator="training data not shuffled",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return judge(watch, sort=True, deviation=0.3, make=lambda p: torch.optim.Adam(p, lr=0.05))


@program(
    "rnn/reviews/sigmoid-twice",
    causes=("loss-output-mismatch",),
    operator="add activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return judge_probabilities(
        watch, nn.BCEWithLogitsLoss(), lambda p: torch.optim.Adam(p, lr=2e-3)
    )


def judge_probabilities(
    watch: Watch, criterion: nn.Module, make: Callable[..., Optimizer]
) -> nn.Module:
    """As many a first script: the last state, a sigmoid in the model, one batch size."""
    tokens, kind = reviews()
    embedding, lstm, fc = nn.Embedding(120, 16), nn.LSTM(16, 24), nn.Linear(24, 1)
    net = nn.ModuleList([embedding, lstm, fc])
    opt = make(net.parameters())
    watch.attach(opt, net)
    for _ in range(4):
        for x, y in zip(tokens.split(20), kind.split(20), strict=True):
            _, (h, _) = lstm(embedding(x.t()))
            rating = torch.sigmoid(fc(h[-1])).view(-1)
            loss = criterion(rating, y)
            watch.observe(outputs=rating, targets=y, loss=loss)
            opt.zero_grad()
            loss.backward()
            opt.step()
    return net


@program("rnn/reviews/sigmoid-bce", operator="probabilities, their own loss", half="held-out")
def _(watch: Watch) -> nn.Module:
    return judge_probabilities(
        watch, nn.BCELoss(), lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-5)
    )


# ---- sequence to sequence -----------------------------------------------------------------------


class Seq2Seq(nn.Module):
    """An encoder and a decoder with attention over the encoder's states."""

    def __init__(self, symbols: int = 12, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.positions = nn.Embedding(8, width)
        self.out = nn.Linear(2 * width, symbols)

    def forward(self, source: Tensor, shifted: Tensor) -> Tensor:
        place = self.positions(torch.arange(source.shape[1]))
        memory, state = self.encoder(self.embed(source) + place)
        states, _ = self.decoder(self.embed(shifted) + place, state)
        weights = torch.softmax(states @ memory.transpose(1, 2), dim=2)
        return self.out(torch.cat([states, weights @ memory], dim=2))


def turn_around(
    watch: Watch,
    *,
    lengths: tuple[int, int] = (4, 7),
    reduce: Callable[[Tensor, Tensor], Tensor] = lambda losses, mask: losses[mask].mean(),
    max_norm: float = 1.0,
    make: Callable[..., Optimizer] = adam,
    steps: int = 250,
) -> nn.Module:
    """Write sequences of digits backwards; 0 is padding and 1 begins."""
    model = Seq2Seq()
    optimizer = make(model.parameters())
    watch.attach(optimizer, model)
    for _ in range(steps):
        size = torch.randint(*lengths, (48,))
        source, target = torch.zeros(2, 48, 6, dtype=torch.long)
        for row, n in enumerate(size.tolist()):
            word = torch.randint(2, 12, (n,))
            source[row, :n] = word
            target[row, :n] = word.flip(0)
        shifted = torch.cat([torch.ones(48, 1, dtype=torch.long), target[:, :-1]], 1)
        logits = model(source, shifted).reshape(-1, 12)
        flat = target.reshape(-1)
        losses = functional.cross_entropy(logits, flat, reduction="none")
        loss = reduce(losses, flat != 0)
        watch.observe(outputs=logits, targets=flat, loss=loss)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return model


@program("rnn/backwards/attention", operator="padding masked, clipping", half="held-out")
def _(watch: Watch) -> nn.Module:
    return turn_around(watch)


@program(
    "rnn/backwards/mask-inverted",
    causes=("zero-loss", "bad-targets"),
    operator="everything masked",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """All sequences are of full length, and the mask keeps only padding."""
    return turn_around(
        watch, lengths=(6, 7), reduce=lambda losses, mask: (losses * ~mask).sum() / len(losses)
    )


@program(
    "rnn/backwards/rows-without-words",
    causes=("nonfinite-loss", "bad-inputs", "bad-targets"),
    operator="mean of nothing",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    def reduce(losses: Tensor, mask: Tensor) -> Tensor:
        losses, mask = losses.view(48, 6), mask.view(48, 6)
        return ((losses * mask).sum(1) / mask.sum(1)).mean()

    return turn_around(watch, lengths=(0, 7), reduce=reduce)


@program(
    "rnn/backwards/clipped-to-1e-6",
    causes=("lr-too-low", "parameters-not-updating"),
    operator="change gradient clip",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return turn_around(watch, max_norm=1e-6, make=lambda p: torch.optim.SGD(p, lr=0.5))
