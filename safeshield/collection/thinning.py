"""Thinning of a log on a grid of cost and return, which keeps rare kinds of episodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from safeshield.files.settings import Count, NonNegativeInt, Settings

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Thinning(Settings):
    """Selection of a given number of episodes, spread over a grid of cost and return.

    The ranges of cost and of return are divided into `bins` equal parts each. The episodes of a
    cell are put in a random order and taken in rounds: the first of every cell, then the second of
    every cell that has one, and so on. Common kinds of episodes are therefore thinned and rare ones
    are kept. DSRL draws a fixed number from each cell and drops cells with a single episode; here
    no cell is dropped.

    Raises:
        ValueError: A number is below 1, or the seed is negative.
    """

    episodes: Count | None = None
    """Number of episodes to keep in total. With None it is limited only by `cap`."""
    cap: Count | None = None
    """Greatest number of episodes to keep of a cell; None for no limit."""
    bins: Count = 30
    """Number of parts of the range of costs, and of the range of returns."""
    seed: NonNegativeInt = 0
    """Seed of the random orders."""

    def keep(self, returns: npt.ArrayLike, costs: npt.ArrayLike) -> Indices:
        """Return the indices of the episodes to keep, in ascending order.

        With the same seed, a larger `episodes` keeps all episodes that a smaller one keeps.

        Args:
            returns: (E,) return of each episode.
            costs: (E,) summed cost of each episode.

        Raises:
            ValueError: The shapes differ, or a number is not finite.

        >>> Thinning(episodes=2).keep([0.0, 0.0, 0.0, 9.0], [1.0, 1.0, 1.0, 0.0]).tolist()[-1]
        3
        """
        rewards, prices = np.asarray(returns, np.float64), np.asarray(costs, np.float64)
        if rewards.ndim != 1 or rewards.shape != prices.shape:
            raise ValueError(
                "returns and costs must have one number an episode, got shapes "
                f"{rewards.shape} and {prices.shape}"
            )
        if not (np.isfinite(rewards).all() and np.isfinite(prices).all()):
            raise ValueError("returns and costs must be finite")
        cells = self.bins * _parts(prices, self.bins) + _parts(rewards, self.bins)
        rng = np.random.default_rng(self.seed)
        rounds = _rounds(cells, rng.permutation(len(cells)))
        # Within a round the cells are in a random order.
        order: Indices = np.lexsort((rng.permutation(self.bins**2)[cells], rounds))
        order = order[rounds[order] < (len(order) if self.cap is None else self.cap)]
        return np.sort(order[: self.episodes])


def _parts(values: npt.NDArray[np.float64], bins: int) -> Indices:
    if not len(values):
        return np.zeros(0, np.int64)
    low, width = values.min(), np.ptp(values)
    if width == 0.0:
        return np.zeros(len(values), np.int64)
    parts: Indices = np.minimum((values - low) / width * bins, bins - 1).astype(np.int64)
    return parts


def _rounds(cells: Indices, shuffled: Indices) -> Indices:
    """Return, for each episode, how many of its cell come before it in the shuffled order."""
    by_cell = shuffled[np.argsort(cells[shuffled], kind="stable")]
    sorted_cells = cells[by_cell]
    first = np.flatnonzero(np.diff(sorted_cells, prepend=-1))
    lengths = np.diff(first, append=len(cells))
    rounds = np.empty(len(cells), np.int64)
    rounds[by_cell] = np.arange(len(cells)) - np.repeat(first, lengths)
    return rounds
