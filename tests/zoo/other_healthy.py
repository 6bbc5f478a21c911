"""Healthy runs whose loss says little of their health: adversaries, policies, embeddings."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo.data import Split, digits, iris
from zoo.models import mlp
from zoo.program import Watch, batches, fit, program


def adversaries() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
    generator = mlp((8, 32, 32, 4))
    critic = mlp((4, 64, 64, 1), functools.partial(nn.LeakyReLU, 0.2))
    rates = {"lr": 1e-3, "betas": (0.5, 0.999)}
    return (
        generator,
        critic,
        torch.optim.Adam(generator.parameters(), **rates),
        torch.optim.Adam(critic.parameters(), **rates),
    )


def duel(watch: Watch, watched: str) -> nn.Module:
    """Learn to draw irises; either adversary's optimizer is watched.

    The samples' mean and deviation come close to the data's, while both losses stay near ln 2,
    where neither adversary wins.
    """
    generator, critic, draw, judge = adversaries()
    if watched == "critic":
        watch.attach(judge, critic)
    else:
        watch.attach(draw, generator)
    loss_fn = nn.BCEWithLogitsLoss()
    for _ in range(150):
        for real, _ in batches(iris(), 32):
            noise = torch.randn(len(real), 8)
            made = generator(noise)
            both = torch.cat([real, made.detach()])
            labels = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
            verdicts = critic(both)
            loss = loss_fn(verdicts, labels)
            if watched == "critic":
                watch.observe(inputs=both, outputs=verdicts, targets=labels, loss=loss)
            judge.zero_grad()
            loss.backward()
            judge.step()
            verdicts = critic(made)
            loss = loss_fn(verdicts, torch.ones(len(made), 1))
            if watched == "generator":
                watch.observe(inputs=noise, loss=loss)
            draw.zero_grad()
            loss.backward()
            draw.step()
    return generator


@program("mlp/iris/generator-of-a-gan", operator="GAN", half="tuning")
def _(watch: Watch) -> nn.Module:
    return duel(watch, "generator")


@program("mlp/iris/critic-of-a-gan", operator="GAN", half="tuning")
def _(watch: Watch) -> nn.Module:
    return duel(watch, "critic")


@program("mlp/digits/policy-gradient", operator="noisy policy gradient", half="tuning")
def _(watch: Watch) -> nn.Module:
    """REINFORCE (Williams 1992) with a reward of 1 for the right guess and its mean as baseline.

    The reward rises from 0.1 to over 0.7; the loss has mean 0 and says nothing of it.
    """
    model = mlp((64, 64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    watch.attach(optimizer, model)
    baseline = 0.1
    for _ in range(12):
        for inputs, answers in batches(digits(), 32):
            policy = torch.distributions.Categorical(logits=model(inputs))
            actions = policy.sample()
            rewards = (actions == answers).float()
            loss = -((rewards - baseline) * policy.log_prob(actions)).mean()
            baseline = 0.95 * baseline + 0.05 * rewards.mean().item()
            watch.observe(inputs=inputs, loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


class Chain:
    """Ten states in a row; a step to the right of the last one brings 1 and a new beginning."""

    length = 10

    @staticmethod
    def step(states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        after = (states + 2 * actions - 1).clamp(min=0)
        done = after == Chain.length
        return torch.where(done, 0, after), done.float()


@program("mlp/chain/q-learning", operator="targets that move", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Deep Q-learning (Mnih et al. 2015): the loss rises as the values do.

    A copy of the network, not trained, makes the targets and is renewed every twenty steps.
    """
    model, copy = mlp((10, 32, 2)), mlp((10, 32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    watch.attach(optimizer, model)
    for step in range(300):
        if step % 20 == 0:
            copy.load_state_dict(model.state_dict())
        states = torch.randint(0, Chain.length, (64,))
        actions = torch.randint(0, 2, (64,))
        after, rewards = Chain.step(states, actions)
        inputs = functional.one_hot(states, Chain.length).float()
        with torch.no_grad():
            best = copy(functional.one_hot(after, Chain.length).float()).amax(dim=1)
            targets = rewards + 0.9 * best
        outputs = model(inputs).gather(1, actions.unsqueeze(1)).squeeze(1)
        loss = functional.smooth_l1_loss(outputs, targets)
        watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


class Factors(nn.Module):
    """Rates a user's liking of an item by the product of their factors."""

    def __init__(self, users: int, items: int, width: int = 8) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width)
        self.items = nn.Embedding(items, width)
        self.bias = nn.Parameter(torch.zeros(()))
        for table in (self.users, self.items):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, pairs: Tensor) -> Tensor:
        return (self.users(pairs[:, 0]) * self.items(pairs[:, 1])).sum(dim=1) + self.bias


@functools.cache
def ratings() -> Split:
    """Ratings around 3.5 of rank two, by 60 users of 40 items."""
    random = torch.Generator().manual_seed(4)
    users, items = torch.randn(60, 2, generator=random), torch.randn(40, 2, generator=random)
    pairs = torch.cartesian_prod(torch.arange(60), torch.arange(40))
    pairs = pairs[torch.randperm(len(pairs), generator=random)]
    y = 3.5 + 0.6 * (users[pairs[:, 0]] * items[pairs[:, 1]]).sum(dim=1)
    y = y + 0.1 * torch.randn(len(y), generator=random)
    return Split(pairs[:1920], y[:1920], pairs[1920:], y[1920:])


@program("mlp/ratings/unseen-users", operator="embedding with unseen rows", half="tuning")
def _(watch: Watch) -> nn.Module:
    """The tables have room for 3000 users and 1000 items, most of whom are not there yet."""
    model = Factors(3000, 1000)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    return fit(watch, model, optimizer, nn.MSELoss(), ratings(), epochs=8)


@program("mlp/digits/contrastive", operator="loss without labels", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Two noisy views of an image are to be closer than those of others (InfoNCE, van den Oord et
    al. 2018): targets are the rows' own numbers."""
    model = mlp((64, 64, 16))
    data = digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch.attach(optimizer, model)
    for _ in range(6):
        for inputs, _ in batches(data, 64):
            one, other = (
                functional.normalize(model(inputs + 0.3 * torch.randn_like(inputs)))
                for _ in range(2)
            )
            logits = one @ other.T / 0.2
            targets = torch.arange(len(inputs))
            loss = functional.cross_entropy(logits, targets)
            watch.observe(inputs=inputs, outputs=logits, targets=targets, loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model
