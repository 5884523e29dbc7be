"""How often an agent violates the constraint, and what it earns: with a shield and without one.

Two evaluations with the same `seed`, `episodes`, `starts` and `certified_by` run from the same
starts in the same order, so an agent with and without its shield can be compared pair by pair.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from safeshield.calibration.proposers import ShieldedProposals, spread_actions
from safeshield.evaluation.intervals import Interval, binomial_interval, mean_interval
from safeshield.files.schema import json_values
from safeshield.rollouts.accepted import Starts, accepted_episodes
from safeshield.rollouts.copies import check_env, environment_name, spaces_of
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.infos import INTERVENED
from safeshield.rollouts.policies import as_batch_policy
from safeshield.rollouts.recorded import Episode, intervention_rate
from safeshield.shield.nested import refuse_shielded, shielding_layer
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.spaces.batches import Batch
from safeshield.spaces.generic import Env, VectorEnv

ShieldLike: TypeAlias = Shield | HasShield | str | os.PathLike[str]
_MOST_AT_ONCE = 256
_MOST_RESETS_PER_EPISODE = 50


@dataclass(frozen=True)
class Evaluation:
    """What some episodes of one agent showed; intervals are two-sided at 95%."""

    policy: str
    """Who proposed the actions."""
    shielded: bool
    """Whether a shield stood between the proposals and the environment."""
    environment: str
    """Id of the environment, or its class."""
    starts: str
    """"all": the environment's own; "certified": those of them with V_h <= -delta."""
    start_share: float | None
    """Share of the environment's own starts that were certified; None with all starts."""
    seed: int
    episodes: int
    """N, the episodes that count."""
    violating: int
    """k, those with h > 0 (or cost > 0) at any state."""
    violation_interval: Interval
    """Clopper and Pearson's interval for the violation rate."""
    mean_return: float
    """Mean over the episodes of the undiscounted sum of rewards."""
    return_interval: Interval | None
    """Student's t interval for it; None with a single episode."""
    mean_cost: float
    """Mean over the episodes of the summed costs; where none is reported, of the steps in
    violation."""
    intervention_rate: float | None
    """Share of the steps in which the shield replaced the action; None without a shield."""

    @property
    def violation_rate(self) -> float:
        """Share of the episodes that violate: k / N."""
        return self.violating / self.episodes

    def to_json(self) -> dict[str, Any]:
        """Return the record, and the rate, as JSON values."""
        return {**json_values(self), "violation_rate": self.violation_rate}


class UnshieldedAdversary:
    """What the calibration's adversary is without a shield: always the action of highest Q_h.

    Args:
        shield: whose safety critic it turns around.
        choices: how many actions it weighs, spread over the box.
    """

    batched = True

    def __init__(self, shield: Shield, choices: int = 32) -> None:
        self._model = shield.model
        self._points = spread_actions(shield, choices)

    def __call__(self, observations: Batch, rng: np.random.Generator, /) -> npt.NDArray[Any]:
        """Propose actions for n observations."""
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
) -> Evaluation:
    """Run whole episodes and count.

    Args:
        env: a Gymnasium environment (`vectorise` says when copies of it run) or a
            VectorEnv. It must report ``info["constraint"]`` or ``info["cost"]``.
        policy: who proposes, anything that `as_batch_policy` takes.
        episodes: N, how many count.
        seed: of starts and noise. The same seed gives the same starts, shielded or not.
        shield: what filters the proposals; None: they are executed as they are.
        starts: "certified": only episodes whose first state has V_h <= -delta count, and as many
            are drawn as it takes; None: all count.
        certified_by: whose V_h and delta that is; by default those of `shield`.
        num_envs: how many environments step together.
        name: of the policy, for tables.

    Raises:
        ValueError: an argument out of range, the environment's spaces are not the shield's, or
            hardly any start is certified.

    >>> import gymnasium, safeshield.envs
    >>> from safeshield.evaluation.episodes import evaluate
    >>> result = evaluate(gymnasium.make("safeshield/Boat-v0"), "random", episodes=4, seed=0)
    >>> result.episodes, result.violation_interval[1] <= 1.0, result.intervention_rate
    (4, True, None)
    """
    runs, share = draw_episodes(
        env,
        policy,
        episodes,
        seed,
        shield=shield,
        starts=starts,
        certified_by=certified_by,
        num_envs=num_envs,
    )
    return summarise(
        runs,
        policy=name or (policy if isinstance(policy, str) else type(policy).__name__),
        environment=environment_name(env),
        start_share=share,
        seed=seed,
    )


def draw_episodes(
    env: Env | VectorEnv,
    policy: object,
    episodes: int,
    seed: int,
    *,
    shield: ShieldLike | None = None,
    starts: Literal["certified"] | None = None,
    certified_by: ShieldLike | None = None,
    num_envs: int | None = None,
) -> tuple[list[Episode], float | None]:
    """Return the episodes that `evaluate` counts, and the share of starts that was certified.

    Raises:
        ValueError: as `evaluate` does.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    check_env(env)
    shield = None if shield is None else as_shield(shield)
    judge = _judge(starts, shield, certified_by)
    for one in (shield, judge):
        if one is not None:
            one.check_fits(*spaces_of(env), name="")
    draw = functools.partial(
        filtered_episodes,
        env,
        policy,
        shield=shield,
        num_envs=num_envs,
        observation_keys=None if judge is None else judge.observation_keys,
    )
    starts_drawn = Starts()
    counted: list[Episode] = []
    for batch in accepted_episodes(
        draw,
        lambda rows: (
            np.ones(len(rows), np.bool_)
            if judge is None
            else judge.row_values(rows) <= judge.threshold
        ),
        episodes,
        np.random.default_rng(np.random.SeedSequence([seed, 2])),
        starts_drawn,
        spare=1.0 if judge is None else 1.1,
        most=_MOST_AT_ONCE,
    ):
        counted += batch
        if starts_drawn.drawn > _MOST_RESETS_PER_EPISODE * max(starts_drawn.accepted, 20):
            raise ValueError(
                f"only {starts_drawn.accepted} of {starts_drawn.drawn} starts have V_h <= -delta: "
                "the environment starts almost everywhere outside the certified set; evaluate with "
                "starts=None"
            )
    return counted, None if judge is None else starts_drawn.share


def summarise(
    runs: Sequence[Episode],
    *,
    policy: str,
    environment: str,
    start_share: float | None,
    seed: int,
) -> Evaluation:
    """Count what episodes from `draw_episodes` show.

    Args:
        runs: at least one, all of the same agent, all with a shield or none.
        policy: who proposed.
        environment: its id.
        start_share: share of the starts that was certified; None where all starts count.
        seed: that they were drawn with.
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
) -> list[Episode]:
    """Run `run_episodes` with a shield behind the policy, or without one.

    Raises:
        ValueError: as `run_episodes` does.
    """
    run = functools.partial(
        run_episodes,
        env,
        episodes=episodes,
        seed=seed,
        num_envs=num_envs,
        observation_keys=observation_keys,
    )
    if shield is None:
        # A shield around the environment tells in its infos where it stepped in.
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
    if judge is None:
        raise ValueError(
            "starts='certified' needs a shield that certifies them: pass shield, or certified_by "
            "to evaluate an unshielded agent from another shield's starts"
        )
    return judge
