"""Two-sided 95% confidence intervals of a rate and of a mean."""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

Interval: TypeAlias = tuple[float, float]
LEVEL = 0.95
"""Two-sided confidence of every interval."""


def binomial_interval(successes: int, trials: int) -> Interval:
    """Return Clopper and Pearson's two-sided 95% interval for k successes in N trials.

    Raises:
        ValueError: There is no trial, or `successes` is outside [0, trials].

    >>> [round(bound, 4) for bound in binomial_interval(0, 1000)]
    [0.0, 0.0037]
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials >= 1, got {successes} and {trials}")
    interval = stats.binomtest(successes, trials).proportion_ci(LEVEL, method="exact")
    return float(interval.low), float(interval.high)


def mean_interval(values: npt.ArrayLike) -> Interval | None:
    """Return Student's two-sided 95% interval for the mean of values (N,); None for N = 1."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return None
    reach = float(stats.t.ppf(0.5 * (1.0 + LEVEL), len(array) - 1))
    reach *= float(array.std(ddof=1)) / math.sqrt(len(array))
    middle = float(array.mean())
    return middle - reach, middle + reach
