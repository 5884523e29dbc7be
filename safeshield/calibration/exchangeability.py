r"""A test, episode by episode, of whether new values are exchangeable with those of a reference.

The value x_t is ranked among the n reference values and the new values up to and including x_t
(Vovk, Gammerman and Shafer 2005, "Algorithmic Learning in a Random World", section 7.1):

    p_t = (#{i: x_i > x_t} + U_t #{i: x_i = x_t}) / (n + t),    U_t uniform on (0, 1).

Where all values are exchangeable, the p_t are independent and uniform on (0, 1), however the values
are distributed. A gambler with a density f on (0, 1) multiplies its wealth by f(p_t). The densities
are 1, a p^(a-1) and a (1 - p)^(a-1) for two a: the last two win where values become larger, or
smaller. After each episode every gambler gives a hundredth of its wealth to a common pot, which is
shared equally, so that a change that comes late is found too (the "jumper" of Vovk et al. 2021,
"Retrain or not retrain"). The total wealth S_t starts at 1, and P(S_t >= 1/b for any t) <= b.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

_POWERS = (0.5, 0.8)
_JUMP = 0.01
_GAMBLERS = 1 + 2 * len(_POWERS)


class ExchangeabilityTest:
    """The conformal test martingale S_t of a growing list of values.

    Args:
        reference: n values to begin with, n >= 1.

    Raises:
        ValueError: There is no reference value, or one is NaN.
    """

    def __init__(self, reference: Iterable[float]) -> None:
        self._values = sorted(float(one) for one in reference)
        if not self._values or any(math.isnan(one) for one in self._values):
            raise ValueError(
                f"reference must hold one number or more, none NaN, got {len(self._values)} values"
            )
        self._logs: npt.NDArray[np.float64] = np.full(_GAMBLERS, -math.log(_GAMBLERS))

    @property
    def log_wealth(self) -> float:
        """Logarithm of S_t."""
        return float(np.logaddexp.reduce(self._logs))

    def add(self, value: float, uniform: float) -> float:
        """Add the next value and return its p_t in (0, 1).

        Args:
            value: The value, not NaN.
            uniform: U_t in (0, 1), drawn independently of the values.
        """
        values = self._values
        low, high = bisect.bisect_left(values, value), bisect.bisect_right(values, value)
        p = (len(values) - high + uniform * (high - low + 1)) / (len(values) + 1)
        values.insert(high, value)
        total = np.logaddexp.reduce(self._logs)
        shared = np.logaddexp(math.log1p(-_JUMP) + self._logs, math.log(_JUMP / _GAMBLERS) + total)
        powers = np.array(_POWERS)
        larger = np.log(powers) + (powers - 1.0) * math.log(p)
        smaller = np.log(powers) + (powers - 1.0) * math.log1p(-p)
        self._logs = shared + np.concatenate([[0.0], larger, smaller])
        return p
