"""Which observations a sensor can mean, and which are broken readings."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from safeshield.spaces.rows import SpaceCodec
from safeshield.spaces.scaling import Scaling
from safeshield.spaces.shapes import Observations

# Standard deviations from the log's mean beyond which a reading counts as broken, as NaN does: it
# would overflow in the networks and come out as NaN.
_READABLE = 1e6


class ReadableRange:
    """The range of each entry of an observation in which a shield judges it.

    Args:
        codec: of the observations. An entry that counts must be a whole number of its space.
        scaling: the log's mean and spread. Any other entry must lie within 1e6 spreads of the mean.
    """

    def __init__(self, codec: SpaceCodec, scaling: Scaling) -> None:
        mean = scaling.observation_mean.astype(np.float64)
        reach = _READABLE * scaling.observation_spread.astype(np.float64)
        counts = np.array(codec.categories, dtype=bool)
        self._counts = counts if counts.any() else None
        self._low = np.where(counts, codec.low, mean - reach)
        self._high = np.where(counts, codec.high, mean + reach)

    def entries(self, rows: Observations) -> npt.NDArray[np.bool_]:
        """Return which entries of observations (n, obs) are readable, (n, obs); NaN is not."""
        near = (rows >= self._low) & (rows <= self._high)
        if self._counts is not None:
            near &= ~self._counts | (np.floor(rows) == rows)
        return near
