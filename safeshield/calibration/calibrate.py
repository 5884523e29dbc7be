"""Calibration by rollouts: run the shielded agent, count violating episodes, choose delta."""

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
"""Shares of the starts with V_h <= 0 that the default thresholds keep, strictest first."""
_STARTS = 2000
_STARTS_OF_SLOW = 400  # without a vectorised form a reset may take a second
_AT_ONCE = 1024
_MOST_RESETS_PER_EPISODE = 20


def start_observations(
    shield: Shield, env: Env | VectorEnv, count: int, seed: int
) -> npt.NDArray[np.float32]:
    """Return `count` first observations of the environment's own resets, as rows (count, obs)."""
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
    """Return the walk's thresholds: quantiles of -V_h over starts with V_h <= 0, a hair below.

    The last one is 0.

    Raises:
        CalibrationError: no start has V_h <= 0.
    """
    values = shield.row_values(observations).astype(np.float64)
    inside = -values[values <= 0]
    if len(inside) == 0:
        raise CalibrationError(
            "no start of the environment has a learned value V_h <= 0: there is nothing to "
            "certify. Train longer, or check the labels' sign (h <= 0 is safe)"
        )
    # The last digits of a value depend on the batch it is computed in. An environment that always
    # starts in the same state must not lie on its own threshold.
    slack = 1e-6 * (abs(shield.model.scale.offset) + shield.model.scale.spread)
    quantiles = np.quantile(inside, [1.0 - share for share in shares]) - slack
    return [*sorted({float(q) for q in quantiles if q > 0}, reverse=True), 0.0]


@dataclass
class _Trials:
    """Fresh shielded episodes from accepted starts; remembers what the record needs."""

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
            # It is not calibrated yet: that is why we are here.
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
    """Choose the most permissive delta whose promise holds, by rollouts with the shield on.

    For delta from strict to permissive: run N fresh episodes for each policy, keep those that
    start with V_h <= -delta until there are N, and test the number of violating ones against
    the binomial tail; stop at the first failure (`walk`).

    The promise: with the confidence asked for, over the draw of these episodes, an episode
    from the same start distribution, in which one of these policies proposes and the shield
    executes, violates with probability at most epsilon.

    Args:
        shield: any shield; its own delta and record are ignored.
        env: the environment it will protect; with a vector entry point it runs in parallel. It must
            report ``info["constraint"]`` or ``info["cost"]``.
        epsilon: violation rate per episode to promise.
        confidence: of the promise.
        policy: who proposes the actions, anything `as_batch_policy` takes; the promise is
            then for this policy alone. By default a battery: random proposals and an adversary that
            always proposes the accepted action of highest Q_h.
        policy_name: what the promise calls it; "policy" by default, and a name by itself.
        deltas: strictly decreasing thresholds to walk; by default those that keep given shares of
            the starts with V_h <= 0 (`DEFAULT_SHARES`), read off resets that test nothing.
        episodes: N for each test; by default as many as allow one violation.
        seed: of all draws.
        num_envs: how many environments run side by side.

    Raises:
        TypeError: `env` is no environment.
        ValueError: spaces differ, an argument is out of range, N is too small (the message says
            how many are needed).
        CalibrationError: no threshold meets the request; the message says what was reached.
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
            "strictest threshold: pass smaller deltas, or check the labels (with binary ones, how "
            "far ahead a violation is felt: data.label_reach)"
        )
    if policy_name is not None and policy is None:
        raise ValueError(f"policy_name={policy_name!r} is the name of a policy: pass policy, too")
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
    """Refuse an environment with a shield inside: that one would earn the promise."""
    layer = shielding_layer(env)
    if layer is not None:
        raise ValueError(
            "env is already shielded (" + type(layer).__name__ + "): calibrate on the plain "
            "environment, the shield is put around it while it is tested"
        )
