"""What gradstat costs a training step of the user's own."""

from gradstat.overhead.measure import measure_overhead
from gradstat.overhead.report import OverheadReport

__all__ = ["OverheadReport", "measure_overhead"]
