"""Statistics of activations: units that never fire, and outputs where the derivative is flat."""

from gradstat.activations.functional import activation_stats
from gradstat.activations.monitor import ActivationMonitor
from gradstat.activations.table import ActivationStats, ActivationTable

__all__ = ["ActivationMonitor", "ActivationStats", "ActivationTable", "activation_stats"]
