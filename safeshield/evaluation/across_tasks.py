"""Scores of one agent on several tasks: interquartile means with stratified bootstrap intervals.

The method is that of Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
Statistical Precipice", and of their package rliable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from safeshield.evaluation.intervals import LEVEL, Interval
from safeshield.evaluation.scores import FieldScore
from safeshield.files.schema import json_values

_TRIM = 0.25
_RESAMPLES = 50_000
_RESAMPLES_AT_ONCE = 1_000


def interquartile_mean(scores: npt.ArrayLike) -> float:
    """Return the mean of the middle half of `scores`, over all runs and tasks together.

    With the n scores in order, x(1) <= ... <= x(n), and g = floor(n / 4), it is the mean of
    x(g + 1) ... x(n - g). This is `scipy.stats.trim_mean` at 25%, as in rliable. For fewer than
    four scores it is the plain mean.

    Raises:
        ValueError: There are no scores, or one is not finite.

    >>> interquartile_mean([[0.0, 1.0, 2.0, 100.0], [3.0, 4.0, 5.0, -100.0]])
    2.5
    """
    array = np.asarray(scores, np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"scores must be finite, and at least one, got {array.tolist()}")
    return float(stats.trim_mean(array, _TRIM, axis=None))


def stratified_interval(
    scores: npt.ArrayLike, *, resamples: int = _RESAMPLES, seed: int = 0
) -> Interval:
    """Return the 95% bootstrap interval of the interquartile mean of scores (runs, tasks).

    Each resample draws, separately for every task, as many runs as the task has, with replacement.
    The tasks are the strata, so no task is left out. The interval goes from the 2.5th to the
    97.5th percentile of the resamples' interquartile means, which is rliable's default. It
    describes the spread over new runs on the same tasks. With few runs it is too narrow.

    Args:
        scores: (runs, tasks) scores, with one row for each run and one column for each task.
        resamples: Number of resamples, at least 1.
        seed: Seed of the draws.

    Raises:
        ValueError: The scores are not two-dimensional, empty or not finite, or `resamples` is
            below 1.

    >>> low, high = stratified_interval([[0.1, 0.5], [0.3, 0.7], [0.2, 0.6]], resamples=500)
    >>> 0.3 < low < 0.4 < high < 0.5
    True
    """
    array = np.asarray(scores, np.float64)
    if array.ndim != 2 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(
            f"scores must be finite and of shape (runs, tasks), got shape {array.shape}"
        )
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    runs, tasks = array.shape
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        count = min(_RESAMPLES_AT_ONCE, resamples - start)
        drawn = array[rng.integers(runs, size=(count, runs, tasks)), np.arange(tasks)]
        means.append(stats.trim_mean(drawn.reshape(count, -1), _TRIM, axis=1))
    tail = 50.0 * (1.0 - LEVEL)
    low, high = np.percentile(np.concatenate(means), [tail, 100.0 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Aggregate:
    """The scores of one agent over several tasks."""

    agent: str
    tasks: tuple[str, ...]
    runs: int
    """Number of runs of each task."""
    safe_tasks: int
    """Number of tasks on which the agent is safe."""
    mean_return: float
    """Mean of the normalised return over tasks, seeds and episodes, as the papers report it."""
    mean_cost: float
    """Mean of the normalised cost over tasks, seeds and episodes."""
    iqm_return: float
    """Interquartile mean over runs and tasks of the normalised return."""
    return_interval: Interval | None
    """95% interval of `iqm_return` (see `stratified_interval`); None with a single run."""
    iqm_cost: float
    """Interquartile mean over runs and tasks of the normalised cost."""
    cost_interval: Interval | None
    """95% interval of `iqm_cost`; None with a single run."""

    @property
    def safe(self) -> bool:
        """Whether the mean normalised cost over all tasks is at most 1."""
        return self.mean_cost <= 1.0

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {**json_values(self), "safe": self.safe}


def aggregate(
    scores: Sequence[FieldScore], *, resamples: int = _RESAMPLES, seed: int = 0
) -> Aggregate:
    """Return the combined scores of one agent on several tasks.

    Args:
        scores: One score for each task, all with the same number of runs.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap draws.

    Raises:
        ValueError: There are no scores, two are of the same task, they are of several agents, or
            their numbers of runs differ.
    """
    agents = sorted({score.agent for score in scores})
    tasks = tuple(score.task for score in scores)
    runs = sorted({len(score.runs) for score in scores})
    if len(agents) != 1 or len(set(tasks)) != len(tasks) or len(runs) != 1:
        raise ValueError(
            "scores must be of one agent, one for each task, all with the same number of runs, got "
            f"agents {agents}, tasks {list(tasks)}, runs {runs}"
        )
    returns = np.stack([score.run_returns for score in scores], axis=1)
    costs = np.stack([score.run_costs for score in scores], axis=1)
    intervals = [
        stratified_interval(one, resamples=resamples, seed=seed) if runs[0] > 1 else None
        for one in (returns, costs)
    ]
    return Aggregate(
        agent=agents[0],
        tasks=tasks,
        runs=runs[0],
        safe_tasks=sum(score.safe for score in scores),
        mean_return=float(returns.mean()),
        mean_cost=float(costs.mean()),
        iqm_return=interquartile_mean(returns),
        return_interval=intervals[0],
        iqm_cost=interquartile_mean(costs),
        cost_interval=intervals[1],
    )
