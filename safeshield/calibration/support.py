r"""The level below which an action counts as unseen: split conformal over EPISODES.

An episode of T steps has the score S = its (k + 1)-th lowest step's score, k = floor(q T): at
most the share q of its steps lies below a level l exactly where S >= l. Of n held-out episodes'
scores, sorted, the level is the j-th lowest, j = floor(alpha (n + 1)). A new episode is
exchangeable with these, so its rank among all n + 1 is uniform, and

    P(S_new < level) <= j / (n + 1) <= alpha.

Steps are not exchangeable with each other, because the steps of an episode share its policy and its
disturbances. A level that counts steps as draws does not hold for whole episodes.

Source: split conformal prediction (Vovk et al. 2005; Lei et al. 2018), an episode one draw.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from safeshield.data.dataset import OfflineDataset
from safeshield.files.settings import Below1, Inside, check
from safeshield.spaces.schema import check_same_space
from safeshield.spaces.shapes import Scalars
from safeshield.support.decide import SupportTest
from safeshield.support.record import SupportRecord, episodes_needed
from safeshield.support.scores import SupportScore, support_score

if TYPE_CHECKING:
    from safeshield.shield.critics import SafetyModel


def episode_scores(
    scores: Scalars, starts: npt.NDArray[np.int64], share: float = 0.01
) -> npt.NDArray[np.float64]:
    """Return S (E,) of each episode.

    Args:
        scores: (N,) of the steps; NaN counts as lowest.
        starts: (E,) first step of each episode.
        share: q in [0, 1); 0 takes the lowest step.

    >>> episode_scores(np.array([3.0, 1.0, 2.0, 5.0]), np.array([0, 3]), share=0.4).tolist()
    [2.0, 5.0]
    """
    check("share", Below1, share)
    known = np.where(np.isnan(scores), -np.inf, scores).astype(np.float64)
    parts = np.split(known, starts[1:])
    ranks = [math.floor(round(share * len(part), 9)) for part in parts]
    return np.array([np.partition(p, k)[k] for p, k in zip(parts, ranks, strict=True)])


def conformal_level(episodes: npt.NDArray[np.float64], alpha: float = 0.1) -> float:
    """Return the level of episodes' scores (n,): their floor(alpha (n + 1))-th lowest.

    Raises:
        ValueError: alpha is not inside (0, 1), or there are too few episodes for it.

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


def record_of(
    scores: Scalars,
    starts: npt.NDArray[np.int64],
    name: str,
    alpha: float = 0.1,
    share: float = 0.01,
) -> SupportRecord:
    """Set the level from the scores (N,) of held-out steps, of episodes that begin at `starts`.

    Raises:
        ValueError: an argument out of range, too few episodes, or so many scores that are not
            finite that the level is none.
    """
    level = conformal_level(episode_scores(scores, starts, share), alpha)
    if not np.isfinite(level):
        raise ValueError(
            f"score '{name}' is not finite at {np.mean(~np.isfinite(scores)):.1%} of the held-out "
            "steps, so no level can be set: check the log for absurd observations, or use another "
            "score"
        )
    return SupportRecord(float(alpha), float(share), len(starts), name, level)


def calibrate_support(
    model: SafetyModel,
    held_out: OfflineDataset,
    alpha: float = 0.1,
    share: float = 0.01,
    score: str | SupportScore | None = None,
) -> SupportTest:
    """Set the level of a support test from whole episodes that were NOT trained on.

    See `calibration.support` for the procedure, `SupportRecord.promise` for what it promises.

    Args:
        model: of a shield.
        held_out: episodes of the policy that made the training log.
        alpha: probability that a new episode of that policy raises more false alarms than `share`.
        share: of an episode's steps that may be false alarms; 0: none.
        score: a name of `SCORES`, a `SupportScore`, or None for the default of the actions' kind.

    Raises:
        TypeError: `held_out` is no OfflineDataset, or `score` no score.
        ValueError: spaces differ, the score is unknown or cannot be had from this model, alpha or
            share is out of range, or there are too few episodes (the message says how many).
    """
    if not isinstance(held_out, OfflineDataset):
        raise TypeError(
            f"held_out must be an OfflineDataset of whole episodes, got {type(held_out).__name__}; "
            "OfflineDataset.split makes one"
        )
    for what in ("observation_space", "action_space"):
        check_same_space(
            getattr(model, what),
            getattr(held_out, what),
            f"held_out's {what}",
            unbounded_matches_any=what == "observation_space",
        )
    chosen = support_score(score, model)
    scores = chosen(model, model.unjudged(held_out.observations), held_out.actions)
    return SupportTest(
        chosen, record_of(scores, held_out.episode_starts, chosen.name, alpha, share)
    )
