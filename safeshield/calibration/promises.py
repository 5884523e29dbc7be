"""What a calibration may promise, and the test of each promise.

Each promise gives an episode a score in [0, 1], where 0 is harmless, and names a test of the mean
of the scores. `Violation` and `CostAbove` have scores of 0 and 1 and an exact sequential test of
their rate (`sequential`). `MeanCost` has the cost as a share of its declared bound and a test by
betting (`betting`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

from safeshield.calibration.betting import betting_test
from safeshield.calibration.binomial import check_probability
from safeshield.calibration.sequential import Decision, fixed_plan, sequential_plan
from safeshield.shield.record import COST_ABOVE, MEAN_COST, VIOLATION, CalibrationRecord

if TYPE_CHECKING:
    from safeshield.rollouts.recorded import Episode


class SequentialTest(Protocol):
    """A sequential test of the mean of the episodes' scores, taken in the order of their seeds."""

    @property
    def most(self) -> int:
        """Greatest number of episodes that the test takes."""
        ...

    def missing(self, episodes: int) -> int:
        """Return how many more episodes to play after `episodes` of them, before `decide`."""
        ...

    def decide(self, scores: npt.NDArray[np.float64], /) -> Decision | None:
        """Return how the test ends on scores (n,); None where it goes on."""
        ...

    def bound(self, scores: npt.NDArray[np.float64], /) -> float:
        """Return the upper bound of the mean that the scores (n,) up to the decision show."""
        ...


class _Rate:
    """A promise about the rate epsilon of episodes whose score is 1."""

    epsilon: float

    @property
    def share(self) -> float:
        """The mean of the scores that is to be shown."""
        return self.epsilon

    def test(self, confidence: float, episodes: int | None = None) -> SequentialTest:
        """Return the test at a confidence, after a fixed number of `episodes` where it is given."""
        if episodes is None:
            return sequential_plan(self.epsilon, confidence)
        return fixed_plan(episodes, self.epsilon, confidence)


@dataclass(frozen=True)
class Violation(_Rate):
    """An episode violates the constraint with probability at most epsilon.

    Args:
        epsilon: Violation rate per episode, in (0, 1).
    """

    epsilon: float

    kind: ClassVar[Literal["violation"]] = VIOLATION
    limit: ClassVar[None] = None
    bound: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_probability("epsilon", self.epsilon)

    def score(self, episode: Episode) -> float:
        """Return 1 for an episode that violates and 0 for another one."""
        return self.score_of(episode.violated, 0.0)

    def score_of(self, violated: bool, cost: float) -> float:
        """Return the score of an episode that violates or not; its cost plays no part."""
        return float(violated)


@dataclass(frozen=True)
class CostAbove(_Rate):
    """The summed cost of an episode exceeds a limit with probability at most epsilon.

    Args:
        limit: Limit of the sum of an episode's costs, at least 0.
        epsilon: Rate per episode, in (0, 1).
    """

    limit: float
    epsilon: float

    kind: ClassVar[Literal["cost above"]] = COST_ABOVE
    bound: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.limit < math.inf:
            raise ValueError(f"limit must be finite and at least 0, got {self.limit}")
        check_probability("epsilon", self.epsilon)

    def score(self, episode: Episode) -> float:
        """Return 1 for an episode whose summed cost exceeds the limit and 0 for another one."""
        return self.score_of(False, episode.total_cost)

    def score_of(self, violated: bool, cost: float) -> float:
        """Return the score of an episode with a summed cost; a violation plays no part."""
        # The comparison is negated so that NaN counts as above the limit.
        return float(not cost <= self.limit)


@dataclass(frozen=True)
class MeanCost:
    """The mean over episodes of their summed cost is at most a limit.

    Args:
        limit: Limit of the mean, above 0 and below `bound`.
        bound: Largest cost that an episode can have: the horizon times the largest cost of a step.
            It is declared, never estimated from costs that were seen. A larger cost makes the
            calibration void.
    """

    limit: float
    bound: float

    kind: ClassVar[Literal["mean cost"]] = MEAN_COST

    def __post_init__(self) -> None:
        if not 0.0 < self.limit < self.bound < math.inf:
            raise ValueError(
                f"bound must be finite and above limit, and limit above 0, got limit "
                f"{self.limit:g} and bound {self.bound:g}; bound is the largest cost that an "
                "episode can have, such as the horizon times the largest cost of a step"
            )

    @property
    def share(self) -> float:
        """The mean of the scores that is to be shown: limit / bound."""
        return self.limit / self.bound

    def score(self, episode: Episode) -> float:
        """Return the episode's cost as a share of the bound; above 1 the calibration is void."""
        return self.score_of(False, episode.total_cost)

    def score_of(self, violated: bool, cost: float) -> float:
        """Return the score of an episode with a summed cost; a violation plays no part."""
        return cost / self.bound

    def test(self, confidence: float, episodes: int | None = None) -> SequentialTest:
        """Return the test at a confidence, with at most `episodes` episodes if they are given."""
        return betting_test(self.share, confidence, episodes)


Promise = Violation | CostAbove | MeanCost
"""What a calibration may promise."""


def promised(record: CalibrationRecord) -> Promise:
    """Return the promise of a calibration's record."""
    if record.kind == VIOLATION:
        return Violation(record.epsilon)
    if record.kind == COST_ABOVE:
        return CostAbove(record.limit or 0.0, record.epsilon)
    return MeanCost(record.limit or 0.0, record.cost_bound or 0.0)
