"""Diagnosis: from what is known of a run to a ranked list of what is wrong with it.

`diagnose` runs every rule on the evidence and puts causes before symptoms. A family of rules is a
file; `causes` holds what explains what.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from gradstat.diagnosis import (
    content,
    data,
    fit,
    flow,
    noise,
    outcome,
    progress,
    rates,
    recurrence,
    shapes,
    targets,
    underfitting,
    units,
    updating,
    weights,
)
from gradstat.diagnosis.causes import rank
from gradstat.diagnosis.evidence import Evidence
from gradstat.diagnosis.finding import Finding
from gradstat.diagnosis.rule import Case, Rule

__all__ = ["RULES", "Case", "Evidence", "Finding", "Rule", "coverage", "diagnose"]

RULES: tuple[Rule, ...] = (
    data.NonfiniteInputs(),
    data.InputScale(),
    data.UnseenInputs(),
    content.HardlyDiffer(),
    content.OneToken(),
    content.WrongAxis(),
    data.Unshuffled(),
    targets.TargetScale(),
    targets.Leak(),
    targets.ConstantTargets(),
    targets.MissingTargets(),
    data.Imbalance(),
    fit.ProbabilitiesAsLogits(),
    fit.CutLogits(),
    fit.TargetsBeyondProbability(),
    fit.ClampedProbabilities(),
    fit.LogitsAsLogProbabilities(),
    fit.Maximised(),
    fit.OneUnitSoftmax(),
    shapes.Broadcast(),
    shapes.Rearranged(),
    fit.OutputRange(),
    updating.NoGradient(),
    updating.NoStep(),
    updating.NoUpdate(),
    updating.WrittenBack(),
    updating.NotZeroed(),
    weights.Initialization(),
    weights.FirstLoss(),
    flow.Vanishing(),
    flow.Exploding(),
    recurrence.ThroughTime(),
    flow.Nonfinite(),
    flow.SparseGradients(),
    rates.TooHigh(),
    rates.TooLow(),
    units.DeadUnits(),
    units.Saturated(),
    progress.ZeroLoss(),
    progress.FlatLoss(),
    progress.HardlyBegun(),
    progress.Diverging(),
    progress.Oscillating(),
    progress.Plateau(),
    outcome.ConstantPredictions(),
    outcome.NothingComesIn(),
    targets.RandomTargets(),
    targets.Contradictions(),
    targets.NoisyTraining(),
    outcome.Overfitting(),
    outcome.ValidationScale(),
    underfitting.Underfitting(),
    noise.BatchSize(),
)


def diagnose(run: Evidence, rules: Sequence[Rule] = RULES) -> list[Finding]:
    """Return what is wrong with a run, causes first, each followed by its symptoms."""
    case = Case(run)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of means over nothing
        return rank(finding for rule in rules for finding in rule.judge(case))


def coverage(run: Evidence, rules: Sequence[Rule] = RULES) -> dict[str, str]:
    """Return for every code whether it could be judged, and what was missing where it could not."""
    seen = run.observed
    found: dict[str, str] = {}
    for rule in rules:
        missing = [name for name in rule.needs if name not in seen]
        for code in rule.codes:
            if not missing:
                found[code] = "judged"
            else:
                why = (
                    f" (not probed: {run.unprobed})" if "steps" in missing and run.unprobed else ""
                )
                found.setdefault(code, "needs " + " and ".join(missing) + why)
    return dict(sorted(found.items()))
