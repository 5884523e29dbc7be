"""A ring buffer of transitions, with the behaviour's proposals before and after each step."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from safeshield.online.losses import Support, Transitions
from safeshield.spaces.rows import SpaceCodec
from safeshield.spaces.scaling import Scaling

Array = npt.NDArray[Any]


class Step(NamedTuple):
    """One step of n environments, with one row for each environment."""

    observations: Array
    """(n, obs)."""
    candidates: Array
    """`candidates` of the `SafeProposals` in the states before the step."""
    log_mu: Array
    """`log_mu` of these proposals."""
    actions: Array
    """(n, act) executed actions."""
    rewards: Array
    """(n,)."""
    next_observations: Array
    """(n, obs)."""
    next_candidates: Array
    """`candidates` in the states after the step; without meaning where an episode terminated."""
    next_log_mu: Array
    """`log_mu` of these proposals."""
    terminated: npt.NDArray[np.bool_]
    """(n,)."""

    def take(self, rows: Array) -> Step:
        """Return some of the rows."""
        return Step(*(part[rows] for part in self))


class Replay:
    """A ring buffer of transitions in NumPy, allocated when the first step is added.

    Args:
        capacity: number of transitions that are kept; the oldest are overwritten.
        codec: converts actions to rows.
    """

    def __init__(self, capacity: int, codec: SpaceCodec) -> None:
        self._capacity = capacity
        self._codec = codec
        self._ring: Step | None = None
        self._next = 0
        self.added = 0

    def __len__(self) -> int:
        return min(self.added, self._capacity)

    def add(self, step: Step) -> None:
        """Append n transitions."""
        actions: Array = step.actions.astype(np.float32)
        if self._codec.discrete:
            actions = self._codec.choice_index(actions)
        step = step._replace(
            observations=step.observations.astype(np.float32),
            actions=actions,
            rewards=step.rewards.astype(np.float32),
            next_observations=step.next_observations.astype(np.float32),
        )
        if self._ring is None:
            self._ring = Step(
                *(np.zeros((self._capacity, *part.shape[1:]), part.dtype) for part in step)
            )
        rows = (self._next + np.arange(len(step.rewards))) % self._capacity
        for ring, part in zip(self._ring, step, strict=True):
            ring[rows] = part
        self._next = int(rows[-1] + 1) % self._capacity
        self.added += len(rows)

    def _filled(self) -> Step:
        if self._ring is None:
            raise RuntimeError("nothing has been added to the replay yet")
        return self._ring

    def column(self, name: str) -> Array:
        """Return the filled part of one field of `Step`."""
        column: Array = getattr(self._filled(), name)[: len(self)]
        return column

    def transitions(self, rows: Array, scaling: Scaling, device: torch.device) -> Transitions:
        """Return a batch on a device, in the networks' units."""
        step, codec = self._filled().take(rows), self._codec
        actions = step.actions if codec.discrete else scaling.actions(step.actions)
        here = support_of(step.observations, step.candidates, step.log_mu, scaling, codec, device)
        after = support_of(
            step.next_observations, step.next_candidates, step.next_log_mu, scaling, codec, device
        )
        return Transitions(
            here,
            _moved(actions, device),
            _moved(step.rewards, device),
            _moved(step.terminated, device),
            after,
        )


def support_of(
    rows: Array,
    candidates: Array,
    log_mu: Array,
    scaling: Scaling,
    codec: SpaceCodec,
    device: torch.device,
) -> Support:
    """Return proposals as tensors on a device, in the networks' units.

    Args:
        rows: (n, obs) observations.
        candidates: `SafeProposals.candidates`.
        log_mu: `SafeProposals.log_mu`.
        scaling: units of the networks' inputs.
        codec: converts actions to rows.
        device: device of the tensors.
    """
    if not codec.discrete:
        each = candidates.shape[1]
        log_mu = np.full((len(candidates), each), -np.log(each), np.float32)
        candidates = scaling.actions(candidates)
    parts = (scaling.observations(rows), candidates, log_mu)
    return Support(*(_moved(part, device) for part in parts))


def _moved(array: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
