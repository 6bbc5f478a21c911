"""Held out: embeddings, factorisation, reinforcement, adversaries and several tasks at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from zoo.data import cancer, digits
from zoo.heldout_data import ratings, skip_grams
from zoo.program import Watch, program


class SkipGram(nn.Module):
    def __init__(self, words: int, width: int = 24) -> None:
        super().__init__()
        self.centre = nn.Embedding(words, width)
        self.context = nn.Embedding(words, width)
        for table in (self.centre, self.context):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, centre: Tensor, context: Tensor) -> Tensor:
        return (self.centre(centre) * self.context(context)).sum(1)


def word2vec(
    watch: Watch, *, words: int, make: Callable[..., Optimizer], zero: bool = False
) -> nn.Module:
    centre, context = skip_grams(words)
    model = SkipGram(words)
    if zero:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    optimizer = make(model.parameters())
    watch.attach(optimizer, model)
    for _ in range(6):
        for rows in torch.randperm(4000).split(64):
            negative = torch.randint(0, words, (len(rows),))
            score = torch.cat([model(centre[rows], context[rows]), model(centre[rows], negative)])
            label = torch.ones(len(rows)).tile(2)
            label[len(rows) :] = 0
            loss = functional.binary_cross_entropy_with_logits(score, label)
            watch.observe(outputs=score, targets=label, loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


@program("mlp/word2vec/adam", operator="embeddings, negative samples", half="held-out")
def _(watch: Watch) -> nn.Module:
    return word2vec(watch, words=160, make=lambda p: torch.optim.Adam(p, lr=0.01))


@program(
    "mlp/word2vec/three-thousand-words",
    causes=("sparse-gradients", "lr-too-low"),
    operator="rows that hardly ever occur",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return word2vec(watch, words=3000, make=lambda p: torch.optim.SGD(p, lr=5.0))


@program(
    "mlp/word2vec/tables-of-zeros",
    causes=("bad-initialization", "plateau"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return word2vec(watch, words=160, make=lambda p: torch.optim.Adam(p, lr=0.01), zero=True)


class Factors(nn.Module):
    def __init__(self, deviation: float, *, biased: bool = True) -> None:
        super().__init__()
        self.user = nn.Embedding(60, 4)
        self.film = nn.Embedding(80, 4)
        self.offset = nn.Parameter(torch.full((), 3.2), requires_grad=biased)
        nn.init.normal_(self.user.weight, std=deviation)
        nn.init.normal_(self.film.weight, std=deviation)

    def forward(self, user: Tensor, film: Tensor) -> Tensor:
        return (self.user(user) * self.film(film)).sum(1) + self.offset


def recommend(
    watch: Watch,
    *,
    deviation: float = 0.3,
    make: Callable[..., Optimizer],
    shape: Callable[[Tensor], Tensor] = lambda stars: stars,
) -> nn.Module:
    user, film, stars = ratings()
    model = Factors(deviation)
    optimizer = make(model.parameters())
    watch.attach(optimizer, model)
    for _ in range(15):
        for rows in torch.randperm(2000).split(80):
            predicted = model(user[rows], film[rows])
            loss = functional.mse_loss(predicted, shape(stars[rows]))
            watch.observe(outputs=predicted, targets=shape(stars[rows]), loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            held = slice(2000, None)
            error = functional.mse_loss(model(user[held], film[held]), shape(stars[held]))
            watch.observe(val_loss=error)
    return model


@program("mlp/ratings/adamw-decayed", operator="weight decay", half="held-out")
def _(watch: Watch) -> nn.Module:
    return recommend(watch, make=lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1))


@program(
    "mlp/ratings/tiny-factors",
    causes=("plateau", "bad-initialization", "lr-too-low"),
    operator="change weight initialisation",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Both factors are next to zero, a saddle."""
    return recommend(watch, deviation=1e-3, make=lambda p: torch.optim.SGD(p, lr=0.5))


@program(
    "mlp/ratings/column-against-row",
    causes=("loss-output-mismatch",),
    operator="targets [N, 1] against outputs [N]",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return recommend(
        watch,
        make=lambda p: torch.optim.AdamW(p, lr=0.02),
        shape=lambda stars: stars.unsqueeze(1),
    )


# ---- reinforcement and adversaries --------------------------------------------------------------


@program("mlp/corridor/baseline-policy-gradient", operator="noisy policy gradient", half="held-out")
def _(watch: Watch) -> nn.Module:
    """REINFORCE in a corridor of seven cells with a reward at its right end. The surrogate loss
    says nothing of the returns, which rise."""
    policy = nn.Sequential(nn.Embedding(7, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.02)
    watch.attach(optimizer, policy)
    baseline = 0.0
    for _ in range(120):
        cell = torch.full((32,), 3)
        logs, gains = [], torch.zeros(32)
        for step in range(8):
            choice = torch.distributions.Categorical(logits=policy(cell))
            action = choice.sample()
            logs.append(choice.log_prob(action))
            cell = (cell + 2 * action - 1).clamp(0, 6)
            gains = gains + (cell == 6) * 0.9**step
        loss = -(torch.stack(logs).sum(0) * (gains - baseline)).mean()
        watch.observe(loss=loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        baseline = 0.9 * baseline + 0.1 * gains.mean().item()
    return policy


def ring_gan(watch: Watch, *, seen: str, clamp: float | None) -> nn.Module:
    """A Wasserstein GAN on a ring of points; the critic or the generator is watched."""
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    critic = nn.Sequential(nn.Linear(2, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
    opt_g = torch.optim.RMSprop(generator.parameters(), lr=5e-4)
    opt_c = torch.optim.RMSprop(critic.parameters(), lr=5e-4 if clamp else 5e-2)
    watch.attach(*((opt_c, critic) if seen == "critic" else (opt_g, generator)))
    for _ in range(300):
        for _ in range(1 if clamp is None else 2):
            angle = 6.2832 * torch.rand(64)
            real = 2 * torch.stack([angle.cos(), angle.sin()], 1)
            fake = generator(torch.randn(64, 4)).detach()
            loss_c = critic(fake).mean() - critic(real).mean()
            if seen == "critic":
                watch.observe(loss=loss_c)
            opt_c.zero_grad()
            loss_c.backward()
            opt_c.step()
            if clamp is not None:
                with torch.no_grad():
                    for parameter in critic.parameters():
                        parameter.clamp_(-clamp, clamp)
        loss_g = -critic(generator(torch.randn(64, 4))).mean()
        if seen == "generator":
            watch.observe(loss=loss_g)
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
    return critic if seen == "critic" else generator


@program("mlp/ring/critic-of-a-wasserstein-gan", operator="GAN", half="held-out")
def _(watch: Watch) -> nn.Module:
    """The critic's loss is a distance that the generator shrinks: it need not fall."""
    return ring_gan(watch, seen="critic", clamp=0.2)


@program("mlp/ring/generator-of-a-wasserstein-gan", operator="GAN", half="held-out")
def _(watch: Watch) -> nn.Module:
    """The generator's loss is the critic's mean score, whose zero is arbitrary."""
    return ring_gan(watch, seen="generator", clamp=0.2)


@program(
    "mlp/ring/critic-never-clamped",
    causes=("diverging-loss", "oscillating-loss", "lr-too-high", "exploding-gradient"),
    operator="remove weight clipping",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return ring_gan(watch, seen="critic", clamp=None)


# ---- several tasks, odd losses ------------------------------------------------------------------


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 48), nn.ELU(), nn.Dropout(0.5))
        self.which = nn.Linear(48, 10)
        self.ink = nn.Linear(48, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.which(h), self.ink(h)


@program("mlp/scans/two-heads-dropout", operator="multi-task, dropout 0.5", half="held-out")
def _(watch: Watch) -> nn.Module:
    x, y = digits().x, digits().y
    ink = (x.mean(1, keepdim=True) - x.mean()) / x.mean(1).std()
    net = TwoHeads()
    opt = torch.optim.Adam(net.parameters(), lr=2e-3)
    watch.attach(opt, net)
    for _ in range(10):
        for rows in torch.randperm(len(x)).split(100):
            which, amount = net(x[rows])
            loss = functional.cross_entropy(which, y[rows])
            loss = loss + 0.3 * functional.mse_loss(amount, ink[rows])
            watch.observe(inputs=x[rows], loss=loss)
            opt.zero_grad()
            loss.backward()
            opt.step()
    return net


def tumours(
    watch: Watch,
    criterion: Callable[[Tensor, Tensor], Tensor],
    *,
    lr: float = 0.1,
    last: nn.Module | None = None,
) -> nn.Module:
    data = cancer()
    y = data.y.float().unsqueeze(1)
    model = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 1), last or nn.Sigmoid())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    watch.attach(optimizer, model)
    for _ in range(30):
        for rows in torch.randperm(len(y)).split(32):
            p = model(data.x[rows])
            loss = criterion(p, y[rows])
            watch.observe(inputs=data.x[rows], outputs=p, targets=y[rows], loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def own_cross_entropy(p: Tensor, y: Tensor) -> Tensor:
    return -(y * p.log() + (1 - y) * (1 - p).log()).mean()


@program("mlp/tumours/own-cross-entropy", operator="none", half="held-out")
def _(watch: Watch) -> nn.Module:
    return tumours(watch, own_cross_entropy)


@program(
    "mlp/tumours/own-cross-entropy-too-sure",
    causes=("nonfinite-loss", "nonfinite-gradient", "lr-too-high"),
    operator="logarithm of zero",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    return tumours(watch, own_cross_entropy, lr=8.0)


@program(
    "mlp/tumours/accuracy-as-loss",
    causes=("flat-loss", "parameters-not-updating", "vanishing-gradient"),
    operator="change loss function",
    half="held-out",
)
def _(watch: Watch) -> nn.Module:
    """Rounded probabilities have no slope."""
    return tumours(
        watch, lambda p, y: 1 - ((p.round() - y).abs() < 0.5).float().mean() + 0 * p.sum()
    )
