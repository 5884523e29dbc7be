r"""The safety backup, over one step, over the steps of a chunk, or over windows along a log.

One step of the safety backup maps the next state's value v to

    y = (1 - g) m + g max(m, v),      m = max(h(s), h(s'))

(FLRP eq. 7 and 9; R2PAC eq. 43; y = m where the episode terminated). `SafetyBackup` applies it to
one step, or to several in turn, from the last one back.

The same map is v -> max(m, (1 - g) m + g v). Such maps v -> max(c, d + k v) with k >= 0 are closed
under composition:

    max(c1, d1 + k1 max(c2, d2 + k2 v)) = max( max(c1, d1 + k1 c2), (d1 + k1 d2) + k1 k2 v ).

So n steps along the log are three numbers for each transition, which depend on the labels alone:
`SafetyWindow` computes them once for a whole log, and a target of any length costs one network
evaluation, at its end. In the same way n steps of reward are v -> r + k v (`RewardWindow`). A
window never crosses an episode's end: one that meets it stops there, and bootstraps from the last
observation unless the episode terminated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor


def back_up(constraint: Tensor, value: Tensor, discount: float) -> Tensor:
    """Return ``(1 - g) m + g max(m, v)``: one step of the safety backup.

    Args:
        constraint: m, in units of h.
        value: v of the next state; minus infinity where the episode terminated.
        discount: g in (0, 1].
    """
    return (1.0 - discount) * constraint + discount * torch.maximum(constraint, value)


@dataclass(frozen=True)
class SafetyBackup:
    """Backups of h steps in turn, of the states that they reach.

    >>> chunk = SafetyBackup(torch.tensor([[-1.0, 0.25]]), torch.tensor([[True, True]]),
    ...                      torch.tensor([True]), discount=0.5)
    >>> chunk.target(torch.tensor([9.0])).tolist()
    [-0.375]
    """

    constraints: Tensor
    """(batch, h) the constraint m of each step, in units of h(s)."""
    inside: Tensor
    """(batch, h) bool, which of the steps were made."""
    terminated: Tensor
    """(batch,) bool, whether the episode terminated at the last step made."""
    discount: float
    """g in (0, 1]."""

    @classmethod
    def one_step(cls, constraint: Tensor, terminated: Tensor, discount: float) -> Self:
        """Return the backup of one step with the constraint m (batch,).

        >>> never = torch.tensor([False])
        >>> SafetyBackup.one_step(torch.tensor([-1.0]), never, 0.5).target(torch.tensor([1.0]))
        tensor([0.])
        """
        made = torch.ones_like(terminated)
        return cls(constraint[:, None], made[:, None], terminated, discount)

    def target(self, value: Tensor) -> Tensor:
        """Return y (batch,) for the value (batch,) of the state after the last step."""
        y = value.masked_fill(self.terminated, -torch.inf)
        for k in reversed(range(self.constraints.shape[1])):
            y = torch.where(self.inside[:, k], back_up(self.constraints[:, k], y, self.discount), y)
        return y


class SafetyWindow(NamedTuple):
    """The map ``v -> max(floor, offset + slope v)`` of windows that begin at each transition."""

    floor: Tensor
    """(N,) c, in units of h."""
    offset: Tensor
    """(N,) d, in units of h."""
    slope: Tensor
    """(N,) k: discount to the power of the steps, 0 where the window meets a termination."""

    def target(self, value: Tensor) -> Tensor:
        """Return y for `value` (N,), the value at the end of each window."""
        return torch.maximum(self.floor, self.offset + self.slope * value)

    def then(self, later: SafetyWindow) -> SafetyWindow:
        """Return the windows that go on with the steps of `later`."""
        return SafetyWindow(
            torch.maximum(self.floor, self.offset + self.slope * later.floor),
            self.offset + self.slope * later.offset,
            self.slope * later.slope,
        )


class RewardWindow(NamedTuple):
    """The map ``v -> reward + slope v`` of windows that begin at each transition."""

    reward: Tensor
    """(N,) the discounted sum of the rewards inside the window."""
    slope: Tensor
    """(N,) discount to the power of the steps, 0 where the window meets a termination."""

    def target(self, value: Tensor) -> Tensor:
        """Return y for `value` (N,), the value at the end of each window."""
        return self.reward + self.slope * value

    def then(self, later: RewardWindow) -> RewardWindow:
        """Return the windows that go on with the steps of `later`."""
        return RewardWindow(self.reward + self.slope * later.reward, self.slope * later.slope)


WindowT = TypeVar("WindowT", SafetyWindow, RewardWindow)


def safety_windows(
    constraints: Tensor,
    next_constraints: Tensor,
    terminated: Tensor,
    episode_last: Tensor,
    discount: float,
    steps: int = 1,
    extra: Tensor | None = None,
) -> SafetyWindow:
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
    >>> window = safety_windows(h[:2], h[1:], torch.tensor([False, False]),
    ...                         torch.tensor([1, 1]), discount=0.5, steps=2)
    >>> window.target(torch.tensor([0.25, 0.25])).tolist()
    [-0.125, 0.25]
    """
    m = torch.maximum(constraints, next_constraints)
    if extra is not None:
        m = torch.maximum(m, extra)
    one = SafetyWindow(
        floor=m,
        offset=torch.where(terminated, m, (1.0 - discount) * m),
        slope=discount * (~terminated).to(m.dtype),
    )
    return _along(one, episode_last, steps)


def reward_windows(
    rewards: Tensor,
    terminated: Tensor,
    episode_last: Tensor,
    discount: float,
    steps: int = 1,
) -> RewardWindow:
    """Sum `steps` discounted rewards along the log, from every transition.

    >>> window = reward_windows(torch.tensor([1.0, 1.0]), torch.tensor([False, True]),
    ...                         torch.tensor([1, 1]), discount=0.5, steps=2)
    >>> window.reward.tolist(), window.slope.tolist()
    ([1.5, 1.0], [0.0, 0.0])
    """
    slope = discount * (~terminated).to(rewards.dtype)
    return _along(RewardWindow(rewards, slope), episode_last, steps)


def window_ends(episode_last: Tensor, rows: Tensor, steps: int) -> Tensor:
    """Return the last transitions (batch,) of windows of `steps` steps that begin at rows (batch,).

    The value at the end of a window is that of the state to which this transition leads.

    Args:
        episode_last: (N,) int64, the last transition of each transition's episode.
        rows: (batch,) int64.
        steps: n >= 1.
    """
    return torch.minimum(rows + steps - 1, episode_last[rows])


def rows_of(window: WindowT, rows: Tensor) -> WindowT:
    """Return the windows that begin at rows (batch,)."""
    return type(window)(*[part[rows] for part in window])


def _along(one: WindowT, episode_last: Tensor, steps: int) -> WindowT:
    """Compose windows of `steps` steps out of windows of one."""
    last = torch.arange(len(episode_last), device=episode_last.device)
    longest = int((episode_last - last).max()) + 1
    total = one
    for _ in range(min(steps, longest) - 1):
        inside = last < episode_last
        last = torch.minimum(last + 1, episode_last)
        longer = zip(total.then(rows_of(one, last)), total, strict=True)
        total = type(one)(*[torch.where(inside, new, old) for new, old in longer])
    return total
