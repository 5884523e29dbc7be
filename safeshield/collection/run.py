"""Learners under several cost limits, one after the other, and the log that they leave."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from tqdm import tqdm

from safeshield.collection.learner import Learner, LearnerConfig
from safeshield.collection.lock import locked
from safeshield.collection.plan import Plan, learner_folder, refuse_foreign, versions_used
from safeshield.collection.state import Progress, load_segment, read_progress
from safeshield.collection.thinning import Indices, Thinning
from safeshield.data.dataset import OfflineDataset
from safeshield.data.labels import DEFAULT_MAGNITUDE
from safeshield.files.schema import whole
from safeshield.rollouts.copies import (
    Member,
    is_vector_env,
    spec_to_copy,
    why_alone,
)
from safeshield.spaces.generic import Env

LIMITS: tuple[float | None, ...] = (None, 25.0, 5.0, 0.0)
"""Of four learners: one for the reward alone, three under a limit on an episode's cost."""
STEPS = 200_000


def collect_while_learning(
    env: Env,
    folder: str | os.PathLike[str],
    *,
    limits: Sequence[float | None] = LIMITS,
    steps: int = STEPS,
    seed: int = 0,
    thinning: Thinning | None = None,
    config: LearnerConfig | None = None,
    label_magnitude: float = DEFAULT_MAGNITUDE,
    progress_bar: bool = False,
) -> OfflineDataset:
    """Log everything that PPO does while it learns under several cost limits, thinned on a grid.

    Every learner begins with random networks, and all of its episodes are logged, whole, from the
    first to the last: observations and actions raw, actions as they were executed. The log thus
    holds safe and reckless, poor and good behaviour. It is as DSRL made its logs (Liu et al. 2024)
    with PPO in place of a dozen algorithms.

    What is done is kept in `folder`: called again with the same arguments after an interruption,
    it goes on from the last whole segment (`LearnerConfig.segment_steps`), and the log is the same,
    bit for bit, as without the interruption, on the same machine with the same versions, where a
    reset with a seed leaves nothing of what was before. More `steps` go on with the same learners;
    another `thinning` reads the same episodes. The folder can be deleted afterwards.

    Args:
        env: a Gymnasium environment that reports ``info["cost"]`` or ``info["constraint"]``.
            Copies of it are stepped; where `gymnasium.make` cannot rebuild it, or a process can
            hold one only, it is stepped itself and `config` must ask for one environment.
        folder: where to keep state and episodes; made if need be. Models and logs in it cannot
            run code.
        limits: for each learner, its limit on the mean cost of an episode; None: none.
        steps: of each learner; rounded up to whole rollouts (`LearnerConfig.rollout` steps). Of
            what is done already nothing is taken back. Episodes under way at the end of a segment
            are played to their end besides.
        seed: of everything.
        thinning: which episodes stay; None: all.
        config: how they learn; by default `config_for(env)`.
        label_magnitude: label of an unsafe state where labels are binary; see `label_reach`.
        progress_bar: show one.

    Raises:
        ValueError: an argument out of range; `folder` is of another run, or another one is using
            it; the environment tells neither cost nor constraint, its rewards are not finite, its
            actions not bounded, or its episodes do not end.
        TypeError: a space that `spaces.rows` does not support, or a number that is not whole.
    """
    _check_env(env)
    config = config or config_for(env)
    plan = Plan.of(env, limits, seed, config, label_magnitude)
    updates = config.updates(whole("steps", steps, least=1))
    folder = Path(folder)
    refuse_foreign(folder)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(folder))
        plan.claim(folder)
        venv = stack.enter_context(_environments(env, config.num_envs))
        bar = stack.enter_context(_Bar(folder, plan, updates, shown=progress_bar))
        done = [
            Learner(
                venv,
                learner_folder(folder, number),
                limit,
                (seed, number),
                config,
                label_magnitude,
                report=bar.of(limit),
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
    return dataclasses.replace(OfflineDataset.concatenate(parts), provenance=provenance)


def config_for(env: Env) -> LearnerConfig:
    """Return the settings that an environment has by default.

    Where it cannot be copied it is stepped alone, and a rollout has as many steps all the same.

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


@contextlib.contextmanager
def _environments(env: Env, count: int) -> Iterator[VecEnv]:
    spec = spec_to_copy(env)
    if spec is None and count > 1:
        raise ValueError(
            f"num_envs must be 1 for {env}, {why_alone(env)}; got {count}. Pass "
            "LearnerConfig(num_envs=1), on the command line --set num_envs=1, or leave it out"
        )

    def make() -> Env:
        # disable_env_checker: what it would say of the copies it has said of the environment.
        owned = count > 1 and spec is not None
        inner = gym.make(spec, disable_env_checker=True) if owned and spec else env
        return Member(inner, owned=owned, freeze=False)

    venv = DummyVecEnv([make for _ in range(count)])
    try:
        yield venv
    finally:
        venv.close()


def _kept(done: Sequence[Progress], thinning: Thinning | None) -> list[Indices]:
    """Of each learner's episodes those that stay, after thinning all of them together."""
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
    """Yield the episodes of a learner that stay, a segment at a time."""
    start = 0
    for segment in range(progress.segments):
        log = load_segment(folder, segment)
        mine = indices[(indices >= start) & (indices < start + log.num_episodes)] - start
        start += log.num_episodes
        if len(mine):
            yield log.select(mine)
    if start != len(progress.returns):
        raise ValueError(
            f"{folder} holds {start} episodes, but its state tells of {len(progress.returns)}; "
            f"delete the folder {folder} to let this learner begin anew"
        )


def _provenance(
    folder: Path,
    plan: Plan,
    done: Sequence[Progress],
    kept: Sequence[Indices],
    thinning: Thinning | None,
) -> dict[str, Any]:
    stored = plan.to_json()
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
        "settings": stored["config"],
        "thinning": None if thinning is None else dataclasses.asdict(thinning),
        "versions": versions_used(folder),
    }


class _Bar:
    """A progress bar over the steps of all learners."""

    def __init__(self, folder: Path, plan: Plan, updates: int, *, shown: bool) -> None:
        numbers = range(len(plan.limits))
        before = [read_progress(learner_folder(folder, number)).updates for number in numbers]
        rollout = plan.config.rollout
        self._bar = tqdm(
            total=rollout * sum(max(updates, one) for one in before),
            initial=rollout * sum(before),
            disable=not shown,
            unit="step",
            unit_scale=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def of(self, limit: float | None) -> Callable[[int, Progress], None]:
        """Return what the learner of this limit reports to."""

        def report(steps: int, progress: Progress) -> None:
            self._bar.update(steps)
            if steps and len(progress.returns):
                recent = slice(-20, None)
                told = {
                    "limit": "none" if limit is None else f"{limit:g}",
                    "return": f"{progress.returns[recent].mean():.4g}",
                    "cost": f"{progress.costs[recent].mean():.4g}",
                }
                if progress.price is not None:
                    told["price"] = f"{progress.price:.3g}"
                self._bar.set_postfix(told, refresh=False)

        return report
