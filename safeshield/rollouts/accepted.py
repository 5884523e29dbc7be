"""Drawing episodes until enough of them begin in an accepted state, such as a certified one.

Here `accepted` is said of starts: a start is accepted where the caller's function says so, for
instance because V_h <= -delta there. It is not said of actions, as in the rest of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from safeshield.rollouts.recorded import Episode

_LEAST_SHARE = 0.05


@dataclass
class Starts:
    """Counts of the starts that were drawn and of those that were accepted."""

    drawn: int = 0
    """Number of starts drawn so far."""
    accepted: int = 0
    """Number of drawn starts that were accepted."""

    @property
    def share(self) -> float:
        """Share of the starts that were accepted. At least one start must have been drawn."""
        return self.accepted / self.drawn


def accepted_episodes(
    draw: Callable[[int, int], list[Episode]],
    accepts: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.bool_]],
    episodes: int,
    rng: np.random.Generator,
    starts: Starts,
    *,
    spare: float,
    most: int,
) -> Iterator[list[Episode]]:
    """Yield batches of whole episodes from accepted starts until there are `episodes` in all.

    The number of episodes drawn at a time follows from the share of starts accepted so far. It
    depends only on the starts, so the same episodes are drawn with and without a shield.

    Args:
        draw: Function (count, seed) that runs `count` episodes with a seed and returns them.
        accepts: Function from the first observations (n, obs) of n episodes to a bool array (n,),
            which is True where an episode is accepted.
        episodes: Total number of accepted episodes.
        rng: Generator of the seeds.
        starts: Counts to update. They are up to date whenever a batch is yielded, so that the
            caller can stop early.
        spare: Factor by which more episodes are drawn than are expected to be needed. It avoids
            small extra batches for the last few episodes.
        most: Greatest number of episodes drawn at once.
    """
    missing = episodes
    while missing > 0:
        share = max(starts.share, _LEAST_SHARE) if starts.drawn else 1.0
        wanted = math.ceil(spare * missing / share)
        runs = draw(min(wanted, most), int(rng.integers(2**31 - 1)))
        accepted: npt.NDArray[Any] = accepts(np.stack([run.observations[0] for run in runs]))
        starts.drawn += len(runs)
        starts.accepted += int(np.count_nonzero(accepted))
        batch = [run for run, counts in zip(runs, accepted, strict=True) if counts][:missing]
        missing -= len(batch)
        yield batch
