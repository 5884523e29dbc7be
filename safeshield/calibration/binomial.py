"""Upper confidence bounds for a violation rate, after Clopper and Pearson (1934).

The bound eps for k violations in N independent episodes solves

    sum_{i=0..k} C(N, i) eps^i (1 - eps)^(N - i) = b    <=>    eps = 1 - Beta.ppf(b; N - k, k + 1)

With confidence 1 - b over the draw of the N episodes, the probability that a new episode of the
same kind violates is at most eps. N counts EPISODES. The steps of one episode depend on each other,
so a bound that counts steps as trials would be too small.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def upper_bound(episodes: int, violations: int, confidence: float) -> float:
    """Return the upper bound eps of the violation rate for k violations in N episodes.

    Args:
        episodes: N >= 1.
        violations: 0 <= k <= N.
        confidence: 1 - b, in (0, 1).

    Raises:
        ValueError: An argument is out of range.

    >>> [round(upper_bound(n, k, 0.999), 4) for n, k in [(1000, 0), (1000, 5), (10_000, 5)]]
    [0.0069, 0.0164, 0.0016]
    >>> round(upper_bound(500, 0, 0.95), 4)
    0.006
    """
    if episodes < 1 or not 0 <= violations <= episodes:
        raise ValueError(
            f"need 0 <= violations <= episodes and episodes >= 1, got {violations} and {episodes}"
        )
    check_probability("confidence", confidence)
    if violations == episodes:
        return 1.0
    # The import stands here because SciPy's statistics load slowly and a shield that only runs
    # needs no bound.
    from scipy.stats import beta

    return float(1.0 - beta.ppf(1.0 - confidence, episodes - violations, violations + 1))


def masses(episodes: int, most: int, rate: float) -> npt.NDArray[np.float64]:
    """Return the probabilities (most + 1,) of i = 0, ..., `most` violations in N episodes.

    They are p_0 = (1 - rate)^N and p_i = p_(i-1) rate / (1 - rate) (N - i + 1) / i, by logarithms.

    Args:
        episodes: N.
        most: The largest i.
        rate: Violation rate of an episode, in [0, 1].

    >>> masses(2, 3, 0.5).round(12).tolist()
    [0.25, 0.5, 0.25, 0.0]
    """
    if rate >= 1.0:
        return np.equal(np.arange(most + 1), episodes).astype(np.float64)
    i = np.arange(1.0, most + 1.0)
    with np.errstate(divide="ignore"):
        odds = np.log(rate) - np.log1p(-rate)
        factors = odds + np.log(np.maximum(episodes - i + 1.0, 0.0) / i)
    first = episodes * math.log1p(-rate)
    return np.asarray(np.exp(np.cumsum(np.concatenate([[first], factors]))), np.float64)


def at_most(violations: int, episodes: int, rate: float) -> float:
    """Return the probability of at most k violations in N episodes. It decreases in the rate.

    The bound of k violations is the rate at which it is b, so that the bound is at most a rate
    where the probability at this rate is at most b. Unlike `upper_bound` it needs no SciPy.

    Args:
        violations: k.
        episodes: N.
        rate: Violation rate of an episode, in [0, 1].

    >>> round(at_most(0, 459, 0.01), 5), round(at_most(0, 458, 0.01), 5)
    (0.00992, 0.01002)
    """
    return min(float(masses(episodes, violations, rate).sum()), 1.0)


def clean_run(epsilon: float, confidence: float) -> int:
    """Return ln b / ln(1 - epsilon), rounded up: the episodes that show epsilon without violations.

    Where this is a whole number but for rounding, the result may be wrong by 1.

    Args:
        epsilon: Violation rate to show.
        confidence: Confidence of the test.
    """
    return max(math.ceil(math.log1p(-confidence) / math.log1p(-epsilon)), 1)


def violations_allowed(episodes: int, epsilon: float, confidence: float) -> int:
    """Return the largest number of violations k for which the bound of N episodes is at most eps.

    The result is -1 where the bound is above eps even for k = 0.

    Args:
        episodes: Number N of episodes of a test.
        epsilon: Violation rate to show.
        confidence: Confidence of the test.

    >>> violations_allowed(458, 0.01, 0.99), violations_allowed(459, 0.01, 0.99)
    (-1, 0)
    """
    check_probability("epsilon", epsilon)
    low, high = -1, episodes
    while high - low > 1:
        middle = (low + high) // 2
        if upper_bound(episodes, middle, confidence) <= epsilon:
            low = middle
        else:
            high = middle
    return low


def episodes_needed(epsilon: float, confidence: float, violations: int = 0) -> int:
    """Return the smallest N for which the bound with `violations` violations is at most eps.

    Args:
        epsilon: Violation rate to show.
        confidence: Confidence of the test.
        violations: Number of violations that the test should tolerate.

    >>> episodes_needed(0.01, 0.99), episodes_needed(0.01, 0.99, violations=1)
    (459, 662)
    """
    check_probability("epsilon", epsilon)
    check_probability("confidence", confidence)
    low = max(violations, 1)
    high = max(low, clean_run(epsilon, confidence))
    while upper_bound(high, violations, confidence) > epsilon:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        if upper_bound(middle, violations, confidence) <= epsilon:
            high = middle
        else:
            low = middle + 1
    return high


def check_probability(name: str, value: float) -> None:
    """Raise ValueError unless a number lies inside (0, 1)."""
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")
