"""What has been experienced, with what the behaviour offered there: a ring of transitions."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from safeshield.online.losses import Support, Transitions
from safeshield.online.offers import Offer
from safeshield.proposals.choices import choice_index
from safeshield.spaces.rows import SpaceCodec
from safeshield.spaces.scaling import Scaling

Array = npt.NDArray[Any]


class Step(NamedTuple):
    """One step of n environments, as rows; `after` offers nothing where an episode terminated."""

    observations: Array
    """(n, obs)."""
    here: Offer
    actions: Array
    """(n, act) executed."""
    rewards: Array
    """(n,)."""
    next_observations: Array
    """(n, obs)."""
    after: Offer
    terminated: npt.NDArray[np.bool_]
    """(n,)."""

    def take(self, rows: Array) -> Step:
        """Return some of the rows."""
        here, after = (Offer(*(part[rows] for part in one)) for one in (self.here, self.after))
        return Step(
            self.observations[rows], here, self.actions[rows], self.rewards[rows],
            self.next_observations[rows], after, self.terminated[rows],
        )  # fmt: skip


class Replay:
    """A ring of transitions in NumPy; memory is taken once, when the first step is added.

    Args:
        capacity: transitions that are kept; the oldest give way.
        played: rows of actions.
    """

    def __init__(self, capacity: int, played: SpaceCodec) -> None:
        self._capacity = capacity
        self._played = played
        self._arrays: dict[str, Array] = {}
        self._next = 0
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, self._capacity)

    def add(self, step: Step) -> None:
        """Append n transitions."""
        actions = step.actions.astype(np.float32)
        if self._played.discrete:
            actions = choice_index(self._played, actions[:, None])[:, 0].astype(np.int64)
        new: dict[str, Array] = {
            "observations": step.observations.astype(np.float32),
            "actions": actions,
            "rewards": step.rewards.astype(np.float32),
            "terminated": step.terminated,
            "next_observations": step.next_observations.astype(np.float32),
            "candidates": step.here.candidates,
            "log_mu": step.here.log_mu,
            "next_candidates": step.after.candidates,
            "next_log_mu": step.after.log_mu,
        }
        if not self._arrays:
            for name, array in new.items():
                self._arrays[name] = np.zeros((self._capacity, *array.shape[1:]), array.dtype)
        rows = (self._next + np.arange(len(actions))) % self._capacity
        for name, array in new.items():
            self._arrays[name][rows] = array
        self._next = int(rows[-1] + 1) % self._capacity
        self.added += len(actions)

    def column(self, name: str) -> Array:
        """Return one array as far as it is filled."""
        return self._arrays[name][: len(self)]

    def transitions(self, rows: Array, scaling: Scaling, device: torch.device) -> Transitions:
        """Return a batch on a device, in the networks' units."""

        def move(array: Array) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        def support(prefix: str) -> Support:
            rows, candidates, log_mu = (
                take[prefix + name] for name in ("observations", "candidates", "log_mu")
            )
            return support_of(rows, candidates, log_mu, scaling, self._played, device)

        take = {name: array[rows] for name, array in self._arrays.items()}
        actions = take["actions"]
        if not self._played.discrete:
            actions = scaling.actions(actions)
        return Transitions(
            support(""),
            move(actions),
            move(take["rewards"]),
            move(take["terminated"]),
            support("next_"),
        )


def support_of(
    rows: Array,
    candidates: Array,
    log_mu: Array,
    scaling: Scaling,
    played: SpaceCodec,
    device: torch.device,
) -> Support:
    """Return what an offer holds on a device, in the networks' units.

    Args:
        rows: (n, obs) observations.
        candidates: of the `Offer`.
        log_mu: likewise.
        scaling: units.
        played: rows of actions.
        device: where to.
    """
    if not played.discrete:
        each = candidates.shape[1]
        log_mu = np.full((len(candidates), each), -np.log(each), np.float32)
        candidates = scaling.actions(candidates)
    parts = (scaling.observations(rows), candidates, log_mu)
    return Support(*(torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in parts))
