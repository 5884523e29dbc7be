"""Online learning inside a safe set: behaviours, the collector and Safe-Support Q-learning."""

from safeshield.online.collector import OutsideSafeSetWarning, Tally, UnguardedWarning
from safeshield.online.config import SSQLConfig
from safeshield.online.refreshing import RefreshRefusedWarning
from safeshield.online.safe_proposals import MaskedUniform
from safeshield.online.safe_sets import NoSafeActionError, SafeRules
from safeshield.online.ssql import SafeSupportQLearning
from safeshield.proposals.cloned import ClonedBehaviour
from safeshield.proposals.sources import Behaviour, FlowTeacher, LoggedBehaviour
from safeshield.proposals.tabular import Tabular

__all__ = [
    "Behaviour",
    "ClonedBehaviour",
    "FlowTeacher",
    "LoggedBehaviour",
    "MaskedUniform",
    "NoSafeActionError",
    "OutsideSafeSetWarning",
    "RefreshRefusedWarning",
    "SSQLConfig",
    "SafeRules",
    "SafeSupportQLearning",
    "Tabular",
    "Tally",
    "UnguardedWarning",
]
