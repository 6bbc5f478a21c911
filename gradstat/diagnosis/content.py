"""Rules on whether inputs tell one row from another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.evidence import Floats
from gradstat.diagnosis.finding import Finding, Measure
from gradstat.diagnosis.medians import counted, median
from gradstat.diagnosis.rule import Case, Rule


def _finding(text: str, remedy: tuple[str, ...], confidence: float, *seen: Measure) -> Finding:
    return Finding("bad-inputs", "error", confidence, text, remedy, seen,
                   "LeCun et al. 1998, Efficient BackProp, section 4.3")  # fmt: skip


@dataclass(frozen=True)
class HardlyDiffer(Rule):
    """Numbers that are the same in all rows but for a small remainder, as after scaling twice."""

    codes = ("bad-inputs",)
    needs = ("inputs",)

    differ: float = 0.05
    """Largest deviation of a feature over the root mean square of all, at most."""

    def judge(self, case: Case) -> Iterator[Finding]:
        rows = case.input_rows
        if case.learns or len(rows) < 2 or _are_tokens(case):
            return
        size = case.input_rms
        widest = float(case.input_deviations.max())
        if 0 < widest < self.differ * size:
            yield _finding(
                "the inputs hardly differ from row to row: what tells them apart is lost beside "
                "what they have in common",
                (
                    "standardise each feature: (x - mean) / std over the training set",
                    "check that the inputs are not divided by their range twice",
                ),
                0.92,
                Measure("largest deviation of a feature", widest / size, "of the inputs' size",
                        threshold=self.differ),
            )  # fmt: skip


@dataclass(frozen=True)
class OneToken(Rule):
    """Token ids of which most are the same: what was read is not in the vocabulary, or padding."""

    codes = ("bad-inputs",)
    needs = ("inputs", "targets")

    share: float = 0.6
    """Share of the commonest id, at least."""

    left: float = 0.9
    """Share of a guess's loss that is left, at least."""

    def judge(self, case: Case) -> Iterator[Finding]:
        if not _are_tokens(case) or case.learns or case.left is None or case.left < self.left:
            return
        rows = case.input_rows
        if not case.run.embeddings or not rows.size:
            return
        ids, counts = counted(rows)
        share = float(counts.max() / rows.size)
        if share > self.share:
            yield _finding(
                f"{share:.0%} of the tokens are the same id, {ids[counts.argmax()]:g}, and nothing "
                "is learnt: what tells rows apart seems to be cut off or not in the vocabulary",
                (
                    "look at some rows: are their words replaced by the unknown word's id?",
                    "leave padding out: pack_padded_sequence, a mask, shorter batches",
                ),
                0.75,
                Measure("share of the commonest id", share, threshold=self.share),
            )


@dataclass(frozen=True)
class WrongAxis(Rule):
    """A table standardised row by row: features of unlike scales stay so, and rows lose theirs."""

    codes = ("bad-inputs",)
    needs = ("inputs", "outputs", "targets", "loss")

    exact: float = 1e-2
    """Distance of each row's mean from 0 and of its deviation from 1, at most."""

    apart: float = 10.0
    """Largest distance of two features' means over the median deviation of a feature, at least: in
    a picture or a signal neighbours are alike, and here it is the columns that differ."""

    left: float = 0.3
    """Share of a guess's loss that is left, at least."""

    def judge(self, case: Case) -> Iterator[Finding]:
        if case.left is None or case.left < self.left or _are_tokens(case):
            return
        if any(len(batch.shapes.get("inputs", ())) != 2 for batch in case.run.batches):
            return
        rows = case.input_rows
        if rows.shape[0] < 2 or rows.shape[1] < 3 or not self._are_standardised(rows):
            return
        means, spreads = rows.mean(axis=0), case.input_deviations
        apart = float((means.max() - means.min()) / max(median(spreads), 1e-12))
        if apart > self.apart:
            yield _finding(
                "each row has a mean of 0 and a deviation of 1 while its features lie far apart: "
                "they were standardised over the wrong axis, and a row's largest feature rules it",
                ("standardise each feature over the training set: x.mean(0), x.std(0)",),
                0.8,
                Measure("distance of two features' means", apart, "of a feature's deviation",
                        threshold=self.apart),
            )  # fmt: skip

    def _are_standardised(self, rows: Floats) -> bool:
        if np.abs(rows.mean(axis=1)).max() >= self.exact:
            return False
        return any(np.abs(rows.std(axis=1, ddof=ddof) - 1).max() < self.exact for ddof in (0, 1))


def _are_tokens(case: Case) -> bool:
    return any("inputs" in batch.integers for batch in case.run.batches)
