r"""The pilot: it proposes the few thresholds that a calibration tests.

The pilot may look at its episodes as often as it likes, because no test uses their seeds. Let
n = max(2.5 / epsilon, 50). To look at a threshold, it plays n / 4 episodes of each policy at a
time. The threshold is bad as soon as more than 0.4 epsilon n episodes of one policy violate. It is
good after n episodes of each policy of which at most a share 0.2 epsilon violates, else after 2 n.
The rate of a good threshold is about 0.2 epsilon or lower, at which the test passes with
probability 0.93.

A bisection over a grid of thresholds finds L, the most permissive good threshold, which is the
first one to be tested. A few thresholds between it and the next more permissive one of the grid are
looked at as well, if the two replace clearly different shares of the steps or certify clearly
different shares of the starts. If the bisection finds no good threshold, the pilot looks at the
whole grid, because a stricter threshold can be worse.

The grid falls geometrically, by a factor of sqrt(2), from the largest -V_h over the starts. It also
holds quantiles of -V_h, which matter where all starts have nearly the same value, and 0.

If the test of L fails, the pilot looks at the strictest threshold of the grid, and at one in the
middle of those that are stricter than L. Of all thresholds above L that are good, S has the lowest
rate of violations. Thresholds stricter than S are not proposed, because a stricter shield can
violate more often. The walk (see `walk`) then tests S, the geometric mean of S and 2 L, and 2 L,
with fresh seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from safeshield.calibration.trials import MOST_RESETS_PER_EPISODE, Trials

_EPISODES = 2.5
_LEAST_EPISODES = 50
_GOOD = 0.2
"""Largest rate that looks good, as a share of the promised one."""
_STEPS = 16
_PARTS = 4
"""Number of parts in which n episodes are played."""
_REFINEMENTS = 2
_NEXT = 2.0
_PREFERRED_SHARE = 0.5
_SHARE_MATTERS = 1.05
_REPLACED_MATTERS = 1.15
_PART = 2**15
"""Distance between the first seeds of two parts of the episodes."""


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
        grid: Thresholds to consider, in decreasing order.
        first_seed: Seed of the environment in the first episode, the same for all thresholds.
    """

    trials: Trials
    grid: list[float]
    first_seed: int
    _seen: dict[float, _Seen] = field(default_factory=dict, init=False)

    def permissive(self) -> float:
        """Return L, the most permissive threshold that looks good.

        Where none looks good, it is the threshold with the lowest rate of violations.
        """
        least = self._bisect(self._wide())
        if least is None:
            least = next((delta for delta in reversed(self.grid) if self.good(delta)), None)
        return self._lowest(self._seen) if least is None else least

    def stricter(self, least: float) -> list[float]:
        """Return at most three thresholds above `least` to test, in decreasing order.

        The list is empty where none of them looks good.

        Args:
            least: A threshold that failed its test, although it was the most permissive good one.
        """
        above = [delta for delta in self._wide() if delta > least]
        for delta in above[:1] + above[len(above) // 2 :][:1]:
            self.good(delta)
        good = [delta for delta, seen in self._seen.items() if delta > least and not seen.bad]
        if not good:
            return []
        safest = self._lowest(good)
        near = _NEXT * least if least > 0 else self.grid[-2]
        between = [near, math.sqrt(safest * near)] if near < safest else []
        return sorted({safest, *between}, reverse=True)

    def good(self, delta: float) -> bool:
        """Return whether a threshold looks good; its episodes are played at the first call.

        Args:
            delta: The threshold's distance from 0.
        """
        if delta in self._seen:
            return not self._seen[delta].bad
        share = self.trials.promise.share
        part = math.ceil(max(_EPISODES / share, _LEAST_EPISODES) / _PARTS)
        limit = _GOOD * share * part * 2 * _PARTS
        seen = self._seen[delta] = _Seen()
        for number in range(2 * _PARTS):
            seed = self.first_seed + number * _PART
            for name in self.trials.names:
                most = limit - seen.sums.get(name, 0.0)
                total, count = self.trials.pilot(delta, name, part, most, seed)
                seen.add(name, total, count, self._replaced(delta, name))
                seen.bad = total > most
                if seen.bad:
                    return False
            if number + 1 == _PARTS and max(seen.sums.values()) <= limit / 2:
                break
        return True

    def _wide(self) -> list[float]:
        """Return the thresholds that do not certify much fewer starts than the threshold 0."""
        least = _PREFERRED_SHARE * self._share(0.0)
        return [delta for delta in self.grid if self._share(delta) >= least]

    def _share(self, delta: float) -> float:
        return float(np.mean(self.trials.values <= -delta))

    def _lowest(self, deltas: Iterable[float]) -> float:
        """Return the threshold with the lowest rate of violations.

        Of equal rates it is the strictest one if there were no violations. Otherwise it is the most
        permissive one, because the stricter ones did not help.
        """
        rates = {delta: self._seen[delta].worst for delta in deltas}
        least = min(rates.values())
        equal = [delta for delta, rate in rates.items() if rate == least]
        return min(equal) if least > 0 else max(equal)

    def _replaced(self, delta: float, name: str) -> float:
        """Return the share of steps that a threshold has replaced so far for one policy."""
        found = (one for one in self.trials.points if (one.delta, one.policy) == (delta, name))
        return next(found).intervention_rate

    def _bisect(self, deltas: list[float]) -> float | None:
        """Return the last good one of falling thresholds, if the good ones come first.

        It may lie between two of them. The result is None where none was found.
        """
        low, high = -1, len(deltas)
        while high - low > 1:
            middle = (low + high) // 2
            if self.good(deltas[middle]):
                low = middle
            else:
                high = middle
        if low < 0 or high == len(deltas) or not self._differ(deltas[low], deltas[high]):
            return deltas[low] if low >= 0 else None
        return self._refine(deltas[low], deltas[high])

    def _differ(self, strict: float, soft: float) -> bool:
        """Return whether a threshold between these two, both played, could matter to a user."""
        if self._share(soft) > _SHARE_MATTERS * self._share(strict):
            return True
        more, less = self._seen[strict].replaced, self._seen[soft].replaced
        return any(more[name] > _REPLACED_MATTERS * less[name] for name in less)

    def _refine(self, good: float, bad: float) -> float:
        for _ in range(_REFINEMENTS):
            middle = math.sqrt(good * bad) if bad > 0 else good / 2
            if self.good(middle):
                good = middle
            else:
                bad = middle
        return good


@dataclass
class _Seen:
    """What the pilot has seen of a threshold."""

    bad: bool = False
    sums: dict[str, float] = field(default_factory=dict)
    """Sums of the scores by policy."""
    counts: dict[str, int] = field(default_factory=dict)
    """Numbers of episodes by policy."""
    replaced: dict[str, float] = field(default_factory=dict)
    """Shares of steps that were replaced in the first part of the episodes, by policy."""

    def add(self, name: str, total: float, count: int, replaced: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0) + count
        self.replaced.setdefault(name, replaced)

    @property
    def worst(self) -> float:
        """Highest mean score of a policy."""
        return max(self.sums[name] / self.counts[name] for name in self.sums)
