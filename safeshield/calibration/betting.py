r"""A sequential test of the mean of a bounded variable, by betting.

Let X_1, X_2, ... lie in [0, 1], in the order of the episodes' seeds, and let m be the mean that is
to be shown. A gambler who bets that the X are smaller has the wealth

    W_n = prod_{t <= n} (1 + lambda_t (m - X_t)),    0 <= lambda_t <= 1 / (1 - m),

where lambda_t may depend on X_1, ..., X_{t-1} only. If E[X_t | past] >= m for every t, then W_n is
a nonnegative supermartingale that starts at 1, and P(W_n >= 1/b for any n) <= b (Ville 1939). So
"the mean is below m" holds with confidence 1 - b as soon as W_n >= 1/b, at whatever n that occurs.

The wealth is split between two gamblers. 90% are bet at the limit lambda = 1 / (1 - m). They grow
fastest while every X is 0, so that a clean run passes after ln b / ln(1 - m) episodes, which no
test can undercut. A single X = 1 ruins them. The other 10% follow the bets of Waudby-Smith and
Ramdas (2024, aGRAPA),

    lambda_t = (m - mean_{t-1}) / (var_{t-1} + (m - mean_{t-1})^2)    clipped to [0, 1],

with the mean and the variance of the X so far, started with one observation of mean m/2 and
variance m^2. The clip keeps them from ruin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from safeshield.calibration.binomial import check_probability, episodes_needed
from safeshield.calibration.eprocess import log_growth, log_mixture
from safeshield.calibration.sequential import Decision

_BOLD = 0.9
_LENGTH = 4.5
"""Episodes that the test may take, as a multiple of a clean run's."""
_MEANS = 400


def wealth(scores: npt.NDArray[np.float64], mean: float) -> npt.NDArray[np.float64]:
    """Return log W_n (n,) after each of n scores in [0, 1], for a mean m in (0, 1).

    >>> round(float(np.exp(wealth(np.zeros(29), 0.1))[-1]), 1)
    20.7
    """
    before = np.arange(len(scores))
    totals = np.cumsum(scores) - scores
    squares = np.cumsum(scores**2) - scores**2
    centre = (mean / 2 + totals) / (before + 1)
    # The second moment that the first, imaginary observation adds is its variance and mean^2.
    spread = (1.25 * mean**2 + squares) / (before + 1) - centre**2
    ahead = mean - centre
    bets = np.clip(ahead / np.maximum(spread + ahead**2, 1e-12), 0.0, 1.0)
    bold = np.cumsum(log_growth(1.0, (mean - scores) / (1.0 - mean)))
    careful = np.cumsum(log_growth(bets, mean - scores))
    return log_mixture([bold, careful], [math.log(_BOLD), math.log1p(-_BOLD)])


@dataclass(frozen=True)
class BettingTest:
    """A test of "the mean of scores in [0, 1] is below `mean`", as `BinomialPlan` is one of a rate.

    It looks after every episode, and fails where even clean episodes could no longer make it pass.
    """

    mean: float
    """m, in (0, 1)."""
    confidence: float
    """1 - b."""
    most: int
    """Greatest number of episodes that the test takes."""

    @property
    def least(self) -> int:
        """Number of episodes after which a clean run passes: ln b / ln(1 - m), rounded up."""
        return episodes_needed(self.mean, self.confidence)

    def missing(self, episodes: int) -> int:
        """Return how many more episodes to play after `episodes` of them."""
        return min(max(self.least - episodes, self.least // 4, 1), self.most - episodes)

    def decide(self, scores: npt.NDArray[np.float64]) -> Decision | None:
        """Return how the test ends on the scores (n,); None where it goes on."""
        logs = wealth(scores[: self.most], self.mean)
        goal = -math.log1p(-self.confidence)
        passed = logs >= goal
        left = self.most - 1 - np.arange(len(logs))
        hopeless = logs - left * math.log1p(-self.mean) < goal
        ended = passed | hopeless
        if not ended.any():
            return None
        at = int(np.argmax(ended))
        return Decision(bool(passed[at]), at + 1)

    def bound(self, scores: npt.NDArray[np.float64]) -> float:
        """Return the upper bound of the mean that the scores (n,) up to the decision show.

        It is the smallest mean of a fine grid above which every mean of the grid is refuted.
        """
        goal = -math.log1p(-self.confidence)
        means = self.mean ** np.linspace(3.0, 0.0, _MEANS + 1)[:-1]
        found = 1.0
        for m in means[::-1]:
            if wealth(scores, float(m))[-1] < goal:
                break
            found = float(m)
        refuted = wealth(scores, self.mean)[-1] >= goal
        return min(found, self.mean) if refuted else found


def betting_test(mean: float, confidence: float, episodes: int | None = None) -> BettingTest:
    """Return the test of a mean of scores in [0, 1].

    Args:
        mean: m, in (0, 1).
        confidence: 1 - b, in (0, 1).
        episodes: Greatest number of episodes; by default 4.5 times the number of a clean run.

    Raises:
        ValueError: An argument is out of range, or there are too few episodes for a clean run.
    """
    check_probability("mean", mean)
    check_probability("confidence", confidence)
    least = episodes_needed(mean, confidence)
    if episodes is not None and episodes < least:
        raise ValueError(
            f"{episodes} episodes cannot show a mean of at most {mean:g} of the bound with "
            f"confidence {confidence:g}, even without any cost: at least {least} are needed"
        )
    most = math.ceil(_LENGTH * least) if episodes is None else episodes
    return BettingTest(mean, confidence, most)
