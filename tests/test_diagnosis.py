"""What the diagnosis gives its users: findings, causes before symptoms, coverage, rounds."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradstat
from gradstat._rounds import Rounds
from gradstat.diagnosis import RULES, Finding, diagnose
from gradstat.diagnosis.causes import EXPLAINS, rank
from gradstat.diagnosis.data import InputScale
from gradstat.diagnosis.finding import Measure
from gradstat.diagnosis.medians import middle

CODES = {code for rule in RULES for code in rule.codes}


def finding(code: str, confidence: float, severity: Any = "error") -> Finding:
    return Finding(code, severity, confidence, "It is so.", ("do this", "or that"))


def train(steps: int = 40, *, scale: float = 1.0, **options: Any) -> gradstat.Monitor:
    """Train a small classifier and observe all of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    optimizer = gradstat.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)
    monitor: gradstat.Monitor = optimizer.gradstat  # type: ignore[attr-defined]
    true = torch.randn(8, 3)
    for _ in range(steps):
        x = torch.randn(32, 8)
        y = (x @ true).argmax(1)
        outputs = model(scale * x)
        loss = nn.functional.cross_entropy(outputs, y)
        monitor.observe(inputs=scale * x, outputs=outputs, targets=y, loss=loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    monitor._kept_alive = optimizer  # type: ignore[attr-defined]
    return monitor


# ---- findings ------------------------------------------------------------------------------------


def test_a_finding_prints_what_to_do_and_why() -> None:
    text = str(
        Finding(
            "lr-too-high", "error", 0.876, "Steps are large.", ("multiply lr by 0.1", "clip"),
            (Measure("update over weight", 0.5, threshold=0.1), Measure("norm", 3.0, "g")),
            "cs231n", ("a", "b", "c", "d", "e"), (7, 8),
        )
    )  # fmt: skip
    assert text.splitlines() == [
        "lr-too-high (error, confidence 0.88): Steps are large.",
        "  seen: update over weight 0.5 (above 0.1); norm 3 g",
        "  where: a, b, c, d and 1 more",
        "  from step: 7",
        "  1. multiply lr by 0.1",
        "  2. clip",
        "  source: cs231n",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.5, "(above 0.1)"), (0.05, "(below 0.1)"), (0.1, "(at 0.1)"), (math.nan, "nan")],
)
def test_a_measure_says_on_which_side_of_its_threshold_it_lies(value: float, shown: str) -> None:
    assert str(Measure("ratio", value, threshold=0.1)).endswith(shown)


def test_a_threshold_that_was_not_crossed_is_not_shown() -> None:
    measure = Measure("ratio", 0.05, threshold=0.1)
    assert measure.only("below") == measure
    assert str(measure.only("above")) == "ratio 0.05"


def test_a_flat_loss_shows_how_far_it_is_from_a_guess() -> None:
    """It begins far above a guess, so that its fall from the first value tells nothing."""
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    optimizer = gradstat.attach(torch.optim.SGD(model.parameters(), lr=0.05), model)
    with torch.no_grad():
        model.bias[0] = 4.0
    for _ in range(600):
        x, y = torch.randn(64, 8), torch.randint(3, (64,))
        outputs = model(x)
        loss = nn.functional.cross_entropy(outputs, y)
        optimizer.gradstat.observe(inputs=x, outputs=outputs, targets=y, loss=loss)  # type: ignore[attr-defined]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = [f for f in optimizer.gradstat.diagnose() if f.code == "flat-loss"]  # type: ignore[attr-defined]
    assert [f.evidence[0].side for f in found] == ["below"]


def test_a_symptom_is_printed_below_its_cause() -> None:
    cause = finding("bad-inputs", 0.9)
    symptom = finding("flat-loss", 0.6).because_of(cause)
    assert symptom.caused_by == "bad-inputs"
    lines = str(symptom).splitlines()
    assert lines[0] == "  flat-loss (error, confidence 0.60, because of bad-inputs): It is so."


def test_a_finding_is_plain_values() -> None:
    found = train(scale=100.0).diagnose()[0]
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["code"] == "bad-inputs"
    assert plain["evidence"][0]["threshold"] == 10.0
    assert plain["remedy"] == list(found.remedy)


def test_a_finding_holds_no_nan_that_json_does_not_know() -> None:
    unknown = dataclasses.replace(finding("flat-loss", 0.6), evidence=(Measure("norm", math.nan),))
    plain = json.loads(json.dumps(unknown.to_dict(), allow_nan=False))
    assert plain["evidence"][0]["value"] is None


# ---- causes --------------------------------------------------------------------------------------


def test_what_was_seen_itself_has_no_cause_that_is_less_sure() -> None:
    """Rows in order of their class kill units, whose sparse gradients explain a lost class."""
    ranked = rank(
        [
            finding("sparse-gradients", 0.75),
            finding("dead-units", 0.93),
            finding("class-imbalance", 0.96),
        ]
    )
    assert ranked[0].code == "class-imbalance"
    assert ranked[0].caused_by is None


def test_causes_come_before_what_they_explain() -> None:
    ranked = rank(
        [
            finding("flat-loss", 0.6),
            finding("overfitting", 0.85),
            finding("vanishing-gradient", 0.92),
            finding("bad-inputs", 0.9),
        ]
    )
    assert [(f.code, f.caused_by) for f in ranked] == [
        ("bad-inputs", None),
        ("vanishing-gradient", "bad-inputs"),
        ("overfitting", "bad-inputs"),
        ("flat-loss", "bad-inputs"),
    ]


def test_a_weak_finding_explains_no_strong_one() -> None:
    ranked = rank([finding("class-imbalance", 0.3), finding("flat-loss", 0.6)])
    assert [f.caused_by for f in ranked] == [None, None]


@pytest.mark.parametrize(
    ("exploding", "first"), [(0.6, "lr-too-high"), (0.95, "exploding-gradient")]
)
def test_of_two_that_explain_each_other_the_surer_is_the_cause(
    exploding: float, first: str
) -> None:
    ranked = rank([finding("exploding-gradient", exploding), finding("lr-too-high", 0.9)])
    assert ranked[0].code == first
    assert ranked[1].caused_by == first


def test_no_finding_is_lost_whatever_is_found() -> None:
    generator = np.random.default_rng(0)
    codes = sorted(CODES)
    for _ in range(300):
        chosen = generator.choice(codes, size=generator.integers(1, 12), replace=False)
        found = [finding(code, round(float(generator.random()), 1)) for code in chosen]
        ranked = rank(found)
        assert sorted(f.code for f in ranked) == sorted(chosen)
        roots = {f.code for f in ranked if f.caused_by is None}
        assert roots
        assert all(f.caused_by in roots for f in ranked if f.caused_by)


def test_information_is_neither_cause_nor_symptom() -> None:
    ranked = rank([finding("bad-inputs", 0.9, "info"), finding("flat-loss", 0.6)])
    assert [(f.code, f.caused_by) for f in ranked] == [("flat-loss", None), ("bad-inputs", None)]


def test_what_explains_is_something_that_can_be_found() -> None:
    assert set(EXPLAINS) <= CODES
    assert {effect for effects in EXPLAINS.values() for effect in effects} <= CODES


# ---- rules ---------------------------------------------------------------------------------------


def test_a_healthy_run_is_left_alone() -> None:
    assert [f for f in train(120).diagnose() if f.severity != "info"] == []


def test_every_rule_abstains_before_the_first_step_and_on_gradients_alone() -> None:
    model = nn.Linear(4, 2)
    optimizer = gradstat.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    monitor: gradstat.Monitor = optimizer.gradstat  # type: ignore[attr-defined]
    assert monitor.diagnose() == []
    for _ in range(30):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [f for f in monitor.diagnose() if f.severity != "info"] == []


def test_thresholds_can_be_changed() -> None:
    run = train(scale=5.0).evidence()
    assert "bad-inputs" not in [f.code for f in diagnose(run)]
    strict = [dataclasses.replace(InputScale(), large=2.0)]
    assert [f.code for f in diagnose(run, strict)] == ["bad-inputs"]


def test_a_monitor_goes_by_its_own_rules() -> None:
    monitor = train(scale=5.0)
    assert "bad-inputs" not in [f.code for f in monitor.diagnose()]
    monitor.rules = [dataclasses.replace(InputScale(), large=2.0)]
    assert [f.code for f in monitor.diagnose()] == ["bad-inputs"]
    assert monitor.coverage() == {"bad-inputs": "judged"}
    assert [f.code for f in copy.deepcopy(monitor).diagnose()] == ["bad-inputs"]


def test_what_cannot_be_called_is_refused_at_once() -> None:
    monitor = train(1)
    for register in (monitor.on_step, monitor.on_finding):
        with pytest.raises(
            gradstat.ArgumentTypeError, match="callback must be a function, got int"
        ):
            register(3)  # type: ignore[type-var]


def test_every_rule_names_codes_needs_and_sources() -> None:
    known = {"steps", "activations", "loss", "val_loss", "inputs", "outputs", "targets"}
    known |= {"gradient_signal", "gradient_noise", "batch_size"}  # observed from a NoiseScale
    for rule in RULES:
        assert dataclasses.is_dataclass(rule)
        assert rule.codes
        assert set(rule.needs) <= known
        assert type(rule).__doc__


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_middle_is_the_median_of_what_is_finite(axis: int, missing: float) -> None:
    generator = np.random.default_rng(0)
    for n in (1, 2, 5, 8):
        values = generator.normal(size=(n, n))
        values[generator.random((n, n)) < missing] = np.nan
        values[generator.random((n, n)) < missing / 3] = np.inf
        finite = np.where(np.isfinite(values), values, np.nan)
        expected = [
            np.median(row[~np.isnan(row)]) if (~np.isnan(row)).any() else np.nan
            for row in np.moveaxis(finite, axis, -1)
        ]
        np.testing.assert_allclose(middle(values, axis), expected)


# ---- coverage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bad", [0, 3])
def test_evidence_counts_nonfinite_elements_by_step_and_layer(n_bad: int) -> None:
    weight, unused = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = gradstat.attach(torch.optim.SGD([weight, unused], 0.1))
    for step in range(3):
        weight.grad = torch.ones(4)
        weight.grad[: n_bad if step == 1 else 0] = torch.nan
        optimizer.step()
    counts = optimizer.gradstat.evidence().recent_nonfinite  # type: ignore[attr-defined]
    assert np.nan_to_num(counts).tolist() == [[0, 0], [n_bad, 0], [0, 0]]


def test_coverage_says_what_was_missing() -> None:
    monitor = train()
    covered = monitor.coverage()
    assert set(covered) == CODES
    assert covered["bad-inputs"] == "judged"
    assert covered["overfitting"] == "needs val_loss"
    monitor.observe(val_loss=1.0)
    assert monitor.coverage()["overfitting"] == "judged"


# ---- while training ------------------------------------------------------------------------------


def test_new_causes_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    told: list[Finding] = []
    with caplog.at_level(logging.WARNING, logger="gradstat"):
        monitor = train(10, scale=math.nan, diagnose=10)
        monitor.on_finding(told.append)
        assert [record.name for record in caplog.records] == ["gradstat"]
        assert "bad-inputs" in caplog.text
        rounds = monitor._rounds
        rounds.tell(monitor.diagnose, 300)
        assert told == []
        rounds.tell(lambda: [finding("flat-loss", 0.9)], 300)
    assert [f.code for f in told] == ["flat-loss"]
    assert len(caplog.records) == 2


class Clock:
    """Stands in for the time, which goes on only where it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> list[Finding]:
        self.now += seconds
        return []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("gradstat._rounds.monotonic", clock)
    return clock


@pytest.mark.parametrize(
    ("step_seconds", "look_steps", "looks"),
    [
        (2**-3, 2**-4, [256, 512, 1024, 2048]),
        (2**-10, 10, [512, 1512, 2512]),  # the first may take 5 ms, the next what the last one took
        (2**-13, 10, []),
    ],
)
def test_looks_come_at_doubling_steps_and_take_a_hundredth_of_the_time(
    clock: Clock, step_seconds: float, look_steps: float, looks: list[int]
) -> None:
    rounds, found = Rounds(0), []
    for step in range(1, 2561):
        clock.passes(step_seconds)
        if rounds.is_due(step):
            found.append(step)
            rounds.tell(lambda: clock.passes(look_steps * step_seconds), step)
    assert found == looks


def test_looks_of_which_all_is_kept_or_that_were_asked_for_come_at_their_steps() -> None:
    steps = range(1, 1025)
    heard = Rounds(0)
    heard.listeners.append(lambda _: None)
    assert [s for s in steps if heard.is_due(s)] == [32, 64, 128, 256, 512, 1024]
    assert [s for s in range(1, 40) if Rounds(15).is_due(s)] == [15, 30]
    assert not any(Rounds(None).is_due(s) for s in steps)


def test_a_look_that_fails_is_the_last_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> list[Finding]:
        raise ZeroDivisionError

    rounds = Rounds(1)
    rounds.tell(fail, 300)
    assert "could not look at the run" in caplog.text
    assert not rounds.is_due(1)


def test_weak_findings_symptoms_and_information_are_not_told() -> None:
    rounds = Rounds(1)
    told: list[Finding] = []
    rounds.callbacks.append(told.append)
    cause = finding("bad-inputs", 0.5)
    rounds.tell(
        lambda: [
            cause,
            finding("flat-loss", 0.9).because_of(cause),
            finding("plateau", 0.9, "info"),
        ],
        300,
    )
    assert told == []


# ---- copies --------------------------------------------------------------------------------------


def test_a_copy_of_a_monitor_gives_the_same_diagnosis() -> None:
    monitor = train(scale=100.0)
    assert copy.deepcopy(monitor).diagnose() == monitor.diagnose()


def test_without_its_optimizer_a_monitor_says_so() -> None:
    monitor = train()
    del monitor._kept_alive  # type: ignore[attr-defined]
    with pytest.raises(gradstat.ArgumentValueError, match="while its optimizer exists; keep the"):
        monitor.diagnose()
