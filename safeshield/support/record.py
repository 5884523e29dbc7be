"""The calibration record of a support test, which is kept in the shield's file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from safeshield.files.schema import json_values, record_from_json
from safeshield.files.settings import Below1, Inside, Settings, check


def episodes_needed(alpha: float) -> int:
    """Return the smallest number n of held-out episodes that can set a level: n + 1 >= 1 / alpha.

    >>> episodes_needed(0.1), episodes_needed(0.01)
    (9, 99)
    """
    check("alpha", Inside, alpha)
    return math.ceil(round(1.0 / alpha, 9)) - 1


def conformal_level(episodes: npt.NDArray[np.float64], alpha: float = 0.1) -> float:
    """Return the level: the floor(alpha (n + 1))-th lowest of the scores (n,) of episodes.

    Raises:
        ValueError: alpha is not inside (0, 1), or there are too few episodes for this alpha.

    >>> conformal_level(np.arange(9.0), alpha=0.2)
    1.0
    """
    check("alpha", Inside, alpha)
    rank = math.floor(round(alpha * (len(episodes) + 1), 9))
    if rank < 1:
        raise ValueError(
            f"{len(episodes)} held-out episodes cannot set a level for alpha {alpha:g}: at least "
            f"{episodes_needed(alpha)} are needed; hold out more, or ask for a larger alpha"
        )
    return float(np.sort(episodes)[rank - 1])


@dataclass(frozen=True)
class SupportRecord(Settings):
    """The calibration of a support test: the level of its score, and what the level promises.

    The level is set by split conformal prediction over held-out episodes (`calibration.support`).
    """

    alpha: Inside
    """Bound on the probability that more than `share` of a new episode's steps are unseen."""
    share: Below1
    """q, the share of an episode's steps that may count as unseen."""
    episodes: int
    """Number of held-out episodes that set the level."""
    score: str
    """Name of the score."""
    level: float
    """The level, in units of the score; an action with a lower score counts as unseen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.episodes < episodes_needed(self.alpha):
            raise ValueError(
                f"episodes must be an integer of at least {episodes_needed(self.alpha)} for alpha "
                f"{self.alpha:g}, got {self.episodes!r}"
            )

    @property
    def promise(self) -> str:
        """The promise of the test in words, limited to the tested conditions."""
        return (
            f"With probability at least {1.0 - self.alpha:g} over the draw of {self.episodes} "
            "held-out episodes and one more episode of the policy that made the log, from the "
            f"same starts in the same environment, at most {self.share:g} of the steps of that "
            f"one count as unseen (score '{self.score}' below {self.level:.4g}). That is the rate "
            "of false alarms on the log's own behaviour. How many of the actions that the log "
            "never showed are let pass is not promised, nor is safety."
        )

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return json_values(self)

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Return the record whose JSON values are `data`, after a check of every field.

        Raises:
            ValueError: A field is missing, unknown, of another type or out of range.
        """
        return record_from_json(cls, data, "support")
