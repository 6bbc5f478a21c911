"""Healthy MLPs whose statistics look like faults: frozen, sparse, converged, noisy or tiny."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from torch.optim import SGD, Adam, AdamW

from zoo.data import diabetes, digits, ids, iris, waves, wine
from zoo.models import mlp
from zoo.program import NoWatch, Watch, batches, fit, program, validate


@program("mlp/digits/healthy-frozen-backbone", operator="frozen backbone", half="tuning")
def _(watch: Watch) -> nn.Module:
    """A body trained on the first five digits and frozen; a new head learns all ten."""
    body = mlp((64, 64, 32))
    few = digits().rows(digits().y < 5)
    pretrained = nn.Sequential(body, nn.ReLU(), nn.Linear(32, 10))
    fit(NoWatch(), pretrained, Adam(pretrained.parameters()), cross_entropy, few, epochs=3)
    body.requires_grad_(False)
    model = nn.Sequential(body, nn.ReLU(), nn.Linear(32, 10))
    optimizer = Adam(model[-1].parameters(), lr=0.01)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=8)


@program("mlp/digits/healthy-sparse-relu", operator="sparse but alive units", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Normalised units less 1.6: each is active for one input in twenty, and none for no input."""
    model = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 10))
    nn.init.constant_(model[1].bias, -1.6)
    optimizer = Adam(model.parameters(), lr=2e-3)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=8)


@program("mlp/ids/healthy-unseen-rows", operator="embedding with unseen rows", half="tuning")
def _(watch: Watch) -> nn.Module:
    """19000 of the 20000 rows never occur, and have no gradient."""
    model = nn.Sequential(nn.EmbeddingBag(20000, 16), nn.Linear(16, 2))
    optimizer = Adam(model.parameters(), lr=0.01)
    return fit(watch, model, optimizer, cross_entropy, ids(), epochs=5)


@program("mlp/iris/healthy-converged", operator="converged run", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Training is taken up again from weights at which there is nothing left to learn."""
    model = mlp((4, 16, 3), nn.Tanh)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    fit(NoWatch(), model, optimizer, cross_entropy, iris(), epochs=60, batch_size=16)
    optimizer = SGD(model.parameters(), lr=0.01)
    return fit(watch, model, optimizer, cross_entropy, iris(), epochs=30, batch_size=16)


@program("mlp/wine/healthy-near-zero-loss", operator="converged run", half="tuning")
def _(watch: Watch) -> nn.Module:
    """An easy set, learnt to a loss of about 0.001 in the first third of the run."""
    model = mlp((13, 32, 3))
    optimizer = Adam(model.parameters(), lr=0.01)
    return fit(watch, model, optimizer, cross_entropy, wine(), epochs=40, batch_size=16)


@program("mlp/digits/healthy-fine-tuning", operator="small rate for fine-tuning", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Trained on clean digits, then on noisy ones at a rate of 0.00002."""
    model = mlp((64, 64, 32, 10))
    fit(NoWatch(), model, Adam(model.parameters(), lr=2e-3), cross_entropy, digits(), epochs=4)
    noisy = digits().map(lambda x: x + 0.3 * torch.randn_like(x))
    optimizer = AdamW(model.parameters(), lr=2e-5)
    return fit(watch, model, optimizer, cross_entropy, noisy, epochs=6)


@program(
    "mlp/digits/healthy-grad-scaler", operator="first steps skipped by a scaler", half="tuning"
)
def _(watch: Watch) -> nn.Module:
    """The scale starts at 2**24: the first gradients overflow float16 and their steps are skipped,
    until the scale has been halved often enough."""
    model = mlp((64, 64, 32, 10))
    optimizer = SGD(model.parameters(), lr=0.05)
    watch.attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    data = digits()
    for _ in range(12):
        for inputs, targets in batches(data, 32):
            with torch.autocast("cpu", dtype=torch.float16):
                outputs = model(inputs)
            loss = cross_entropy(outputs.float(), targets)
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        validate(watch, model, cross_entropy, data)
    return model


@program("mlp/digits/healthy-accumulation", operator="gradients summed on purpose", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Gradients of four batches make one step."""
    model = mlp((64, 64, 32, 10))
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch.attach(optimizer, model)
    data = digits()
    for _ in range(8):
        for index, (inputs, targets) in enumerate(batches(data, 16)):
            outputs = model(inputs)
            loss = cross_entropy(outputs, targets) / 4
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            loss.backward()
            if index % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
        validate(watch, model, cross_entropy, data)
    return model


class Residual(nn.Module):
    """``x`` plus a fifth of what a two-layer network makes of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(width), mlp((width, width, width)))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.2 * self.body(x)


@program("mlp/digits/healthy-deep-residual", operator="small gradients in depth", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Sixteen residual blocks, the gradients of which are small next to the head's."""
    model = nn.Sequential(nn.Linear(64, 32), *(Residual(32) for _ in range(16)), nn.Linear(32, 10))
    optimizer = AdamW(model.parameters(), lr=1e-3)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=4)


@program("mlp/waves/healthy-two-tasks", operator="several heads", half="tuning")
def _(watch: Watch) -> nn.Module:
    """One output is a value, the other a logit of its sign; the losses are added."""
    model = mlp((2, 32, 32, 2))
    optimizer = Adam(model.parameters(), lr=5e-3)

    def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
        value, sign = outputs.split(1, dim=1)
        return mse_loss(value, targets) + 0.5 * binary_cross_entropy_with_logits(
            sign, (targets > 0).float()
        )

    return fit(watch, model, optimizer, loss_fn, waves(), epochs=15)


@program("mlp/diabetes/healthy-small-units", operator="targets of small units", half="tuning")
def _(watch: Watch) -> nn.Module:
    """Targets and their loss in a unit a hundred times larger: a loss of 1e-4 and gradients of
    1e-4, at which Adam learns no worse."""
    model = mlp((10, 16, 1))
    with torch.no_grad():
        model[-1].weight.mul_(0.01)
        model[-1].bias.mul_(0.01)
    optimizer = Adam(model.parameters(), lr=5e-4)
    data = diabetes().map(targets=lambda y: y / 100)
    return fit(watch, model, optimizer, mse_loss, data, epochs=14)


@program("mlp/cloud/healthy-gan", operator="generative adversarial network", half="tuning")
def _(watch: Watch) -> nn.Module:
    """A generator of points in a slanted cloud, against a critic: neither loss falls for long, and
    the points still come near the cloud's mean and spread. The generator is watched."""
    generator, critic = mlp((4, 32, 32, 2)), mlp((2, 32, 32, 1), lambda: nn.LeakyReLU(0.2))
    optimizer = Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    watch.attach(optimizer, generator)
    critic_optimizer = Adam(critic.parameters(), lr=2e-3, betas=(0.5, 0.9))
    slant, centre = torch.tensor([[1.0, 0.5], [0.0, 0.5]]), torch.tensor([2.0, -1.0])
    real, fake = torch.ones(64, 1), torch.zeros(64, 1)
    for _ in range(500):
        points = torch.randn(64, 2) @ slant + centre
        noise = torch.randn(64, 4)
        critic_optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(critic(points), real)
        loss = loss + binary_cross_entropy_with_logits(critic(generator(noise).detach()), fake)
        loss.backward()
        critic_optimizer.step()

        optimizer.zero_grad()
        outputs = critic(generator(noise))
        loss = binary_cross_entropy_with_logits(outputs, real)
        watch.observe(inputs=noise, outputs=outputs, targets=real, loss=loss)
        loss.backward()
        optimizer.step()
    return generator


@program("mlp/bandit/healthy-policy-gradient", operator="noisy policy gradient", half="tuning")
def _(watch: Watch) -> nn.Module:
    """REINFORCE on a contextual bandit of four arms with noisy rewards: the loss is noise about
    zero from first to last, while the reward rises."""
    model = mlp((8, 32, 4), nn.Tanh)
    optimizer = Adam(model.parameters(), lr=0.01)
    watch.attach(optimizer, model)
    best = torch.randn(8, 4)
    for _ in range(400):
        contexts = torch.randn(64, 8)
        policy = torch.distributions.Categorical(logits=model(contexts))
        arms = policy.sample()
        rewards = (contexts @ best).gather(1, arms[:, None])[:, 0] + torch.randn(64)
        loss = -(policy.log_prob(arms) * (rewards - rewards.mean())).mean()
        watch.observe(inputs=contexts, loss=loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@program("mlp/digits/healthy-zero-head", operator="last layer that starts at 0", half="tuning")
def _(watch: Watch) -> nn.Module:
    """All answers are alike in the first step, and the body has no gradient until the second."""
    model = mlp((64, 64, 32, 10))
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    optimizer = Adam(model.parameters(), lr=1e-3)
    return fit(watch, model, optimizer, cross_entropy, digits(), epochs=8)


@program("mlp/waves/healthy-clipped-spikes", operator="bad batches under a clip", half="tuning")
def _(watch: Watch) -> nn.Module:
    """One batch in fifty has targets a hundred times too large; the clip bounds what it does."""
    model = mlp((2, 32, 32, 1), nn.Tanh)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.5)
    watch.attach(optimizer, model)
    data = waves()
    step = 0
    for _ in range(20):
        for inputs, clean in batches(data, 32):
            step += 1
            targets = 100 * clean if step % 50 == 0 else clean
            outputs = model(inputs)
            loss = mse_loss(outputs, targets)
            watch.observe(inputs=inputs, outputs=outputs, targets=targets, loss=loss)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        validate(watch, model, mse_loss, data)
    return model
