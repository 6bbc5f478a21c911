"""The policies as a user meets them: their arguments, `attach`, checkpoints, policies of one's
own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import numpy as np
import policy_reference as plain
import pytest
import torch
from policy_calls import CPU
from torch import Tensor, nn

import gradstat
from gradstat import _kernels
from gradstat.clipping.clipper import Clipper
from gradstat.clipping.policy import Policy, policies_of
from gradstat.clipping.resolve import AUTO, AUTO_SCALE_FREE, auto_policy, resolve
from gradstat.columns import L2

POLICIES: dict[str, Callable[[], object]] = {
    "auto": lambda: "auto",
    "global": lambda: gradstat.GlobalNorm(0.5),
    "per-layer": lambda: gradstat.PerLayer(0.2),
    "autoclip": lambda: gradstat.AutoClip(window=20),
    "zclip": lambda: gradstat.ZClip(warmup_steps=5),
    "adagc": lambda: gradstat.AdaGC(warmup_steps=5),
    "skip": lambda: gradstat.SkipOnSpike(sigma=3, window=20, min_history=5) | AUTO,
    "chain": lambda: [gradstat.ZClip(warmup_steps=5), gradstat.PerLayer(0.3), gradstat.AGC(0.1)],
    "value": lambda: gradstat.Value(0.01),
    "agc": lambda: gradstat.AGC(0.05),
    "own": lambda: Halving(),  # noqa: PLW0108 (defined below)
}


class Halving(gradstat.Policy):
    """Halves all gradients when their total norm is above 0.5."""

    def coefficient(self, table: Tensor) -> Tensor:
        return torch.where(table[-1, L2] > 0.5, 0.5, 1.0)


class Training:
    """A small network and its batches, stepping with gradients that a test may spoil."""

    def __init__(
        self, clip: object = None, *, kind: type[torch.optim.Optimizer] = torch.optim.SGD
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 2)).double()
        self.optimizer = kind(self.model.parameters(), lr=0.05)  # type: ignore[call-arg]
        gradstat.attach(self.optimizer, self.model, clip=clip)  # type: ignore[arg-type]
        self.batches = torch.Generator().manual_seed(4)

    def backward(self) -> None:
        inputs = torch.randn(8, 6, dtype=torch.float64, generator=self.batches)
        self.optimizer.zero_grad()
        (self.model(inputs) - inputs[:, :2].sin()).square().mean().backward()

    def step(self, times: float = 1.0) -> None:
        self.backward()
        for gradient in self.gradients():
            gradient.mul_(times)
        self.optimizer.step()

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    @property
    def monitor(self) -> gradstat.Monitor:
        return self.optimizer.gradstat  # type: ignore[attr-defined,no-any-return]


def same(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---- through attach ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_bad_steps_change_nothing_and_a_later_spike_is_still_held(name: str, bad: float) -> None:
    clean, dirty = Training(POLICIES[name]()), Training(POLICIES[name]())
    for step in range(30):
        clean.step()
        dirty.step()
        if step % 7 == 3:
            before = dirty.weights()
            dirty.step(times=bad)
            assert same(before, dirty.weights())
            clean.backward()  # draws the same batches
    assert same(clean.weights(), dirty.weights())
    assert dirty.monitor.skipped_steps - clean.monitor.skipped_steps == 4
    before = dirty.weights()
    dirty.step(times=1e6)
    moved = math.hypot(
        *(float((a - b).norm()) for a, b in zip(before, dirty.weights(), strict=True))
    )
    if name != "own":  # it only halves
        assert moved < 0.1


def test_all_zero_step_is_no_spike_and_no_skip() -> None:
    for policy in POLICIES.values():
        training = Training(policy())
        for step in range(12):
            training.step(times=0.0 if step % 3 == 0 else 1.0)
        assert training.monitor.skipped_steps == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", POLICIES)
def test_resumed_training_ends_where_the_uninterrupted_one_does(
    name: str, kind: type[torch.optim.Optimizer]
) -> None:
    whole = Training(POLICIES[name](), kind=kind)
    for _ in range(15):
        whole.step(times=2.0)
    resumed = Training(POLICIES[name](), kind=kind)
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    resumed.batches.set_state(whole.batches.get_state())
    for step in range(15):
        times = 50.0 if step == 10 else 1.0
        whole.step(times)
        resumed.step(times)
    assert same(whole.weights(), resumed.weights())
    assert resumed.monitor.clip_rate == whole.monitor.clip_rate
    assert resumed.monitor.skipped_steps == whole.monitor.skipped_steps


def test_global_norm_trains_as_torch_does() -> None:
    ours, torchs = Training(gradstat.GlobalNorm(0.3)), Training()
    for _ in range(20):
        ours.step()
        torchs.backward()
        norm = nn.utils.clip_grad_norm_(torchs.model.parameters(), 0.3)
        torchs.optimizer.step()
        assert ours.monitor.total_norm == pytest.approx(norm.item(), rel=1e-12)
    for a, b in zip(ours.weights(), torchs.weights(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_value_trains_as_torch_does() -> None:
    ours, torchs = Training(gradstat.Value(0.01)), Training()
    for _ in range(20):
        ours.step()
        torchs.backward()
        nn.utils.clip_grad_value_(torchs.model.parameters(), 0.01)
        torchs.optimizer.step()
    assert same(ours.weights(), torchs.weights())
    assert ours.monitor.clip_rate == 1


def test_list_and_bar_mean_the_same() -> None:
    parts = (gradstat.PerLayer(0.1), gradstat.GlobalNorm(0.1), gradstat.Value(0.02))
    barred, listed = Training(parts[0] | parts[1] | parts[2]), Training(list(parts))
    for _ in range(10):
        barred.step()
        listed.step()
    assert same(barred.weights(), listed.weights())


def test_parameter_without_a_gradient_keeps_out_of_it() -> None:
    policies: list[Policy] = [gradstat.AdaGC(warmup_steps=2), gradstat.AGC(), gradstat.Value(0.1)]
    for policy in policies:
        training = Training(policy)
        for step in range(8):
            training.backward()
            training.model[2].bias.grad = None if step % 2 else training.model[2].bias.grad
            training.optimizer.step()
        assert math.isfinite(training.monitor.total_norm)


def test_new_parameter_group_leaves_what_adagc_knows_of_the_others() -> None:
    training = Training(gradstat.AdaGC(warmup_steps=3))
    for _ in range(6):
        training.step()
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    before = training.optimizer.state_dict()["gradstat"]["clipper"]
    training.optimizer.add_param_group({"params": [extra]})
    training.backward()
    extra.grad = torch.full((2,), 7.0, dtype=torch.float64)
    training.optimizer.step()
    after = training.optimizer.state_dict()["gradstat"]["clipper"]
    assert after["names"] == [*before["names"], "group1.param0"]
    counters = _kernels.NUM_CLIP_COUNTERS
    old, new = before["state"][counters:].tolist(), after["state"][counters:].tolist()
    assert new[0] == old[0] + 1
    assert new[-1] == pytest.approx(math.hypot(7, 7))
    np.testing.assert_allclose(new[1:5], old[1:], rtol=0.3)  # one step of the moving average


# ---- policies that are not fused -----------------------------------------------------------------


def stepped(policy: Policy, gradients: list[Tensor], weights: list[Tensor]) -> Clipper:
    """Run a policy on gradients in place; return the clipper."""
    return stepped_scaled(policy, gradients, weights, None)


def stepped_scaled(
    policy: Policy, gradients: list[Tensor], weights: list[Tensor], grad_scale: float | None
) -> Clipper:
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    names = [f"p{index}" for index in range(len(parameters))]
    clipper = Clipper(policy, _kernels.Nonfinite.KEEP)
    clipper.bind(names, CPU)
    batch = _kernels.gather(gradients)
    table = torch.empty((len(names) + 1, _kernels.NUM_COLUMNS), dtype=torch.float64)
    out = torch.empty(_kernels.NUM_CLIP_OUT, dtype=torch.float64)
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    clipper.measure(batch, table, out, grad_scale=scale)
    if grad_scale is not None:
        table[:, 4:] /= grad_scale  # true units; what the seam does, near enough for these tests
    clipper.apply(batch, out, str)
    clipper.apply_rest(batch, table, parameters, str, scale)
    return clipper


def clipped_steps(clipper: Clipper) -> int:
    assert clipper.state is not None
    return int(clipper.state[_kernels.COUNTER_CLIPPED])


SHAPES = {"matrix": (5, 7), "convolution": (4, 3, 2, 2), "vector": (6,), "scalar": ()}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_agc_follows_the_paper(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape, dtype=dtype, generator=generator)
    if len(shape) > 1:
        weight[0] = 0  # a unit that starts at 0 moves by eps
    gradient = torch.randn(shape, dtype=dtype, generator=generator)
    if len(shape) > 1:
        gradient[1] *= 1e-4  # one that is small enough
    want = plain.agc(weight.double().numpy(), gradient.double().numpy(), 0.02, 1e-3)
    clipper = stepped(gradstat.AGC(0.02), [gradient], [weight])
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(gradient.double().numpy(), want, rtol=rtol)
    assert clipped_steps(clipper) == 1


def test_agc_leaves_excluded_and_spoilt_units_alone() -> None:
    weights = [torch.ones(2, 3), torch.ones(2, 3)]
    gradients = [torch.ones(2, 3), torch.ones(2, 3)]
    gradients[1][0, 0] = math.nan
    spoilt = gradients[1][0].clone()
    clipper = stepped(gradstat.AGC(exclude=("p0",)), gradients, weights)
    assert torch.equal(gradients[0], torch.ones(2, 3))
    torch.testing.assert_close(gradients[1][0], spoilt, equal_nan=True)
    assert gradients[1][1].norm().item() == pytest.approx(0.01 * math.sqrt(3))
    assert clipped_steps(clipper) == 1


def test_agc_holds_a_gradient_whose_squares_overflow() -> None:
    gradient = torch.full((2, 3), 1e30)
    stepped(gradstat.AGC(), [gradient], [torch.ones(2, 3)])
    assert gradient.norm(dim=1).tolist() == pytest.approx([0.01 * math.sqrt(3)] * 2)


def test_agc_of_complex_parameters() -> None:
    gradient = torch.full((2, 2), 3 + 4j)
    stepped(gradstat.AGC(), [gradient], [torch.full((2, 2), 1 + 0j)])
    assert gradient.abs().flatten().tolist() == pytest.approx([0.01] * 4)


def test_agc_prefix_excludes_a_whole_module() -> None:
    policy = gradstat.AGC(exclude=("head", "body.0.bias"))
    names = ["head.weight", "head", "header.weight", "body.0.bias", "body.0.weight"]
    assert [policy.excludes(name) for name in names] == [True, True, False, True, False]


@pytest.mark.parametrize("scale", [None, 2.0**14])
def test_elements_and_units_are_limited_in_true_units(scale: float | None) -> None:
    factor = 1.0 if scale is None else scale
    for policy, want in (
        (gradstat.Value(0.5), [0.25, -0.5, 0.5]),
        (gradstat.AGC(0.1), None),
        (PerTensor(), [0.25 * 0.5, -2 * 0.5, 3 * 0.5]),
    ):
        gradient = torch.tensor([0.25, -2.0, 3.0], dtype=torch.float64) * factor
        weight = torch.full_like(gradient, 0.1)
        clipper = stepped_scaled(policy, [gradient], [weight], scale)
        if want is None:
            assert gradient.norm().item() / factor == pytest.approx(0.1 * 0.1 * math.sqrt(3))
        else:
            assert (gradient / factor).tolist() == pytest.approx(want)
        assert clipped_steps(clipper) == 1


class PerTensor(gradstat.Policy):
    """Halves each gradient whose own norm is above 1."""

    def coefficient(self, table: Tensor) -> Tensor:
        return torch.where(table[:-1, L2] > 1, 0.5, 1.0)


def test_own_policy_may_answer_for_each_parameter() -> None:
    gradients = [torch.tensor([0.5]), torch.tensor([2.0]), torch.tensor([math.nan])]
    clipper = stepped(PerTensor(), gradients, [torch.ones(1)] * 3)
    assert [gradient.item() for gradient in gradients[:2]] == [0.5, 1.0]
    assert clipped_steps(clipper) == 1


def test_step_clipped_twice_counts_once() -> None:
    gradients = [torch.tensor([8.0])]
    policy = gradstat.GlobalNorm(4.0) | Halving() | gradstat.Value(1.0)
    clipper = stepped(policy, gradients, [torch.ones(1)])
    assert gradients[0].item() == 1
    assert clipped_steps(clipper) == 1


@pytest.mark.parametrize("policy", [gradstat.Value(9.0), gradstat.AGC(9.0), Halving()], ids=repr)
def test_step_that_needs_no_clipping_is_not_counted(policy: Policy) -> None:
    gradients = [torch.tensor([0.25])]
    assert clipped_steps(stepped(policy, gradients, [torch.ones(1)])) == 0
    assert gradients[0].item() == 0.25


def test_wrong_answers_of_own_policies() -> None:
    class Wrong(gradstat.Policy):
        def coefficient(self, table: Tensor) -> Tensor:
            return table.new_ones(3)

    message = (
        r"^Wrong.coefficient must return one number or one for each of the 2 parameters, got 3$"
    )
    with pytest.raises(gradstat.ArgumentValueError, match=message):
        stepped(Wrong(), [torch.ones(1)] * 2, [torch.ones(1)] * 2)
    with pytest.raises(TypeError, match=r"^Policy must override coefficient\(table\)$"):
        stepped(gradstat.Policy(), [torch.ones(1)], [torch.ones(1)])


# ---- arguments -----------------------------------------------------------------------------------

INVALID: dict[str, Callable[[], object]] = {
    'GlobalNorm: max_norm must be positive, got -1.0; use float("inf") for no limit': (
        lambda: gradstat.GlobalNorm(-1.0)
    ),
    'PerLayer: max_norm must be positive, got 0; use float("inf") for no limit': (
        lambda: gradstat.PerLayer(0)
    ),
    'Value: max_value must be positive, got nan; use float("inf") for no limit': (
        lambda: gradstat.Value(math.nan)
    ),
    "AutoClip: percentile must lie in 0..100, got 101; the published value is 10": (
        lambda: gradstat.AutoClip(101)
    ),
    "AutoClip: window must be a whole number of at least 1, got 0; use for example 1000": (
        lambda: gradstat.AutoClip(window=0)
    ),
    "ZClip: alpha must lie in [0, 1), got 1; the published value is 0.97": (
        lambda: gradstat.ZClip(alpha=1)
    ),
    "AdaGC: warmup_steps must be a whole number of at least 0, got 1.5; the published value is "
    "100": lambda: gradstat.AdaGC(warmup_steps=1.5),  # type: ignore[arg-type]
    "SkipOnSpike: min_history must be a whole number of at least 2, got 1; the published value "
    "is 64": lambda: gradstat.SkipOnSpike(min_history=1),
    "AGC: clipping must be positive, got 'much'; the published value is 0.01": (
        lambda: gradstat.AGC("much")  # type: ignore[arg-type]
    ),
    'clip must be a policy or "auto", got \'automatic\'; use clip="auto"': (
        lambda: resolve("automatic")
    ),
    "AutoClip must stand before Value: it works on the norms of the one read of the gradients, "
    "the other changes them; swap the two": lambda: resolve([gradstat.Value(1.0), AUTO]),
    "AGC must stand before Value: it works on the norms of the one read of the gradients, the "
    "other changes them; swap the two": lambda: resolve(gradstat.Value(1.0) | gradstat.AGC()),
    "clip must combine at most 4 of the fused policies, got 5; drop some, or subclass "
    "gradstat.Policy": lambda: resolve([gradstat.GlobalNorm(1.0)] * 5),
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_value_is_named_with_a_remedy(message: str) -> None:
    with pytest.raises(gradstat.ArgumentValueError) as raised:
        INVALID[message]()
    assert str(raised.value) == message


@pytest.mark.parametrize("clip", [1.0, [gradstat.AGC(), 1.0], ["auto"]], ids=repr)
def test_what_is_no_policy_is_a_type_error(clip: object) -> None:
    with pytest.raises(gradstat.ArgumentTypeError, match="use (for example )?"):
        resolve(clip)


def test_resolve_makes_one_policy_of_what_it_is_given() -> None:
    a, b, c = gradstat.PerLayer(1.0), gradstat.GlobalNorm(1.0), gradstat.Value(1.0)
    assert resolve(None) is None
    assert resolve([]) is None
    assert resolve(a) is a
    assert policies_of(resolve([a, b | c])) == (a, b, c)
    assert policies_of(resolve((a | b) | c)) == (a, b, c)
    assert policies_of(resolve(policy for policy in (a, b))) == (a, b)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (torch.optim.SGD, AUTO),
        (torch.optim.ASGD, AUTO),
        (torch.optim.LBFGS, AUTO),
        (torch.optim.Adam, AUTO_SCALE_FREE),
        (torch.optim.AdamW, AUTO_SCALE_FREE),
        (torch.optim.NAdam, AUTO_SCALE_FREE),
        (torch.optim.RMSprop, AUTO_SCALE_FREE),
        (torch.optim.Adagrad, AUTO_SCALE_FREE),
        (type("MyOwn", (torch.optim.Adam,), {}), AUTO_SCALE_FREE),
    ],
)
def test_auto_depends_on_the_optimizer(kind: type[torch.optim.Optimizer], expected: Policy) -> None:
    optimizer = kind([torch.zeros(1)], lr=0.1)  # type: ignore[call-arg]
    assert auto_policy(optimizer) is expected
    assert resolve("auto", optimizer) is expected
    training = Training("auto", kind=kind)
    assert repr(expected) in repr(training.monitor)


def test_policies_read_as_they_are_written() -> None:
    assert repr(gradstat.GlobalNorm(1.0) | Halving()) == "GlobalNorm(max_norm=1.0) | Halving()"
    assert gradstat.ZClip() == gradstat.ZClip(alpha=0.97)
