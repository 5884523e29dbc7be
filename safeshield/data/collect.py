"""Collecting a log: whole episodes of a policy as an `OfflineDataset`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from safeshield.data.dataset import OfflineDataset
from safeshield.files.schema import versions
from safeshield.rollouts.copies import (
    behind_shield,
    check_env,
    constraint_source,
    environment_name,
    spaces_of,
)
from safeshield.rollouts.episodes import VectorStep, run_episodes
from safeshield.rollouts.infos import CONSTRAINT, COST
from safeshield.rollouts.recorded import STEP_ARRAYS, Episode
from safeshield.spaces.generic import Env, VectorEnv
from safeshield.spaces.schema import part_of
from safeshield.values.constraint import ConstraintSource, constraints_by_name, in_own_steps


def collect(
    env: Env | VectorEnv,
    policy: object,
    episodes: int,
    seed: int,
    *,
    policy_name: str | None = None,
    num_envs: int | None = None,
    observation_keys: Sequence[str] | None = None,
    step_limit: int = 100_000,
) -> OfflineDataset:
    """Run whole episodes of a policy and return them as a log.

    Labels are continuous, from ``info["constraint"]``, where the environment reports it at reset
    and at every step. Otherwise they are binary, from ``info["cost"]`` after every step, and a cost
    that is missing at reset counts as 0, a safe start. Where only the constraint is reported, the
    cost is 1 in a violation and 0 elsewhere. The logged action is ``info["action_executed"]``, the
    action that the dynamics saw, where the environment reports it. Where the environment names a
    function of the observation that gives its constraint (`values.constraint`), the log stores that
    name. Several constraints that are reported by name become one label, each in units of its own
    steps in this log (`OfflineDataset.with_constraint`). The log stores their names and units where
    a function is registered for each name.

    The provenance holds the names of the environment and, where it is given, of the policy, the
    seed, and the versions of the packages. That of a log of a shielded environment names the
    shield, its delta and its mode, under "behind_shield", and says where its threshold adapts.

    Args:
        env: A Gymnasium environment (see `vectorise` for when copies of it run) or a VectorEnv.
        policy: A policy in any form that `as_batch_policy` takes. ``"random"`` covers the action
            box. A model of Stable-Baselines3 acts deterministically; to include its noise, pass
            ``as_batch_policy(model, action_space, deterministic=False)``.
        episodes: Number of episodes, at least 1.
        seed: Seed of starts and noise. The same seed gives the same log.
        policy_name: Name of the policy, with which `Shield.calibrate_from_log` compares the agent
            that it is given.
        num_envs: Number of environments that step together.
        observation_keys: Entries of a Dict observation to log; all by default. A shield that is
            trained on the log sees only these entries, whereas the policy sees all of them.
        step_limit: Greatest length of an episode in steps. A longer episode is an error.

    Raises:
        ValueError: The environment reports neither key, which is found at its first step, or one of
            them at some steps only; or an episode does not end.
        TypeError: `spaces.rows` does not support a space, or `policy_name` is not a text.

    >>> import gymnasium, safeshield.envs
    >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=3, seed=0)
    >>> log
    OfflineDataset(1200 transitions, 3 episodes, obs 2, act 2, continuous constraints)
    """
    check_env(env)
    if policy_name is not None and (not isinstance(policy_name, str) or not policy_name):
        raise TypeError(f"policy_name must be a text, got {policy_name!r:.60}")
    observation_space, action_space = spaces_of(env)
    space = part_of(observation_space, observation_keys)
    runs = run_episodes(
        env, policy, episodes, seed, num_envs=num_envs, observation_keys=observation_keys,
        step_limit=step_limit, on_step=_check_reports,
    )  # fmt: skip
    log = log_of(runs, space, action_space)
    source = log.constraint_source
    if source is None and log.constraint_kind != "binary":
        source = constraint_source(env)
    if observation_keys is not None:
        source = None  # The function takes whole observations.
    behind = behind_shield(env)
    name = policy if policy_name is None and isinstance(policy, str) else policy_name
    provenance = {
        **({} if name is None else {"collected_by": name}),
        "environment": environment_name(env),
        "seed": seed,
        "versions": [versions()],
        **({} if behind is None else {"behind_shield": behind}),
    }
    return dataclasses.replace(log, constraint_source=source, provenance=provenance)


def log_of(
    runs: Sequence[Episode], observation_space: gym.Space[Any], action_space: gym.Space[Any]
) -> OfflineDataset:
    """Return episodes as a log. See `collect` for their labels.

    Where the episodes report several constraints whose functions are registered, the log names
    them.

    Args:
        runs: Whole episodes, in the order of the log.
        observation_space: Space of one observation.
        action_space: Space of one action.

    Raises:
        ValueError: There is no episode, they report neither key, only some of them report
            ``info["constraint"]`` or a name in it, or one of several constraints never changes.
    """
    if not runs:
        raise ValueError("runs must hold at least one episode, got none")
    labelled = [run.next_constraints is not None for run in runs]
    if not all(labelled) and any(labelled):
        raise ValueError("info['constraint'] must be reported in all episodes or in none")
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(run, name) for run in runs])
        for name in (*STEP_ARRAYS, *(("constraints", "next_constraints") if labelled[0] else ()))
    }
    arrays["costs"] = np.concatenate([_costs(run) for run in runs])
    names = [set(run.named) for run in runs]
    if any(named != names[0] for named in names):
        raise ValueError(
            f"info['constraint'] must hold the same constraints in all episodes, got "
            f"{sorted(map(sorted, names))[0]} and {sorted(map(sorted, names))[-1]}"
        )
    source: ConstraintSource | None = None
    if names[0]:
        parts = constraints_by_name(sorted(names[0]))
        now, after = (
            [np.concatenate([run.named[part.name][rows] for run in runs]) for part in parts]
            for rows in (slice(None, -1), slice(1, None))
        )
        source = in_own_steps(parts, now, after)
        if not source.available:
            warnings.warn(
                f"the constraints {[part.name for part in parts if not part.available]} are not "
                "registered, so the log does not name its constraint and the units of its labels; "
                "register their functions (register_constraint) before collecting, or label the "
                "finished log by with_constraint",
                stacklevel=2,
            )
        for key, each in (("constraints", now), ("next_constraints", after)):
            arrays[key] = source.largest(np.stack(each, axis=1))
    if not labelled[0]:
        arrays["initial_costs"] = np.array([run.initial_cost or 0.0 for run in runs])
    return OfflineDataset.from_arrays(
        **arrays,
        observation_space=observation_space,
        action_space=action_space,
        constraint_source=source.name if source is not None and source.available else None,
    )


def _costs(run: Episode) -> np.ndarray:
    if run.costs is not None:
        return run.costs
    if run.next_constraints is None:
        raise _no_reports()
    return (run.next_constraints > 0).astype(np.float32)


def _check_reports(step: VectorStep) -> None:
    """Raise an error at the very first step where the environment reports nothing to label by."""
    # The infos of an episode that ends there may be elsewhere.
    ended = step.terminated.any() or step.truncated.any()
    reported = CONSTRAINT in step.infos or COST in step.infos
    if step.wave == 0 and step.index == 0 and not ended and not reported:
        raise _no_reports()


def _no_reports() -> ValueError:
    return ValueError(
        "the environment must report info['constraint'] (h, positive is a violation) at reset and "
        "every step, or info['cost'] at every step; add safeshield.wrappers.ConstraintFromFunction "
        "or CostFromFunction"
    )
