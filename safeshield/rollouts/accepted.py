"""Episodes that count only where their start is accepted, such as those of a certified set."""

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
    """How many starts were drawn so far, and how many of them were accepted."""

    drawn: int = 0
    accepted: int = 0

    @property
    def share(self) -> float:
        """Share of the starts that was accepted; at least one start must have been drawn."""
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
    """Yield whole episodes from accepted starts, batch by batch, until there are `episodes`.

    How many are drawn at a time follows from the share of accepted starts so far. All of this
    depends on the starts alone, so that it is the same with and without a shield.

    Args:
        draw: runs that many episodes with a seed.
        accepts: which first observations (n, obs) are accepted: (n,).
        episodes: how many in all.
        rng: of the seeds.
        starts: what is counted; it is up to date whenever a batch is yielded, so that the caller
            can give up.
        spare: how many more than are missing on average to draw, as a factor: the last few are
            not worth a batch of their own.
        most: episodes drawn at once.
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
