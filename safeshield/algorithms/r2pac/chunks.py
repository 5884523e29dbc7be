r"""Chunks of h consecutive steps of a log, formed a batch at a time from the log's arrays.

    (s_t, a_t, ..., a_{t+h-1}, s_{t+h})

The critics Q(s_t, a_{t:t+h}) of chunks are fitted to them (R2PAC, eq. 14). A chunk never crosses
the end of its episode:

- Where the episode was truncated, the chunk begins early enough to end with the episode.
- Where the episode TERMINATED inside the chunk, the chunk is kept, so that violations that end
  episodes stay in the data. The actions after the termination are drawn at random, so that a critic
  learns to ignore them. If they were always 0, a critic would take a 0 as the sign of a termination
  and would expect none in a plan with other numbers there. Everything else leaves these actions
  out, by `inside`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safeshield.training.log import LogTensors
from safeshield.values.backup import RewardWindow


class Chunk(NamedTuple):
    """A batch of chunks, each of which is h successive actions of the log."""

    observations: Tensor
    """(batch, obs) s_t, normalised."""
    actions: Tensor
    """(batch, h * act) actions in the order of time, in [-1, 1]; padded after a termination."""
    rows: Tensor
    """(batch, h) int64 rows of the transitions; after the episode's end, its last row again."""
    inside: Tensor
    """(batch, h) whether a step belongs to the episode, rather than being padding."""
    terminated: Tensor
    """(batch,) whether the episode terminated inside the chunk."""

    @property
    def end(self) -> Tensor:
        """(batch,) row of the last transition, whose next state is the one the chunk leads to."""
        return self.rows[:, -1]

    def discounted(self, values: Tensor, discount: float) -> Tensor:
        """Return sum_k discount^k values[k], (batch,), for values (batch, h) of the steps."""
        powers = discount ** torch.arange(values.shape[1], device=values.device)
        return (values * self.inside * powers).sum(1)

    def any(self, flags: Tensor) -> Tensor:
        """Return whether any step inside the episode has a flag, (batch,), for flags (batch, h)."""
        return (flags & self.inside).any(1)


def log_window(
    log: LogTensors,
    rows: Tensor,
    steps: int,
    values: Tensor,
    discount: float,
    fails: Tensor | None = None,
    worth: Tensor | float = 0.0,
    test_every: int = 1,
) -> RewardWindow:
    """Return the sums of up to `steps` discounted values along the log, starting at `rows`.

    `values.backup.reward_windows` computes the same for a whole log. This function computes it for
    a batch, so that the transitions that end a window may change during training.

    Args:
        log: Log; no window crosses the end of an episode.
        rows: (batch,) first rows of the windows.
        steps: Number n of steps.
        values: (N,) value of each transition.
        discount: Discount factor g.
        fails: (N,) whether a transition ends the window with the value `worth`; None means that no
            transition does.
        worth: Value of a transition that `fails` marks, in place of everything after it.
        test_every: Number of steps after which `fails` is tested, as in a window that consists of
            chunks of this length. The last transition of a window is always tested.
    """
    at = rows[:, None] + torch.arange(steps, device=rows.device)
    last = log.episode_last[rows][:, None]
    inside = at <= last
    at = torch.minimum(at, last)
    added, stops = values[at], log.terminated[at]
    if fails is not None:
        failed = fails[at]
        if test_every > 1:
            number = torch.arange(1, steps + 1, device=rows.device)
            failed &= (number % test_every == 0) | (number == steps) | (at == last)
        added, stops = torch.where(failed, worth, added), stops | failed
    # A step counts if no step before it has ended the window.
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
    """The chunks of a log whose episodes either terminate or have at least h steps.

    >>> import numpy as np
    >>> steps, no = torch.arange(3.0), torch.zeros(3, dtype=torch.bool)
    >>> log = LogTensors(steps[:, None], steps[:, None] / 4, steps, steps[:, None] + 1, steps,
    ...                  steps + 1, no, torch.full((3,), 2))
    >>> Chunks(log, 2).batch(torch.tensor([0, 2]), torch.zeros(2, 2)).actions.tolist()
    [[0.0, 0.25], [0.25, 0.5]]
    """

    log: LogTensors
    length: int
    """Number h of actions in a chunk."""

    @property
    def width(self) -> int:
        """Number of entries in the actions of a chunk: h * act."""
        return self.length * self.log.actions.shape[1]

    def batch(self, rows: Tensor, padding: Tensor) -> Chunk:
        """Return the chunks that begin at these rows, or earlier near the end of an episode.

        Args:
            rows: (batch,) rows of the log.
            padding: (batch, h * act) actions for the steps after a termination.
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
