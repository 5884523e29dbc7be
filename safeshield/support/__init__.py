"""The support test: scores of how similar an action is to the log's, and their calibrated level.

Q_h is not reliable for actions that the log has not shown. A shield with a support test
(`Shield.with_support`) also checks how similar an action is to the log's actions in that state.
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
