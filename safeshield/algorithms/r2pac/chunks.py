r"""A log as chunks of h consecutive steps: views, made a batch at a time from the log's own arrays.

    (s_t, a_t, ..., a_{t+h-1}, s_{t+h})

(R2PAC, eq. 14: what chunk critics Q(s_t, a_{t:t+h}) are fitted to.) A chunk never crosses the end
of its episode:

- where the episode was truncated, the chunk begins so much earlier that it ends with it;
- where it TERMINATED inside the chunk, the chunk is kept, so that violations that end episodes stay
  in the data. What would have come after plays no part: those actions are drawn at random (a critic
  learns that they do not matter; were they always 0, it would take a 0 for the sign of an end and
  foresee none in a plan that has other numbers there), and `inside` leaves them out of everything
  else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safeshield.training.log import LogTensors
from safeshield.values.backup import RewardWindow


class Chunk(NamedTuple):
    """A batch of chunks."""

    observations: Tensor
    """(batch, obs) s_t, normalised."""
    actions: Tensor
    """(batch, h * act) one action after the other, in [-1, 1]; padded after a termination."""
    rows: Tensor
    """(batch, h) int64: the transitions; the episode's last one again after its end."""
    inside: Tensor
    """(batch, h) bool: which of them were really made."""
    terminated: Tensor
    """(batch,) bool: whether the episode terminated inside the chunk."""

    @property
    def end(self) -> Tensor:
        """(batch,) the last transition: the chunk leads where it leads."""
        return self.rows[:, -1]

    def discounted(self, values: Tensor, discount: float) -> Tensor:
        """Return sum_k discount^k values[k], (batch,), of values (batch, h) of the steps."""
        powers = discount ** torch.arange(values.shape[1], device=values.device)
        return (values * self.inside * powers).sum(1)

    def any(self, flags: Tensor) -> Tensor:
        """Whether any of the steps made has a flag, (batch,), of flags (batch, h)."""
        return (flags & self.inside).any(1)


def log_window(
    log: LogTensors,
    rows: Tensor,
    steps: int,
    values: Tensor,
    discount: float,
    fails: Tensor | None = None,
    worth: float = 0.0,
) -> RewardWindow:
    """Sum up to `steps` discounted values along the log, from rows (batch,).

    What `values.backup.reward_windows` computes for a whole log, for a batch, so that what ends a
    window may change in training.

    Args:
        log: the log; no window crosses the end of an episode.
        rows: where windows begin.
        steps: n.
        values: (N,) what each transition adds.
        discount: g.
        fails: (N,) bool: transitions that end a window, worth `worth` for good; None: none does.
        worth: see `fails`.
    """
    at = rows[:, None] + torch.arange(steps, device=rows.device)
    last = log.episode_last[rows][:, None]
    inside = at <= last
    at = torch.minimum(at, last)
    added, stops = values[at], log.terminated[at]
    if fails is not None:
        failed = fails[at]
        added, stops = torch.where(failed, worth, added), stops | failed
    # A step counts where none before it has stopped the window.
    going = torch.ones_like(stops)
    going[:, 1:] = (~stops[:, :-1]).cumprod(1).bool()
    powers = discount ** torch.arange(steps, device=rows.device)
    open_end = ~(stops & inside).any(1)
    return RewardWindow(
        (added * powers * (going & inside)).sum(1),
        open_end * discount ** inside.sum(1),
    )


@dataclass(frozen=True, eq=False)
class Chunks:
    """A log of episodes that terminate, or have at least h steps.

    >>> import numpy as np
    >>> steps, no = torch.arange(3.0), torch.zeros(3, dtype=torch.bool)
    >>> log = LogTensors(steps[:, None], steps[:, None] / 4, steps, steps[:, None] + 1, steps,
    ...                  steps + 1, no, torch.full((3,), 2))
    >>> Chunks(log, 2).batch(torch.tensor([0, 2]), torch.zeros(2, 2)).actions.tolist()
    [[0.0, 0.25], [0.25, 0.5]]
    """

    log: LogTensors
    length: int
    """h."""

    @property
    def width(self) -> int:
        """Of a chunk's actions: h * act."""
        return self.length * self.log.actions.shape[1]

    def batch(self, rows: Tensor, padding: Tensor) -> Chunk:
        """Return the chunks that begin at rows (batch,), or earlier at the end of an episode.

        Args:
            rows: of the log.
            padding: (batch, h * act) actions in the place of those that were never taken.
        """
        log = self.log
        last = log.episode_last[rows]
        ends = log.terminated[last]
        start = torch.where(ends, rows, torch.minimum(rows, last - self.length + 1))
        steps = start[:, None] + torch.arange(self.length, device=rows.device)
        inside = steps <= last[:, None]
        steps = torch.minimum(steps, last[:, None])
        taken = log.actions[steps]
        filled = torch.where(inside[..., None], taken, padding.reshape(taken.shape))
        reaches = start + self.length - 1 >= last
        return Chunk(log.observations[start], filled.flatten(1), steps, inside, ends & reaches)
