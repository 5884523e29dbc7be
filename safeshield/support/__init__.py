"""Is this action like those of the log? Scores, their calibrated level, and the test made of both.

Where the log has shown nothing, Q_h is a guess. A shield with a support test
(`Shield.with_support`) also asks how much an action looks like what the log does in that state.
"""

from safeshield.support.decide import SupportTest
from safeshield.support.record import SupportRecord, episodes_needed
from safeshield.support.scores import SCORES, SupportScore, support_score

__all__ = [
    "SCORES",
    "SupportRecord",
    "SupportScore",
    "SupportTest",
    "episodes_needed",
    "support_score",
]
