r"""Backups along a log, as the coefficients of what they do to the value at their end.

One step of the safety backup maps the next state's value v to

    y = (1 - g) m + g max(m, v) = max(m, (1 - g) m + g v),      m = max(h(s), h(s')),

(FLRP eq. 7 and 9; R2PAC eq. 43; y = m where the episode terminated). Such maps v -> max(c, d + k v)
with k >= 0 are closed under composition:

    max(c1, d1 + k1 max(c2, d2 + k2 v)) = max( max(c1, d1 + k1 c2), (d1 + k1 d2) + k1 k2 v ).

So n steps along the log are three numbers a transition, that depend on the labels alone: they are
computed once for a whole log, and a target of any length costs one network evaluation, at its
end. Likewise n steps of reward are v -> r + k v. No window crosses an episode's end; one that meets
it stops there, and bootstraps from the last observation unless the episode terminated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SafetyBackup(NamedTuple):
    """The map ``v -> max(floor, offset + slope v)`` of each transition, and where v is taken."""

    floor: Tensor
    """(N,) c, in units of h."""
    offset: Tensor
    """(N,) d, in units of h."""
    slope: Tensor
    """(N,) k: discount to the power of the steps, 0 where the window meets a termination."""
    last: Tensor
    """(N,) int64: v is the value of the state that transition `last` leads to."""

    def target(self, value: Tensor) -> Tensor:
        """Return y for `value` (N,), the value at the end of each window."""
        return torch.maximum(self.floor, self.offset + self.slope * value)


class RewardBackup(NamedTuple):
    """The map ``v -> reward + slope v`` of each transition, and where v is taken."""

    reward: Tensor
    slope: Tensor
    last: Tensor

    def target(self, value: Tensor) -> Tensor:
        """Return y for `value` (N,), the value at the end of each window."""
        return self.reward + self.slope * value


def safety_backup(
    constraints: Tensor,
    next_constraints: Tensor,
    terminated: Tensor,
    episode_last: Tensor,
    discount: float,
    steps: int = 1,
    extra: Tensor | None = None,
) -> SafetyBackup:
    """Compose `steps` safety backups along the log, from every transition.

    Args:
        constraints: (N,) h(s), positive is a violation.
        next_constraints: (N,) h(s').
        terminated: (N,) bool.
        episode_last: (N,) int64, the last transition of each transition's episode.
        discount: g in (0, 1].
        steps: n >= 1. More than the longest episode has are the same as that many.
        extra: (N,) one more constraint, of the transition itself, that joins m; None: there is
            none.

    >>> h = torch.tensor([-1.0, -0.5, 0.25])
    >>> backup = safety_backup(h[:2], h[1:], torch.tensor([False, False]),
    ...                        torch.tensor([1, 1]), discount=0.5, steps=2)
    >>> backup.target(torch.tensor([0.25, 0.25])).tolist()
    [-0.125, 0.25]
    """
    m = torch.maximum(constraints, next_constraints)
    if extra is not None:
        m = torch.maximum(m, extra)
    alive = (~terminated).to(m.dtype)
    one = SafetyBackup(
        floor=m,
        offset=torch.where(terminated, m, (1.0 - discount) * m),
        slope=discount * alive,
        last=torch.arange(len(m), device=m.device),
    )
    total = one
    for _ in range(min(steps, _longest(episode_last)) - 1):
        inside = total.last < episode_last
        nxt = torch.minimum(total.last + 1, episode_last)
        floor, offset, slope = one.floor[nxt], one.offset[nxt], one.slope[nxt]
        total = SafetyBackup(
            floor=torch.where(
                inside,
                torch.maximum(total.floor, total.offset + total.slope * floor),
                total.floor,
            ),
            offset=torch.where(inside, total.offset + total.slope * offset, total.offset),
            slope=torch.where(inside, total.slope * slope, total.slope),
            last=nxt,
        )
    return total


def reward_backup(
    rewards: Tensor,
    terminated: Tensor,
    episode_last: Tensor,
    discount: float,
    steps: int = 1,
) -> RewardBackup:
    """Sum `steps` discounted rewards along the log, from every transition.

    >>> backup = reward_backup(torch.tensor([1.0, 1.0]), torch.tensor([False, True]),
    ...                        torch.tensor([1, 1]), discount=0.5, steps=2)
    >>> backup.reward.tolist(), backup.slope.tolist()
    ([1.5, 1.0], [0.0, 0.0])
    """
    one_slope = discount * (~terminated).to(rewards.dtype)
    total = RewardBackup(rewards, one_slope, torch.arange(len(rewards), device=rewards.device))
    for _ in range(min(steps, _longest(episode_last)) - 1):
        inside = total.last < episode_last
        nxt = torch.minimum(total.last + 1, episode_last)
        total = RewardBackup(
            reward=torch.where(inside, total.reward + total.slope * rewards[nxt], total.reward),
            slope=torch.where(inside, total.slope * one_slope[nxt], total.slope),
            last=nxt,
        )
    return total


def chunk_safety_target(
    reached: Tensor, inside: Tensor, terminated: Tensor, after: Tensor, discount: float
) -> Tensor:
    """Compose the backups of h given steps, of the states that they reach: (batch,).

    What `safety_backup` computes for a whole log, for a batch of chunks that need not be kept. As
    Q_h does (`values.safety`) it leaves out the state in which the chunk begins.

    Args:
        reached: (batch, h) h of the states s_{t+1} .. s_{t+h}.
        inside: (batch, h) bool, which of the steps were made.
        terminated: (batch,) bool, whether the episode terminated at the last step made.
        after: (batch,) V_h of the state after the last step.
        discount: g.

    >>> chunk_safety_target(torch.tensor([[-1.0, 0.25]]), torch.tensor([[True, True]]),
    ...                     torch.tensor([True]), torch.tensor([9.0]), 0.5).tolist()
    [-0.375]
    """
    value = after.masked_fill(terminated, -torch.inf)
    for k in reversed(range(reached.shape[1])):
        here = reached[:, k]
        backed_up = (1.0 - discount) * here + discount * torch.maximum(here, value)
        value = torch.where(inside[:, k], backed_up, value)
    return value


def _longest(episode_last: Tensor) -> int:
    """Return the number of transitions of the longest episode."""
    own = torch.arange(len(episode_last), device=episode_last.device)
    return int((episode_last - own).max()) + 1
