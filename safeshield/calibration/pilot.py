r"""The pilot: it proposes the few thresholds that a calibration tests.

The pilot may look at its episodes as often as it likes, because no test uses their seeds. It plays
n = max(2.5 / epsilon, 50) episodes of each policy at a threshold, and calls the threshold good if
the rate of violations is at most 0.4 epsilon. On a grid of thresholds it looks by bisection for the
most permissive good one, and refines it between two neighbours of the grid. Where no threshold of
the bisection is good, it tries the whole grid, because a stricter threshold can be worse.

The grid falls geometrically, by a factor of sqrt(2), from the largest -V_h over the starts. It also
holds quantiles of -V_h, which matter where all starts have nearly the same value, and 0.

Three thresholds are proposed at most: the strictest good one, one that is 1.2 times the most
permissive good one, and the most permissive good one. The walk (see `walk`) tests them in this
order, so that a last threshold that looked better than it is leaves one that is hardly stricter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from safeshield.calibration.trials import MOST_RESETS_PER_EPISODE, Trials

_EPISODES = 2.5
_LEAST_EPISODES = 50
_GOOD = 0.4
"""Largest rate that looks good, as a share of the promised one."""
_STEPS = 16
_REFINEMENTS = 2
_NEXT = 1.2
_PREFERRED_SHARE = 0.5


def threshold_grid(values: npt.NDArray[np.float64], quantiles: list[float]) -> list[float]:
    """Return the thresholds that a pilot considers, in decreasing order; the last one is 0.

    Args:
        values: (n,) V_h of starts, of which at least one is at most 0.
        quantiles: More thresholds to consider, such as quantiles of -V_h.
    """
    inside = -values[values <= 0]
    steps = float(inside.max()) * 2.0 ** (-0.5 * np.arange(_STEPS + 1))
    falling = sorted({*map(float, steps), *quantiles} - {0.0}, reverse=True)
    least = len(values) / MOST_RESETS_PER_EPISODE
    return [*(d for d in falling if np.count_nonzero(values <= -d) >= least), 0.0]


@dataclass
class Pilot:
    """Looks for thresholds that are worth a test.

    Args:
        trials: Plays the episodes.
        first_seed: Seed of the environment in the first episode, the same for all thresholds.
    """

    trials: Trials
    first_seed: int
    _worst: dict[float, float] = field(default_factory=dict, init=False)

    def thresholds(self, grid: list[float]) -> list[float]:
        """Return at most three thresholds to test, in decreasing order.

        The list is empty where none looks good.

        Args:
            grid: Thresholds to consider, in decreasing order.
        """
        # Thresholds that would certify few starts come last.
        wide = [d for d in grid if self._share(d) >= _PREFERRED_SHARE * self._share(0.0)]
        least = self._bisect(wide)
        if least is None:
            good = [delta for delta in grid if self.good(delta)]
            return good[-2:]
        softer = [delta for delta in grid if delta < least]
        if softer:
            least = self._refine(least, softer[0])
        strictest = max(delta for delta in self._worst if self.good(delta))
        near = _NEXT * least if least > 0 else grid[-2] if len(grid) > 1 else 0.0
        return sorted({strictest, *([near] if near < strictest else []), least}, reverse=True)

    def best(self) -> float:
        """Return the threshold that was looked at with the lowest rate of violations."""
        return min(self._worst, key=lambda delta: (self._worst[delta], -delta))

    def good(self, delta: float) -> bool:
        """Return whether a threshold looks good; its episodes are played at the first call."""
        share = self.trials.promise.share
        if delta not in self._worst:
            episodes = max(math.ceil(_EPISODES / share), _LEAST_EPISODES)
            worst = 0.0
            for name in self.trials.names:
                most = _GOOD * share * episodes
                mean = self.trials.pilot(delta, name, episodes, most, self.first_seed)
                worst = max(worst, mean)
                if worst > _GOOD * share:
                    break
            self._worst[delta] = worst
        return self._worst[delta] <= _GOOD * share

    def _share(self, delta: float) -> float:
        return float(np.mean(self.trials.values <= -delta))

    def _bisect(self, grid: list[float]) -> float | None:
        """Return the last good threshold if the good ones come first; None if none was found."""
        low, high = -1, len(grid)
        while high - low > 1:
            middle = (low + high) // 2
            if self.good(grid[middle]):
                low = middle
            else:
                high = middle
        return grid[low] if low >= 0 else None

    def _refine(self, good: float, bad: float) -> float:
        for _ in range(_REFINEMENTS):
            middle = math.sqrt(good * bad) if bad > 0 else good / 2
            if self.good(middle):
                good = middle
            else:
                bad = middle
        return good
