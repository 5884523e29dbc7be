"""The test of whether an observation is readable, or a sensor's broken reading."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from safeshield.spaces.rows import SpaceCodec
from safeshield.spaces.scaling import Scaling
from safeshield.spaces.shapes import Observations

# Distance from the log's mean, in standard deviations, beyond which a reading counts as broken. A
# number farther away would overflow in the networks, whose result would then be NaN.
_READABLE = 1e6


class ReadableRange:
    """The ranges of an observation's entries outside which an entry is not readable.

    Args:
        codec: Codec of the observation space. An entry with whole numbers must be one of its space.
        scaling: Mean and spread of the log's observations. Any other entry must lie within 1e6
            spreads of the mean.
    """

    def __init__(self, codec: SpaceCodec, scaling: Scaling) -> None:
        mean = scaling.observation_mean.astype(np.float64)
        reach = _READABLE * scaling.observation_spread.astype(np.float64)
        counts = np.array(codec.categories, dtype=bool)
        self._counts = counts if counts.any() else None
        self._low = np.where(counts, codec.low, mean - reach)
        self._high = np.where(counts, codec.high, mean + reach)

    def entries(self, rows: Observations) -> npt.NDArray[np.bool_]:
        """Return which entries of observations `rows` are readable, (n, obs) each; NaN never is."""
        near = (rows >= self._low) & (rows <= self._high)
        if self._counts is not None:
            near &= ~self._counts | (np.floor(rows) == rows)
        return near

    @property
    def ranges(
        self,
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_] | None]:
        """Lowest and highest readable numbers (obs,), and which entries must be whole numbers.

        The last is None where no entry must be whole.
        """
        return self._low, self._high, self._counts
