"""Calibration by rollouts: run the shielded agent, count violating episodes and choose delta."""

from __future__ import annotations

import datetime
import functools
import platform
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from safeshield.calibration.binomial import episodes_needed
from safeshield.calibration.proposers import ShieldedProposals, battery
from safeshield.calibration.walk import CalibrationError, fixed_sequence_walk
from safeshield.rollouts.accepted import Starts, accepted_episodes
from safeshield.rollouts.copies import (
    check_env,
    environment_kwargs,
    environment_name,
    is_vector_env,
    spaces_of,
    vectorise,
)
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.infos import INTERVENED
from safeshield.shield.nested import shielding_layer
from safeshield.shield.record import CalibrationRecord, PolicyResult
from safeshield.shield.replacement import describe
from safeshield.spaces.generic import Env, VectorEnv

if TYPE_CHECKING:
    from safeshield.shield.shield import Shield

DEFAULT_SHARES = (0.8, 0.9, 0.95, 0.965, 0.975, 0.985)
"""Shares of the starts with V_h <= 0 that the default thresholds keep. The strictest is first."""
_STARTS = 2000
_STARTS_OF_SLOW = 400  # A reset without a vectorised form may take a second.
_AT_ONCE = 1024
_MOST_RESETS_PER_EPISODE = 20


def start_observations(
    shield: Shield, env: Env | VectorEnv, count: int, seed: int
) -> npt.NDArray[np.float32]:
    """Return the first observations after `count` ordinary resets, as rows (count, obs).

    Args:
        shield: Shield whose observation space determines the rows.
        env: Environment to reset.
        count: Number of observations.
        seed: Seed of the resets.
    """
    envs = vectorise(env)
    rng = np.random.default_rng(seed)
    rows: list[npt.NDArray[np.float32]] = []
    try:
        while sum(map(len, rows)) < count:
            observations, _ = envs.reset(seed=int(rng.integers(2**31 - 1)))
            rows.append(shield.observation_rows(observations)[0].astype(np.float32))
    finally:
        if envs is not env:
            envs.close()
    return np.concatenate(rows)[:count]


def default_deltas(
    shield: Shield,
    observations: npt.NDArray[np.float32],
    shares: Sequence[float] = DEFAULT_SHARES,
) -> list[float]:
    """Return the default thresholds of the walk, in decreasing order; the last one is 0.

    The others are quantiles of -V_h over the starts with V_h <= 0. Each is lowered by 1e-6 of the
    scale of h, to allow for rounding.

    Args:
        shield: Shield whose critics give V_h.
        observations: (n, obs) first observations of episodes, as rows.
        shares: Shares of the starts with V_h <= 0 that the thresholds keep, each in (0, 1).

    Raises:
        CalibrationError: No start has V_h <= 0.
    """
    values = shield.row_values(observations).astype(np.float64)
    inside = -values[values <= 0]
    if len(inside) == 0:
        raise CalibrationError(
            "no start of the environment has a learned value V_h <= 0: there is nothing to "
            "certify. Train longer, or check the labels' sign (h <= 0 is safe)"
        )
    # The last digits of a value depend on the batch in which it is computed. Without the slack,
    # the start of an environment that always starts in the same state could miss its own threshold.
    slack = 1e-6 * (abs(shield.model.scale.offset) + shield.model.scale.spread)
    quantiles = np.quantile(inside, [1.0 - share for share in shares]) - slack
    return [*sorted({float(q) for q in quantiles if q > 0}, reverse=True), 0.0]


@dataclass
class _Trials:
    """Runs fresh shielded episodes from accepted starts and keeps the counts for the record."""

    shield: Shield
    env: Env | VectorEnv
    policy: object
    policy_name: str | None
    seeds: np.random.Generator
    num_envs: int | None
    intervention_rates: dict[tuple[float, str], float] = field(default_factory=dict)
    start_shares: dict[float, float] = field(default_factory=dict)

    def __call__(self, delta: float, name: str, episodes: int, most: int) -> tuple[int, int]:
        with warnings.catch_warnings():
            # The warning that the shield is not calibrated does not apply during calibration.
            warnings.simplefilter("ignore")
            shield = self.shield.with_delta(delta)
            acting = ShieldedProposals(shield, battery(shield, self.policy, self.policy_name)[name])
            draw = functools.partial(
                run_episodes,
                self.env,
                acting,
                num_envs=self.num_envs,
                observation_keys=shield.observation_keys,
            )
            starts = Starts()
            accepted = violations = steps = replaced = 0
            for batch in accepted_episodes(
                lambda count, seed: acting.with_interventions(draw(count, seed)),
                lambda rows: shield.row_values(rows) <= shield.threshold,
                episodes,
                self.seeds,
                starts,
                spare=1.05,
                most=_AT_ONCE,
            ):
                accepted += len(batch)
                violations += sum(run.violated for run in batch)
                steps += sum(map(len, batch))
                replaced += sum(int(run.info[INTERVENED].sum()) for run in batch)
                if starts.drawn > _MOST_RESETS_PER_EPISODE * max(accepted, episodes // 10, 50):
                    raise CalibrationError(
                        f"only {accepted} of {starts.drawn} starts have V_h <= -{delta:.4g}: the "
                        "environment starts almost everywhere outside the certified set"
                    )
                if violations > most:
                    break
        self.intervention_rates[delta, name] = replaced / max(steps, 1)
        self.start_shares[delta] = starts.share
        return accepted, violations


def calibrate(
    shield: Shield,
    env: Env | VectorEnv,
    *,
    epsilon: float = 0.01,
    confidence: float = 0.99,
    policy: object = None,
    policy_name: str | None = None,
    deltas: Sequence[float] | None = None,
    episodes: int | None = None,
    seed: int = 0,
    num_envs: int | None = None,
) -> CalibrationRecord:
    """Choose the most permissive delta that passes the tests, by rollouts with the shield on.

    The thresholds are tested from strict to permissive. For each threshold and each policy, fresh
    episodes are run until N of them start with V_h <= -delta. The number of violating episodes is
    tested against the binomial tail. The walk stops at the first failure (see `walk`).

    The promise is: with the given confidence, over the draw of these episodes, an episode
    from the same start distribution, in which one of these policies proposes and the shield
    executes, violates with probability at most epsilon.

    Args:
        shield: The shield to calibrate. Its own delta and record are ignored.
        env: The environment that the shield will protect. With a vector entry point it runs in
            parallel. It must report ``info["constraint"]`` or ``info["cost"]``.
        epsilon: Violation rate per episode to promise.
        confidence: Confidence of the promise.
        policy: The policy that proposes the actions, in any form that `as_batch_policy` takes. The
            promise then holds for this policy alone. By default there are two: random proposals,
            and an adversary that always proposes the accepted action of highest Q_h.
        policy_name: Name of the policy in the promise. By default it is `policy` itself where that
            is a string, and "policy" otherwise.
        deltas: Strictly decreasing thresholds to test. By default they are those that keep given
            shares of the starts with V_h <= 0 (`DEFAULT_SHARES`), estimated from separate resets
            that are not used in any test.
        episodes: N for each test. By default it is the smallest number that allows one violation.
        seed: Seed of all draws.
        num_envs: Number of environments that run side by side.

    Returns:
        The record, with the chosen delta and the counts of every test. `shield` is not changed;
        `Shield.calibrate` returns a shield that carries the record.

    Raises:
        TypeError: `env` is not an environment.
        ValueError: The spaces differ, an argument is out of range, or N is too small (the message
            says how many episodes are needed).
        CalibrationError: No threshold meets the request. The message says what was reached.
    """
    check_env(env)
    shield.check_fits(*spaces_of(env), name="")
    _refuse_shielded(env)
    if episodes is None:
        episodes = episodes_needed(epsilon, confidence, violations=1)
    spec = getattr(env, "spec", None)
    fast = is_vector_env(env) or getattr(spec, "vector_entry_point", None) is not None
    starts = start_observations(shield, env, _STARTS if fast else _STARTS_OF_SLOW, seed)
    if deltas is not None:
        deltas = [float(delta) for delta in deltas]
    else:
        deltas = default_deltas(shield, starts)
    share = float(np.mean(shield.row_values(starts) <= -max(deltas, default=0.0)))
    if share < 1.0 / _MOST_RESETS_PER_EPISODE:
        raise CalibrationError(
            f"only {share:.1%} of the environment's starts have V_h <= -{max(deltas):.4g}, the "
            "strictest threshold: pass smaller deltas, or check the labels (for binary labels, "
            "data.label_reach says how many steps before a violation V_h becomes positive)"
        )
    if policy_name is not None and policy is None:
        raise ValueError(
            f"policy_name={policy_name!r} names a policy, but policy is None: pass policy as well"
        )
    names = list(battery(shield, policy, policy_name))
    seeds = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    trials = _Trials(shield, env, policy, policy_name, seeds, num_envs)
    delta, rungs = fixed_sequence_walk(
        trials, deltas, names, epsilon=epsilon, confidence=confidence, episodes=episodes
    )
    chosen = {rung.policy: rung for rung in rungs if rung.delta == delta}
    results = tuple(
        PolicyResult(
            name,
            chosen[name].episodes,
            chosen[name].violations,
            chosen[name].bound,
            trials.intervention_rates[delta, name],
        )
        for name in names
    )
    return CalibrationRecord(
        delta=delta,
        epsilon=epsilon,
        confidence=confidence,
        policies=results,
        environment=environment_name(env),
        start_distribution="its own reset does, kept where V_h <= -delta",
        start_share=trials.start_shares[delta],
        walk=tuple(rungs),
        seed=seed,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("safeshield", "gymnasium", "numpy")},
        },
        replacement=describe(shield.replacement),
        environment_kwargs=environment_kwargs(env),
    )


def _refuse_shielded(env: object) -> None:
    """Raise ValueError where the environment already contains a shield.

    The rollouts would then test that shield as well as the one to be calibrated.
    """
    layer = shielding_layer(env)
    if layer is not None:
        raise ValueError(
            "env is already shielded (" + type(layer).__name__ + "): calibrate on the plain "
            "environment; the calibration puts the shield around it by itself"
        )
