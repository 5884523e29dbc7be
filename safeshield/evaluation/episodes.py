"""How often an agent violates the constraint, and what it earns: with a shield and without one.

Two evaluations with the same `seed`, `episodes`, `starts` and `certified_by` run from the same
starts in the same order, so an agent with and without its shield can be compared pair by pair.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy import stats

from safeshield.calibration.proposers import ShieldedProposals, spread_actions
from safeshield.files.schema import json_values
from safeshield.rollouts.copies import Env, check_env, environment_name, is_vector_env
from safeshield.rollouts.episodes import Episode, run_episodes
from safeshield.rollouts.infos import INTERVENED
from safeshield.rollouts.policies import as_batch_policy
from safeshield.shield.nested import refuse_shielded, shielding_layer
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.spaces.batches import Batch

if TYPE_CHECKING:
    from safeshield.rollouts.copies import VectorEnv

ShieldLike: TypeAlias = Shield | HasShield | str | os.PathLike[str]
Interval: TypeAlias = tuple[float, float]
LEVEL = 0.95
"""Confidence of every interval, two-sided."""
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


@dataclass(frozen=True)
class FilteredEpisode:
    """One episode, and where a shield stepped in."""

    episode: Episode
    intervened: npt.NDArray[np.bool_] | None
    """(L,) whether the step's action was replaced; None without a shield."""


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
) -> tuple[list[FilteredEpisode], float | None]:
    """Return the episodes that `evaluate` counts, and the share of starts that was certified.

    Raises:
        ValueError: as `evaluate` does.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    check_env(env)
    shield = None if shield is None else as_shield(shield)
    judge = _judge(starts, shield, certified_by)
    prefix = "single_" if is_vector_env(env) else ""
    for one in (shield, judge):
        if one is not None:
            seen, played = (
                getattr(env, f"{prefix}{what}_space") for what in ("observation", "action")
            )
            one.check_fits(seen, played, name="")
    rng = np.random.default_rng(np.random.SeedSequence([seed, 2]))
    counted: list[FilteredEpisode] = []
    drawn = accepted = 0
    while len(counted) < episodes:
        missing = episodes - len(counted)
        share = max(accepted / drawn, 0.05) if drawn else 1.0
        # A few more than are missing on average: the last ones are not worth a wave of their own.
        # All of this depends on the starts alone, so that it is the same with and without a shield.
        wanted = missing if judge is None else math.ceil(1.1 * missing / share)
        runs = filtered_episodes(
            env,
            policy,
            min(wanted, _MOST_AT_ONCE),
            int(rng.integers(2**31 - 1)),
            shield=shield,
            num_envs=num_envs,
            observation_keys=None if judge is None else judge.observation_keys,
        )
        drawn += len(runs)
        if judge is not None:
            first = np.stack([run.episode.observations[0] for run in runs])
            certain = judge.row_values(first) <= judge.threshold
            runs = [run for run, counts in zip(runs, certain, strict=True) if counts]
        accepted += len(runs)
        counted += runs[:missing]
        if drawn > _MOST_RESETS_PER_EPISODE * max(accepted, 20):
            raise ValueError(
                f"only {accepted} of {drawn} starts have V_h <= -delta: the environment starts "
                "almost everywhere outside the certified set; evaluate with starts=None"
            )
    return counted, None if judge is None else accepted / drawn


def summarise(
    runs: Sequence[FilteredEpisode],
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
    violating = sum(run.episode.violated for run in runs)
    returns = [run.episode.total_return for run in runs]
    replaced = [run.intervened for run in runs if run.intervened is not None]
    return Evaluation(
        policy=policy,
        shielded=bool(replaced),
        environment=environment,
        starts="all" if start_share is None else "certified",
        start_share=start_share,
        seed=seed,
        episodes=len(runs),
        violating=violating,
        violation_interval=binomial_interval(violating, len(runs)),
        mean_return=float(np.mean(returns)),
        return_interval=mean_interval(returns),
        mean_cost=float(np.mean([episode_cost(run.episode) for run in runs])),
        intervention_rate=float(np.concatenate(replaced).mean()) if replaced else None,
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
) -> list[FilteredEpisode]:
    """Run `run_episodes` with a shield behind the policy, or without one.

    Raises:
        ValueError: as `run_episodes` does.
    """
    if shield is None:
        # A shield around the environment tells in its infos where it stepped in.
        told = () if shielding_layer(env) is None else (INTERVENED,)
        runs = run_episodes(
            env,
            policy,
            episodes,
            seed,
            num_envs=num_envs,
            info_keys=told,
            observation_keys=observation_keys,
        )
        return [
            FilteredEpisode(run, np.asarray(run.info[INTERVENED], np.bool_) if told else None)
            for run in runs
        ]
    refuse_shielded(env, "leave out shield=, or pass the plain environment")
    prefix = "single_" if is_vector_env(env) else ""
    space = getattr(env, f"{prefix}action_space")
    acting = ShieldedProposals(shield, as_batch_policy(policy, space))
    runs = run_episodes(
        env, acting, episodes, seed, num_envs=num_envs, observation_keys=observation_keys
    )
    # The last wave may hold more environments than there are episodes left.
    pairs = zip(runs, acting.interventions(), strict=False)
    return [FilteredEpisode(run, flags[: len(run)]) for run, flags in pairs]


def format_table(evaluations: Sequence[Evaluation]) -> str:
    """Return the evaluations as lines of aligned text, with their intervals.

    Raises:
        ValueError: there is none.
    """
    if not evaluations:
        raise ValueError("evaluations must hold at least one Evaluation, got none")
    header = (
        "agent", "shield", "episodes", "violating", "rate in %, 95% interval",
        "return, 95% interval", "cost", "replaced",
    )  # fmt: skip
    rows = [header, *(_cells(one) for one in evaluations)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def binomial_interval(successes: int, trials: int) -> Interval:
    """Return Clopper and Pearson's two-sided 95% interval for k successes in N trials.

    Raises:
        ValueError: not 0 <= successes <= trials, or no trial.

    >>> [round(bound, 4) for bound in binomial_interval(0, 1000)]
    [0.0, 0.0037]
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"need 0 <= successes <= trials >= 1, got {successes} and {trials}")
    tail = 0.5 * (1.0 - LEVEL)
    low, high = 0.0, 1.0
    if successes > 0:
        low = float(stats.beta.ppf(tail, successes, trials - successes + 1))
    if successes < trials:
        high = float(stats.beta.ppf(1.0 - tail, successes + 1, trials - successes))
    return low, high


def mean_interval(values: npt.ArrayLike) -> Interval | None:
    """Return Student's two-sided 95% interval for the mean of values (N,); None for N = 1."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return None
    reach = float(stats.t.ppf(0.5 * (1.0 + LEVEL), len(array) - 1))
    reach *= float(array.std(ddof=1)) / math.sqrt(len(array))
    middle = float(array.mean())
    return middle - reach, middle + reach


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


def episode_cost(episode: Episode) -> float:
    """Return the summed costs of an episode; where none is reported, its steps in violation.

    Raises:
        ValueError: the environment reports neither costs nor constraints.
    """
    if episode.costs is None and episode.next_constraints is not None:
        return float(np.count_nonzero(episode.next_constraints > 0))
    return episode.total_cost


def _cells(one: Evaluation) -> tuple[str, ...]:
    low, high = one.violation_interval
    reward = f"{one.mean_return:.1f}"
    if one.return_interval is not None:
        reward += f" [{one.return_interval[0]:.1f}, {one.return_interval[1]:.1f}]"
    return (
        one.policy,
        "yes" if one.shielded else "no",
        str(one.episodes),
        str(one.violating),
        f"{100 * one.violation_rate:.2f} [{100 * low:.2f}, {100 * high:.2f}]",
        reward,
        f"{one.mean_cost:.2f}",
        "-" if one.intervention_rate is None else f"{one.intervention_rate:.1%}",
    )
