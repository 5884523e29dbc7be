"""Collection of a log by learners under several cost limits, which run one after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from tqdm import tqdm

from safeshield.collection.learner import Learner, LearnerConfig
from safeshield.collection.plan import Plan, learner_folder, refuse_foreign, versions_used
from safeshield.collection.state import Progress, load_segment, read_progress
from safeshield.collection.thinning import Indices, Thinning
from safeshield.data.dataset import OfflineDataset
from safeshield.files.lock import locked
from safeshield.files.schema import json_values, whole
from safeshield.rollouts.copies import (
    Member,
    is_vector_env,
    spec_to_copy,
    why_alone,
)
from safeshield.spaces.generic import Env

LIMITS: tuple[float | None, ...] = (None, 25.0, 5.0, 0.0)
"""Default limits of four learners: one without a limit, three with a limit on an episode's cost."""
STEPS = 200_000
"""Default number of steps of each learner."""


def collect_while_learning(
    env: Env,
    folder: str | os.PathLike[str],
    *,
    limits: Sequence[float | None] = LIMITS,
    steps: int = STEPS,
    seed: int = 0,
    thinning: Thinning | None = None,
    config: LearnerConfig | None = None,
    progress_bar: bool = False,
) -> OfflineDataset:
    """Return a log of the episodes that PPO agents run while they learn under several cost limits.

    Each agent is called a learner.

    Every learner begins with random networks, and all of its episodes are logged from the first to
    the last. Logged observations are raw, and logged actions are those that were executed. The log
    therefore holds safe and reckless, good and poor behaviour. DSRL made its logs in the same way
    (Liu et al. 2024), with a dozen algorithms in place of PPO.

    State and episodes are stored in `folder`. A call with the same arguments after an interruption
    resumes from the last complete segment (`LearnerConfig.segment_steps`). The log is then the
    same, bit for bit, as without the interruption. This holds on the same machine with the same
    versions, for environments that a reset with a seed puts back completely. A call with more
    `steps` continues the same learners, and a call with another `thinning` uses the same episodes.
    The folder can be deleted afterwards.

    Args:
        env: A Gymnasium environment that reports ``info["cost"]`` or ``info["constraint"]``.
            Where it reports several constraints by name, the labels are binary;
            `OfflineDataset.with_constraint` then gives each its unit. Copies of it are stepped.
            Where `gymnasium.make` cannot rebuild it, or a process can hold only one, `env` itself
            is stepped and `config.num_envs` must be 1.
        folder: Folder for state and episodes. It is made if necessary. Reading its models and logs
            runs no code from them.
        limits: Limit of each learner on the mean cost of an episode; None for no limit.
        steps: Number of steps of each learner, rounded up to whole rollouts of
            `LearnerConfig.rollout` steps. Learners that have done more keep all their steps. The
            steps that complete the running episodes at the end of a segment come in addition.
        seed: Seed of all random numbers.
        thinning: Selection of the episodes that the log keeps. With None it keeps all.
        config: Settings of the learners; by default `config_for(env)`.
        progress_bar: Whether to show a progress bar.

    Raises:
        ValueError: An argument is out of range; `folder` belongs to another run, or another run is
            using it; the environment reports neither cost nor constraint, its rewards are not
            finite, its actions are unbounded, or its episodes do not end.
        TypeError: `spaces.rows` does not support a space, or a number is not whole.
    """
    _check_env(env)
    config = config or config_for(env)
    plan = Plan.of(env, limits, seed, config)
    updates = config.updates(whole("steps", steps, least=1))
    folder = Path(folder)
    refuse_foreign(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(folder))
        plan.claim(folder)
        venv = stack.enter_context(contextlib.closing(_environments(env, config.num_envs)))
        bar = stack.enter_context(_progress_bar(folder, plan, updates, shown=progress_bar))
        done = [
            Learner(
                venv,
                learner_folder(folder, number),
                limit,
                (seed, number),
                config,
                report=_report_to(bar, limit),
            ).learn(updates)
            for number, limit in enumerate(plan.limits)
        ]
        kept = _kept(done, thinning)
        parts = [
            part
            for number, (progress, indices) in enumerate(zip(done, kept, strict=True))
            for part in _selected(learner_folder(folder, number), progress, indices)
        ]
        provenance = _provenance(folder, plan, done, kept, thinning)
    return dataclasses.replace(OfflineDataset.concat(parts), provenance=provenance)


def config_for(env: Env) -> LearnerConfig:
    """Return the default settings of learners for the environment `env`.

    For an environment that cannot be copied `num_envs` is 1, and `rollout_steps` is larger, so that
    a rollout has the same total number of steps.

    >>> config_for(gym.make("CartPole-v1")).num_envs
    4
    """
    plain = LearnerConfig()
    if spec_to_copy(env) is not None:
        return plain
    return dataclasses.replace(plain, num_envs=1, rollout_steps=plain.rollout)


def _check_env(env: object) -> None:
    if not isinstance(env, gym.Env) or is_vector_env(env):
        raise TypeError(
            f"env must be a single Gymnasium environment, got {type(env).__name__}; make one "
            "with gymnasium.make(id)"
        )


def _environments(env: Env, count: int) -> VecEnv:
    spec = spec_to_copy(env)
    if spec is None and count > 1:
        raise ValueError(
            f"num_envs must be 1 for {env}, {why_alone(env)}; got {count}. Pass "
            "LearnerConfig(num_envs=1), on the command line --set num_envs=1, or leave it out"
        )

    def make() -> Env:
        # The checker is disabled because it has already checked the environment that is copied.
        owned = count > 1 and spec is not None
        inner = gym.make(spec, disable_env_checker=True) if owned and spec else env
        return Member(inner, owned=owned, freeze=False)

    return DummyVecEnv([make for _ in range(count)])


def _kept(done: Sequence[Progress], thinning: Thinning | None) -> list[Indices]:
    """Return the kept indices of each learner, after thinning the episodes of all together."""
    lengths = [len(progress.returns) for progress in done]
    returns = np.concatenate([progress.returns for progress in done])
    costs = np.concatenate([progress.costs for progress in done])
    indices = (
        np.arange(len(returns), dtype=np.int64)
        if thinning is None
        else thinning.keep(returns, costs)
    )
    starts = np.cumsum([0, *lengths])
    return [
        indices[(indices >= start) & (indices < stop)] - start
        for start, stop in itertools.pairwise(starts)
    ]


def _selected(folder: Path, progress: Progress, indices: Indices) -> Iterator[OfflineDataset]:
    """Yield the kept episodes of a learner, one log for each segment."""
    start = 0
    for segment in range(progress.segments):
        log = load_segment(folder, segment)
        mine = indices[(indices >= start) & (indices < start + log.num_episodes)] - start
        start += log.num_episodes
        if len(mine):
            yield log.select(mine)
    if start != len(progress.returns):
        raise ValueError(
            f"{folder} holds {start} episodes, but its state counts {len(progress.returns)}; "
            f"delete the folder {folder} to let this learner begin again"
        )


def _provenance(
    folder: Path,
    plan: Plan,
    done: Sequence[Progress],
    kept: Sequence[Indices],
    thinning: Thinning | None,
) -> dict[str, Any]:
    learners = [
        {
            "limit": limit,
            "steps": progress.updates * plan.config.rollout,
            "episodes": len(progress.returns),
            "kept": len(indices),
            "price": progress.price,
        }
        for limit, progress, indices in zip(plan.limits, done, kept, strict=True)
    ]
    return {
        "collected_by": "PPO while it learned, under cost limits",
        "environment": plan.environment,
        "wrappers": list(plan.wrappers),
        "seed": plan.seed,
        "learners": learners,
        "settings": json_values(plan.config),
        "thinning": None if thinning is None else dataclasses.asdict(thinning),
        "versions": versions_used(folder),
    }


def _progress_bar(folder: Path, plan: Plan, updates: int, *, shown: bool) -> tqdm:
    """Return a progress bar over the steps of all learners, at what they have done before."""
    numbers = range(len(plan.limits))
    before = [read_progress(learner_folder(folder, number)).updates for number in numbers]
    rollout = plan.config.rollout
    return tqdm(
        total=rollout * sum(max(updates, one) for one in before),
        initial=rollout * sum(before),
        disable=not shown,
        unit="step",
        unit_scale=True,
    )


def _report_to(bar: tqdm, limit: float | None) -> Callable[[int, Progress], None]:
    """Return the `report` function for the learner with this limit."""

    def report(steps: int, progress: Progress) -> None:
        bar.update(steps)
        if steps and len(progress.returns):
            recent = slice(-20, None)
            told = {
                "limit": "none" if limit is None else f"{limit:g}",
                "return": f"{progress.returns[recent].mean():.4g}",
                "cost": f"{progress.costs[recent].mean():.4g}",
            }
            if progress.price is not None:
                told["price"] = f"{progress.price:.3g}"
            bar.set_postfix(told, refresh=False)

    return report
