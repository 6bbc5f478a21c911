"""The report of one run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gradstat._run_view import RunView
from gradstat.report import layer_sections, sections
from gradstat.report.page import fill
from gradstat.report.saved import Report
from gradstat.report.sections import Section
from gradstat.report.summary import Summary, findings_of, flat, summarise
from gradstat.report.text import duration, moment, number, percent, plural

NOTHING_FOUND = (
    "Nothing was found wrong. What was not observed could not be judged: monitor.coverage() lists "
    "it."
)
NO_STEP = "No step was recorded, so there is nothing to judge."


@dataclass(frozen=True)
class KeyNumber:
    """One of the numbers at the top of a page."""

    name: str
    value: str
    note: str = ""
    tone: str = ""
    """``"bad"``, ``"warn"`` or nothing."""


def report_of(run: RunView) -> Report:
    """Return the report of a run that is open."""
    steps, scalars = run.steps, run.scalars
    summary = summarise(run, steps)
    findings = findings_of(run)
    tables = layer_sections.read_tables(run)
    updates = run.update_ratio()
    update_steps, ratio = updates if updates is not None else (tables.steps[:0], None)
    made = [
        sections.training(steps, scalars),
        sections.clipping(steps),
        layer_sections.flow(run, tables, ratio),
        layer_sections.heat(tables),
        layer_sections.updates(update_steps, ratio),
        sections.activations(run.activations),
        layer_sections.histograms(run, [name for told in findings for name in told.finding.layers]),
    ]
    build = partial(
        fill,
        "report.html",
        [layer.name for layer in run.layers],
        [figure for section in made for figure in section.figures],
        summary=summary,
        facts=_facts(summary, run),
        numbers=_key_numbers(summary),
        findings=findings,
        quiet=NOTHING_FOUND if summary.steps else NO_STEP,
        actions=run.actions,
        sections=made,
        setup=setup_of(run),
        links=_links(made),
    )
    values = {"summary": summary.to_dict(), "findings": flat(findings)}
    lines = [f"{summary.name}: {summary.status}"]
    lines += [
        f"{n.name}: {n.value}" + (f" ({n.note})" if n.note else "") for n in _key_numbers(summary)
    ]
    lines += [str(told.finding) for root in findings for told in (root, *root.symptoms)]
    return Report(build, values, "\n".join(lines), [run.path])


def _facts(summary: Summary, run: RunView) -> list[str]:
    is_timed = summary.seconds == summary.seconds
    facts = [moment(summary.started), duration(summary.seconds)] if is_timed else []
    model = str(run.meta.get("model", {}).get("class", ""))
    return [fact for fact in (model, *facts, f"run {run.id[:8]}" if run.id else "") if fact]


def _key_numbers(summary: Summary) -> list[KeyNumber]:
    is_known = np.isfinite(summary.lowest_loss)
    is_infinite = np.isinf(summary.final_loss)
    is_broken = is_infinite or (is_known and np.isnan(summary.final_loss))
    lowest = f"lowest {number(summary.lowest_loss)}" if is_known else "no finite loss was observed"
    return [
        KeyNumber("Steps", f"{summary.steps:,}"),
        KeyNumber(
            "Final loss",
            number(summary.final_loss) if is_known or is_infinite else "-",
            lowest,
            "bad" if is_broken else "",
        ),
        KeyNumber("Total norm", number(summary.final_norm), "at the last step")
        if summary.steps
        else KeyNumber("Total norm", "-"),
        KeyNumber("Clip rate", percent(summary.clip_rate), "of the measured steps"),
        KeyNumber(
            "Skipped steps",
            f"{summary.skipped:,}",
            percent(summary.skipped / summary.steps) if summary.skipped and summary.steps else "",
            "warn" if summary.skipped else "",
        ),
        KeyNumber("Steps not kept", f"{summary.dropped:,}", "", "warn" if summary.dropped else ""),
        KeyNumber("Layers", f"{summary.layers:,}", f"{plural(summary.parameters, 'element')}"),
    ]


def setup_of(run: RunView) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return what is known of a run's circumstances, as titles with pairs of text."""
    titles = ("model", "optimizer", "config", "versions", "machine")
    parts = [(title.capitalize(), _pairs(run.meta.get(title) or {})) for title in titles]
    return [(title, values) for title, values in parts if values]


def _pairs(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), _text(value)) for key, value in values.items()]


def _text(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 300 else f"{text[:297]}..."


def _links(made: list[Section]) -> list[tuple[str, str]]:
    inner = [(section.id, section.link) for section in made]
    return [("findings", "Findings"), *inner, ("setup", "Set-up")]
