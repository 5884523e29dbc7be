r"""The pilot: it proposes the few thresholds that a calibration tests.

The pilot may look at its episodes as often as it likes, because no test uses their seeds. Let
n = max(2.5 / epsilon, 50). It plays n / 4 episodes of each policy at a time, and calls a threshold
bad as soon as more than 0.4 epsilon n episodes of one policy violate. A glance ends after n / 4
episodes of each policy if at most a share 0.2 epsilon of them violates, else after n / 2. A
thorough look ends after n or 2 n in the same way. A threshold that is good by it has a rate of at
most about 0.2 epsilon, at which the test passes with probability 0.93.

First, a bisection by glances over a grid of thresholds finds the most permissive good threshold. A
few thresholds between it and the next more permissive one of the grid are looked at as well, if the
two replace clearly different shares of the steps or certify clearly different shares of the starts.
The result and stricter thresholds are then looked at thoroughly, the most permissive first, until
one is good. This is L, the first one to be tested. If no threshold is found good, the pilot looks
at the whole grid thoroughly, because a stricter threshold can be worse.

The grid falls geometrically, by a factor of sqrt(2), from the largest -V_h over the starts. It also
holds quantiles of -V_h, which matter where all starts have nearly the same value, and 0.

If the test of L fails, the pilot looks thoroughly at the strictest threshold of the grid, and at
one in the middle of those that are stricter than L. Of all thresholds above L that are good, S has
the lowest rate of violations. Thresholds stricter than S are not proposed,
because a stricter shield can violate more often. The walk (see `walk`) then tests S, the geometric
mean of S and 1.2 L, and 1.2 L, with fresh seeds.
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
_NEXT = 1.2
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
        wide = self._wide()
        found = self._bisect(wide)
        if not (found and self._most_permissive(found)):
            found = self.grid
        least = self._most_permissive(found)
        return self._lowest(self._seen) if least is None else least

    def stricter(self, least: float) -> list[float]:
        """Return at most three thresholds above `least` to test, in decreasing order.

        The list is empty where none of them looks good.

        Args:
            least: A threshold that failed its test, although it was the most permissive good one.
        """
        above = [delta for delta in self._wide() if delta > least]
        if above:
            self.good(above[0])
            self.good(above[len(above) // 2])
        good = [d for d, seen in self._seen.items() if d > least and seen.thorough]
        if not good:
            return []
        safest = self._lowest(good)
        near = _NEXT * least if least > 0 else self.grid[-2]
        between = [near, math.sqrt(safest * near)] if near < safest else []
        return sorted({safest, *between}, reverse=True)

    def good(self, delta: float, *, thorough: bool = True) -> bool:
        """Return whether a threshold looks good; its episodes are played at the first call.

        Args:
            delta: The threshold's distance from 0.
            thorough: Whether to play four times as many episodes as at a glance.
        """
        share = self.trials.promise.share
        n = max(_EPISODES / share, _LEAST_EPISODES)
        part = math.ceil(n / _PARTS)
        first, last = (_PARTS, 2 * _PARTS) if thorough else (_PARTS // 4, _PARTS // 2)
        limit = _GOOD * share * part * 2 * _PARTS
        seen = self._seen.setdefault(delta, _Seen())
        while not (seen.bad or seen.parts >= last):
            m = seen.parts * part
            if seen.parts >= first and max(seen.sums.values()) <= _GOOD * share * m:
                break
            seed = self.first_seed + seen.parts * _PART
            seen.parts += 1
            for name in self.trials.names:
                most = limit - seen.sums.get(name, 0.0)
                total, count = self.trials.pilot(delta, name, part, most, seed)
                seen.add(name, total, count)
                seen.bad = total > most
                if seen.bad:
                    break
        seen.thorough = (seen.thorough or thorough) and not seen.bad
        return not seen.bad

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

    def _most_permissive(self, deltas: list[float]) -> float | None:
        """Return the last of some falling thresholds that looks good; None if none does."""
        return next((delta for delta in reversed(deltas) if self.good(delta)), None)

    def _bisect(self, deltas: list[float]) -> list[float]:
        """Return falling thresholds up to the last good one, if the good ones come first.

        Their last ones may lie between two of `deltas`.
        """
        low, high = -1, len(deltas)
        while high - low > 1:
            middle = (low + high) // 2
            if self.good(deltas[middle], thorough=False):
                low = middle
            else:
                high = middle
        found = deltas[: low + 1]
        if found and high < len(deltas) and self._differ(found[-1], deltas[high]):
            found += self._refine(found[-1], deltas[high])
        return found

    def _differ(self, strict: float, soft: float) -> bool:
        """Return whether a threshold between these two, both played, could matter to a user."""
        if self._share(soft) > _SHARE_MATTERS * self._share(strict):
            return True
        replaced: list[dict[str, float]] = [{}, {}]
        for point in self.trials.points:
            if point.delta in (strict, soft):
                replaced[point.delta == soft].setdefault(point.policy, point.intervention_rate)
        more, less = replaced
        return any(more[name] > _REPLACED_MATTERS * less[name] for name in less)

    def _refine(self, good: float, bad: float) -> list[float]:
        """Return the thresholds between two that look good at a glance, in decreasing order."""
        found = []
        for _ in range(_REFINEMENTS):
            middle = math.sqrt(good * bad) if bad > 0 else good / 2
            if self.good(middle, thorough=False):
                found.append(middle)
                good = middle
            else:
                bad = middle
        return found


@dataclass
class _Seen:
    """What the pilot has seen of a threshold."""

    parts: int = 0
    bad: bool = False
    thorough: bool = False
    """Whether a thorough look found it good."""
    sums: dict[str, float] = field(default_factory=dict)
    """Sums of the scores by policy."""
    counts: dict[str, int] = field(default_factory=dict)
    """Numbers of episodes by policy."""

    def add(self, name: str, total: float, count: int) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0) + count

    @property
    def worst(self) -> float:
        """Highest mean score of a policy."""
        return max(self.sums[name] / self.counts[name] for name in self.sums)
