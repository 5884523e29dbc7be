"""Evidence from a log alone: each method's theorem over repeats, its words, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from fitted import DT
from scipy.stats import binom
from tables import table_shield
from test_masks import Walk
from test_masks import table as masks_table
from test_support import write_header

from safeshield import (
    AdaptiveThreshold,
    CalibrationError,
    OfflineDataset,
    SafeFQL,
    SafetyShield,
    Shield,
    collect,
)
from safeshield.calibration.binomial import episodes_needed, upper_bound
from safeshield.calibration.from_log import lowest_allowed, rank_of
from safeshield.demo.helmsmen import Helmsmen
from safeshield.rollouts.policies import as_batch_policy
from safeshield.shield import CommittedFallback, NearestAcceptable
from safeshield.shield.log_record import Ledger, LogRecord
from safeshield.support.record import conformal_level

pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning"
)
Array = npt.NDArray[Any]
REPEATS, ALPHA, CONFIDENCE, LEAD = 300, 0.1, 0.9, 4
MOST = int(binom.ppf(0.999, REPEATS, 1.0 - CONFIDENCE))
"""47: a correct calibrator breaks its level more often in one of a thousand runs of a test."""


def boat() -> Any:  # noqa: ANN401
    return gym.make("safeshield/Boat-v0", dt=DT, max_episode_steps=100)


@pytest.fixture(scope="module")
def pool() -> OfflineDataset:
    return collect(boat(), Helmsmen(), episodes=1500, seed=11)


@pytest.fixture
def fresh(shield: Shield) -> Shield:
    """The shield at delta 0.1, which remembers nothing."""
    return replace(shield.with_delta(0.1), ledger=Ledger())


def last(shield: Shield) -> LogRecord:
    return shield.log_records[-1]


# -- the rank ------------------------------------------------------------------------------------


def test_the_rank_is_the_largest_that_the_binomial_tail_allows() -> None:
    for n, alpha, confidence in [
        (29, 0.1, 0.95),
        (44, 0.1, 0.99),
        (100, 0.1, 0.95),
        (77, 0.3, 0.9),
    ]:
        rank = rank_of(n, alpha, confidence)
        assert binom.cdf(rank - 1, n, alpha) <= 1 - confidence < binom.cdf(rank, n, alpha)
    assert [rank_of(29, 0.1, 0.95), rank_of(44, 0.1, 0.99), rank_of(100, 0.1, 0.95)] == [1, 1, 5]
    for n, confidence in [(28, 0.95), (43, 0.99), (0, 0.9)]:
        with pytest.raises(ValueError, match=f"at least {episodes_needed(0.1, confidence)} are"):
            rank_of(n, 0.1, confidence)


# -- theorems over repeats, where the truth is known ----------------------------------------------


class Voyages:
    """Violating episodes: their entry T, and Q_h of their steps before it.

    An episode's values vary little around its own level, so its steps say hardly more than one.
    One in sixteen enters before the lead.
    """

    def __init__(self, rng: np.random.Generator, episodes: int) -> None:
        self.entry = rng.integers(LEAD, 40, episodes)
        self.entry[rng.random(episodes) < 1 / 16] = LEAD - 1
        level = rng.normal(size=episodes)
        self.values = level[:, None] + 0.02 * rng.normal(size=(episodes, 40))
        self.in_time = np.arange(40) <= self.entry[:, None] - LEAD

    @property
    def scores(self) -> Array:
        return np.where(self.in_time, self.values, -np.inf).max(axis=1)


def correct(voyages: Voyages) -> float:
    return lowest_allowed(voyages.scores, ALPHA, CONFIDENCE).threshold


def next_rank(voyages: Voyages) -> float:
    rank = lowest_allowed(voyages.scores, ALPHA, CONFIDENCE).rank
    return float(np.sort(voyages.scores)[rank])


def pooled_steps(voyages: Voyages) -> float:
    steps = voyages.values[voyages.in_time]
    early = np.full(int((~voyages.in_time.any(axis=1)).sum()), -np.inf)
    return lowest_allowed(np.append(steps, early), ALPHA, CONFIDENCE).threshold


def early_entries_dropped(voyages: Voyages) -> float:
    scores = voyages.scores
    return lowest_allowed(scores[np.isfinite(scores)], ALPHA, CONFIDENCE).threshold


def marginal(voyages: Voyages) -> float:
    return conformal_level(voyages.scores, ALPHA)


def misses(calibrator: Callable[[Voyages], float], episodes: int) -> Array:
    """The true share of missed violations at the threshold of each of 300 calibrations."""
    rng = np.random.default_rng(0)
    truth = np.sort(Voyages(rng, 100_000).scores)
    thresholds = [calibrator(Voyages(rng, episodes)) for _ in range(REPEATS)]
    return np.searchsorted(truth, thresholds) / len(truth)


@pytest.mark.parametrize("episodes", [22, 29, 100])
def test_a_detection_threshold_breaks_its_level_at_most_as_often_as_it_says(episodes: int) -> None:
    broken = int((misses(correct, episodes) > ALPHA).sum())
    assert broken <= MOST
    # It is not empty either: the size of the rank is that of the binomial tail.
    size = float(binom.cdf(rank_of(episodes, ALPHA, CONFIDENCE) - 1, episodes, ALPHA))
    assert broken >= binom.ppf(0.001, REPEATS, size)


@pytest.mark.parametrize(
    ("calibrator", "episodes"),
    [(next_rank, 22), (next_rank, 29), (pooled_steps, 100), (early_entries_dropped, 100)],
)
def test_broken_detectors_are_found_out(
    calibrator: Callable[[Voyages], float], episodes: int
) -> None:
    assert (misses(calibrator, episodes) > ALPHA).sum() > MOST


def test_a_marginal_threshold_covers_on_average_only() -> None:
    missed = misses(marginal, 100)
    assert missed.mean() <= ALPHA + 3 * missed.std() / np.sqrt(REPEATS)
    assert 0.35 < np.mean(missed > ALPHA) < 0.55


def test_residual_quantiles_of_episodes_hold_and_those_of_steps_do_not() -> None:
    rng = np.random.default_rng(1)
    largest = np.sort(rng.exponential(size=(100_000, 20)).max(axis=1))
    broken = {"episodes": 0, "steps": 0}
    for _ in range(REPEATS):
        steps = rng.exponential(size=(60, 20))
        for name, scores in (("episodes", steps.max(axis=1)), ("steps", steps.ravel())):
            quantile = -lowest_allowed(-scores, ALPHA, CONFIDENCE).threshold
            exceed = 1.0 - np.searchsorted(largest, quantile) / len(largest)
            broken[name] += exceed > ALPHA
    assert broken["episodes"] <= MOST
    assert broken["steps"] > MOST


def held(pool: OfflineDataset, rng: np.random.Generator, count: int, among: Array) -> Any:  # noqa: ANN401
    return pool.select(np.sort(rng.choice(among, count, replace=False)))


def scores_of(shield: Shield, pool: OfflineDataset, lead: int) -> tuple[Array, Array, Array]:
    """S, R and whether the shield would step in, of each episode, by their definitions."""
    found = []
    for log in pool.episodes:
        q = np.asarray(shield.value(log.observations, log.actions), np.float64)
        after = np.maximum(np.asarray(shield.value(log.next_observations)), log.next_constraints)
        bad = np.flatnonzero(log.next_constraints > 0)
        entry = bad[0] + 1 if len(bad) else len(log) + lead
        early = q[: max(entry - lead + 1, 0)]
        residual = max(float((after - q).max()), 0.0)
        _, report = shield.filter(log.observations, log.actions)
        found.append((early.max() if len(early) else -np.inf, residual, report.intervened.any()))
    return tuple(np.array(column) for column in zip(*found, strict=True))  # type: ignore[return-value]


def test_detection_and_residuals_on_the_boat(fresh: Shield, pool: OfflineDataset) -> None:
    lead = 2
    scores, residuals, _ = scores_of(fresh, pool, lead)
    starts_safe = pool.constraints[pool.episode_starts] <= 0
    counts = pool.violating_episodes & starts_safe
    violating, others = np.flatnonzero(counts), np.flatnonzero(~pool.violating_episodes)
    assert len(violating) > 200
    rng = np.random.default_rng(5)
    broken, worse, refused = 0, 0, 0
    for _ in range(REPEATS):
        shield = replace(fresh, ledger=Ledger())
        log = held(pool, rng, 40, np.arange(pool.num_episodes))
        quantile = last(shield.calibrate_from_log(log, "residuals", confidence=CONFIDENCE))
        assert quantile.threshold is not None
        worse += np.mean(residuals > quantile.threshold + 1e-6) > ALPHA
        shield = replace(fresh, ledger=Ledger())
        chosen = np.append(rng.choice(violating, 40, False), rng.choice(others, 5, False))
        try:
            found = shield.calibrate_from_log(
                pool.select(np.sort(chosen)), "detection", confidence=CONFIDENCE, lead=lead
            )
        except CalibrationError:
            refused += 1  # Too many entries before the lead: nothing is stated.
            continue
        record = last(found)
        # The alarm as the shield raises it: by its own delta.
        broken += np.mean(scores[violating] <= -found.delta) > ALPHA
        assert (record.episodes, record.violating, record.held_out) == (40, 40, 45)
        assert record.threshold is not None
        assert record.threshold <= -found.delta + 2e-5 or found.delta == 0
    assert broken <= MOST
    assert worse <= MOST
    assert refused < REPEATS / 2


def test_shadow_bounds_hold_and_a_shortened_tail_does_not(
    fresh: Shield, pool: OfflineDataset
) -> None:
    _, _, stepped_in = scores_of(fresh, pool, 1)
    starts = pool.observations[pool.episode_starts]
    certified = np.flatnonzero(np.asarray(fresh.value(starts)) <= fresh.threshold)
    events = pool.violating_episodes | stepped_in
    truth = events[certified].mean()
    rng = np.random.default_rng(6)
    broken, short = 0, 0
    for _ in range(REPEATS):
        log = held(pool, rng, 30, certified)
        shield = replace(fresh, ledger=Ledger())
        record = last(shield.calibrate_from_log(log, "shadow", confidence=CONFIDENCE))
        assert record.episodes == 30
        broken += record.bound < truth
        short += upper_bound(30, max(record.events - 1, 0), CONFIDENCE) < truth
    assert broken <= MOST
    assert short > MOST


def test_thresholds_tried_on_the_same_episodes_cost_their_levels() -> None:
    """Of ten shields, each at exactly the promised rate, the best looking one is reported."""
    rng = np.random.default_rng(2)
    rate, tries, n = 0.05, 10, 200
    alone, shared = 0, 0
    for _ in range(REPEATS):
        best = int(rng.binomial(n, rate, tries).min())
        alone += upper_bound(n, best, CONFIDENCE) < rate
        shared += upper_bound(n, best, 1.0 - (1.0 - CONFIDENCE) / tries) < rate
    assert shared <= MOST
    assert alone > MOST


def test_the_shielded_episode_violates_only_where_the_shadow_counts_it(fresh: Shield) -> None:
    """From one start with the same randomness both runs are the same up to the intervention."""
    shadow, on = SafetyShield(boat(), fresh, mode="shadow"), SafetyShield(boat(), fresh)
    reckless = np.array([-1.0, 0.0], np.float32)
    counted, violated = 0, 0
    for seed in range(40):
        a, b = shadow.reset(seed=seed)[0], on.reset(seed=seed)[0]
        same, event, bad, over = True, False, False, False
        for _ in range(100):
            rng = np.random.default_rng(int(1e6 * abs(float(a[0]))))
            action = reckless + 0.5 * rng.normal(size=2).astype(np.float32)
            action = np.clip(action, -1, 1).astype(np.float32)
            if same:
                np.testing.assert_array_equal(a, b)
            a, _, over, cut, told = shadow.step(action)
            event |= told["shield/would_intervene"] or told["constraint"] > 0
            if same:
                b, _, ended, _, info = on.step(action)
                assert info["shield/intervened"] == told["shield/would_intervene"]
                bad |= info["constraint"] > 0
                same = not info["shield/intervened"]
                if same:
                    assert (over, told["constraint"]) == (ended, info["constraint"])
            if over or cut:
                break
        while not same and not bad:
            b, _, ended, cut, info = on.step(reckless)
            bad |= info["constraint"] > 0
            if ended or cut:
                break
        counted, violated = counted + event, violated + bad
        assert event or not bad
    assert violated < counted < 40


# -- shadow mode changes nothing -------------------------------------------------------------------


def test_a_log_behind_a_shield_that_no_file_can_hold_names_it(fresh: Shield) -> None:
    known = fresh.model.fallback_actor
    own = type("Own", (type(known),), {})
    fields = {f.name: getattr(known, f.name) for f in dataclasses.fields(known) if f.init}  # type: ignore[arg-type]
    other = replace(fresh, model=replace(fresh.model, fallback_actor=own(**fields)))
    log = collect(SafetyShield(boat(), other), Helmsmen(), episodes=1, seed=4)
    assert log.provenance is not None
    assert log.provenance["behind_shield"]["digest"] == other.digest != fresh.digest
    with pytest.raises(ValueError, match="is not of a kind that a file can name"):
        other.save("never.safetensors")


def test_a_log_behind_a_shadow_is_the_plain_log_and_says_so(fresh: Shield) -> None:
    plain = collect(boat(), Helmsmen(), episodes=8, seed=4, num_envs=1)
    shadow = SafetyShield(boat(), fresh, mode="shadow")
    log = collect(shadow, Helmsmen(), episodes=8, seed=4, num_envs=1)
    np.testing.assert_array_equal(log.episode_hashes, plain.episode_hashes)
    assert plain.provenance is not None
    assert {k: v for k, v in plain.provenance.items() if k != "versions"} == {
        "environment": "safeshield/Boat-v0", "seed": 4,
    }  # fmt: skip
    assert log.provenance == {
        **plain.provenance,
        "behind_shield": {"digest": fresh.digest, "delta": 0.1, "mode": "shadow"},
    }
    record = last(fresh.calibrate_from_log(log, "shadow", policy="Helmsmen"))
    assert {one.name: one.checked for one in record.assumptions}["proposals logged"]
    named = collect(shadow, Helmsmen(), episodes=8, seed=4, num_envs=1, policy_name="crew A")
    for given in ({"policy": "crew B"}, {"policy": Helmsmen(), "policy_name": "crew B"}):
        with pytest.raises(ValueError, match="got 'crew B', but the log was collected by 'crew A'"):
            fresh.calibrate_from_log(named, "shadow", **given)
    with pytest.raises(TypeError, match="policy_name must be a text, got 5"):
        collect(boat(), Helmsmen(), episodes=1, seed=0, policy_name=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be recorded with this shield on at delta 0\.1"):
        fresh.calibrate_from_log(log, "trial")


@pytest.mark.parametrize("count", [None, 3])
def test_shadow_infos_tell_what_the_shield_would_have_done(
    fresh: Shield, count: int | None
) -> None:
    from safeshield.wrappers import VectorSafetyShield

    rng = np.random.default_rng(0)
    fresh = fresh.with_delta(1.2)
    if count is None:
        env: Any = SafetyShield(boat(), fresh, mode="shadow")
    else:
        boats = gym.vector.SyncVectorEnv([boat] * count)
        env = VectorSafetyShield(boats, fresh, mode="shadow")
    obs, info = env.reset(seed=0)
    assert not np.any(info["shield/would_intervene"])
    assert np.isnan(info["action_shielded"]).all()
    seen = 0
    for _ in range(150):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        executed, report = fresh.filter(obs, action)
        obs, _, over, cut, info = env.step(action)
        ends = np.any(over) or np.any(cut)
        if not ends and np.isfinite(info["action_executed"]).all():
            np.testing.assert_array_equal(info["action_executed"], action)
            np.testing.assert_array_equal(info["shield/would_intervene"], report.intervened)
            np.testing.assert_allclose(info["action_shielded"], executed, atol=1e-4)
            np.testing.assert_allclose(info["shield/value"], report.proposed_value, atol=1e-5)
            seen += int(np.sum(report.intervened))
        assert not np.any(info["shield/intervened"])
        assert not np.any(info["shield/certified"])
        if count is None and ends:
            obs, _ = env.reset()
    assert seen > 5


def test_shadow_in_stable_baselines3_and_a_spec_that_rebuilds_it(
    fresh: Shield, tmp_path: Path
) -> None:
    from stable_baselines3.common.vec_env import DummyVecEnv

    from safeshield.wrappers import VecSafetyShield

    fresh = fresh.with_delta(1.2)
    envs = VecSafetyShield(DummyVecEnv([boat] * 2), fresh, mode="shadow")
    envs.seed(0)
    envs.reset()
    actions = np.tile(np.array([-1.0, 0.3], np.float32), (2, 1))
    would = 0
    for _ in range(110):
        _, _, _, infos = envs.step(actions)
        np.testing.assert_array_equal([one["action_executed"] for one in infos], actions)
        assert not any(one["shield/intervened"] for one in infos)
        would += sum(one["shield/would_intervene"] for one in infos)
    assert would > 0
    fresh.save(tmp_path / "s.safetensors")
    env = SafetyShield(boat(), str(tmp_path / "s.safetensors"), mode="shadow")
    assert env.spec is not None
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    again.reset(seed=0)
    assert "shield/would_intervene" in again.step(actions[0])[-1]


def test_a_shadow_adapts_nothing_and_an_unknown_mode_is_refused(fresh: Shield) -> None:
    for more in ({"adaptive": {"target": 0.1}}, {"intervention_penalty": 1.0}, {"monitor": 1}):
        with pytest.raises(ValueError, match="mode='shadow' changes and promises nothing"):
            SafetyShield(boat(), fresh, mode="shadow", **more)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mode must be one of \['shield', 'shadow'\], got 'off'"):
        SafetyShield(boat(), fresh, mode="off")  # type: ignore[arg-type]


def test_a_shadow_forbids_no_discrete_action_of_its_own() -> None:
    discrete = table_shield(masks_table, gym.spaces.Discrete(5, start=1))
    for own in (False, True):
        env = SafetyShield(Walk(own=own), discrete, mode="shadow")
        state, info = env.reset(seed=0)
        for action in (1, 2, 3, 4, 5):
            allowed = np.arange(5) != state if own else np.ones(5)
            np.testing.assert_array_equal(info["action_mask"], allowed)
            np.testing.assert_array_equal(env.action_masks(), allowed)
            before = state
            state, _, _, _, info = env.step(action)
            assert env.unwrapped.sent[-1] == (before, action)
            would = masks_table[before, action - 1] > 0
            assert info["shield/would_intervene"] == would


# -- words and records -----------------------------------------------------------------------------


def test_the_words_are_those_of_the_method(fresh: Shield, pool: OfflineDataset) -> None:
    log = pool.select(np.arange(400))
    found = fresh.calibrate_from_log(log, "detection", lead=2)
    assert found.record is None
    told = last(found).statement
    assert told.startswith(
        "With confidence 0.95 over the held-out episodes, of violating episodes of "
        "safeshield/Boat-v0 that start in a safe state, drawn like this log's (its policies, "
        "starts, horizon), at least 0.9 raise the alarm 2 or more steps before entry. Whether the "
        "alarm comes in time to be saved, and how other agents fail, is not covered."
    )
    unsafe = int((log.constraints[log.episode_starts] > 0).sum())
    assert unsafe > 0
    assert f"{unsafe} violating episodes of the log started in the violation" in told
    shadow = last(fresh.calibrate_from_log(pool.select(np.arange(400, 700)), "shadow"))
    assert (
        "This bound cannot be below the agent's own rate without the shield: it shows that agent "
        "and shield together violate at most at this rate, not that the shield is the reason."
    ) in shadow.statement
    assert f"with probability at most {shadow.bound:.4g}" in shadow.statement
    residuals = last(found.calibrate_from_log(log, "residuals"))
    assert "for the logging policy's actions" in residuals.statement
    assert "That an acceptable action exists does not follow" in residuals.statement
    assert residuals.tries == 2
    assert residuals.joint_confidence == pytest.approx(0.9)
    assert "2 statements were made about some of these episodes" in residuals.statement
    assert residuals.delta is None


def test_the_curve_counts_what_it_says(fresh: Shield, pool: OfflineDataset, tmp_path: Path) -> None:
    log = pool.select(np.arange(300))
    record = last(fresh.calibrate_from_log(log, "detection", lead=LEAD))
    scores, _, _ = scores_of(fresh, log, LEAD)
    highest = np.array(
        [float(np.max(fresh.value(one.observations, one.actions))) for one in log.episodes]
    )
    safe = log.constraints[log.episode_starts] <= 0
    counts = log.violating_episodes & safe
    assert 10 < len(record.curve) <= 65
    for point in record.curve[::7]:
        near = 1e-5
        missed = (scores[counts] < point.threshold - near).sum()
        assert missed <= point.missed <= (scores[counts] < point.threshold + near).sum()
        false = (highest[~log.violating_episodes] >= point.threshold + near).sum()
        most = (highest[~log.violating_episodes] >= point.threshold - near).sum()
        assert false <= point.false_alarms <= most
    assert record.threshold in [point.threshold for point in record.curve]
    record.picture(str(tmp_path / "curve.svg"))
    assert (tmp_path / "curve.svg").stat().st_size > 5000
    with pytest.raises(ValueError, match="must be one of method 'detection'"):
        last(fresh.calibrate_from_log(log, "residuals")).picture(str(tmp_path / "none.svg"))


def test_values_that_repeat_do_not_slip_past_the_shield(
    fresh: Shield, pool: OfflineDataset
) -> None:
    """The shield accepts an action whose Q_h equals its threshold, so delta lies beyond it."""
    found = fresh.calibrate_from_log(pool.select(np.arange(400)), "detection", lead=LEAD)
    log = pool.select(np.arange(400))
    scores, _, _ = scores_of(found, log, LEAD)
    record = last(found)
    assert record.threshold is not None
    at = np.argmin(np.abs(scores - record.threshold))
    assert scores[at] > found.threshold


def test_a_copy_keeps_what_still_holds_for_it(fresh: Shield, pool: OfflineDataset) -> None:
    one, two = pool.select(np.arange(300)), pool.select(np.arange(300, 500))
    shield = fresh.calibrate_from_log(one, "detection")
    shield = shield.calibrate_from_log(one, "residuals").calibrate_from_log(two, "shadow")
    kinds = lambda s: [record.method for record in s.log_records]  # noqa: E731
    assert kinds(shield) == ["detection", "residuals", "shadow"]
    assert kinds(shield.with_delta(shield.delta)) == kinds(shield)
    assert kinds(shield.with_delta(1.0)) == ["residuals"]
    assert kinds(shield.with_replacement(NearestAcceptable())) == ["detection", "residuals"]
    other = shield.with_constraint(lambda obs: np.full(len(obs), -1.0))
    assert kinds(other) == []
    assert len(other.ledger.attempts) == 3
    with pytest.raises(ValueError, match="log_records were made for deltas"):
        replace(shield, delta=1.0)


def test_nothing_from_a_log_certifies(fresh: Shield, pool: OfflineDataset) -> None:
    shield = fresh.calibrate_from_log(pool.select(np.arange(300)), "shadow")
    env = SafetyShield(boat(), shield)
    for seed in range(5):
        assert not env.reset(seed=seed)[1]["shield/certified"]
    assert not shield.certified(pool.observations[:50]).any()


# -- the ledger ------------------------------------------------------------------------------------


def test_both_shields_remember_and_the_same_question_costs_nothing(
    fresh: Shield, pool: OfflineDataset
) -> None:
    log, part = pool.select(np.arange(300)), pool.select(np.arange(299, 598))
    first = fresh.calibrate_from_log(log, "detection")
    again = fresh.calibrate_from_log(log, "detection")
    assert last(first).tries == last(again).tries == 1
    assert len(fresh.ledger.attempts) == 1
    other = fresh.calibrate_from_log(log, "detection", lead=7)
    assert (last(other).tries, last(other).spent) == (2, pytest.approx(0.1))
    # One common episode is enough.
    assert last(fresh.calibrate_from_log(part, "detection")).tries == 3
    assert last(fresh.calibrate_from_log(pool.select(np.arange(600, 900)), "shadow")).tries == 1
    for share in np.linspace(0.5, 0.6, 16):
        fresh.calibrate_from_log(log, "residuals", alpha=float(share))
    with pytest.raises(ValueError, match="leave no confidence for another: use fresh episodes"):
        fresh.calibrate_from_log(log, "residuals", alpha=0.7)


def test_episodes_that_chose_delta_cannot_test_it(fresh: Shield, pool: OfflineDataset) -> None:
    log = pool.select(np.arange(300))
    chosen = fresh.calibrate_from_log(log, "detection")
    for method in ("shadow", "trial"):
        with pytest.raises(ValueError, match="was chosen by some of these episodes"):
            chosen.calibrate_from_log(pool.select(np.arange(290, 400)), method)
    quantile = last(fresh.calibrate_from_log(log, "residuals")).threshold
    assert quantile is not None
    with pytest.raises(ValueError, match="was chosen by some of these episodes"):
        fresh.with_delta(quantile).calibrate_from_log(log, "shadow")
    assert last(chosen.calibrate_from_log(pool.select(np.arange(300, 400)), "shadow")).tries == 1


def test_a_trial_that_is_repeated_until_it_passes_says_so(
    fresh: Shield, pool: OfflineDataset
) -> None:
    parts = [pool.select(np.arange(at, at + 60)) for at in range(0, 300, 60)]
    for part in parts[:2]:
        with pytest.raises(CalibrationError, match="the rate is not shown"):
            fresh.calibrate_from_log(part, "trial", epsilon=0.1, policy="a")
    found = last(fresh.calibrate_from_log(parts[2], "trial", policy="a", epsilon=0.999))
    assert (found.repeats, found.failed, found.tries) == (2, 2, 3)
    assert found.spent == pytest.approx(0.15)
    assert (
        "2 earlier attempts by trial were made for this shield at this delta with this agent, of "
        "which 2 did not pass. The probability that one of all 3 statements promises too much is "
        "at most 0.15."
    ) in found.statement
    # The same question is free; another agent, delta or method is another question.
    again = last(fresh.calibrate_from_log(parts[2], "trial", policy="a"))
    assert (again.repeats, again.tries) == (2, 3)
    for shield, method, agent in (
        (fresh, "trial", "b"), (fresh.with_delta(0.2), "trial", "a"), (fresh, "shadow", "a"),
    ):  # fmt: skip
        twin = replace(shield, ledger=fresh.ledger)
        assert last(twin.calibrate_from_log(parts[3], method, policy=agent)).tries == 1
    with pytest.raises(ValueError, match="3 statements about this shield and agent, at levels"):
        fresh.calibrate_from_log(parts[4], "trial", policy="a", confidence=0.1)


# -- what is refused -------------------------------------------------------------------------------


def test_other_outcomes_of_the_same_episodes_are_another_question(
    fresh: Shield, pool: OfflineDataset
) -> None:
    log = pool.select(np.arange(60))
    with pytest.raises(CalibrationError):
        fresh.calibrate_from_log(log, "shadow", policy="a", epsilon=0.1)
    # All episodes count as cut at a longer horizon; at the usual one they do not.
    again = last(fresh.calibrate_from_log(log, "shadow", policy="a", horizon=101))
    assert (again.repeats, again.failed, again.tries) == (1, 1, 2)
    assert "of which 1 did not pass" in again.statement
    ended = replace(log, terminated=log.terminated | log.truncated, truncated=log.truncated & False)
    third = last(fresh.calibrate_from_log(ended, "shadow", policy="a"))
    assert (third.repeats, third.failed, third.tries) == (2, 1, 3)


def test_another_replacement_or_support_test_is_another_question(
    fresh: Shield, pool: OfflineDataset
) -> None:
    log = pool.select(np.arange(60))
    first = fresh.calibrate_from_log(log, "shadow", policy="a")
    assert last(first).tries == 1
    assert last(first.calibrate_from_log(log, "shadow", policy="a")).tries == 1
    other = first.with_replacement(CommittedFallback()).calibrate_from_log(
        log, "shadow", policy="a"
    )
    assert (last(other).tries, last(other).spent) == (2, pytest.approx(0.1))


def test_labels_that_contradict_the_shields_own_constraint_are_refused(
    fresh: Shield, pool: OfflineDataset
) -> None:
    log = pool.select(np.arange(60))
    told = {
        one.name: one.checked for one in last(fresh.calibrate_from_log(log, "shadow")).assumptions
    }
    source = fresh.model.constraint
    known = source is not None and source.available
    assert told["labels"] == known
    named = fresh if known else fresh.with_constraint("Boat@1")
    blind = replace(
        log, costs=log.costs * 0, constraints=-np.abs(log.constraints),
        next_constraints=-np.abs(log.next_constraints),
    )  # fmt: skip
    for wrong in (blind, replace(log, costs=log.costs * 0 + 1)):
        with pytest.raises(ValueError, match=r"contradict the shield's constraint 'Boat@1' in \d+"):
            named.calibrate_from_log(wrong, "shadow")
    right = last(named.calibrate_from_log(log, "shadow"))
    assert {one.name: one.checked for one in right.assumptions}["labels"]


def test_what_a_flight_lost_counts_against_every_statement(
    fresh: Shield, pool: OfflineDataset
) -> None:
    log = pool.select(np.arange(400))
    for method in ("shadow", "residuals", "detection"):
        without, lost = (
            last(replace(fresh, ledger=Ledger()).calibrate_from_log(
                replace(log, provenance={**(log.provenance or {}), "flight": told}),
                method, alpha=None if method == "shadow" else 0.3,
            ))
            for told in ({}, {"stepless": 7})
        )  # fmt: skip
        assert (lost.stepless, lost.episodes, lost.held_out) == (7, without.episodes + 7, 400)
        assert lost.cut == without.cut + 7
        if method == "shadow":
            assert lost.events == without.events + 7
            assert lost.bound == upper_bound(lost.episodes, lost.events, 0.95)
        elif method == "residuals":
            assert lost.threshold >= without.threshold
        else:
            assert lost.threshold <= without.threshold
            assert "led to no readable state" in lost.statement
    aborted = replace(log, provenance={**(log.provenance or {}), "flight": {"aborted": 2}})
    with pytest.raises(ValueError, match="horizon must be given, because 2 recorded episodes"):
        fresh.calibrate_from_log(aborted, "shadow")
    assert last(fresh.calibrate_from_log(aborted, "shadow", horizon=100)).horizon == 100


def test_an_episode_of_the_training_log_is_refused_with_count_and_index(
    fresh: Shield, pool: OfflineDataset
) -> None:
    train = pool.select(np.arange(100))
    shield = replace(fresh, training_episodes=train.episode_hashes)
    with pytest.raises(
        ValueError, match="but 2 of 300 episodes are in both, the first is episode 0"
    ):
        shield.calibrate_from_log(pool.select(np.arange(98, 398)), "shadow")
    found = last(shield.calibrate_from_log(pool.select(np.arange(100, 400)), "shadow"))
    assert {one.name: one.checked for one in found.assumptions}["held out"]
    # Other labels and rewards do not make another episode of it.
    part = pool.select(np.arange(99, 200))
    relabelled = replace(
        part,
        rewards=part.rewards + 1.0,
        constraints=2.0 * part.constraints,
        next_constraints=2.0 * part.next_constraints,
        constraint_source=None,
    )
    with pytest.raises(ValueError, match="1 of 101 episodes are in both, the first is episode 0"):
        shield.calibrate_from_log(relabelled, "shadow")
    unknown = last(fresh.calibrate_from_log(train, "shadow"))
    assert "could not be checked" in unknown.assumptions[0].statement
    assert "held out" in unknown.statement.rpartition("not checked:")[2]


def test_every_learner_keeps_the_hashes_of_its_log(
    agent: SafeFQL,
    boat_log: OfflineDataset,
    tmp_path: Path,
) -> None:
    np.testing.assert_array_equal(agent.shield().training_episodes, boat_log.episode_hashes)
    agent.save(tmp_path / "agent.safetensors")
    again = type(agent).load(tmp_path / "agent.safetensors")
    np.testing.assert_array_equal(again.shield().training_episodes, boat_log.episode_hashes)
    with pytest.raises(ValueError, match="1 of 1 episodes are in both"):
        agent.shield().calibrate_from_log(boat_log.select([7]), "shadow")


def test_episodes_that_set_the_support_test_are_refused_too(
    fresh: Shield, pool: OfflineDataset
) -> None:
    known = replace(fresh, training_episodes=pool.select([0]).episode_hashes)
    tested = known.with_support(pool.select(np.arange(50, 90)), score="ensemble")
    with pytest.raises(ValueError, match="40 of 50 episodes are in both, the first is episode 10"):
        tested.calibrate_from_log(pool.select(np.arange(40, 90)), "shadow")


def test_too_few_episodes_are_told_with_the_number_needed(
    fresh: Shield, pool: OfflineDataset
) -> None:
    some = pool.select(np.flatnonzero(pool.violating_episodes)[:20])
    with pytest.raises(ValueError, match=r"held_out has \d+ violating episodes .* at least 29 are"):
        fresh.calibrate_from_log(some, "detection")
    with pytest.raises(ValueError, match=r"20 episodes cannot set a threshold .* at least 29 are"):
        fresh.calibrate_from_log(some, "residuals")
    with pytest.raises(
        ValueError, match=r"which cannot show a rate of at most 0\.01 with confidence"
    ):
        fresh.calibrate_from_log(pool.select(np.arange(100)), "shadow", epsilon=0.01)
    with pytest.raises(CalibrationError, match="more episodes will not help") as caught:
        fresh.calibrate_from_log(pool.select(np.arange(500)), "shadow", epsilon=0.01)
    assert "the bound is" in str(caught.value)
    assert len(fresh.ledger.attempts) == 1, "an attempt that failed counts as well"
    assert not fresh.ledger.attempts[0].passed
    with pytest.raises(CalibrationError, match="less than 90 steps after their start"):
        fresh.calibrate_from_log(pool.select(np.arange(500)), "detection", lead=90)
    assert len(fresh.ledger.attempts) == 2


def test_an_episode_twice_is_refused(fresh: Shield, pool: OfflineDataset) -> None:
    with pytest.raises(ValueError, match="but 2 are repeated, first episode 1"):
        fresh.calibrate_from_log(pool.select([0, 1, 2, 1, 1]), "shadow")


def supervised(shield: Shield, pool: OfflineDataset) -> OfflineDataset:
    """The log of a supervisor who stops each episode before the first rejected action."""
    parts = []
    for log in pool.episodes:
        _, report = shield.filter(log.observations, log.actions)
        at = int(np.argmax(report.intervened)) if report.intervened.any() else len(log)
        if at == 0:
            at = 1  # A log cannot hold an episode without steps.
        ends = log.truncated[:at].copy()
        ends[-1] = not log.terminated[at - 1]
        fields = {
            name: getattr(log, name)[:at]
            for name in (
                "observations", "actions", "rewards", "next_observations", "terminated", "costs",
                "constraints", "next_constraints",
            )
        }  # fmt: skip
        parts.append(replace(log, **fields, truncated=ends))
    return OfflineDataset.concatenate(parts)


def test_cut_episodes_count_against_the_shield(fresh: Shield, pool: OfflineDataset) -> None:
    whole = pool.select(np.arange(120))
    cut = supervised(fresh, whole)
    found = [last(fresh.calibrate_from_log(log, "shadow", horizon=100)) for log in (whole, cut)]
    assert found[0].events == found[1].events > 0
    assert found[0].cut == 0 < found[1].cut
    last_rows = cut.episode_starts + cut.episode_lengths - 1
    kept = np.asarray(fresh.value(cut.observations[cut.episode_starts])) <= fresh.threshold
    early = cut.truncated[last_rows] & (cut.episode_lengths < 100)
    assert found[1].cut == (early & kept).sum() < early.sum()
    counted = f"{found[1].cut} of the {kept.sum()} episodes were cut, and count as a violation."
    assert counted in found[1].statement
    # Without the cut ones the bound would be far below the agent's own rate.
    ends = cut.episode_starts + cut.episode_lengths - 1
    whole_ones = np.flatnonzero(~(cut.truncated[ends] & (cut.episode_lengths < 100)))
    shorter = last(fresh.calibrate_from_log(cut.select(whole_ones), "shadow", horizon=100))
    assert shorter.bound < 0.5 * found[0].bound
    with pytest.raises(CalibrationError, match="were cut"):
        fresh.calibrate_from_log(cut, "residuals", horizon=100)
    with pytest.raises(ValueError, match="horizon must be at least 100, got 50"):
        fresh.calibrate_from_log(whole, "shadow", horizon=50)


def test_a_trial_without_the_shield_is_refused(fresh: Shield, pool: OfflineDataset) -> None:
    fresh = fresh.with_replacement(CommittedFallback())
    with pytest.raises(ValueError, match="an action was executed that this shield replaces"):
        fresh.calibrate_from_log(pool.select(np.arange(50)), "trial")
    log = collect(SafetyShield(boat(), fresh), Helmsmen(), episodes=60, seed=21)
    record = last(fresh.calibrate_from_log(log, "trial", policy="Helmsmen"))
    starts = np.asarray(fresh.value(log.observations[log.episode_starts]))
    assert record.events == log.violating_episodes[starts <= fresh.threshold].sum()
    assert record.bound == upper_bound(record.episodes, record.events, 0.95)
    assert "Violating episodes seen with the shield on" in record.statement
    assert {one.name: one.checked for one in record.assumptions}["shield on"]
    told = last(fresh.calibrate_from_log(log, "trial", policy=Helmsmen(), deterministic=True))
    assert "(deterministic=True)" in told.statement
    assert "deterministic=True" in told.statement.rpartition("not checked:")[2]
    with pytest.raises(ValueError, match="recorded with a shield on, so it does not show"):
        fresh.calibrate_from_log(log, "shadow")
    with pytest.raises(ValueError, match=r"with this shield on at delta 0\.2, but the log says"):
        fresh.with_delta(0.2).calibrate_from_log(log, "trial")
    # Without the mark the executed actions agree, but nothing proves it.
    bare = last(fresh.calibrate_from_log(replace(log, provenance=None), "trial"))
    assert "shield on" in bare.statement.rpartition(":")[2]
    assert bare.events == record.events


def test_the_parts_of_a_joined_log_are_looked_at(fresh: Shield) -> None:
    plain = collect(boat(), Helmsmen(), episodes=3, seed=31)
    shadow = collect(SafetyShield(boat(), fresh, mode="shadow"), Helmsmen(), episodes=3, seed=32)
    trial = collect(SafetyShield(boat(), fresh), Helmsmen(), episodes=3, seed=33)
    join = OfflineDataset.concatenate
    more = replace(collect(boat(), Helmsmen(), episodes=1, seed=34), provenance={"parts": []})
    nested = join([join([plain, trial]), more])
    for log in (join([shadow, trial]), join([plain, trial]), nested):
        with pytest.raises(ValueError, match="recorded with a shield on, so it does not show"):
            fresh.calibrate_from_log(log, "shadow")
    for log in (join([shadow, trial]), join([plain, shadow])):
        with pytest.raises(ValueError, match="but the log says mode 'shadow'"):
            fresh.calibrate_from_log(log, "trial")
    with pytest.raises(ValueError, match="1 of the 2 logs that it was joined from do not say so"):
        fresh.calibrate_from_log(join([plain, trial]), "trial")
    for log, told in ((join([shadow, plain]), False), (shadow, True)):
        checked = last(fresh.calibrate_from_log(log, "shadow")).assumptions
        assert {one.name: one.checked for one in checked}["proposals logged"] is told

    def by(log: OfflineDataset, **provenance: object) -> OfflineDataset:
        return replace(log, provenance=provenance)

    two = join([by(plain, collected_by="a"), by(shadow, collected_by="b")])
    with pytest.raises(ValueError, match=r"joined from logs of \['a', 'b'\]"):
        fresh.calibrate_from_log(two, "shadow")
    with pytest.raises(ValueError, match="got 'a', but the log was collected by 'b'"):
        fresh.calibrate_from_log(two, "shadow", policy="a")
    with pytest.raises(ValueError, match="its agents learned while it was made"):
        fresh.calibrate_from_log(join([plain, by(shadow, learners=[{"steps": 1}])]), "shadow")
    # Parts that have the same parts keep them.
    both = [by(log, parts=[{"learners": [1]}], at=at) for at, log in enumerate((plain, shadow))]
    with pytest.raises(ValueError, match="its agents learned while it was made"):
        fresh.calibrate_from_log(join(both), "shadow")


def test_a_trial_whose_threshold_adapted_is_refused(fresh: Shield) -> None:
    env = SafetyShield(boat(), fresh, adaptive=AdaptiveThreshold(target=0.1))
    log = collect(env, Helmsmen(), episodes=3, seed=5)
    assert (log.provenance or {})["behind_shield"]["adaptive"] is True
    with pytest.raises(ValueError, match="the log says that the threshold adapted"):
        fresh.calibrate_from_log(log, "trial")


def straight(observation: Array) -> Array:
    return np.array([-0.9, -0.2 * observation[1]], np.float32)


def test_a_log_of_another_agent_is_refused(fresh: Shield) -> None:
    log = collect(boat(), straight, episodes=40, seed=3)
    record = last(fresh.calibrate_from_log(log, "shadow", policy=straight, deterministic=True))
    assert record.agent == "straight"
    assert {one.name: one.checked for one in record.assumptions}["same agent"]
    assert {one.name: one.checked for one in record.assumptions}["deterministic=True"]
    said = last(fresh.calibrate_from_log(log, "shadow", policy="straight", deterministic=False))
    assert "deterministic=False" in said.statement.rpartition("not checked:")[2]

    def other(observation: Array) -> Array:
        return straight(observation) + np.float32(0.1)

    with pytest.raises(ValueError, match=r"but other chooses other actions in \d+ of \d+ logged"):
        fresh.calibrate_from_log(log, "shadow", policy=other, deterministic=True)
    named = replace(log, provenance={"collected_by": "agent_a.zip"})
    with pytest.raises(ValueError, match=r"got 'agent_b\.zip', but the log was collected by"):
        fresh.calibrate_from_log(named, "shadow", policy="agent_b.zip")
    with pytest.raises(ValueError, match=r"agent_b\.zip.*, but the log was collected by"):
        fresh.calibrate_from_log(named, "shadow", policy=straight, policy_name="PPO (agent_b.zip)")
    same = "PPO (agent_a.zip)"
    fresh.calibrate_from_log(named, "shadow", policy=straight, policy_name=same)
    assert last(fresh.calibrate_from_log(named, "shadow")).agent == "agent_a.zip"
    learned = replace(log, provenance={"learners": [{"steps": 1}]})
    with pytest.raises(ValueError, match="its agents learned while it was made"):
        fresh.calibrate_from_log(learned, "shadow")
    told = last(fresh.calibrate_from_log(learned, "residuals")).assumptions
    assert any("only by a random split" in one.statement for one in told)
    assert any("The log says that its agents learned" in one.statement for one in told)
    assert as_batch_policy(straight, boat().action_space) is not None


def test_arguments_of_other_methods_are_refused(fresh: Shield, pool: OfflineDataset) -> None:
    log = pool.select(np.arange(60))
    for method, arguments, match in (
        ("shadow", {"alpha": 0.1}, "alpha=0.1 goes with detection and residuals"),
        ("residuals", {"lead": 2}, "lead=2 goes with detection"),
        ("detection", {"epsilon": 0.1}, "epsilon=0.1 goes with shadow, spliced and trial"),
        ("detection", {"lead": 0}, "lead must be at least 1, got 0"),
        ("detection", {"alpha": 1.0}, "alpha must lie between 0 and 1"),
        ("shadow", {"confidence": 1.0}, "confidence must lie between 0 and 1"),
        ("shadow", {"policy_name": "a"}, "policy_name='a' needs policy"),
        ("shadow", {"policy": ""}, "policy must name the agent that made the log, got ''"),
        ("trial", {"policy": straight, "policy_name": ""}, "policy_name must name the agent"),
        ("detection", {"policy": "a"}, "policy=a goes with shadow, spliced and trial"),
        ("residuals", {"deterministic": False}, "deterministic=False goes with shadow, spl"),
        ("detection", {"horizon": 100}, "horizon=100 goes with shadow, spliced, trial"),
        ("rollouts", {}, r"method must be one of \['detection', 'shadow', 'spliced', 't"),
    ):
        with pytest.raises(ValueError, match=match):
            fresh.calibrate_from_log(log, method, **arguments)  # type: ignore[arg-type]
    for method, wrong, match in (
        ("shadow", {"policy": 5}, "policy must be 'random', have act_batch .* got int"),
        ("trial", {"policy": 5}, "policy must be 'random', have act_batch .* got int"),
        ("trial", {"policy": straight, "policy_name": 5}, "policy_name must be a text, got 5"),
        ("trial", {"deterministic": "yes"}, r"deterministic must be True, False or None .*'yes'"),
    ):
        with pytest.raises(TypeError, match=match):
            fresh.calibrate_from_log(log, method, **wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="held_out must be an OfflineDataset"):
        fresh.calibrate_from_log(log.observations, "shadow")  # type: ignore[arg-type]


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture
def recorded(fresh: Shield, pool: OfflineDataset) -> Shield:
    known = replace(fresh, training_episodes=pool.select([0, 1]).episode_hashes)
    found = known.calibrate_from_log(pool.select(np.arange(10, 310)), "detection")
    return found.calibrate_from_log(pool.select(np.arange(310, 400)), "shadow")


def test_the_file_keeps_records_ledger_and_hashes(recorded: Shield, tmp_path: Path) -> None:
    path = tmp_path / "shield.safetensors"
    recorded.save(path)
    for twin in (Shield.load(path), pickle.loads(pickle.dumps(recorded))):
        assert twin.log_records == recorded.log_records
        assert twin.ledger.attempts == recorded.ledger.attempts
        for one, other in zip(twin.ledger.hashes, recorded.ledger.hashes, strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(twin.training_episodes, recorded.training_episodes)
        assert twin.digest == recorded.digest
    from safeshield.cli.kinds import describe

    told = describe(path)
    assert told["from_logs"] == [one.statement for one in recorded.log_records]
    assert json.loads(json.dumps(told["log_records"])) == told["log_records"]
    assert not told["calibrated"]


def without(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for name in names:
            header.pop(name)

    return change


def test_a_file_from_before_loads(fresh: Shield, tmp_path: Path) -> None:
    path = tmp_path / "shield.safetensors"
    fresh.save(path)
    write_header(path, without("log_records", "log_attempts"))
    shield = Shield.load(path)
    assert (shield.log_records, shield.ledger.attempts) == ((), ())
    assert shield.training_episodes is None


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "records a text": lambda h: h.update(log_records="x"),
    "method unknown": lambda h: h["log_records"][0].update(method="rollouts"),
    "another delta": lambda h: h["log_records"][1].update(delta=9.0),
    "a field missing": lambda h: h["log_records"][0].pop("bound"),
    "bound infinite": lambda h: h["log_records"][0].update(bound=float("1e999")),
    "no record of an attempt": lambda h: h["log_attempts"].pop(),
    "episodes below 0": lambda h: h["log_attempts"][0].update(episodes=-1),
    "episodes a text": lambda h: h["log_attempts"][0].update(episodes="3"),
    "training a float": lambda h: h.update(training_episodes=2.0),
    "training unknown": lambda h: h.update(training_episodes=None),
    "training more": lambda h: h.update(training_episodes=3),
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_are_refused(
    recorded: Shield, tmp_path: Path, damage: Callable[[dict[str, Any]], Any]
) -> None:
    path = tmp_path / "shield.safetensors"
    recorded.save(path)
    write_header(path, damage)
    with pytest.raises(ValueError, match=r"shield\.safetensors|log_records"):
        Shield.load(path)


# -- the plan --------------------------------------------------------------------------------------


def test_the_plan_says_what_the_methods_ask_for(
    fresh: Shield, pool: OfflineDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    from typer.testing import CliRunner

    from safeshield.calibration import episodes_plan
    from safeshield.cli.main import app

    needs = {need.kind: need for need in episodes_plan(0.3, 0.95, limit=10, bound=100)}
    violating = np.flatnonzero(
        pool.violating_episodes & (pool.constraints[pool.episode_starts] <= 0)
    )
    few = needs["detection"].least
    with pytest.raises(ValueError, match=f"at least {few} are needed"):
        fresh.calibrate_from_log(pool.select(violating[: few - 1]), "detection")
    fresh.calibrate_from_log(pool.select(violating[:few]), "detection", lead=1)
    assert needs["mean cost"].least == 29
    for need in (needs["shadow"], needs["trial"]):
        for episodes, most in need.looks:
            assert upper_bound(episodes, most, 0.95) <= 0.3 < upper_bound(episodes - 1, most, 0.95)
    with pytest.raises(ValueError, match="limit and bound belong together"):
        episodes_plan(0.1, 0.9, limit=1.0)
    run = CliRunner()
    shown = run.invoke(app, ["plan", "--epsilon", "0.05", "--confidence", "0.95", "--json"])
    assert shown.exit_code == 0
    told = {one["kind"]: one["looks"][0] for one in json.loads(shown.output)}
    assert told == {
        "detection": [29, 0], "residuals": [29, 0], "shadow": [59, 0], "spliced": [59, 0],
        "trial": [59, 0], "rollouts": [65, 0],
    }  # fmt: skip
    text = run.invoke(app, ["plan", "--lead", "0.5s", "--step-seconds", "0.1"]).output
    assert "lead 5 steps" in text
    for wrong in (["--lead", "0.5s"], ["--lead", "two"], ["--lead", "3", "--step-seconds", "1"]):
        failed = run.invoke(app, ["plan", *wrong])
        assert failed.exit_code == 2
        assert "--lead" in failed.output + failed.stderr
