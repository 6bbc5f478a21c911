"""Reports: a run, or two runs beside each other, as one HTML file that needs no network."""

from __future__ import annotations

from gradstat._run_view import RunSource, viewed
from gradstat.report.comparison import comparison_of
from gradstat.report.run_report import report_of
from gradstat.report.saved import Report

__all__ = ["Report", "compare_runs", "make_report"]


def make_report(source: RunSource) -> Report:
    """Return the report of a run: findings first, then what was measured, in charts and words.

    Of a monitor without a run log it shows the window that the monitor keeps in memory.
    Synchronises with a CUDA device where ``source`` is a monitor.

    Args:
        source: A run log, open or by its path, or a monitor.

    Raises:
        ArgumentTypeError: ``source`` is nothing of these.
        RunLogError: The file is no run log.

    Example:
        >>> gradstat.make_report("runs/first.db").save("first.html")
    """
    with viewed(source) as run:
        return report_of(run)


def compare_runs(first: RunSource, second: RunSource) -> Report:
    """Return the report of two runs beside each other: key numbers, findings, set-up, charts.

    ``print`` gives numbers, differences and findings as text. Synchronises with a CUDA device where
    a monitor is given.

    Args:
        first: A run log, open or by its path, or a monitor.
        second: As ``first``.

    Raises:
        ArgumentTypeError: One is nothing of these.
        RunLogError: A file is no run log.

    Example:
        >>> gradstat.compare_runs("runs/a.db", "runs/b.db").save("a-b.html")
    """
    with viewed(first) as a, viewed(second) as b:
        return comparison_of(a, b)
