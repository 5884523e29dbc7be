"""What a backup controller would do in the states of a log, for the values of its escape."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from safeshield.data.dataset import OfflineDataset
from safeshield.shield.backup import BackupController
from safeshield.spaces.rows import flat_actions, flat_observations
from safeshield.spaces.scaling import Scaling
from safeshield.training.log import POOL
from safeshield.values.safety import EscapeBatch

_SAME = 0.01
"""Largest difference, in half widths of the box, between two actions that count as the same."""
_QUERIES, _ROWS = 2048, 256
"""Number of states whose actions are looked for in the log, and of those compared together."""
_UNSEEN = 0.95
"""Share of the logged pairs (s, a) whose distance from the rest of the log is no further."""
_TOLERATED = 0.25
"""Share of unseen actions of the controller above which `Escape.of` warns."""


class UnseenBackupWarning(UserWarning):
    """A backup controller does what the log does not show, so its values are extrapolated."""


@dataclass(frozen=True)
class Escape:
    """The actions of a backup controller mu in the N states before the steps of a log."""

    actions: Tensor
    """(N, act) mu(s), in [-1, 1]."""
    logged: Tensor
    """(N,) bool, whether the logged action is mu(s)."""
    last: Tensor
    """(N,) int64, index of the last transition to which the log follows mu without a break. It has
    no meaning where `logged` is False."""

    def batch(self, rows: Tensor) -> EscapeBatch:
        """Return what the controller does in the states of the rows (batch,)."""
        return EscapeBatch(self.actions[rows], self.logged[rows])

    @classmethod
    def of(
        cls,
        controller: BackupController,
        dataset: OfflineDataset,
        scaling: Scaling,
        device: torch.device,
    ) -> Self:
        """Return what a controller does in the states of a log, and warn where it is unseen.

        Args:
            controller: The backup controller.
            dataset: The log.
            scaling: Scaling of observations and actions.
            device: Device of the tensors.

        Raises:
            LookupError: The controller is not registered in this process.
            ValueError: An action of the controller is not finite or not in the action space, or
                the controller does not return one action for each observation.
        """
        codecs = flat_observations(dataset.observation_space), flat_actions(dataset.action_space)
        parts = [
            controller.actions(dataset.observations[at : at + POOL], *codecs)
            for at in range(0, len(dataset), POOL)
        ]
        found, usable = (np.concatenate(part) for part in zip(*parts, strict=True))
        if not usable.all():
            row = int(usable.argmin())
            raise ValueError(
                f"the backup '{controller.name}' must return a finite action of "
                f"{dataset.action_space} for every observation of the log, got {found[row]} for "
                f"the observation {dataset.observations[row]} of row {row}"
            )
        mine, theirs = scaling.actions(found), scaling.actions(dataset.actions)
        logged = (np.abs(mine - theirs) <= _SAME).all(axis=1)
        share = _unseen_share(dataset.observations, scaling, theirs, mine)
        if share > _TOLERATED:
            warnings.warn(
                f"the backup '{controller.name}' does in {share:.0%} of the log's states what the "
                f"log does not show ({logged.mean():.1%} of its actions are the controller's), so "
                "its values are extrapolated there. Log the controller: collect(env, "
                "HandOver(policy, controller, env.action_space), ...) makes episodes that begin "
                "with a policy and end with the controller",
                UnseenBackupWarning,
                stacklevel=5,
            )
        starts, lengths = dataset.episode_starts, dataset.episode_lengths
        stop = np.append(~logged[1:], True)
        stop[starts + lengths - 1] = True
        ends = np.flatnonzero(stop)
        last = ends[np.searchsorted(ends, np.arange(len(logged)))]
        tensors = (torch.tensor(x, device=device) for x in (mine, logged, last.astype(np.int64)))
        return cls(*tensors)


def _unseen_share(
    observations: np.ndarray,
    scaling: Scaling,
    logged: np.ndarray,
    asked: np.ndarray,
    seed: int = 0,
) -> float:
    """Return the share of states in which an asked action lies further from the log than most.

    The distance of a pair (s, a) is that to the nearest of other logged pairs, in normalised units.
    A pair counts as unseen where this distance exceeds that of 95% of the logged pairs.

    Args:
        observations: (N, obs) observations.
        scaling: Scaling of observations and actions.
        logged: (N, act) the log's actions, in [-1, 1].
        asked: (N, act) actions to look for.
        seed: Seed with which rows of the log are sampled.
    """
    rows = np.random.default_rng(seed).permutation(len(observations))
    queries, others = rows[: min(_QUERIES, len(rows) // 2)], rows[_QUERIES : _QUERIES + POOL]
    if len(rows) <= 2 * _QUERIES:
        others = rows[len(queries) :]

    def pairs_of(at: np.ndarray, actions: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.hstack([scaling.observations(observations[at]), actions[at]]))

    known = pairs_of(others, logged)

    def nearest(actions: np.ndarray) -> np.ndarray:
        pairs = pairs_of(queries, actions)
        starts = range(0, len(pairs), _ROWS)
        found = [torch.cdist(pairs[at : at + _ROWS], known).amin(1) for at in starts]
        return torch.cat(found).numpy()

    return float((nearest(asked) > np.quantile(nearest(logged), _UNSEEN)).mean())
