"""Evaluation of violation rate, return and cost of an agent, with or without a shield.

Two evaluations with the same `seed`, `episodes`, `starts` and `certified_by` run from the same
starts in the same order. The episodes of an agent with and without its shield can therefore be
compared in pairs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from safeshield.calibration.proposers import ShieldedProposals, spread_actions
from safeshield.calibration.trials import StartValues
from safeshield.evaluation.intervals import Interval, binomial_interval, mean_interval
from safeshield.files.schema import json_values, whole
from safeshield.rollouts.copies import (
    check_env,
    copies,
    environment_name,
    is_vector_env,
    runs_natively,
    spaces_of,
)
from safeshield.rollouts.episodes import SEEDS, run_episodes
from safeshield.rollouts.infos import INTERVENED
from safeshield.rollouts.policies import as_batch_policy, default_name, torch_seeded
from safeshield.rollouts.recorded import Episode, intervention_rate
from safeshield.shield.nested import is_shielded_policy, refuse_shielded, shielding_layer
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.spaces.batches import Batch
from safeshield.spaces.generic import Env, VectorEnv

ShieldLike: TypeAlias = Shield | HasShield | str | os.PathLike[str]
_MOST_AT_ONCE = 256
_MOST_RESETS_PER_EPISODE = 50


@dataclass(frozen=True)
class Evaluation:
    """Results of the episodes of one agent. All intervals are two-sided at 95%."""

    policy: str
    """Name of the policy that proposed the actions."""
    shielded: bool
    """Whether a shield filtered the proposals."""
    environment: str
    """Id of the environment, or the name of its class."""
    starts: str
    """"all" where every start counts, "certified" where only those with V_h <= -delta do."""
    start_share: float | None
    """Share of the drawn starts that were certified; None where every start counts."""
    seed: int
    """Seed of the starts and of the noise."""
    episodes: int
    """N, the number of episodes that count."""
    violating: int
    """k, the number of episodes with h > 0 (or cost > 0) in any state."""
    violation_interval: Interval
    """Clopper and Pearson's interval for the violation rate."""
    mean_return: float
    """Mean over the episodes of the undiscounted sum of rewards."""
    return_interval: Interval | None
    """Student's t interval for the mean return; None with a single episode."""
    mean_cost: float
    """Mean over the episodes of the summed costs, or of the number of steps in violation where the
    environment reports no cost."""
    intervention_rate: float | None
    """Share of the steps in which the shield replaced the action; None without a shield."""
    deterministic: bool | None = None
    """The `deterministic` that a policy's ``predict`` was called with; None where not known."""

    @property
    def violation_rate(self) -> float:
        """Share of the episodes that violate: k / N."""
        return self.violating / self.episodes

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the violation rate as JSON values."""
        return {**json_values(self), "violation_rate": self.violation_rate}


class UnshieldedAdversary:
    """A policy that always takes the action of highest Q_h, the calibration's adversary unshielded.

    Args:
        shield: The shield whose safety critic the adversary uses.
        choices: Number of actions to consider, spread over the box.
    """

    batched = True

    def __init__(self, shield: Shield, choices: int = 32) -> None:
        self._model = shield.model
        self._points = spread_actions(shield, choices)

    def __call__(self, observations: Batch, rng: np.random.Generator, /) -> npt.NDArray[Any]:
        """Return proposed actions for n observations."""
        states = self._model.states(
            self._model.observation_codec.flatten(observations, "observation")[0]
        )
        shape = (len(states.value), *self._points.shape)
        values = self._model.candidate_values(states, np.broadcast_to(self._points, shape))
        return self._model.action_codec.unflatten(self._points[values.argmax(axis=1)])


def evaluate(
    env: Env | VectorEnv,
    policy: object,
    episodes: int,
    seed: int,
    *,
    shield: ShieldLike | None = None,
    starts: Literal["certified"] | None = None,
    certified_by: ShieldLike | None = None,
    num_envs: int | None = None,
    name: str | None = None,
    deterministic: bool = True,
) -> Evaluation:
    """Run whole episodes and return their violation rate, return and cost.

    Args:
        env: A Gymnasium environment (see `vectorise` for when copies of it run) or a
            VectorEnv. It must report ``info["constraint"]`` or ``info["cost"]``.
        policy: The policy that proposes actions, in any form that `as_batch_policy` takes.
        episodes: N, the number of episodes that count.
        seed: Seed of starts and noise. The same seed gives the same starts, shielded or not, and
            the same result where it is repeated.
        shield: The shield that filters the proposals. With None they are executed unchanged.
        starts: With "certified" only starts with V_h <= -delta are played, and starts are drawn
            until there are N of them. With None every start is played.
        certified_by: The shield whose V_h and delta certify the starts, by default `shield`; or an
            agent whose actor is calibrated (`SafeFQL.calibrate`), with the delta of its record.
        num_envs: Number of environments that step together. A function that remembers earlier
            steps needs 1, or a method `start_wave` (`rollouts.policies.BatchPolicy`).
        name: Name of the policy in tables.
        deterministic: The `deterministic` with which a policy's ``predict`` is called. Choose what
            will be deployed: the promise of a shield is about one of the two (`as_calibrated`). The
            default is that of the field's protocol, mean actions; that of `Shield.calibrate` is
            False.

    Raises:
        ValueError: An argument is out of range, the environment's spaces are not the shield's, or
            hardly any start is certified.

    >>> import gymnasium, safeshield.envs
    >>> from safeshield.evaluation.episodes import evaluate
    >>> result = evaluate(gymnasium.make("safeshield/Boat-v0"), "random", episodes=4, seed=0)
    >>> result.episodes, result.violation_interval[1] <= 1.0, result.intervention_rate
    (4, True, None)
    """
    shield = None if shield is None else as_shield(shield)
    judge = _judge(starts, shield, certified_by)
    check_env(env)
    acting = as_batch_policy(policy, spaces_of(env)[1], deterministic=deterministic)
    runs, share = draw_episodes(env, acting, episodes, seed, shield, judge, num_envs)
    result = summarise(
        runs,
        policy=name or default_name(policy),
        environment=environment_name(env),
        start_share=share,
        seed=seed,
        deterministic=deterministic,
    )
    # A ShieldedPolicy filters its own actions, so that the episodes report no replaced action.
    return replace(result, shielded=True) if is_shielded_policy(policy) else result


def as_calibrated(shield: Shield | None) -> bool:
    """Return the `deterministic` of a shield's calibration, for `evaluate`; True without one."""
    record = None if shield is None else shield.record
    return record is None or record.deterministic is not False


def draw_episodes(
    env: Env | VectorEnv,
    policy: object,
    episodes: int,
    seed: int,
    shield: ShieldLike | None = None,
    judge: Shield | None = None,
    num_envs: int | None = None,
) -> tuple[list[Episode], float | None]:
    """Return the episodes that `evaluate` counts, and the share of starts that were certified.

    `judge` is the shield that certifies the starts that count. Where it is None, all starts count,
    and the share is None. The arguments `env`, `policy`, `episodes`, `seed`, `shield` and
    `num_envs` are those of `evaluate`.

    Raises:
        ValueError: As in `evaluate`.
    """
    episodes, seed = whole("episodes", episodes, least=1), whole("seed", seed, least=0)
    check_env(env)
    shield = None if shield is None else as_shield(shield)
    for one in (shield, judge):
        if one is not None:
            one.check_fits(*spaces_of(env))
    rng = np.random.default_rng(np.random.SeedSequence([seed, 2]))
    with torch_seeded(seed):
        if judge is not None:
            first = int(rng.integers(SEEDS))
            return _certified_episodes(env, policy, episodes, first, shield, judge, num_envs)
        runs: list[Episode] = []
        while (missing := episodes - len(runs)) > 0:
            count, own = min(missing, _MOST_AT_ONCE), int(rng.integers(2**31 - 1))
            runs += filtered_episodes(env, policy, count, own, shield=shield, num_envs=num_envs)
        return runs, None


def _certified_episodes(
    env: Env | VectorEnv,
    policy: object,
    episodes: int,
    first_seed: int,
    shield: Shield | None,
    judge: Shield,
    num_envs: int | None,
) -> tuple[list[Episode], float]:
    """Return episodes from certified starts, and the share of the drawn starts that are certified.

    The episodes are reset with those seeds from `first_seed` on whose start is certified. V_h of a
    start is known before its episode is played, so any other start costs a reset and nothing more.
    """
    native = not is_vector_env(env) and runs_natively(env)
    # Copies of an environment without a vectorised form are made once: that may be slow.
    envs = env if native else copies(env, num_envs, most=_MOST_AT_ONCE, freeze=True)
    values = StartValues(judge, envs)
    near = judge.threshold + judge.model.scale.rounding
    counted: list[Episode] = []
    seed, found = first_seed, 0
    try:
        while (missing := episodes - len(counted)) > 0:
            seeds: list[int] = []
            while len(seeds) < min(missing, _MOST_AT_ONCE):
                if values[seed] <= judge.threshold:
                    seeds.append(seed)
                seed += 1
                drawn, kept = seed - first_seed, len(counted) + len(seeds)
                if drawn > _MOST_RESETS_PER_EPISODE * max(kept, 20):
                    raise ValueError(
                        f"only {kept} of {drawn} starts have V_h <= -delta: the environment "
                        "starts almost everywhere outside the certified set; evaluate with "
                        "starts=None"
                    )
            found += len(seeds)
            runs = filtered_episodes(
                envs, policy, len(seeds), seeds[0], shield=shield, seeds=seeds,
                num_envs=num_envs if native else None, observation_keys=judge.observation_keys,
            )  # fmt: skip
            # An environment that does not start alike for the same seed may start outside.
            counted += [run for run in runs if judge.row_values(run.observations[:1])[0] <= near]
    finally:
        if envs is not env:
            envs.close()
    return counted, found / (seed - first_seed)


def summarise(
    runs: Sequence[Episode],
    *,
    policy: str,
    environment: str,
    start_share: float | None,
    seed: int,
    deterministic: bool | None = None,
) -> Evaluation:
    """Return the evaluation of episodes from `draw_episodes`.

    Args:
        runs: At least one episode. All are of the same agent, either all with a shield or all
            without one.
        policy: Name of the policy that proposed the actions.
        environment: Id of the environment.
        start_share: Share of the starts that were certified; None where all starts count.
        seed: Seed with which the episodes were drawn.
        deterministic: The `deterministic` that a policy's ``predict`` was called with, if known.
    """
    violating = sum(run.violated for run in runs)
    returns = [run.total_return for run in runs]
    replaced = intervention_rate(runs)
    return Evaluation(
        policy=policy,
        shielded=replaced is not None,
        environment=environment,
        starts="all" if start_share is None else "certified",
        start_share=start_share,
        seed=seed,
        episodes=len(runs),
        violating=violating,
        violation_interval=binomial_interval(violating, len(runs)),
        mean_return=float(np.mean(returns)),
        return_interval=mean_interval(returns),
        mean_cost=float(np.mean([run.cost_or_violations for run in runs])),
        intervention_rate=replaced,
        deterministic=deterministic,
    )


def filtered_episodes(
    env: Env | VectorEnv,
    policy: object,
    episodes: int,
    seed: int,
    *,
    shield: Shield | None = None,
    num_envs: int | None = None,
    observation_keys: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Episode]:
    """Return whole episodes of a policy, run with a shield that filters its actions or without one.

    `shield` filters the actions of `policy`; None for no shield. The arguments `env`, `episodes`,
    `seed`, `num_envs`, `observation_keys` and `seeds` are those of `run_episodes`.

    Raises:
        ValueError: As in `run_episodes`, or `env` and `shield` would both shield the actions.
    """
    run = functools.partial(
        run_episodes,
        env,
        episodes=episodes,
        seed=seed,
        num_envs=num_envs,
        observation_keys=observation_keys,
        seeds=seeds,
    )
    if shield is None:
        # A shield around the environment reports in the infos which actions it replaced.
        return run(policy, info_keys=() if shielding_layer(env) is None else (INTERVENED,))
    refuse_shielded(env, "leave out shield=, or pass the plain environment")
    acting = ShieldedProposals(shield, as_batch_policy(policy, spaces_of(env)[1]))
    return acting.with_interventions(run(acting))


def _judge(
    starts: str | None, shield: Shield | None, certified_by: ShieldLike | None
) -> Shield | None:
    if starts not in (None, "certified"):
        raise ValueError(f"starts must be None or 'certified', got {starts!r}")
    if starts is None:
        if certified_by is not None:
            raise ValueError("certified_by is used with starts='certified' only; pass both")
        return None
    judge = shield if certified_by is None else as_shield(certified_by)
    # An agent whose actor is calibrated certifies starts at the delta of its own record.
    actor = None if isinstance(certified_by, Shield) else getattr(certified_by, "record", None)
    if judge is not None and actor is not None:
        judge = judge.with_delta(actor.delta)
    if judge is None:
        raise ValueError(
            "starts='certified' needs a shield that certifies the starts: pass shield, or pass "
            "certified_by to evaluate an unshielded agent from the starts that a shield certifies"
        )
    return judge
