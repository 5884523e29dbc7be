"""The test of whether an observation is readable, or a sensor's broken reading."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from safeshield.spaces.rows import SpaceCodec
from safeshield.spaces.scaling import Scaling
from safeshield.spaces.shapes import Flags, Observations

# Distance from the log's mean, in standard deviations, beyond which a reading counts as broken. A
# number farther away would overflow in the networks, whose result would then be NaN.
_READABLE = 1e6
# A row with more entries than this is tested by NumPy.
_FEW = 64
_YES = np.ones(1, np.bool_)
_YES.flags.writeable = False


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
        # Every observation whose Euclidean norm is at most this number is readable.
        self._radius = -np.inf
        if self._counts is None and codec.width <= _FEW:
            self._radius = float(np.minimum(self._high, -self._low).min())

    def rows(self, rows: Observations) -> Flags:
        """Return which observations `rows` (n, obs) are readable in every entry, (n,)."""
        # For one short row `math.hypot` is faster than NumPy. It is NaN where an entry is.
        if len(rows) == 1 and math.hypot(*rows[0].tolist()) <= self._radius:
            return _YES
        return np.asarray(np.logical_and.reduce(self.entries(rows), axis=-1))

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
