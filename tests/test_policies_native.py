"""The policies inside the kernel, step by step against their plain versions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import policy_reference as plain
import pytest
import torch
from norm_sequences import SEQUENCES, Steps
from policy_calls import CPU, Decided, Runner

import gradstat
from gradstat import _kernels, _native
from gradstat.clipping.clipper import Clipper
from gradstat.clipping.policy import Policy
from gradstat.clipping.resolve import AUTO, AUTO_SCALE_FREE

Nonfinite = _kernels.Nonfinite

SPREAD_FLOOR = 1e-3  # kRelativeSpreadFloor in csrc/policy.h

# A policy and its plain version, at the published defaults and away from them.
PAIRS: dict[str, tuple[Policy, Callable[[], list[plain.Rule]]]] = {
    "global": (gradstat.GlobalNorm(0.7), lambda: [plain.GlobalNorm(0.7)]),
    "per-layer": (gradstat.PerLayer(0.4), lambda: [plain.PerLayer(0.4)]),
    "autoclip": (gradstat.AutoClip(), lambda: [plain.AutoClip(10, 1000)]),
    "autoclip-window": (
        gradstat.AutoClip(90, window=16, factor=1.5, min_history=5),
        lambda: [plain.AutoClip(90, 16, 1.5, 5)],
    ),
    "autoclip-warm-up": (
        gradstat.AutoClip(50, 20, factor=1.5, min_history=8, warmup_norm=0.6, peak_share=0.5),
        lambda: [plain.AutoClip(50, 20, 1.5, 8, 0.6, 0.5)],
    ),
    "autoclip-max": (
        gradstat.AutoClip(100, window=7, factor=0.9),
        lambda: [plain.AutoClip(100, 7, 0.9)],
    ),
    "autoclip-one": (
        gradstat.AutoClip(0, window=1, factor=0.5),
        lambda: [plain.AutoClip(0, 1, 0.5)],
    ),
    "zclip": (gradstat.ZClip(), lambda: [plain.ZClip(0.97, 2.5, 25, 1.0)]),
    "zclip-unlimited": (
        gradstat.ZClip(alpha=0.8, z_thresh=1.5, warmup_steps=3, max_grad_norm=math.inf),
        lambda: [plain.ZClip(0.8, 1.5, 3, math.inf, SPREAD_FLOOR)],
    ),
    "adagc": (gradstat.AdaGC(), lambda: [plain.AdaGC(1.05, 1.0, 0.98, 100)]),
    "adagc-quick": (
        gradstat.AdaGC(lambda_rel=1.2, lambda_abs=0.5, beta=0.7, warmup_steps=4),
        lambda: [plain.AdaGC(1.2, 0.5, 0.7, 4)],
    ),
    "skip": (gradstat.SkipOnSpike(), lambda: [plain.SkipOnSpike(6, 128, 64)]),
    "skip-eager": (
        gradstat.SkipOnSpike(sigma=2, window=10, min_history=3),
        lambda: [plain.SkipOnSpike(2, 10, 3)],
    ),
    "skip, autoclip": (
        gradstat.SkipOnSpike(3, 20, 10) | gradstat.AutoClip(50, window=12),
        lambda: [plain.SkipOnSpike(3, 20, 10), plain.AutoClip(50, 12)],
    ),
    "per-layer, global": (
        gradstat.PerLayer(0.5) | gradstat.GlobalNorm(0.4),
        lambda: [plain.PerLayer(0.5), plain.GlobalNorm(0.4)],
    ),
    "global, per-layer": (
        gradstat.GlobalNorm(0.4) | gradstat.PerLayer(0.35),
        lambda: [plain.GlobalNorm(0.4), plain.PerLayer(0.35)],
    ),
    "adagc, zclip, skip, global": (
        gradstat.AdaGC(1.1, 1.0, 0.9, 5)
        | gradstat.ZClip(0.9, 2, 5, math.inf)
        | gradstat.SkipOnSpike(4, 30, 10)
        | gradstat.GlobalNorm(3.0),
        lambda: [
            plain.AdaGC(1.1, 1.0, 0.9, 5),
            plain.ZClip(0.9, 2, 5, math.inf, SPREAD_FLOOR),
            plain.SkipOnSpike(4, 30, 10, SPREAD_FLOOR),
            plain.GlobalNorm(3.0),
        ],
    ),
}
LEARNING = ("autoclip", "autoclip-window", "zclip", "adagc", "adagc-quick", "skip-eager")


def assert_equal(got: Decided, want: plain.Factors | None, norms: dict[str, float]) -> None:
    assert got.skip == (want is None)
    factors = dict.fromkeys(norms, 1.0) if want is None else want
    np.testing.assert_allclose(got.factors, list(factors.values()), rtol=1e-9)
    if want is not None:
        left = plain.total({name: norms[name] * factors[name] for name in norms})
        assert got.coefficient == pytest.approx(left / plain.total(norms), rel=1e-9)


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("pair", PAIRS)
def test_policy_follows_its_reference(pair: str, sequence: str) -> None:
    policy, rules = PAIRS[pair]
    steps = SEQUENCES[sequence]()
    runner, reference = Runner(policy, list(steps[0])), plain.Reference(*rules())
    clipped = skipped = 0
    for norms in steps:
        got, want = runner.step(norms), reference.factors(norms)
        assert_equal(got, want, norms)
        assert got.norm == pytest.approx(plain.total(norms), rel=1e-12)
        skipped += want is None
        clipped += not got.skip and got.coefficient < 1 - 1e-12
    assert runner.counters[:3] == [len(steps), clipped, skipped]


@pytest.mark.parametrize("pair", PAIRS)
def test_reference_is_put_to_work(pair: str) -> None:
    """No pair agrees merely because neither ever acts."""
    steps = [norms for name in ("spikes", "recorded-adamw") for norms in SEQUENCES[name]()[:290]]
    acted = 0
    for name in ("spikes", "recorded-adamw"):
        steps = SEQUENCES[name]()
        decided = Runner(PAIRS[pair][0], list(steps[0])).steps(steps)
        acted += sum(step.skip or step.coefficient < 1 - 1e-12 for step in decided)
    assert acted > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_nonfinite_norm_is_skipped_and_not_learnt(pair: str, bad: float) -> None:
    steps = SEQUENCES["spikes"]()[:100]
    policy, _ = PAIRS[pair]
    clean, dirty = Runner(policy, ["body", "head"]), Runner(policy, ["body", "head"])
    for index, norms in enumerate(steps):
        if index % 9 == 3:
            answer = dirty.step({**norms, "head": bad})
            assert answer.skip
            assert not answer.finite
            assert answer.factors[0] == 1
        assert dirty.step(norms) == clean.step(norms)
    assert learnt(dirty) == learnt(clean)
    n_bad = len([index for index in range(100) if index % 9 == 3])
    assert dirty.counters[2] == clean.counters[2] + n_bad


@pytest.mark.parametrize("pair", PAIRS)
def test_all_zero_step_teaches_nothing(pair: str) -> None:
    steps = SEQUENCES["spikes"]()[:100]
    policy, _ = PAIRS[pair]
    clean, dirty = Runner(policy, ["body", "head"]), Runner(policy, ["body", "head"])
    for index, norms in enumerate(steps):
        if index % 9 == 3:
            answer = dirty.step({"body": 0.0, "head": 0.0})
            assert (answer.skip, answer.coefficient, answer.norm) == (False, 1, 0)
        assert dirty.step(norms) == clean.step(norms)
    assert learnt(dirty) == learnt(clean)


def learnt(runner: Runner) -> list[float]:
    assert runner.clipper.state is not None
    values: list[float] = runner.clipper.state[_kernels.NUM_CLIP_COUNTERS :].tolist()
    return values


@pytest.mark.parametrize(
    "policy",
    [
        gradstat.ZClip(max_grad_norm=math.inf),
        gradstat.SkipOnSpike(),
        gradstat.SkipOnSpike(window=128, min_history=2),
        AUTO,
        AUTO_SCALE_FREE,
    ],
    ids=repr,
)
@pytest.mark.parametrize("level", [1e-7, 0.3, 1e6])
def test_constant_history_lets_a_rounding_error_pass(policy: Policy, level: float) -> None:
    runner = Runner(policy, ["p"])
    usual = runner.steps([{"p": level}] * 200)[-1]
    assert usual.coefficient == (0.5 if policy is AUTO_SCALE_FREE else 1)
    answer = runner.step({"p": level * (1 + 1e-5)})
    assert not answer.skip
    assert answer.coefficient == usual.coefficient or policy is AUTO_SCALE_FREE
    assert answer.coefficient == pytest.approx(usual.coefficient, rel=1e-4)
    answer = runner.step({"p": level * 100})
    assert answer.skip or answer.coefficient < 0.1


def test_zero_variance_in_the_published_zclip_would_clip_a_rounding_error() -> None:
    """What the floor under the spread is for."""
    reference = plain.Reference(plain.ZClip(0.97, 2.5, 25, math.inf))
    for _ in range(200):
        reference.factors({"p": 0.3})
    answer = reference.factors({"p": 0.3 + 1e-5})
    assert answer is not None
    assert answer["p"] < 1


@pytest.mark.parametrize("pair", LEARNING)
@pytest.mark.parametrize("sequence", ["decay", "duplicates"])
def test_missing_gradients_count_as_absent(pair: str, sequence: str) -> None:
    policy, rules = PAIRS[pair]
    steps = [
        {name: norm for name, norm in norms.items() if (name, index % 5) != ("head", 2)}
        for index, norms in enumerate(SEQUENCES[sequence]())
    ]
    runner, reference = Runner(policy, ["body", "head"]), plain.Reference(*rules())
    for norms in steps:
        got, want = runner.step(norms), reference.factors(norms)
        kept = [factor for factor in got.factors if not math.isnan(factor)]
        assert len(kept) == len(norms)
        assert_equal(got._replace(factors=kept), want, norms)


@pytest.mark.parametrize("pair", PAIRS)
def test_loss_scale_is_taken_out_of_the_norms(pair: str) -> None:
    steps = SEQUENCES["spikes"]()[:150]
    policy, _ = PAIRS[pair]
    plainly, scaled = Runner(policy, ["body", "head"]), Runner(policy, ["body", "head"])
    for index, norms in enumerate(steps):
        got = scaled.step(norms, grad_scale=2.0 ** (16 - index // 50))
        want = plainly.step(norms)
        np.testing.assert_allclose(got.factors, want.factors, rtol=1e-12)
        assert got[:-1] == pytest.approx(want[:-1], rel=1e-12)
    assert scaled.counters == plainly.counters


def test_found_inf_says_whether_to_skip() -> None:
    runner = Runner(gradstat.SkipOnSpike(sigma=3, window=10, min_history=5), ["p"])
    found_inf = torch.tensor(-7.0)
    seen = []
    for norm in [1, 1.1, 0.9, 1, 1.05, 0.95, 50, 1, math.nan, 1, math.inf, 1]:
        runner.step({"p": norm}, found_inf=found_inf)
        seen.append(found_inf.item())
    assert seen == [0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1, 0]
    assert runner.counters == [12, 0, 3, 0]


def test_counters_count() -> None:
    runner = Runner(gradstat.GlobalNorm(1.0), ["p"])
    expected = [(0.5, [1, 0, 0, 0]), (2.0, [2, 1, 0, 0]), (math.nan, [3, 1, 1, 1])]
    expected += [(math.inf, [4, 1, 2, 2]), (0.0, [5, 1, 2, 0]), (1.0 - 1e-6, [6, 1, 2, 0])]
    for norm, counters in expected:
        runner.step({"p": norm})
        assert runner.counters == counters


@pytest.mark.parametrize("window", [1, 2, 3, 10, 64])
@pytest.mark.parametrize("sequence", ["decay", "growth", "duplicates", "spikes"])
def test_ring_and_sorted_values_stay_right(window: int, sequence: str) -> None:
    steps = SEQUENCES[sequence]()[: 5 * window + 20]
    runner = Runner(gradstat.AutoClip(50, window=window), ["body", "head"])
    norms: list[float] = []
    for step in steps:
        norms.append(runner.step(step).norm)
        count, _, *values = learnt(runner)
        expected = norms[-window:]
        assert count == len(expected)
        assert sorted(values[:window][: len(expected)]) == sorted(expected)  # the ring
        assert values[window:][: len(expected)] == sorted(expected)


@pytest.mark.parametrize("pair", PAIRS)
def test_saved_state_gives_the_same_later_decisions(pair: str) -> None:
    steps = SEQUENCES["level-changes"]()
    policy, _ = PAIRS[pair]
    first = Runner(policy, ["body", "head"])
    first.steps(steps[:150])
    second = Runner(policy, ["body", "head"])
    assert second.clipper.load_state_dict(first.clipper.state_dict(), CPU)
    assert second.steps(steps[150:]) == first.steps(steps[150:])
    assert second.counters == first.counters


def test_state_of_another_policy_is_refused() -> None:
    saved = Runner(gradstat.ZClip(), ["p"]).clipper.state_dict()
    runner = Runner(gradstat.ZClip(alpha=0.9), ["p"])
    before = learnt(runner)
    assert not runner.clipper.load_state_dict(saved, CPU)
    assert learnt(runner) == before


def test_state_of_the_wrong_size_is_refused() -> None:
    runner = Runner(gradstat.ZClip(), ["p"])
    saved = runner.clipper.state_dict()
    saved["state"] = saved["state"][:-1]
    assert not runner.clipper.load_state_dict(saved, CPU)


def run_with_a_change(policy: Policy, steps: Steps, at: int) -> list[Decided]:
    """Step with body and head, then with tail, head and body."""
    runner = Runner(policy, ["body", "head"])
    decided = runner.steps(steps[:at])
    runner.names = ["tail", "head", "body"]
    runner.clipper.bind(runner.names, CPU)
    return decided + [runner.step({**norms, "tail": 0.2}) for norms in steps[at:]]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("at", [2, 150])
def test_new_parameters_leave_the_history_of_the_others(pair: str, at: int) -> None:
    steps = SEQUENCES["spikes"]()
    policy, rules = PAIRS[pair]
    reference = plain.Reference(*rules())
    decided = run_with_a_change(policy, steps, at)
    for index, (norms, got) in enumerate(zip(steps, decided, strict=True)):
        named = norms if index < at else {"tail": 0.2, "head": norms["head"], "body": norms["body"]}
        assert_equal(got, reference.factors(named), named)


def test_zeroed_nonfinite_elements_leave_a_norm_of_the_rest() -> None:
    runner = Runner(gradstat.GlobalNorm(1.0), ["p", "q"], nonfinite=Nonfinite.ZERO)
    answer = runner.step({"p": 4.0, "q": math.nan})
    assert math.isnan(answer.norm)
    assert (answer.skip, answer.finite) == (False, False)
    assert answer.factor == pytest.approx(0.25, rel=1e-6)
    assert answer.coefficient == pytest.approx(0.25, rel=1e-6)


def test_kept_nonfinite_norm_changes_and_teaches_nothing() -> None:
    runner = Runner(gradstat.ZClip(), ["p", "q"], nonfinite=Nonfinite.KEEP)
    before = learnt(runner)
    answer = runner.step({"p": 4.0, "q": math.inf})
    assert (answer.skip, answer.finite, answer.factor) == (False, False, 1)
    assert learnt(runner) == before


@pytest.mark.parametrize("policy", [gradstat.PerLayer(0.5), gradstat.AdaGC()], ids=repr)
@pytest.mark.parametrize("level", [1e-200, 1e200])
def test_norms_whose_squares_leave_the_range_of_fp64(policy: Policy, level: float) -> None:
    answer = Runner(policy, ["p", "q"]).step({"p": 3 * level, "q": 4 * level})
    assert answer.norm == pytest.approx(5 * level, rel=1e-12)
    if level < 1:
        assert answer.coefficient == pytest.approx(1.0, rel=1e-12)
    else:
        assert 0 <= answer.coefficient < 1e-190


@pytest.mark.parametrize("pair", PAIRS)
def test_decision_from_a_finished_table_is_the_same(pair: str) -> None:
    policy, _ = PAIRS[pair]
    names = ["body", "head"]
    runner, other = Runner(policy, names), Clipper(policy, Nonfinite.SKIP)
    other.bind(names, CPU)
    for norms in SEQUENCES["spikes"]():
        gradients = [torch.tensor([norms[name]], dtype=torch.float64) for name in names]
        table, _ = _kernels.moments(_kernels.gather(gradients))
        out = torch.empty(_kernels.NUM_CLIP_OUT, dtype=torch.float64)
        other.program.out = out
        _native.run_clip(table, other.program, len(names))
        want = runner.step(norms)
        assert out.tolist() == pytest.approx([float(x) for x in want[:-1]], rel=1e-12)
