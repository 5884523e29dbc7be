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
    """(n, obs) observations before the step, as rows of `spaces.rows`."""
    candidates: Array
    """`candidates` of the `SafeProposals` in the states before the step."""
    log_mu: Array
    """`log_mu` of these proposals."""
    actions: Array
    """(n, act) executed actions, as rows. A `Replay` of discrete actions keeps their indices (n,)
    among all choices instead."""
    rewards: Array
    """(n,) rewards of the step."""
    next_observations: Array
    """(n, obs) observations after the step; at an episode's end, its last observation."""
    next_candidates: Array
    """`candidates` in the states after the step; without meaning where an episode terminated."""
    next_log_mu: Array
    """`log_mu` of these proposals."""
    terminated: npt.NDArray[np.bool_]
    """(n,) whether the episode terminated in the state after the step."""

    def take(self, rows: Array) -> Step:
        """Return the steps with these indices `rows` (k,), as a `Step` of k rows."""
        return Step(*(part[rows] for part in self))


class Replay:
    """A ring buffer of transitions in NumPy, allocated when the first step is added.

    Args:
        capacity: Number of transitions that are kept; the oldest are overwritten.
        codec: Converter of actions to rows. Where it is of discrete actions, the buffer keeps their
            indices among all choices.
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
        """Append the n transitions of `step`; where the buffer is full, they replace the oldest."""
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
        """Return the filled part of the field `name` of `Step`, one row for each transition."""
        column: Array = getattr(self._filled(), name)[: len(self)]
        return column

    def transitions(self, rows: Array, scaling: Scaling, device: torch.device) -> Transitions:
        """Return a batch of stored transitions as tensors, in the networks' units.

        Args:
            rows: (n,) indices of the transitions in the buffer.
            scaling: Units of the networks' inputs.
            device: Device of the tensors.
        """
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
    """Return the proposals in n states as a `Support`, tensors in the networks' units.

    Args:
        rows: (n, obs) observations.
        candidates: `SafeProposals.candidates`: (n, m, act) samples of continuous actions, or
            (n, 0, act) where actions are discrete.
        log_mu: `SafeProposals.log_mu`: (n, c) log probabilities of all c choices where actions are
            discrete. For continuous actions it is not used, and each of the m samples gets -log m.
        scaling: Units of the networks' inputs.
        codec: Converter of actions to rows, which tells whether actions are discrete.
        device: Device of the tensors.
    """
    if not codec.discrete:
        each = candidates.shape[1]
        log_mu = np.full((len(candidates), each), -np.log(each), np.float32)
        candidates = scaling.actions(candidates)
    parts = (scaling.observations(rows), candidates, log_mu)
    return Support(*(_moved(part, device) for part in parts))


def _moved(array: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
