"""Calibration by rollouts: a pilot proposes thresholds, and tests on fresh seeds choose one."""

from __future__ import annotations

import contextlib
import datetime
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from safeshield.calibration.advice import nothing_passes
from safeshield.calibration.binomial import check_probability
from safeshield.calibration.pilot import Pilot, threshold_grid
from safeshield.calibration.promises import Promise, Violation
from safeshield.calibration.proposers import policy_names
from safeshield.calibration.trials import MOST_RESETS_PER_EPISODE, Trials, start_rows
from safeshield.calibration.walk import CalibrationError, check_deltas, walks_in_turn
from safeshield.files.schema import whole
from safeshield.rollouts.copies import (
    Identity,
    check_env,
    environment_name,
    is_vector_env,
    sensor_fault,
    spaces_of,
)
from safeshield.rollouts.episodes import SEEDS
from safeshield.rollouts.infos import LABELS
from safeshield.shield.nested import shielding_layer
from safeshield.shield.record import (
    RESERVED_SEEDS,
    ActorRecord,
    Attempt,
    CalibrationRecord,
    EnvironmentWrapper,
    PolicyResult,
)
from safeshield.shield.replacement import describe
from safeshield.spaces.generic import Env, VectorEnv

if TYPE_CHECKING:
    from safeshield.shield.shield import Shield

DEFAULT_SHARES = (0.5, 0.8, 0.9, 0.95, 0.965, 0.975, 0.985)
"""Shares of the starts with V_h <= 0 that some of the pilot's thresholds keep, the strictest first.
"""
_STARTS = 2000
_STARTS_OF_SLOW = 400  # A reset without a vectorised form may take a second.
# The environment's seeds of an attempt: first those of the starts, then the pilot's and the tests'.
_PILOT = 2**14
_TESTS = 2**19
_NEXT_WALK = 2**20
_WALKS = 2
"""Number of walks that share the level where a pilot proposes the thresholds."""


def start_observations(
    shield: Shield, env: Env | VectorEnv, count: int, seed: int, first_seed: int | None = None
) -> npt.NDArray[np.float32]:
    """Return the first observations after `count` ordinary resets, as rows (count, obs).

    Args:
        shield: Shield whose observation space determines the rows.
        env: Environment to reset.
        count: Number of observations.
        seed: Seed from which that of the first reset is drawn.
        first_seed: Seed of the first reset, in place of `seed`. The others follow it.
    """
    if first_seed is None:
        first_seed = int(np.random.default_rng(seed).integers(SEEDS))
    return start_rows(shield, env, count, first_seed)


def default_deltas(
    shield: Shield,
    observations: npt.NDArray[np.float32],
    shares: Sequence[float] = DEFAULT_SHARES,
) -> list[float]:
    """Return thresholds that keep given shares of the starts with V_h <= 0, and 0, decreasing.

    They are quantiles of -V_h over the starts with V_h <= 0. Each is lowered by 1e-6 of the scale
    of h, to allow for rounding.

    Args:
        shield: Shield whose critics give V_h.
        observations: (n, obs) first observations of episodes, as rows.
        shares: Shares of the starts with V_h <= 0 that the thresholds keep, each in (0, 1).

    Raises:
        CalibrationError: No start has V_h <= 0.
    """
    return _quantiles(shield, shield.row_values(observations).astype(np.float64), shares)


def _quantiles(
    shield: Shield, values: npt.NDArray[np.float64], shares: Sequence[float] = DEFAULT_SHARES
) -> list[float]:
    """Return `default_deltas` for the values V_h (n,) of starts."""
    inside = -values[values <= 0]
    if len(inside) == 0:
        raise CalibrationError(
            "no start of the environment has a learned value V_h <= 0: there is nothing to "
            "certify. Train longer, or check the labels' sign (h <= 0 is safe)"
        )
    # Without the slack for rounding, the start of an environment that always starts in the same
    # state could miss its own threshold.
    quantiles = np.quantile(inside, [1.0 - share for share in shares]) - shield.model.scale.rounding
    return [*sorted({float(q) for q in quantiles if q > 0}, reverse=True), 0.0]


class Remembers(Protocol):
    """What remembers its calibrations: a shield, or an agent that is calibrated itself."""

    attempts: tuple[Attempt, ...]


@contextlib.contextmanager
def remembering(owner: Remembers) -> Iterator[None]:
    """Add the attempt of a calibration that fails in this context to the attempts of `owner`.

    A calibration that is interrupted, or ended by any other error, counts too. One that ended
    before its tests does not.
    """
    try:
        yield
    except BaseException as error:
        attempt = getattr(error, "attempt", None)
        if attempt is not None:
            owner.attempts = (*owner.attempts, attempt)
        raise


def calibrate(
    shield: Shield,
    env: Env | VectorEnv,
    *,
    epsilon: float | None = None,
    confidence: float = 0.99,
    promise: Promise | None = None,
    policy: object = None,
    policy_name: str | None = None,
    deterministic: bool = False,
    deltas: Sequence[float] | None = None,
    episodes: int | None = None,
    seed: int = 0,
    num_envs: int | None = None,
    workers: int = 0,
    ray: str | None = None,
    progress_bar: bool = False,
    alone: bool = False,
) -> CalibrationRecord:
    """Choose the most permissive delta that passes the tests, by rollouts with the shield on.

    A pilot proposes the most permissive threshold that looks good (see `pilot`). It is then tested
    on fresh seeds at half of the level 1 - confidence: for each policy, episodes that start with
    V_h <= -delta are played until a sequential test decides. If it fails, the pilot proposes
    stricter thresholds. These are tested on further fresh seeds at the other half of the level, the
    strictest first, up to the first failure (see `walk`).

    The promise is: with the given confidence, over the draw of these episodes, an episode
    from the same start distribution, in which one of these policies proposes and the shield
    executes, violates with probability at most epsilon. Other promises are `CostAbove` and
    `MeanCost`.

    Where the shield remembers m earlier attempts in this environment with one of these policies,
    the tests have the level (1 - confidence) / 2^m, and the seeds of those attempts are not used.

    Args:
        shield: The shield to calibrate. Its own delta and record are ignored.
        env: The environment that the shield will protect. Copies of it run in parallel where it can
            be copied (see `copies.vectorise`). It must report ``info["constraint"]`` or
            ``info["cost"]``, and the cost for a promise about costs. With faults of sensors and
            actuators around it (`rollouts.faults`) the promise holds under these faults, which the
            record lists. The environment inside them must then report these infos.
        epsilon: Violation rate per episode to promise, by default 0.01; short for
            ``promise=Violation(epsilon)``.
        confidence: Confidence of the promise.
        promise: What to promise: a `Violation`, `CostAbove` or `MeanCost`.
        policy: The policy that proposes the actions, in any form that `as_batch_policy` takes. The
            promise then holds for this policy alone. Pass ``num_envs=1`` if the policy reads an
            environment object, because the episodes otherwise run in copies of it, or if it is a
            function that remembers earlier calls, because it is otherwise called for several
            episodes in turn. By default there are two policies: random proposals, and an adversary
            that always proposes the accepted action of highest Q_h.
        policy_name: Name of the policy in the promise. By default it is `policy` itself where that
            is a string, the qualified name of a function, and the class of any other object.
        deterministic: The `deterministic` with which a policy's ``predict`` is called. It should be
            what is deployed; the default is Stable-Baselines3's.
        deltas: Strictly decreasing thresholds to test in this order, without a pilot and at the
            whole level. The tests stop at the first failure.
        episodes: A fixed number of episodes for each test in place of the sequential test; for a
            `MeanCost` the greatest number.
        seed: Seed of all draws.
        num_envs: Number of environments that run side by side.
        workers: Number of processes that step the environments (see `workers.WorkerVectorEnv`);
            with 0 this process does. Workers are worthwhile where a step takes milliseconds. The
            record does not depend on their number. A script must use them below
            ``if __name__ == "__main__":``.
        ray: Address of a Ray cluster that steps the environments, as `ray.init` takes it: "auto",
            "local" or host:port. `workers` is then the number of Ray actors, and 0 means one for
            each CPU of the cluster, of which each takes one. The record is that of ``workers=1``.
        progress_bar: Whether to show a progress bar, with the threshold, the policy, the episodes
            counted and the bound so far.
        alone: Whether `policy` acts without the shield, which then only certifies the starts: an
            episode counts where V_h <= -delta at its start. The record is an `ActorRecord`. As
            delta changes no episode, the outcome of a seed is used for every threshold.

    Returns:
        The record, with the chosen delta and the counts of every test. `shield` is not changed;
        `Shield.calibrate` returns a shield that carries the record.

    Raises:
        TypeError: `env` is not an environment.
        ValueError: The spaces differ, an argument is out of range, N is too small (the message
            says how many episodes are needed), or the environment does not report what is needed.
        ImportError: `ray` is given, and Ray is not installed.
        ConnectionError: No Ray cluster answers at `ray`.
        RuntimeError: A worker has ended. Nothing of the run is kept.
        KeyboardInterrupt: The tests were interrupted. This counts as an attempt, which is stored in
            the exception's `attempt`.
        CalibrationError: No threshold meets the request. The message says what was reached and what
            would help; `curve` and `attempt` of the error have the figures.
    """
    check_env(env)
    shield.check_fits(*spaces_of(env))
    _refuse_shielded(env)
    _refuse_faulty_labels(env)
    if epsilon is not None and promise is not None:
        raise ValueError(f"pass epsilon={epsilon} or promise={promise}, not both")
    promise = promise or Violation(0.01 if epsilon is None else epsilon)
    if policy_name is not None and policy is None:
        raise ValueError(
            f"policy_name={policy_name!r} names a policy, but policy is None: pass policy as well"
        )
    if alone and policy is None:
        raise ValueError("alone=True tests a policy, but policy is None: pass policy as well")
    check_probability("confidence", confidence)
    workers, seed = whole("workers", workers, least=0), whole("seed", seed, least=0)
    name, names = environment_name(env), tuple(policy_names(policy, policy_name))
    earlier = _known_attempts(shield)
    tried = sum(one.counts_for(name, names) for one in earlier)
    level = (1.0 - confidence) * 2.0**-tried
    planned = _WALKS if deltas is None else 1
    tested_confidence = confidence if tried == 0 and planned == 1 else 1.0 - level / planned
    try:
        test = promise.test(tested_confidence, episodes)
    except ValueError as error:
        if tested_confidence == confidence:
            raise
        raise ValueError(
            f"{error}. Confidence {confidence:g} needs {tested_confidence:g} here, because the "
            "level is shared with earlier attempts, and with a second walk unless deltas are given"
        ) from None
    if deltas is not None:
        deltas = [float(delta) for delta in deltas]
        check_deltas(deltas)
    first_seed = _fresh_seeds(seed, earlier)
    values = _start_values(shield, env, seed, first_seed)
    asked = deltas
    if asked is not None:
        _refuse_few_starts(values, asked)
    quantiles = _quantiles(shield, values) if asked is None else []
    trials = Trials(
        shield, env, promise, policy, policy_name, tested_confidence, values, seed,
        deterministic=deterministic, num_envs=num_envs, workers=workers, ray=ray,
        progress_bar=progress_bar, alone=alone,
    )  # fmt: skip
    try:
        walks: Iterable[Sequence[float]] = [asked or []]
        if asked is None:
            pilot = Pilot(trials, threshold_grid(values, quantiles), first_seed + _PILOT)
            walks = _walks(pilot, pilot.permissive())
        attempt = Attempt(name, names, level, False, first_seed)
        try:
            delta, rungs = walks_in_turn(
                lambda number, delta, policy: trials.test(
                    delta, policy, test, first_seed + _TESTS + number * _NEXT_WALK
                ),
                walks,
                names,
            )
        except BaseException as error:
            # The user may have seen results before an interruption, for example on the bar. An
            # environment may raise because of what the policy did, for example in a collision.
            error.attempt = attempt  # type: ignore[attr-defined]
            raise
    finally:
        trials.close()
    if delta is None:
        raise CalibrationError(
            nothing_passes(
                promise, confidence, rungs[-1], trials.points, values, asked, policy, level, alone
            ),
            trials.points,
            attempt,
        )
    chosen = {rung.policy: rung for rung in rungs if rung.delta == delta}
    played = {one.policy: one for one in trials.tests if one.delta == delta}
    results = tuple(
        PolicyResult(
            one,
            chosen[one].episodes,
            chosen[one].violations,
            chosen[one].bound,
            played[one].intervention_rate,
        )
        for one in names
    )
    tested = Identity.of(env)
    kind = ActorRecord if alone else CalibrationRecord
    return kind(
        delta=delta,
        epsilon=promise.share,
        confidence=confidence,
        policies=results,
        environment=name,
        start_distribution="its own reset does, kept where V_h <= -delta"
        + (f" for delta {delta:.4g}" if alone else ""),
        start_share=played[names[0]].start_share,
        walk=tuple(rungs),
        seed=seed,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={
            "python": platform.python_version(),
            **{one: version(one) for one in ("safeshield", "gymnasium", "numpy")},
        },
        replacement=describe(shield.replacement),
        environment_kwargs=tested.kwargs,
        kind=promise.kind,
        limit=promise.limit,
        cost_bound=promise.bound,
        deterministic=deterministic,
        horizon=tested.horizon,
        wrappers=None
        if tested.wrappers is None
        else tuple(EnvironmentWrapper(*one) for one in tested.wrappers),
        pilot=trials.piloted,
        walks_planned=planned,
        attempts=(*earlier, replace(attempt, passed=True)),
    )


def _known_attempts(shield: Shield) -> tuple[Attempt, ...]:
    """Return the attempts that a shield remembers; a record from before there were any is one."""
    record = shield.record
    if record is None or record.attempts:
        return shield.attempts
    names = tuple(result.policy for result in record.policies)
    own = Attempt(record.environment, names, 1.0 - record.confidence, True, -1)
    return (own, *shield.attempts)


def _fresh_seeds(seed: int, earlier: Sequence[Attempt]) -> int:
    """Return the first of the environment's seeds for an attempt, apart from all earlier ones."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    while True:
        first = int(rng.integers(SEEDS))
        known = (one.first_seed for one in earlier if one.first_seed >= 0)
        if all(abs(first - other) >= RESERVED_SEEDS for other in known):
            return first


def _start_values(
    shield: Shield, env: Env | VectorEnv, seed: int, first_seed: int
) -> npt.NDArray[np.float64]:
    """Return V_h of starts (n,), drawn with seeds that no test uses."""
    spec = getattr(env, "spec", None)
    fast = is_vector_env(env) or getattr(spec, "vector_entry_point", None) is not None
    starts = start_observations(shield, env, _STARTS if fast else _STARTS_OF_SLOW, seed, first_seed)
    return shield.row_values(starts).astype(np.float64)


def _walks(pilot: Pilot, least: float) -> Iterator[list[float]]:
    """Yield the thresholds of two walks: `least`, and stricter ones if it fails its test."""
    yield [least]
    yield pilot.stricter(least)


def _refuse_few_starts(values: npt.NDArray[np.float64], deltas: Sequence[float]) -> None:
    share = float(np.mean(values <= -max(deltas)))
    if share < 1.0 / MOST_RESETS_PER_EPISODE:
        raise CalibrationError(
            f"only {share:.1%} of the environment's starts have V_h <= -{max(deltas):.4g}, the "
            "strictest threshold: pass smaller deltas, or check the labels (for binary labels, "
            "data.label_reach says how many steps before a violation V_h becomes positive)"
        )


def _refuse_faulty_labels(env: object) -> None:
    """Raise ValueError unless the environment inside a sensor's fault reports what is counted.

    A label that is added outside would be that of the faulty observation. The environment takes one
    step.
    """
    fault = sensor_fault(env)
    if fault is None:
        return
    while (inside := sensor_fault(fault.env)) is not None:
        fault = inside
    fault.env.reset(seed=0)
    *_, info = fault.env.step(fault.env.action_space.sample())
    if not any(info.get(label) is not None for label in LABELS):
        name = type(fault).__name__
        raise ValueError(
            f"the environment inside {name} must report info['constraint'] or info['cost'], got "
            f"the infos {sorted(info)}: a violation is that of the plant, not that of a faulty "
            f"observation. Report one inside, as {name}(ConstraintFromFunction(env, function), ...)"
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
