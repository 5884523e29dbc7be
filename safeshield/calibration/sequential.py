r"""An exact sequential test of a violation rate: a fixed list of looks at a growing sample.

A plan is a list of looks (n_j, k_j) for j = 0, ..., K - 1, both numbers increasing. Episodes are
taken in the order of their seeds. At look j the test passes if at most k_j of the first n_j
episodes violate, and otherwise it goes on to the next look. It fails at the last look, or earlier,
as soon as more than k_{K-1} episodes violate. The looks and their order do not depend on which
episodes finish first, because short episodes are often those that violate.

For independent episodes that violate with probability p, the probability of passing follows
exactly from the binomial distribution of the violations between two looks (`BinomialPlan.power`).
It decreases in p. The size of a test of "p <= epsilon" is its value at p = epsilon, and a plan for
confidence 1 - b has a size of at most b. The bound of a result is the rate p at which a result at
least as good has probability b; results are ordered by stages (Armitage 1957): an earlier pass is
better than a later one, and a later failure is better than an earlier one.

The rule of `sequential_plan` is: look j forgives j violations, K = round(1.5 ln(1 / b)), looks lie
2.5 / epsilon episodes apart, and the first look is the smallest for which the size is at most b.
The first look then needs about a tenth more episodes than the smallest test that forgives nothing.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from safeshield.calibration.binomial import (
    check_probability,
    clean_run,
    episodes_needed,
    masses,
    violations_allowed,
)

_BISECTIONS = 60
TOLERANCE = 1e-6
"""Relative difference of two bounds, or of two levels, that counts as rounding."""


@dataclass(frozen=True)
class Decision:
    """The end of a test."""

    passed: bool
    episodes: int
    """Number of episodes, in the order of their seeds, after which the test ended."""


@dataclass(frozen=True)
class BinomialPlan:
    """A sequential test of a rate, as a list of looks."""

    looks: tuple[tuple[int, int], ...]
    """Pairs (number of episodes, number of violations forgiven), both increasing."""
    confidence: float
    """1 - b, for the bound of a result."""

    @property
    def most(self) -> int:
        """Greatest number of episodes that the test takes."""
        return self.looks[-1][0]

    def missing(self, episodes: int) -> int:
        """Return how many more episodes the next look needs after `episodes` of them."""
        return next(n for n, _ in self.looks if n > episodes) - episodes

    def decide(self, scores: npt.NDArray[np.float64]) -> Decision | None:
        """Return how the test ends on the scores (n,) of episodes; None where it goes on.

        A score is 1 for an episode that violates and 0 for another one. The scores are in the order
        of the episodes' seeds.
        """
        counts = np.cumsum(scores > 0)
        too_many = counts > self.looks[-1][1]
        failed = int(too_many.argmax()) + 1 if too_many.any() else None
        for episodes, most in self.looks:
            if failed is not None and failed <= episodes:
                return Decision(False, failed)
            if episodes > len(counts):
                return None
            if counts[episodes - 1] <= most:
                return Decision(True, episodes)
        return Decision(False, self.most)

    def power(self, rate: float) -> float:
        """Return the exact probability of passing where episodes violate with a given rate.

        >>> plan = sequential_plan(0.01, 0.99)
        >>> [round(plan.power(rate), 4) for rate in (0.01, 0.002, 0.001)]
        [0.0099, 0.9291, 0.9974]
        """
        return 1.0 - float(self._open(self.most, rate)[1].sum())

    def bound(self, scores: npt.NDArray[np.float64]) -> float:
        """Return the upper bound of the rate that the scores (n,) up to the decision show."""
        return self.bound_of(len(scores), int(np.count_nonzero(scores)))

    def ended(self, episodes: int, violations: int) -> bool | None:
        """Return whether a test that ended after `episodes` with `violations` of them has passed.

        The result is None where `decide` ends with these counts in no order of the scores.
        """
        if violations == self.looks[-1][1] + 1 and violations <= episodes <= self.most:
            return False
        # It would have passed at an earlier look if it had seen no more than that one forgives.
        before = max((most for count, most in self.looks if count < episodes), default=-1)
        forgiven = dict(self.looks).get(episodes, -1)
        return True if before < violations <= min(forgiven, episodes) else None

    def shows(self, episodes: int, violations: int, bound: float) -> bool:
        """Return whether `bound` is `bound_of` these counts, but for rounding."""
        if not 0.0 < bound <= 1.0 or violations == episodes:
            return violations == episodes and abs(bound - 1.0) <= TOLERANCE
        below, above = bound * (1.0 - TOLERANCE), min(bound * (1.0 + TOLERANCE), 1.0)
        at_below, at_above = (
            self._at_least_as_good(episodes, violations, rate) for rate in (below, above)
        )
        return at_below > 1.0 - self.confidence >= at_above

    def bound_of(self, episodes: int, violations: int) -> float:
        """Return the upper bound of the rate that the counts of a test's end show.

        Args:
            episodes: Number of episodes up to the decision.
            violations: Number of them that violate.
        """
        if violations == episodes:
            return 1.0
        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            if self._at_least_as_good(episodes, violations, middle) > 1.0 - self.confidence:
                low = middle
            else:
                high = middle
        return high

    def _at_least_as_good(self, episodes: int, violations: int, rate: float) -> float:
        """Return the probability of an earlier pass or of at most these violations here."""
        if violations > self.looks[-1][1]:
            # The last episode made it fail: as good is whatever did not fail before.
            return 1.0 - float(self._open(episodes - 1, rate)[1][-1])
        passed, open_ = self._open(episodes, rate, look_there=False)
        return passed + float(open_[: violations + 1].sum())

    def _open(
        self, episodes: int, rate: float, *, look_there: bool = True
    ) -> tuple[float, npt.NDArray[np.float64]]:
        """Return the probability of having passed, and those of k violations while undecided.

        Both are after a number of episodes, at which a look counts only with `look_there`. The last
        entry of the probabilities is that of one violation more than the plan ever forgives.
        """
        size = self.looks[-1][1] + 2
        open_ = np.zeros(size)
        open_[0] = 1.0
        passed, before = 0.0, 0
        stops = [look for look in self.looks if look[0] < episodes + look_there]
        for count, most in [*stops, (episodes, -1)]:
            step = masses(count - before, size - 1, rate)
            # One violation too many ends the test. The mass beyond it does not come back.
            alive = np.convolve(open_[:-1], step)[: size - 1]
            open_ = np.append(alive, open_.sum() - alive.sum())
            passed += float(open_[: most + 1].sum())
            open_[: most + 1] = 0.0
            before = count
        return passed, open_


@functools.lru_cache(maxsize=64)
def sequential_plan(epsilon: float, confidence: float) -> BinomialPlan:
    """Return the plan of the sequential test of a violation rate of at most epsilon.

    Args:
        epsilon: Violation rate, in (0, 1).
        confidence: 1 - b, in (0, 1). The size of the plan is at most b.

    Raises:
        ValueError: An argument is out of range.

    >>> sequential_plan(0.05, 0.95).looks
    ((65, 0), (115, 1), (165, 2), (215, 3))
    >>> [n for n, _ in sequential_plan(0.01, 0.99).looks]
    [513, 763, 1013, 1263, 1513, 1763, 2013]
    """
    check_probability("epsilon", epsilon)
    check_probability("confidence", confidence)
    # 1 - (1 - b) differs from b by rounding; the size must be at most either of them.
    level = (1.0 - confidence) * (1.0 - 1e-9)
    count = max(round(-1.5 * math.log(level)), 1)
    gap = max(round(2.5 / epsilon), 1)

    def plan(first: int) -> BinomialPlan:
        return BinomialPlan(tuple((first + j * gap, j) for j in range(count)), confidence)

    # The first look alone forgives nothing. Rounding may make `clean_run` too large by 1.
    low = high = max(clean_run(epsilon, confidence) - 1, 1)
    while plan(high).power(epsilon) > level:
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        if plan(middle).power(epsilon) <= level:
            high = middle
        else:
            low = middle + 1
    return plan(high)


def fixed_plan(episodes: int, epsilon: float, confidence: float) -> BinomialPlan:
    """Return the plan with a single look, after a fixed number of episodes.

    Raises:
        ValueError: There are too few episodes to show epsilon even without a violation, or an
            argument is out of range.

    >>> fixed_plan(662, 0.01, 0.99).looks
    ((662, 1),)
    """
    most = -1 if episodes < 1 else violations_allowed(episodes, epsilon, confidence)
    if most < 0:
        raise ValueError(
            f"{episodes} episodes cannot show a violation rate of at most {epsilon:g} with "
            f"confidence {confidence:g}, even without a single violation: at least "
            f"{episodes_needed(epsilon, confidence)} are needed"
        )
    return BinomialPlan(((episodes, most),), confidence)
