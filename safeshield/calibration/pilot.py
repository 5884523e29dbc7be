r"""The pilot: it proposes the few thresholds that a calibration tests.

The pilot may look at its episodes as often as it likes, because no test uses their seeds. It
evaluates a threshold by playing m episodes of each policy. Let n = max(2.5 / epsilon, 50). The
threshold is called good if at most 0.4 epsilon max(m, n) episodes of each policy violate.

First, a bisection over a grid of thresholds finds the most permissive good threshold, with
m = n / 2 for each one. This threshold and the stricter ones of the grid are then evaluated with
m = 2 n, the most permissive first, until one is good. A few thresholds between that one and the
next more permissive one of the grid are evaluated as well, if the two replace clearly different
shares of the steps or certify clearly different shares of the starts. If the bisection finds no
good threshold, the pilot evaluates the whole grid, because a stricter threshold can be worse.

The grid falls geometrically, by a factor of sqrt(2), from the largest -V_h over the starts. It also
holds quantiles of -V_h, which matter where all starts have nearly the same value, and 0.

Let L be the most permissive good threshold. The strictest threshold of the grid is evaluated with
m = 2 n as well. If it does not look safer than L, a threshold in the middle of those that are
stricter than L is evaluated in the same way. At most four thresholds are proposed: the good one S
with the lowest rate of violations, L, 1.2 L, and the geometric mean of S and 1.2 L. Thresholds
stricter than S are not proposed, because a stricter shield can violate more often. The walk (see
`walk`) tests the thresholds in falling order. If L fails its test although it looked good in the
pilot, the calibration keeps 1.2 L, which is only slightly stricter.
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
_PARTS = 4
"""Number of parts, of n / 2 episodes each, that are played before a threshold may be proposed."""
_REFINEMENTS = 2
_NEXT = 1.2
_PREFERRED_SHARE = 0.5
_SHARE_MATTERS = 1.05
_REPLACED_MATTERS = 1.15
_PART = 2**16
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
        first_seed: Seed of the environment in the first episode, the same for all thresholds.
    """

    trials: Trials
    first_seed: int
    _seen: dict[float, _Seen] = field(default_factory=dict, init=False)

    def thresholds(self, grid: list[float]) -> list[float]:
        """Return at most four thresholds to test, in decreasing order.

        The list is empty where none looks good.

        Args:
            grid: Thresholds to consider, in decreasing order.
        """
        # Thresholds that would certify few starts come last.
        wide = [d for d in grid if self._share(d) >= _PREFERRED_SHARE * self._share(0.0)]
        least = self._bisect(wide)
        if least is None:
            every = [delta for delta in grid if self.good(delta)]
            if not every:
                return []
            least = every[-1]
        softer = [delta for delta in grid if delta < least]
        if softer and self._differ(least, softer[0]):
            least = self._refine(least, softer[0])
        # If the first test fails, calibration fails. It is therefore a test of the threshold with
        # the lowest rate in the pilot, which is usually a strict one.
        self.good(wide[0])
        if self._safest() == least and (stricter := [d for d in wide if d > least]):
            self.good(stricter[len(stricter) // 2])
        safest = self._safest()
        near = _NEXT * least if least > 0 else grid[-2] if len(grid) > 1 else 0.0
        between = [near, math.sqrt(safest * near)] if near < safest else []
        return sorted({safest, *between, least}, reverse=True)

    def best(self) -> float:
        """Return the threshold that was looked at with the lowest rate of violations."""
        return min(self._seen, key=lambda delta: (self._seen[delta].worst, -delta))

    def good(self, delta: float, parts: int = _PARTS) -> bool:
        """Return whether a threshold looks good; its episodes are played at the first call.

        Args:
            delta: The threshold's distance from 0.
            parts: Number of times that n / 2 episodes are played.
        """
        share = self.trials.promise.share
        half = math.ceil(max(_EPISODES / share, _LEAST_EPISODES) / 2)
        seen = self._seen.setdefault(delta, _Seen())
        while seen.parts < parts and not seen.bad:
            first = self.first_seed + seen.parts * _PART
            seen.parts += 1
            limit = _GOOD * share * half * max(seen.parts, 2)
            for name in self.trials.names:
                most = limit - seen.sums.get(name, 0.0)
                total, count = self.trials.pilot(delta, name, half, most, first)
                seen.add(name, total, count)
                seen.bad = seen.bad or total > most
                if seen.bad:
                    break
        return not seen.bad

    def _share(self, delta: float) -> float:
        return float(np.mean(self.trials.values <= -delta))

    def _safest(self) -> float:
        """Return the threshold of the lowest rate among those that had all parts and look good.

        Of equal rates it is the strictest one if there were no violations. Otherwise it is the most
        permissive one, because the stricter ones did not help.
        """
        full = [d for d, seen in self._seen.items() if seen.parts == _PARTS and not seen.bad]
        least = min(self._seen[delta].worst for delta in full)
        equal = [delta for delta in full if self._seen[delta].worst == least]
        return min(equal) if least > 0 else max(equal)

    def _bisect(self, grid: list[float]) -> float | None:
        """Return the last good threshold if the good ones come first; None if none was found."""
        low, high = -1, len(grid)
        while high - low > 1:
            middle = (low + high) // 2
            if self.good(grid[middle], parts=1):
                low = middle
            else:
                high = middle
        return next((delta for delta in reversed(grid[: low + 1]) if self.good(delta)), None)

    def _differ(self, strict: float, soft: float) -> bool:
        """Return whether a threshold between these two could matter to a user."""
        if self._share(soft) > _SHARE_MATTERS * self._share(strict):
            return True
        replaced: list[dict[str, float]] = [{}, {}]
        self.good(soft, parts=1)
        for point in self.trials.points:
            if point.delta in (strict, soft):
                replaced[point.delta == soft].setdefault(point.policy, point.intervention_rate)
        more, less = replaced
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

    parts: int = 0
    bad: bool = False
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
