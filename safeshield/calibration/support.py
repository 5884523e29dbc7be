r"""Calibration of the support test by split conformal prediction over EPISODES.

An action counts as unseen where its score lies below a level. The score S of an episode of T steps
is the (k + 1)-th lowest score of its steps, with k = floor(q T). At most the share q of its steps
lies below a level l exactly where S >= l. The level is the j-th lowest score of n held-out
episodes, with j = floor(alpha (n + 1)). A new episode is exchangeable with these episodes, so its
rank among all n + 1 is uniform, and

    P(S_new < level) <= j / (n + 1) <= alpha.

Steps are not exchangeable with each other, because the steps of an episode share its policy and its
disturbances. A level that counts steps as draws does not hold for whole episodes.

Source: split conformal prediction (Vovk et al. 2005; Lei et al. 2018), with episodes as the draws.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from safeshield.data.dataset import OfflineDataset
from safeshield.files.settings import Below1, check
from safeshield.spaces.schema import check_same_space
from safeshield.spaces.shapes import Scalars
from safeshield.support.decide import SupportTest
from safeshield.support.record import SupportRecord, conformal_level
from safeshield.support.scores import SupportScore, support_score

if TYPE_CHECKING:
    from safeshield.shield.critics import SafetyModel


def episode_scores(
    scores: Scalars, starts: npt.NDArray[np.int64], share: float = 0.01
) -> npt.NDArray[np.float64]:
    """Return the score S of each episode, (E,).

    Args:
        scores: (N,) scores of the steps. NaN counts as the lowest score.
        starts: (E,) index of the first step of each episode.
        share: q in [0, 1). With 0 the score of an episode is that of its lowest step.

    >>> episode_scores(np.array([3.0, 1.0, 2.0, 5.0]), np.array([0, 3]), share=0.4).tolist()
    [2.0, 5.0]
    """
    check("share", Below1, share)
    known = np.where(np.isnan(scores), -np.inf, scores).astype(np.float64)
    parts = np.split(known, starts[1:])
    ranks = [math.floor(round(share * len(part), 9)) for part in parts]
    return np.array([np.partition(p, k)[k] for p, k in zip(parts, ranks, strict=True)])


def record_of(
    scores: Scalars,
    starts: npt.NDArray[np.int64],
    name: str,
    alpha: float = 0.1,
    share: float = 0.01,
) -> SupportRecord:
    """Return the record of a support test, whose level comes from held-out episodes.

    Args:
        scores: (N,) scores of the logged actions of the episodes, one after the other.
        starts: (E,) indices at which the episodes begin.
        name: Name of the score.
        alpha: Largest probability that a new episode has more than `share` of its steps below the
            level.
        share: Share of an episode's steps whose scores may be below the level.

    Raises:
        ValueError: An argument is out of range, there are too few episodes, or so many scores are
            not finite that the level is not finite either.
    """
    level = conformal_level(episode_scores(scores, starts, share), alpha)
    if not np.isfinite(level):
        raise ValueError(
            f"score '{name}' is not finite at {np.mean(~np.isfinite(scores)):.1%} of the held-out "
            "steps, so no level can be set: check the log for extreme observations, or use another "
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
    """Return a support test whose level comes from whole episodes that were NOT trained on.

    See `calibration.support` for the procedure and `SupportRecord.promise` for what it promises.

    Args:
        model: Safety model of a shield.
        held_out: Episodes of the policy that made the training log.
        alpha: Probability that the share of false alarms in a new episode of that policy exceeds
            `share`.
        share: Share of an episode's steps that may be false alarms. 0 allows none.
        score: A name in `SCORES`, a `SupportScore`, or None for the default score of this kind of
            actions.

    Raises:
        TypeError: `held_out` is not an OfflineDataset, or `score` is not a score.
        ValueError: The spaces differ, the score is unknown or this model does not provide it, alpha
            or share is out of range, or there are too few episodes (the message says how many).
    """
    check_held_out(model, held_out)
    chosen = support_score(score, model)
    scores = chosen(model, model.unjudged(held_out.observations), held_out.actions)
    return SupportTest(
        chosen, record_of(scores, held_out.episode_starts, chosen.name, alpha, share)
    )


def check_held_out(model: SafetyModel, held_out: object) -> None:
    """Raise unless `held_out` is a log with the spaces of a shield's `model`.

    Raises:
        TypeError: It is no `OfflineDataset`.
        ValueError: The spaces differ.
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
