r"""The safety backup, over one step, over the steps of a chunk, or over windows along a log.

One step of the safety backup maps the next state's value v to

    y = (1 - g) m + g max(m, v),      m = max(h(s), h(s'))

(FLRP eq. 7 and 9; R2PAC eq. 43; y = m where the episode terminated). `SafetyBackup` applies this
map to one step, or to several steps in turn, beginning with the last one.

The map can also be written v -> max(m, (1 - g) m + g v). Maps of the form v -> max(c, d + k v) with
k >= 0 are closed under composition:

    max(c1, d1 + k1 max(c2, d2 + k2 v)) = max( max(c1, d1 + k1 c2), (d1 + k1 d2) + k1 k2 v ).

Therefore n steps along the log are described by three numbers c, d, k for each transition. These
numbers depend on the labels alone and are computed once for a whole log (`SafetyWindow`). A target
over any number of steps then needs one evaluation of the network, at the end of the window. In the
same way n steps of reward form the map v -> r + k v (`RewardWindow`). A window stops at the end of
its episode. There it bootstraps from the last observation, unless the episode terminated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor


def back_up(constraint: Tensor, value: Tensor, discount: float) -> Tensor:
    """Return ``(1 - g) m + g max(m, v)``, one step of the safety backup.

    Args:
        constraint: m, in units of h.
        value: Value v of the next state, in units of h; minus infinity where the episode
            terminated.
        discount: g in (0, 1].
    """
    return (1.0 - discount) * constraint + discount * torch.maximum(constraint, value)


@dataclass(frozen=True)
class SafetyBackup:
    """Safety backups over h successive steps, from the last one to the first.

    >>> chunk = SafetyBackup(torch.tensor([[-1.0, 0.25]]), torch.tensor([[True, True]]),
    ...                      torch.tensor([True]), discount=0.5)
    >>> chunk.target(torch.tensor([9.0])).tolist()
    [-0.375]
    """

    constraints: Tensor
    """(batch, h) the constraint m of each step, in units of the constraint."""
    inside: Tensor
    """(batch, h) bool, whether each of the steps was made."""
    terminated: Tensor
    """(batch,) bool, whether the episode terminated at the last step that was made."""
    discount: float
    """g in (0, 1]."""

    @classmethod
    def one_step(cls, constraint: Tensor, terminated: Tensor, discount: float) -> Self:
        """Return the backup of a single step with the constraint m (batch,).

        Args:
            constraint: (batch,) m.
            terminated: (batch,) whether the episode terminated after the step.
            discount: Discount g in (0, 1].

        >>> never = torch.tensor([False])
        >>> SafetyBackup.one_step(torch.tensor([-1.0]), never, 0.5).target(torch.tensor([1.0]))
        tensor([0.])
        """
        made = torch.ones_like(terminated)
        return cls(constraint[:, None], made[:, None], terminated, discount)

    def target(self, value: Tensor) -> Tensor:
        """Return the target y (batch,) for the value (batch,) of the state after the last step."""
        y = value.masked_fill(self.terminated, -torch.inf)
        for k in reversed(range(self.constraints.shape[1])):
            y = torch.where(self.inside[:, k], back_up(self.constraints[:, k], y, self.discount), y)
        return y


class SafetyWindow(NamedTuple):
    """The maps ``v -> max(floor, offset + slope v)`` of windows, one for each first transition."""

    floor: Tensor
    """(N,) c, in units of h."""
    offset: Tensor
    """(N,) d, in units of h."""
    slope: Tensor
    """(N,) k, the discount to the power of the number of steps; 0 where the window reaches a
    termination."""

    def target(self, value: Tensor) -> Tensor:
        """Return y for `value` (N,), the value at the end of each window."""
        return torch.maximum(self.floor, self.offset + self.slope * value)

    def then(self, later: SafetyWindow) -> SafetyWindow:
        """Return the windows that consist of these steps followed by the steps of `later`."""
        return SafetyWindow(
            torch.maximum(self.floor, self.offset + self.slope * later.floor),
            self.offset + self.slope * later.offset,
            self.slope * later.slope,
        )


class RewardWindow(NamedTuple):
    """The maps ``v -> reward + slope v`` of windows, one for each first transition."""

    reward: Tensor
    """(N,) the discounted sum of the rewards inside the window."""
    slope: Tensor
    """(N,) the discount to the power of the number of steps; 0 where the window reaches a
    termination."""

    def target(self, value: Tensor) -> Tensor:
        """Return y for `value` (N,), the value at the end of each window."""
        return self.reward + self.slope * value

    def then(self, later: RewardWindow) -> RewardWindow:
        """Return the windows that consist of these steps followed by the steps of `later`."""
        return RewardWindow(self.reward + self.slope * later.reward, self.slope * later.slope)


_PART = 65_536
"""Number of transitions whose windows are computed together, at least."""
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
    """Return the composition of `steps` safety backups along the log, from every transition.

    Args:
        constraints: (N,) h(s), positive for a violation.
        next_constraints: (N,) h(s'), in the same units.
        terminated: (N,) bool, whether the episode terminated in s'.
        episode_last: (N,) int64, index of the last transition of each transition's episode.
        discount: g in (0, 1].
        steps: n >= 1. A number above the length of the longest episode has the effect of that
            length.
        extra: (N,) a further constraint of the transition itself, which enters the maximum m; None
            for no further constraint.

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
    """Return the composition of `steps` discounted reward backups, from every transition.

    Args:
        rewards: (N,) rewards of the log.
        terminated: (N,) bool, whether the episode terminated in s'.
        episode_last: (N,) int64, index of the last transition of each transition's episode.
        discount: g in (0, 1].
        steps: Number of steps, at least 1.

    >>> window = reward_windows(torch.tensor([1.0, 1.0]), torch.tensor([False, True]),
    ...                         torch.tensor([1, 1]), discount=0.5, steps=2)
    >>> window.reward.tolist(), window.slope.tolist()
    ([1.5, 1.0], [0.0, 0.0])
    """
    slope = discount * (~terminated).to(rewards.dtype)
    return _along(RewardWindow(rewards, slope), episode_last, steps)


def window_ends(episode_last: Tensor, rows: Tensor, steps: int) -> Tensor:
    """Return the indices (batch,) of the last transitions of windows that begin at `rows`.

    The value at the end of a window is the value of the state that its last transition reaches.

    Args:
        episode_last: (N,) int64, index of the last transition of each transition's episode.
        rows: (batch,) int64, indices of the transitions at which the windows begin.
        steps: Length n >= 1 of the windows.
    """
    return torch.minimum(rows + steps - 1, episode_last[rows])


def rows_of(window: WindowT, rows: Tensor) -> WindowT:
    """Return the windows of `window` that begin at the transitions `rows` (batch,)."""
    return type(window)(*[part[rows] for part in window])


def _along(one: WindowT, episode_last: Tensor, steps: int) -> WindowT:
    """Return windows of `steps` steps, composed of windows of one step."""
    parts: list[WindowT] = []
    start = 0
    while start < len(episode_last):
        # Whole episodes, which no window leaves, so that the copies in between stay small.
        stop = int(episode_last[min(start + _PART, len(episode_last)) - 1]) + 1
        own = type(one)(*[column[start:stop] for column in one])
        parts.append(_along_part(own, episode_last[start:stop] - start, steps))
        start = stop
    return type(one)(*[torch.cat(columns) for columns in zip(*parts, strict=True)])


def _along_part(one: WindowT, episode_last: Tensor, steps: int) -> WindowT:
    last = torch.arange(len(episode_last), device=episode_last.device)
    longest = int((episode_last - last).max()) + 1
    total = one
    for _ in range(min(steps, longest) - 1):
        inside = last < episode_last
        last = torch.minimum(last + 1, episode_last)
        longer = zip(total.then(rows_of(one, last)), total, strict=True)
        total = type(one)(*[torch.where(inside, new, old) for new, old in longer])
    return total
