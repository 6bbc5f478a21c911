"""Sinks: where the records of a run go, beside or in place of its database."""

from gradstat.records import Sink
from gradstat.sinks.callback import Callback
from gradstat.sinks.json_lines import JsonLines
from gradstat.sinks.tensorboard import TensorBoard

__all__ = ["Callback", "JsonLines", "Sink", "TensorBoard"]
