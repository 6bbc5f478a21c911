"""Fresh: tickets as bags of words, songs with tags, and pairs that are alike or not.

Name, accept-set:

- mlp/tickets/embedding-bag: healthy
- mlp/tickets/sparse-adam: healthy
- mlp/tickets/counts-adagrad: healthy
- mlp/tickets/one-urgent-in-thirty-weighted: healthy
- mlp/tickets/one-urgent-in-forty: class-imbalance, constant-predictions
- mlp/tickets/every-word-unknown: bad-inputs, constant-predictions
- mlp/tickets/thirty-topics-of-probabilities: loss-output-mismatch
- mlp/tickets/words-seen-once: sparse-gradients, lr-too-low, underfitting
- mlp/tickets/embeddings-x100: bad-initialization
- mlp/tickets/embeddings-left-out: parameters-not-updating
- mlp/tags/multi-label-rmsprop: healthy
- mlp/tags/focal-noisy: healthy
- mlp/tags/one-of-many: loss-output-mismatch
- mlp/tags/plus-and-minus-one: loss-output-mismatch, bad-targets
- mlp/tags/log-of-a-sure-no: nonfinite-loss, nonfinite-gradient
- mlp/twins/contrastive-margin: healthy
- mlp/twins/info-nce: healthy
- mlp/twins/temperature-turned-round: loss-output-mismatch, flat-loss, underfitting, plateau
- mlp/twins/augmentation-does-nothing: zero-loss, bad-inputs, bad-targets
- mlp/twins/both-towers-detached: parameters-not-updating
- mlp/twins/adam-lr-1e-7: lr-too-low
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn, optim
from torch.nn import functional

from zoo.data import digits
from zoo.fresh_data import tagged, tickets
from zoo.program import Watch, program

Criterion = Callable[[Tensor, Tensor], Tensor]

# ---- tickets ------------------------------------------------------------------------------------


def bag(words: int, outputs: int, *, sparse: bool = False, width: int = 24) -> nn.Sequential:
    return nn.Sequential(
        nn.EmbeddingBag(words, width, mode="mean", sparse=sparse),
        nn.Linear(width, 32),
        nn.ReLU(),
        nn.Linear(32, outputs),
    )


def sort_tickets(
    watch: Watch,
    model: nn.Module,
    optimizer: optim.Optimizer,
    data: tuple[Tensor, Tensor],
    *,
    criterion: Criterion = functional.cross_entropy,
    epochs: int = 8,
) -> nn.Module:
    tokens, topic = data
    n_train = len(topic) * 5 // 6
    watch.attach(optimizer, model)
    for _ in range(epochs):
        for batch in torch.randperm(n_train).split(25):
            scores = model(tokens[batch])
            loss = criterion(scores, topic[batch])
            watch.observe(inputs=tokens[batch], outputs=scores, targets=topic[batch], loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            watch.observe(val_loss=criterion(model(tokens[n_train:]), topic[n_train:]))
    return model


def counts(words: int) -> tuple[Tensor, Tensor]:
    """Return how often each word occurs, ``[N, words]``, and the topics."""
    tokens, topic = tickets(words)
    return functional.one_hot(tokens, words).sum(1).float(), topic


@program("mlp/tickets/embedding-bag", operator="bag of embeddings", half="held-out")
def _(watch: Watch) -> nn.Module:
    model = bag(400, 4)
    return sort_tickets(watch, model, optim.Adam(model.parameters(), lr=5e-3), tickets())


@program("mlp/tickets/sparse-adam", operator="gradients of sparse layout", half="held-out")
def _(watch: Watch) -> nn.Module:
    """The table of words alone, with gradients that hold only the rows in the batch."""
    model = nn.EmbeddingBag(400, 4, mode="mean", sparse=True)
    return sort_tickets(watch, model, optim.SparseAdam(model.parameters(), lr=0.03), tickets())


@program("mlp/tickets/counts-adagrad", operator="inputs nearly all zero", half="held-out")
def _(watch: Watch) -> nn.Module:
    model = nn.Sequential(nn.Linear(400, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 4))
    return sort_tickets(watch, model, optim.Adagrad(model.parameters(), lr=0.05), counts(400))


def urgent(one_in: int, *, plain: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return tickets of two topics, ``[N, 12]`` words; all but one in so many are of the first.
    A share of the second's words becomes plain, as of the first."""
    tokens, topic = tickets(400, rows=3000)
    chosen = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < plain
    tokens = torch.where(chosen & (tokens % 4 == 1), tokens - 1, tokens)
    kept = (topic == 0) | ((topic == 1) & (torch.arange(3000) % (one_in // 4) == 0))
    return tokens[kept], (topic[kept] == 1).float().unsqueeze(1)


@program(
    "mlp/tickets/one-urgent-in-thirty-weighted", operator="imbalance, weighted", half="held-out"
)
def _(watch: Watch) -> nn.Module:
    model = bag(400, 1)
    weight = torch.tensor(10.0)

    def criterion(scores: Tensor, y: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(scores, y, pos_weight=weight)

    return sort_tickets(
        watch,
        model,
        optim.Adam(model.parameters(), lr=0.01),
        urgent(28),
        criterion=criterion,
        epochs=14,
    )


@program(
    "mlp/tickets/one-urgent-in-forty",
    causes=("class-imbalance", "constant-predictions"),
    operator="unbalance training data",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    model = bag(400, 1)
    return sort_tickets(
        watch,
        model,
        optim.Adam(model.parameters(), lr=2e-3),
        urgent(160, plain=0.75),
        criterion=functional.binary_cross_entropy_with_logits,
        epochs=5,
    )


@program(
    "mlp/tickets/every-word-unknown",
    causes=("bad-inputs", "constant-predictions"),
    operator="inputs lost",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The vocabulary is of other spelling: each word becomes the sign for unknown ones."""
    tokens, topic = tickets()
    model = bag(400, 4)
    optimizer = optim.Adam(model.parameters(), lr=5e-3)
    return sort_tickets(watch, model, optimizer, (torch.ones_like(tokens), topic))


@program(
    "mlp/tickets/thirty-topics-of-probabilities",
    causes=("loss-output-mismatch",),
    operator="add activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    model = bag(600, 30).append(nn.Softmax(dim=-1))
    optimizer = optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return sort_tickets(watch, model, optimizer, tickets(600, 30))


@program(
    "mlp/tickets/words-seen-once",
    causes=("sparse-gradients", "lr-too-low", "underfitting"),
    operator="rows that hardly ever occur",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Of 6,000 words a batch has 300 at most, and a step reaches no others."""
    model = nn.Sequential(nn.Linear(6000, 24), nn.ReLU(), nn.Linear(24, 4))
    return sort_tickets(
        watch, model, optim.SGD(model.parameters(), lr=0.02), counts(6000), epochs=4
    )


@program(
    "mlp/tickets/embeddings-x100",
    causes=("bad-initialization",),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    model = bag(400, 4)
    nn.init.normal_(model[0].weight, std=100)
    return sort_tickets(watch, model, optim.Adam(model.parameters(), lr=5e-3), tickets())


@program(
    "mlp/tickets/embeddings-left-out",
    causes=("parameters-not-updating",),
    operator="optimizer of too few parameters",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """The optimizer has what is called a linear layer, and the words' table is none."""
    model = bag(400, 4, width=3)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    parameters = [p for layer in linear for p in layer.parameters()]
    return sort_tickets(watch, model, optim.Adam(parameters, lr=5e-3), tickets())


# ---- tags ---------------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self, last: Callable[[Tensor], Tensor] = lambda z: z) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.GroupNorm(4, 64), nn.GELU())
        self.tags = nn.Linear(64, 8)
        self.last = last

    def forward(self, song: Tensor) -> Tensor:
        return self.last(self.tags(self.body(song)))


def tag(
    watch: Watch,
    model: nn.Module,
    criterion: Criterion,
    *,
    code: Callable[[Tensor], Tensor] = lambda y: y,
    lr: float = 2e-3,
) -> nn.Module:
    songs, tags = tagged()
    tags = code(tags)
    opt = optim.RMSprop(model.parameters(), lr=lr, momentum=0.5)
    watch.attach(opt, model)
    for _ in range(12):
        for i in torch.randperm(1000).view(25, 40):
            opt.zero_grad()
            p = model(songs[i])
            loss = criterion(p, tags[i])
            watch.observe(outputs=p, targets=tags[i], loss=loss)
            loss.backward()
            opt.step()
    return model


@program("mlp/tags/multi-label-rmsprop", operator="multi-label", half="held-out")
def _(watch: Watch) -> nn.Module:
    return tag(watch, Tagger(), nn.BCEWithLogitsLoss())


@program("mlp/tags/focal-noisy", operator="focal loss, 10 % of tags wrong", half="held-out")
def _(watch: Watch) -> nn.Module:
    def focal(z: Tensor, y: Tensor) -> Tensor:
        each = functional.binary_cross_entropy_with_logits(z, y, reduction="none")
        return ((1 - (-each).exp()) ** 2 * each).mean()

    wrong = torch.rand(1000, 8, generator=torch.Generator().manual_seed(2)) < 0.1
    return tag(watch, Tagger(), focal, code=lambda y: torch.where(wrong, 1 - y, y))


@program(
    "mlp/tags/one-of-many",
    causes=("loss-output-mismatch",),
    operator="change activation function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """A softmax shares 1 among all tags, though a song may have several or none."""
    return tag(watch, Tagger(lambda z: z.softmax(1)), nn.BCELoss())


@program(
    "mlp/tags/plus-and-minus-one",
    causes=("loss-output-mismatch", "bad-targets"),
    operator="change labels",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return tag(watch, Tagger(), nn.MultiLabelSoftMarginLoss(), code=lambda y: 2 * y - 1)


@program(
    "mlp/tags/log-of-a-sure-no",
    causes=("nonfinite-loss", "nonfinite-gradient"),
    operator="logarithm of zero",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """A hard sigmoid is exactly 0 or 1 from some score on."""

    def criterion(p: Tensor, y: Tensor) -> Tensor:
        return -(y * p.log() + (1 - y) * (1 - p).log()).mean()

    return tag(watch, Tagger(functional.hardsigmoid), criterion)


# ---- pairs --------------------------------------------------------------------------------------


class Twins(nn.Module):
    """One encoder, or one for each side, to unit length."""

    def __init__(self, *, shared: bool = True) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16))
        self.right = (
            self.left if shared else nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16))
        )

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return functional.normalize(self.left(a)), functional.normalize(self.right(b))


def of_one_class(y: Tensor) -> Tensor:
    """Return for each row another of the same class."""
    order = y.argsort()
    partner = torch.empty_like(y)
    partner[order] = order.roll(1)
    return torch.where(y[partner] == y, partner, torch.arange(len(y)))


def learn_likeness(
    watch: Watch,
    twins: Twins,
    optimizer: optim.Optimizer,
    criterion: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    augment: float | None = None,
    steps: int = 300,
) -> nn.Module:
    """Show pairs of one class, or a row and its noisy copy."""
    data = digits()
    watch.attach(optimizer, twins)
    for _ in range(steps):
        rows = torch.randperm(len(data.x))[:60]
        x, y = data.x[rows], data.y[rows]
        other = x[of_one_class(y)] if augment is None else x + augment * torch.randn_like(x)
        a, b = twins(x, other)
        loss = criterion(a, b, y)
        watch.observe(inputs=x, loss=loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return twins


def margin_loss(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Hadsell et al. 2006: equals are drawn together, others pushed beyond a margin."""
    distance = (a[:, None] - b[None]).square().sum(2)
    alike = (y[:, None] == y[None]).float()
    apart = functional.relu(1 - (distance + 1e-6).sqrt()) ** 2
    return (alike * distance).sum() / alike.sum() + ((1 - alike) * apart).sum() / (1 - alike).sum()


def info_nce(temperature: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def criterion(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(a @ b.T / temperature, torch.arange(len(y)))

    return criterion


@program("mlp/twins/contrastive-margin", operator="contrastive loss, only inputs", half="held-out")
def _(watch: Watch) -> nn.Module:
    twins = Twins()
    return learn_likeness(watch, twins, optim.Adam(twins.parameters(), lr=2e-3), margin_loss)


@program("mlp/twins/info-nce", operator="two towers, noisy copies", half="held-out")
def _(watch: Watch) -> nn.Module:
    twins = Twins(shared=False)
    optimizer = optim.AdamW(twins.parameters(), lr=2e-3)
    return learn_likeness(watch, twins, optimizer, info_nce(0.1), augment=0.4)


@program(
    "mlp/twins/temperature-turned-round",
    causes=("loss-output-mismatch", "flat-loss", "underfitting", "plateau"),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Divided by 30 instead of by its inverse, all scores are about 0."""
    twins = Twins(shared=False)
    optimizer = optim.AdamW(twins.parameters(), lr=2e-3)
    return learn_likeness(watch, twins, optimizer, info_nce(30), augment=0.4)


@program(
    "mlp/twins/augmentation-does-nothing",
    causes=("zero-loss", "bad-inputs", "bad-targets"),
    operator="training data repeated",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Each row is its own partner: at no distance, nearer than any other from the start."""

    def triplet(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        return functional.triplet_margin_with_distance_loss(
            a, b, b.roll(1, 0), margin=1e-3, distance_function=lambda u, v: 1 - (u * v).sum(1)
        )

    twins = Twins()
    optimizer = optim.Adam(twins.parameters(), lr=2e-3)
    return learn_likeness(watch, twins, optimizer, triplet, augment=0.0)


@program(
    "mlp/twins/both-towers-detached",
    causes=("parameters-not-updating",),
    operator="graph cut by detach",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Both towers are in the optimizer, but the loss only reaches the scale of their scores."""
    twins = Twins(shared=False)
    scale = nn.Parameter(torch.tensor(10.0))
    twins.register_parameter("scale", scale)

    def criterion(a: Tensor, b: Tensor, y: Tensor) -> Tensor:
        scores = scale * a.detach() @ b.detach().T
        return functional.cross_entropy(scores, torch.arange(len(y)))

    optimizer = optim.AdamW(twins.parameters(), lr=2e-3)
    return learn_likeness(watch, twins, optimizer, criterion, augment=0.4)


@program(
    "mlp/twins/adam-lr-1e-7",
    causes=("lr-too-low",),
    operator="change learning rate",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    twins = Twins()
    return learn_likeness(watch, twins, optim.Adam(twins.parameters(), lr=1e-7), margin_loss)
