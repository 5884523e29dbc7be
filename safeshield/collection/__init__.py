"""Collection of logs by agents that learn under cost limits, and thinning of the logs."""

from safeshield.collection.learner import LearnerConfig
from safeshield.collection.multiplier import Multiplier
from safeshield.collection.run import LIMITS, STEPS, collect_while_learning, config_for
from safeshield.collection.thinning import Thinning

__all__ = [
    "LIMITS",
    "STEPS",
    "LearnerConfig",
    "Multiplier",
    "Thinning",
    "collect_while_learning",
    "config_for",
]
