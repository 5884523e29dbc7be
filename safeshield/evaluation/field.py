"""Running the episodes that are scored: several seeds, copies side by side, worker processes."""

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
    one_per_process,
    spec_to_copy,
)
from safeshield.rollouts.recorded import intervention_rate
from safeshield.shield.nested import is_shielded_policy, shielding_layer
from safeshield.spaces.generic import Env, VectorEnv

SEEDS = (0, 1, 2)
EPISODES = 20
"""Seeds, and episodes of each, of R2PAC's table."""
_MOST_TOGETHER, _MOST_NATIVE = 8, 256


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
    """Run whole episodes under several seeds and score them.

    The result depends on `num_envs` where the policy draws noise, and in its last digits where it
    is a network, which rounds otherwise in a batch of another size (returns differed by 2.4e-6).
    It never depends on `workers`, but where a process can hold one environment only (MetaDrive):
    there as many step together as there are workers.

    Args:
        env: a Gymnasium environment or a VectorEnv that reports ``info["cost"]``, or
            ``info["constraint"]``.
        policy: who proposes, anything that `as_batch_policy` takes; or a dict of one for each
            seed, where each was trained with it.
        references: the task's least and greatest return.
        cost_limit: of an episode's summed cost.
        seeds: one run each; starts and noise follow from it.
        episodes: of each run.
        shield: what filters the proposals, or a dict of one for each seed; None: nothing does, but
            for a `SafetyShield` around `env` or a `ShieldedPolicy`, which are recognised.
        name: of the policy, for tables.
        task: name of the task, for tables; by default the environment's id.
        num_envs: how many copies of the environment step together.
        workers: processes that step them (see `workers.WorkerVectorEnv`); 0: this one. Worth it
            where a step takes milliseconds. A script that asks for any must do so below
            ``if __name__ == "__main__":``.

    Raises:
        ValueError: an argument out of range, dicts that lack a seed, or an environment that
            reports no cost, or a reward or cost that is no number.
        TypeError: an argument of another type.
        RuntimeError: a worker ended by itself.

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
    """Run the episodes of one seed; see `field_score`.

    Raises:
        ValueError: an argument out of range.
    """
    with _side_by_side(env, episodes, num_envs, workers) as envs:
        runs, _ = draw_episodes(envs, policy, episodes, seed, shield=shield)
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
    """Yield the copies of an environment that step together.

    By default as many as share the episodes evenly in batches of up to 8, or 256 where the
    environment has a vector form of its own: a number that `workers` does not change, since a
    policy may round otherwise in a batch of another size. Where a process can hold one only, it is
    the number of processes.
    """
    check_env(env)
    whole("episodes", episodes, least=1)
    whole("workers", workers, least=0)
    if is_vector_env(env):
        if workers:
            raise ValueError(
                f"workers={workers} needs one Gymnasium environment to copy, got a VectorEnv; "
                "leave workers out, or pass gymnasium.make(id)"
            )
        yield copies(env, num_envs, most=None, freeze=True)
        return
    single = cast(Env, env)
    spec = spec_to_copy(single)
    if num_envs is None and one_per_process(single):
        num_envs = max(workers, 1)
    elif num_envs is None and spec is not None:
        native = spec.vector_entry_point and not spec.additional_wrappers
        batches = math.ceil(episodes / (_MOST_NATIVE if native else _MOST_TOGETHER))
        num_envs = math.ceil(episodes / batches)
    if workers:
        from safeshield.rollouts.workers import WorkerVectorEnv

        together: VectorEnv = WorkerVectorEnv(single, min(num_envs or 1, episodes), workers)
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
