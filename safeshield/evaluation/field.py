"""Running the episodes of a score: several seeds, parallel copies and worker processes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from safeshield.evaluation.episodes import ShieldLike, draw_episodes
from safeshield.evaluation.scores import (
    COST_LIMIT,
    FieldScore,
    ReferenceReturns,
    Run,
    check_references,
    normalised_cost,
)
from safeshield.files.schema import whole
from safeshield.rollouts.copies import (
    check_env,
    copies,
    environment_name,
    is_vector_env,
    most_together,
    one_per_process,
    refuse_vector_env,
    spec_to_copy,
)
from safeshield.rollouts.recorded import intervention_rate
from safeshield.shield.nested import is_shielded_policy, shielding_layer
from safeshield.spaces.generic import Env, VectorEnv

SEEDS = (0, 1, 2)
EPISODES = 20
"""Number of episodes for each seed. `SEEDS` and `EPISODES` are those of R2PAC's table."""


def field_score(
    env: Env | VectorEnv,
    policy: object,
    *,
    references: ReferenceReturns,
    cost_limit: float = COST_LIMIT,
    seeds: Sequence[int] = SEEDS,
    episodes: int = EPISODES,
    shield: ShieldLike | Mapping[int, ShieldLike] | None = None,
    name: str | None = None,
    task: str | None = None,
    num_envs: int | None = None,
    workers: int = 0,
) -> FieldScore:
    """Run whole episodes under several seeds and return their score.

    The result depends on `num_envs` where the policy draws noise. Where the policy is a network, it
    also depends on `num_envs` in its last digits, because rounding differs with the batch size
    (returns differed by 2.4e-6). The result does not depend on `workers`, except where a process
    can hold only one environment (MetaDrive). There, by default as many environments step together
    as there are workers.

    Args:
        env: A Gymnasium environment or a VectorEnv that reports ``info["cost"]`` or
            ``info["constraint"]``.
        policy: The policy that proposes actions, in any form that `as_batch_policy` takes. A dict
            with one policy for each seed says that each was trained with that seed.
        references: The task's least and greatest return.
        cost_limit: Limit on the summed cost of an episode.
        seeds: Seeds of the runs, one for each. They determine starts and noise.
        episodes: Number of episodes of each run.
        shield: The shield that filters the proposals, or a dict with one for each seed. With None
            the proposals are executed unchanged; a `SafetyShield` around `env` and a
            `ShieldedPolicy` are recognised.
        name: Name of the policy in tables.
        task: Name of the task in tables; by default the environment's id.
        num_envs: Number of copies of the environment that step together.
        workers: Number of processes that step the copies (see `workers.WorkerVectorEnv`); with 0
            this process does. Workers are worthwhile where a step takes milliseconds. A script must
            use them below ``if __name__ == "__main__":``.

    Raises:
        ValueError: An argument is out of range, a dict lacks a seed, the environment reports no
            cost, or a reward or cost is not a finite number.
        TypeError: An argument has the wrong type.
        RuntimeError: A worker process ended unexpectedly.

    >>> import gymnasium, safeshield.envs
    >>> env = gymnasium.make("safeshield/Boat-v0")
    >>> score = field_score(env, "random", references=ReferenceReturns(0, 400), episodes=2)
    >>> len(score.runs), len(score.runs[0].returns), score.task
    (3, 2, 'safeshield/Boat-v0')
    """
    wanted = [whole("each of seeds", seed, least=0) for seed in seeds]
    if not wanted or len(set(wanted)) != len(wanted):
        raise ValueError(f"seeds must be different whole numbers, at least one, got {list(seeds)}")
    check_references(references)
    normalised_cost(0.0, cost_limit)
    policies = _for_each_seed("policy", policy, wanted)
    shields = _for_each_seed("shield", shield, wanted)
    with _side_by_side(env, episodes, num_envs, workers) as envs:
        runs = [
            play(
                envs,
                policies[seed],
                seed,
                episodes=episodes,
                shield=cast("ShieldLike | None", shields[seed]),
            )
            for seed in wanted
        ]
    first = policies[wanted[0]]
    inner = getattr(first, "model", first) if is_shielded_policy(first) else first
    behind = any(map(is_shielded_policy, policies.values()))
    return FieldScore(
        policy=name or (inner if isinstance(inner, str) else type(inner).__name__),
        task=task or environment_name(env),
        references=references,
        cost_limit=float(cost_limit),
        runs=tuple(runs),
        shielded=shield is not None or shielding_layer(env) is not None or behind,
        trained_apart=isinstance(policy, Mapping) or isinstance(shield, Mapping),
    )


def play(
    env: Env | VectorEnv,
    policy: object,
    seed: int,
    *,
    episodes: int = EPISODES,
    shield: ShieldLike | None = None,
    num_envs: int | None = None,
    workers: int = 0,
) -> Run:
    """Run the episodes of one seed and return their returns and costs.

    Args:
        env: Environment, as in `field_score`.
        policy: The policy that proposes actions, in any form that `as_batch_policy` takes.
        seed: Seed of starts and noise.
        episodes: Number of episodes.
        shield: Shield that filters the proposals; None for no shield.
        num_envs: Number of copies of the environment that step together.
        workers: Number of processes that step the copies, as in `field_score`.

    Raises:
        ValueError: An argument is out of range.
    """
    with _side_by_side(env, episodes, num_envs, workers) as envs:
        runs, _ = draw_episodes(envs, policy, episodes, seed, shield)
    return Run(
        seed=seed,
        returns=tuple(one.total_return for one in runs),
        costs=tuple(one.cost_or_violations for one in runs),
        intervention_rate=intervention_rate(runs),
    )


@contextlib.contextmanager
def _side_by_side(
    env: Env | VectorEnv, episodes: int, num_envs: int | None, workers: int
) -> Iterator[VectorEnv]:
    """Yield a vector environment of the copies that step together.

    By default the number of copies divides the episodes evenly into batches of up to 8, or up to
    256 where the environment has a vector entry point. The number does not depend on `workers`,
    because the rounding of a policy may depend on the batch size. Where a process can hold only one
    environment, it is the number of processes.
    """
    check_env(env)
    whole("episodes", episodes, least=1)
    whole("workers", workers, least=0)
    if is_vector_env(env):
        if workers:
            refuse_vector_env(env, workers)
        yield copies(env, num_envs, most=None, freeze=True)
        return
    single = cast(Env, env)
    if num_envs is None and one_per_process(single):
        num_envs = max(workers, 1)
    elif num_envs is None:
        batches = math.ceil(episodes / most_together(spec_to_copy(single)))
        num_envs = math.ceil(episodes / batches)
    if workers:
        from safeshield.rollouts.workers import WorkerVectorEnv

        together: VectorEnv = WorkerVectorEnv(single, min(num_envs, episodes), workers)
    else:
        together = copies(single, num_envs, most=episodes, freeze=True)
    try:
        yield together
    finally:
        together.close()


def _for_each_seed(name: str, value: object, seeds: Sequence[int]) -> dict[int, object]:
    if not isinstance(value, Mapping):
        return dict.fromkeys(seeds, value)
    if set(value) != set(seeds):
        raise ValueError(
            f"{name} must have one entry for each of the seeds {list(seeds)}, got entries for "
            f"{list(value)}"
        )
    return dict(value)
