"""The run log: what happens while a run trains, kept in a file that others can read meanwhile."""

from gradstat.runlog.database import DatabaseSink
from gradstat.runlog.log import Log, RunLog
from gradstat.runlog.run import LayerInfo, Run, Session, open_run

__all__ = ["DatabaseSink", "LayerInfo", "Log", "Run", "RunLog", "Session", "open_run"]
