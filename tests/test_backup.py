"""Backups along a log: the composed form against the recursion, and what makes it a backup."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshield.values.backup import (
    SafetyBackup,
    SafetyWindow,
    reward_windows,
    safety_windows,
    window_ends,
)

SETTINGS = settings(max_examples=60)


@dataclass(frozen=True)
class Log:
    h: torch.Tensor
    next_h: torch.Tensor
    rewards: torch.Tensor
    terminated: torch.Tensor
    last: torch.Tensor
    values: torch.Tensor
    discount: float
    steps: int

    @property
    def ends(self) -> torch.Tensor:
        return window_ends(self.last, torch.arange(len(self.last)), self.steps)

    def backup(self) -> SafetyWindow:
        return safety_windows(
            self.h, self.next_h, self.terminated, self.last, self.discount, self.steps
        )


@st.composite
def logs(draw: st.DrawFn) -> Log:
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = sum(lengths)
    ends = np.cumsum(lengths) - 1
    terminated = np.zeros(count, bool)
    terminated[ends] = rng.random(len(ends)) < 0.5
    h, next_h = rng.normal(size=count), rng.normal(size=count)
    # Within an episode the next state's h is the next row's h, as in a real log.
    inner = np.setdiff1d(np.arange(count), ends)
    next_h[inner] = h[inner + 1]
    return Log(
        h=torch.tensor(h),
        next_h=torch.tensor(next_h),
        rewards=torch.tensor(rng.normal(size=count)),
        terminated=torch.tensor(terminated),
        last=torch.tensor(np.repeat(ends, lengths)),
        values=torch.tensor(rng.normal(size=count) * 2),
        discount=draw(st.sampled_from([0.3, 0.9, 0.99, 1.0])),
        steps=draw(st.integers(1, 8)),
    )


def recursion(log: Log, row: int, steps: int) -> tuple[float, int]:
    """The safety backup one step at a time; returns y and the row whose next state gave v."""
    m = max(float(log.h[row]), float(log.next_h[row]))
    if log.terminated[row]:
        return m, row
    if steps == 1 or row == int(log.last[row]):
        later, end = float(log.values[row]), row
    else:
        later, end = recursion(log, row + 1, steps - 1)
    return (1 - log.discount) * m + log.discount * max(m, later), end


@given(log=logs())
@SETTINGS
def test_composed_coefficients_equal_the_recursion(log: Log) -> None:
    backup = log.backup()
    targets = backup.target(log.values[log.ends])
    for row in range(len(log.h)):
        expected, end = recursion(log, row, log.steps)
        assert abs(float(targets[row]) - expected) < 1e-12
        assert int(log.ends[row]) == end


@given(log=logs())
@SETTINGS
def test_windows_stop_at_the_end_of_the_episode(log: Log) -> None:
    """The ends are where the recursion takes its value; nothing is read beyond the episode."""
    for row in range(len(log.h)):
        assert recursion(log, row, log.steps)[1] == int(log.ends[row]) or log.terminated[row]
        assert row <= int(log.ends[row]) <= int(log.last[row])


@given(log=logs(), seed=st.integers(0, 1000))
@SETTINGS
def test_nothing_of_another_episode_enters(log: Log, seed: int) -> None:
    backup = log.backup()
    mine = log.last == log.last[0]
    noise = torch.tensor(np.random.default_rng(seed).normal(size=len(log.h)))
    other = Log(
        torch.where(mine, log.h, noise),
        torch.where(mine, log.next_h, noise),
        log.rewards,
        log.terminated & mine,
        log.last,
        torch.where(mine, log.values, noise),
        log.discount,
        log.steps,
    )
    changed = other.backup()
    before, after = (x.target(log.values[log.ends])[mine] for x in (backup, changed))
    assert torch.equal(before, after)


@given(log=logs(), shift=st.floats(0, 3))
@SETTINGS
def test_monotone_and_a_contraction_by_the_slope(log: Log, shift: float) -> None:
    backup = log.backup()
    low = backup.target(log.values)
    high = backup.target(log.values + shift)
    assert bool((high >= low).all())
    assert bool((high - low <= backup.slope * shift + 1e-12).all())
    assert bool((backup.slope <= log.discount + 1e-12).all())
    length = (log.ends - torch.arange(len(log.h)) + 1).double()
    alive = ~log.terminated[log.ends]
    torch.testing.assert_close(backup.slope, alive * log.discount**length)


@given(log=logs())
@SETTINGS
def test_never_below_the_constraint_of_either_end_of_the_step(log: Log) -> None:
    m = torch.maximum(log.h, log.next_h)
    for value in (log.values, torch.full_like(m, -1e6)):
        assert bool((log.backup().target(value) >= m - 1e-12).all())


@given(log=logs())
@SETTINGS
def test_one_step_is_the_papers_form(log: Log) -> None:
    m, g = torch.maximum(log.h, log.next_h), log.discount
    bootstrapped = (1 - g) * m + g * torch.maximum(m, log.values)
    expected = torch.where(log.terminated, m, bootstrapped)
    window = safety_windows(log.h, log.next_h, log.terminated, log.last, g)
    for one in (window, SafetyBackup.one_step(m, log.terminated, g)):
        torch.testing.assert_close(one.target(log.values), expected, rtol=0, atol=1e-12)


def test_termination_cuts_and_truncation_bootstraps() -> None:
    h, last = torch.tensor([-1.0, -1.0]), torch.tensor([1, 1])
    for steps in (1, 2, 5):
        ended = safety_windows(h, h, torch.tensor([False, True]), last, 0.9, steps)
        cut = safety_windows(h, h, torch.tensor([False, False]), last, 0.9, steps)
        far = torch.tensor([5.0, 5.0])
        assert float(ended.target(far)[1]) == -1.0
        assert float(cut.target(far)[1]) > 4.0


def test_the_violation_that_ends_an_episode_reaches_the_steps_before_it() -> None:
    # Only the last state, which the log names in next_constraints alone, is a violation.
    h, next_h = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.0, 2.0])
    backup = safety_windows(
        h, next_h, torch.tensor([False, False, True]), torch.full((3,), 2), 0.5, 3
    )
    assert backup.target(torch.full((3,), -9.0)).tolist() == [-0.25, 0.5, 2.0]


@given(log=logs())
@SETTINGS
def test_reward_backup_equals_the_discounted_sum(log: Log) -> None:
    backup = reward_windows(log.rewards, log.terminated, log.last, log.discount, log.steps)
    targets = backup.target(log.values[log.ends])
    for row in range(len(log.h)):
        total, weight, at = 0.0, 1.0, row
        for _ in range(log.steps):
            total += weight * float(log.rewards[at])
            weight *= log.discount * (not log.terminated[at])
            if at == int(log.last[at]):
                break
            at += 1
        else:
            at -= 1
        assert int(log.ends[row]) == min(row + log.steps - 1, int(log.last[row]))
        total += weight * float(log.values[min(row + log.steps - 1, int(log.last[row]))])
        assert abs(float(targets[row]) - total) < 1e-12
