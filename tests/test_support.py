"""Out of the data's support: scores, their calibrated level, the test, and the term in backups."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save as format_safetensors

from safeshield import (
    CalibrationRecord,
    SafetyShield,
    Shield,
    ShieldConfig,
    ShieldTrainer,
    collect,
)
from safeshield.calibration import upper_bound
from safeshield.calibration.proposers import Adversary
from safeshield.calibration.support import (
    calibrate_support,
    conformal_level,
    episode_scores,
    record_of,
)
from safeshield.data import OfflineDataset
from safeshield.demo.helmsmen import Helmsmen
from safeshield.files.tensors import read_tensors
from safeshield.nn.actor import FlowActor
from safeshield.shield import CommittedFallback, NearestAcceptable, ProjectedGradient
from safeshield.shield.critics import SafetyModel, StateValue
from safeshield.shield.record import PolicyResult, Rung
from safeshield.shield.runtime import ShieldRuntime
from safeshield.spaces.scaling import Scaling
from safeshield.support import SCORES, SupportRecord, SupportTest, episodes_needed, support_score
from safeshield.training.config import SafetyConfig
from safeshield.training.log import LogTensors, safety_scale
from safeshield.training.safety import SafetyLog
from safeshield.training.support_term import held_out_episodes
from safeshield.values.backup import safety_windows
from safeshield.values.safety import SafetyCritics
from safeshield.values.units import BEHAVIOUR


def flow_of(model: SafetyModel) -> FlowActor:
    assert isinstance(model.behaviour_actor, FlowActor)
    return model.behaviour_actor


def to_actions(model: SafetyModel, inputs: Array, noise: Array) -> Array:
    return flow_of(model).act(model.networks, inputs, noise)


def to_noise(model: SafetyModel, inputs: Array, actions: Array) -> Array:
    return flow_of(model).to_noise(model.networks, inputs, actions)


pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning"
)
Array = npt.NDArray[Any]
BOAT = "safeshield/Boat-v0"
REPEATS = 400


class Upstream(Helmsmen):
    """The helmsmen, none of whom ever steers a course with dy < 0."""

    def __call__(self, observations: Array, rng: np.random.Generator, /) -> Array:
        courses = super().__call__(observations, rng)
        return np.stack([courses[:, 0], np.abs(courses[:, 1])], axis=-1)


@pytest.fixture(scope="module")
def half_log() -> OfflineDataset:
    return collect(gym.make(BOAT), Upstream(), episodes=90, seed=5)


@pytest.fixture(scope="module")
def held_out(half_log: OfflineDataset) -> OfflineDataset:
    return half_log.split(0.7, seed=0)[1]


@pytest.fixture(scope="module")
def plain(half_log: OfflineDataset) -> Shield:
    """Trained on the other 70% of the half log; delta 0.02."""
    config = ShieldConfig(
        critic_hidden=(32, 32),
        behaviour_hidden=(48, 48),
        fallback_hidden=(16,),
        batch_size=128,
        learning_rate=3e-3,
        phase_shares=(0.4, 0.55, 0.05),
    )
    trainer = ShieldTrainer(config, device="cpu").fit(half_log.split(0.7, seed=0)[0], steps=2000)
    return trainer.shield().with_replacement(NearestAcceptable()).with_delta(0.02)


@pytest.fixture(scope="module")
def tested(plain: Shield, held_out: OfflineDataset) -> Shield:
    return plain.with_support(held_out)


def never_shown(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Actions of full strength that point down, by 20 degrees or more."""
    angle = np.random.default_rng(seed).uniform(np.pi + 0.35, 2 * np.pi - 0.35, count)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)


def safe_rows(shield: Shield, log: OfflineDataset, count: int = 500) -> Array:
    """Rows of the log whose states lie well inside the learned safe set."""
    inside = np.flatnonzero(np.asarray(shield.value(log.observations)) < -0.3)
    return np.random.default_rng(1).permutation(inside)[:count]


# -- the level: coverage ------------------------------------------------------------------------


def simulated(rng: np.random.Generator, episodes: int) -> tuple[Array, Array]:
    """Scores of whole episodes whose steps hang together, and where the episodes begin."""
    lengths = rng.integers(20, 120, episodes)
    # One in twenty episodes is sailed by somebody else: low for its whole length.
    mood = 0.5 * rng.normal(size=episodes) - 3.0 * (rng.random(episodes) < 0.05)
    scores = np.repeat(mood, lengths) + rng.normal(size=lengths.sum())
    return scores, np.concatenate([[0], np.cumsum(lengths)[:-1]])


def unseen_too_often(level: float, scores: Array, starts: Array, share: float) -> Array:
    """Whether more than `share` of an episode's steps lie below the level: (E,)."""
    parts = np.split(scores < level, starts[1:])
    return np.array([part.sum() > share * len(part) for part in parts])


def steps_for_episodes(scores: Array, _: Array, alpha: float, share: float) -> float:
    """A broken calibrator: every step counts as an episode of its own."""
    return record_of(scores, np.arange(len(scores)), "noise", alpha, share).level


def honest(scores: Array, starts: Array, alpha: float, share: float) -> float:
    return record_of(scores, starts, "noise", alpha, share).level


def broken_share(
    calibrator: Callable[..., float], alpha: float, share: float, repeats: int = REPEATS
) -> float:
    """How often a NEW episode has too many unseen steps, over fresh calibrations."""
    scores, starts = simulated(np.random.default_rng(0), 30 * repeats)
    broken = 0
    for first in range(0, 30 * repeats, 30):
        old, last = starts[first : first + 29], starts[first + 29]
        level = calibrator(scores[old[0] : last], old - old[0], alpha, share)
        new = scores[last : starts[first + 30] if first + 30 < len(starts) else None]
        broken += bool(unseen_too_often(level, new, np.array([0]), share)[0])
    return broken / repeats


@pytest.mark.parametrize(("alpha", "share"), [(0.1, 0.01), (0.1, 0.0), (0.25, 0.1)])
def test_the_promise_holds_and_counting_steps_breaks_it(alpha: float, share: float) -> None:
    noise = 3.0 * np.sqrt(alpha * (1 - alpha) / REPEATS)
    rate = broken_share(honest, alpha, share)
    assert rate <= alpha + noise
    # Nor is it empty: ranks are uniform, so the rate is floor(30 alpha) / 30.
    assert rate >= np.floor(30 * alpha) / 30 - noise
    assert broken_share(steps_for_episodes, alpha, share) > alpha + noise


@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.0, 0.01, 0.05, 0.3, 0.99]),
    shift=st.floats(-1, 1),
)
@settings(max_examples=60)
def test_an_episodes_score_is_where_its_share_is_used_up(
    seed: int, share: float, shift: float
) -> None:
    scores, starts = simulated(np.random.default_rng(seed), 5)
    each = episode_scores(scores, starts, share)
    for level in (*each, *(each + 1e-9), float(each.mean()) + shift):
        too_often = unseen_too_often(level, scores, starts, share)
        np.testing.assert_array_equal(too_often, ~(each >= level))


@pytest.mark.parametrize("alpha", [0.5, 0.1, 0.07, 1 / 3, 0.01])
def test_the_fewest_episodes_are_told(alpha: float) -> None:
    needed = episodes_needed(alpha)
    assert needed + 1 >= 1 / alpha - 1e-9 > needed
    level = conformal_level(np.arange(float(needed)), alpha)
    assert level == 0.0
    with pytest.raises(ValueError, match=f"at least {needed} are needed"):
        conformal_level(np.arange(float(needed - 1)), alpha)


def test_the_rank_is_exact_where_floats_are_not() -> None:
    # 0.29 * 100 is 28.999999999999996.
    assert conformal_level(np.arange(99.0), 0.29) == 28.0
    assert episode_scores(np.arange(100.0), np.array([0]), 0.29)[0] == 29.0


def test_not_a_number_counts_as_lowest_and_sets_no_level() -> None:
    scores = np.array([np.nan, 1.0, 2.0, 3.0])
    assert episode_scores(scores, np.array([0, 2]), 0.0).tolist() == [-np.inf, 2.0]
    starts = np.arange(0, 40, 2)
    with pytest.raises(ValueError, match=r"not finite at 50\.0% of the held-out steps"):
        record_of(np.tile([np.nan, 1.0], 20), starts, "noise", 0.1, 0.0)


# -- scores -------------------------------------------------------------------------------------


def linear_field(
    plain: Shield, steps: int, rate: float = 0.5, drift: float = 0.3, clock: float = 0.0
) -> Any:  # noqa: ANN401
    """A model whose behaviour is the field v(s, x, t) = rate x + drift + clock t."""
    width, act = plain.model.scaling.observation_features, 2
    first = np.zeros((1, width + act + 1, 2 * act + 1), np.float32)
    second = np.zeros((1, 2 * act + 1, act), np.float32)
    first[0, -1, -1], second[0, -1] = 1.0, clock
    # The others are ReLUs of x and -x.
    for i in range(act):
        first[0, width + i, 2 * i : 2 * i + 2] = 1.0, -1.0
        second[0, 2 * i : 2 * i + 2, i] = rate, -rate
    field = {
        "0.weight": first,
        "0.bias": np.zeros((1, 1, 2 * act + 1), np.float32),
        "1.weight": second,
        "1.bias": np.full((1, 1, act), drift, np.float32),
    }
    networks = {**plain.model.networks, BEHAVIOUR: field}
    flow = replace(flow_of(plain.model), flow_steps=steps)
    return replace(plain.model, networks=networks, behaviour_actor=flow)


def test_backward_inverts_forward_on_a_known_field(plain: Shield) -> None:
    rng = np.random.default_rng(0)
    noise = (0.15 * rng.standard_normal((50, 2))).astype(np.float32)
    inputs = rng.standard_normal((50, 2)).astype(np.float32)
    errors = []
    for steps in (5, 10, 20, 40, 400):
        model = linear_field(plain, steps)
        actions = to_actions(model, inputs, noise)
        # The sampler of the trainer, and the closed form of its steps.
        growth = (1 + 0.5 / steps) ** steps
        np.testing.assert_allclose(actions, growth * noise + 0.6 * (growth - 1), atol=1e-5)
        errors.append(float(np.abs(to_noise(model, inputs, actions) - noise).max()))
    assert errors[-1] < 1e-3
    # First order: half the step, half the error.
    for coarse, fine in itertools.pairwise(errors[:4]):
        assert coarse / fine == pytest.approx(2.0, rel=0.15)
    # A field of the time alone, v = t: forward from 0 / K on, backward from K / K down.
    timed = linear_field(plain, 10, rate=0.0, drift=0.0, clock=1.0)
    np.testing.assert_allclose(to_actions(timed, inputs, noise), noise + 0.45, atol=1e-6)
    np.testing.assert_allclose(to_noise(timed, inputs, noise), noise - 0.55, atol=1e-6)
    # A field that is constant is followed exactly.
    still = linear_field(plain, 10, rate=0.0)
    back = to_noise(still, inputs, to_actions(still, inputs, noise))
    np.testing.assert_allclose(back, noise, atol=1e-6)


def test_forward_is_the_trainers_sampler(plain: Shield) -> None:
    from safeshield.nn.flow import euler_sample, velocity_network

    rng = np.random.default_rng(0)
    inputs, noise = (rng.standard_normal((30, 2)).astype(np.float32) for _ in range(2))
    params = {k: torch.tensor(v) for k, v in plain.model.networks[BEHAVIOUR].items()}
    network = velocity_network(2, 2, (48, 48))
    there = euler_sample(network, params, torch.tensor(inputs), torch.tensor(noise), 10)
    np.testing.assert_allclose(to_actions(plain.model, inputs, noise), there, atol=1e-5)


def area_under_roc(high: Array, low: Array) -> float:
    return float(np.mean(high[:, None] > low[None, :]))


def test_the_noise_ranks_logged_above_never_shown(plain: Shield, held_out: OfflineDataset) -> None:
    rows = safe_rows(plain, held_out)
    states = plain.states(held_out.observations[rows])
    score = SCORES["noise"]
    logged = score(plain.model, states, held_out.actions[rows])
    unseen = score(plain.model, states, never_shown(len(rows)))
    assert logged.shape == (len(rows),)
    assert area_under_roc(logged, unseen) > 0.98


def test_scores_do_not_depend_on_the_batch(plain: Shield, held_out: OfflineDataset) -> None:
    rows = safe_rows(plain, held_out, 40)
    states = plain.states(held_out.observations[rows])
    for name in ("noise", "ensemble"):
        score = SCORES[name]
        many = score(plain.model, states, held_out.actions[rows])
        for i, row in enumerate(rows):
            one = StateValue(states.inputs[i : i + 1], states.value[i : i + 1])
            alone = score(plain.model, one, held_out.actions[row : row + 1])
            assert alone[0] == pytest.approx(many[i], abs=1e-4)


def test_the_ensembles_score_is_its_members_disagreement(plain: Shield) -> None:
    states = plain.states(np.zeros((3, 2), np.float32))
    actions = never_shown(3)
    spread = SCORES["ensemble"](plain.model, states, actions)
    assert (spread < 0).all()
    twins = {
        key: np.repeat(array[:1], 2, axis=0)
        for key, array in plain.model.networks["advantage"].items()
    }
    agreed = replace(plain.model, networks={**plain.model.networks, "advantage": twins})
    np.testing.assert_allclose(SCORES["ensemble"](agreed, states, actions), 0.0)


# -- the shield ---------------------------------------------------------------------------------


def test_only_the_tested_shield_refuses_what_the_log_never_showed(
    plain: Shield, tested: Shield, held_out: OfflineDataset
) -> None:
    rows = safe_rows(plain, held_out)
    observations, unseen = held_out.observations[rows], never_shown(len(rows))
    assert np.mean(plain.filter(observations, unseen)[1].intervened) < 0.02
    assert np.mean(tested.filter(observations, unseen)[1].intervened) > 0.9
    assert np.mean(tested.filter(observations, held_out.actions[rows])[1].intervened) < 0.05


def test_the_fallback_runs_where_only_the_support_test_refuses(
    tested: Shield, held_out: OfflineDataset
) -> None:
    shield = replace(tested, replacement=CommittedFallback(), record=None)
    rows = safe_rows(tested, held_out)
    observations, unseen = held_out.observations[rows], never_shown(len(rows))
    executed, report = shield.filter(observations, unseen)
    good = np.asarray(report.proposed_value) <= shield.threshold
    refused = good & np.asarray(report.intervened)
    assert refused.mean() > 0.5
    own = shield.model.fallback_alone(shield.states(observations))
    np.testing.assert_allclose(executed[refused], own[refused], atol=1e-5)


def test_the_promise_holds_for_episodes_of_another_log(tested: Shield) -> None:
    fresh = collect(gym.make(BOAT), Upstream(), episodes=60, seed=99)
    assert tested.support is not None
    states = tested.states(fresh.observations)
    seen = tested.support.accepts(tested.model, states, fresh.actions)
    too_often = np.add.reduceat(~seen, fresh.episode_starts) > 0.01 * fresh.episode_lengths
    assert too_often.mean() < 0.1 + 3 * np.sqrt(0.1 * 0.9 / 27)


@pytest.mark.parametrize("score", ["noise", "ensemble"])
def test_nothing_unsupported_passes_and_the_report_says_what_ran(
    plain: Shield, held_out: OfflineDataset, score: str
) -> None:
    shield = plain.with_support(held_out, alpha=0.2, share=0.05, score=score).with_delta(0.1)
    assert shield.support is not None
    rng = np.random.default_rng(0)
    observations = rng.uniform([-3, -2], [2, 2], (1500, 2)).astype(np.float32)
    actions = rng.uniform(-1.1, 1.1, (1500, 2)).astype(np.float32)
    executed, report = shield.filter(observations, actions)
    kept = ~np.asarray(report.intervened)
    assert 0.05 < kept.mean() < 0.95
    states, level = shield.states(observations), shield.support.record.level
    scores = shield.support.scores(shield.model, states, executed.astype(np.float32))
    rounding = 1e-4 * scores.std()
    clear = np.abs(scores - level) > rounding
    assert clear.mean() > 0.98
    np.testing.assert_array_equal(np.asarray(report.supported)[clear], (scores >= level)[clear])
    assert (scores[kept & clear] >= level).all()
    q = np.asarray(shield.value(observations, executed))
    passes = (q <= shield.threshold) & np.asarray(report.supported)
    edge = np.abs(q - shield.threshold) < 1e-5
    np.testing.assert_array_equal(np.asarray(report.acceptable)[~edge], passes[~edge])
    assert executed[kept].tobytes() == actions[kept].tobytes()
    proposed = shield.support.scores(shield.model, states, np.clip(actions, -1, 1))
    refused = np.asarray(report.proposed_value) <= shield.threshold
    refused &= ~kept & clear & (np.abs(proposed - level) > rounding)
    assert refused.any()
    assert (proposed[refused] < level).all()


def slow_choice(shield: Shield, observation: Array, action: Array) -> Array:
    """The replacement by its definition, every candidate judged."""
    assert shield.support is not None
    model, test = shield.model, shield.support
    states = shield.states(observation[None])
    wanted = np.clip(action[None], -1, 1)
    options = np.concatenate(
        [
            wanted[:, None],
            shield.replacement.candidates.actions(model, states, wanted),
            test.proposals(model, states),
        ],
        axis=1,
    )[0]
    many = StateValue(*(np.repeat(x, len(options), axis=0) for x in (states.inputs, states.value)))
    q, scores = model.action_values(many, options), test.scores(model, many, options)
    supported = scores >= test.record.level
    good = supported & (q <= shield.threshold)
    if good.any():
        far = np.square(options - wanted).sum(axis=-1)
        return options[np.where(good, far, np.inf).argmin()]
    if supported.any():
        return options[np.where(supported, q, np.inf).argmin()]
    return options[scores.argmax()]


@pytest.mark.parametrize("delta", [0.02, 0.6, 5.0])
def test_the_replacement_is_the_one_of_the_documented_order(tested: Shield, delta: float) -> None:
    shield = tested.with_delta(delta)
    assert shield.support is not None
    strict = replace(shield.support, record=replace(shield.support.record, level=1.0))
    rng = np.random.default_rng(3)
    observations = rng.uniform([-3, -2], [2, 2], (60, 2)).astype(np.float32)
    actions = rng.uniform(-1, 1, (60, 2)).astype(np.float32)
    for judge in (shield, replace(shield, support=strict)):
        executed, report = judge.filter(observations, actions)
        for i in np.flatnonzero(report.intervened):
            expected = slow_choice(judge, observations[i], actions[i])
            np.testing.assert_allclose(executed[i], expected, atol=1e-6)
        if judge.support is strict:
            # No score is above 0: nothing counts as seen, and it says so.
            assert np.asarray(report.intervened).all()
            assert not np.asarray(report.supported).any()
            assert not np.asarray(report.acceptable).any()
        else:
            assert np.asarray(report.supported)[np.asarray(report.intervened)].all()
            assert np.asarray(report.acceptable).any() == (delta < 5)


def test_a_replacement_is_found_where_only_the_behaviour_is_supported(tested: Shield) -> None:
    # Without draws of the behaviour no candidate would lie in so small a support.
    assert tested.support is not None
    narrow = replace(tested.support, record=replace(tested.support.record, level=-1e-3))
    shield = replace(tested, support=narrow)
    observations = np.tile([[1.5, 0.0]], (20, 1)).astype(np.float32)
    _, report = shield.filter(observations, never_shown(20))
    # z = 0 comes back as 0 up to the error of ten Euler steps.
    assert np.asarray(report.intervened).all()
    exact = shield.support.proposals(shield.model, shield.states(observations[:1]))  # type: ignore[union-attr]
    assert exact.shape == (1, 8, 2)
    assert (np.abs(exact) <= 1).all()


def test_single_wrapper_and_guard_agree_with_the_batch(tested: Shield) -> None:
    rng = np.random.default_rng(0)
    observations = rng.uniform([-3, -2], [2, 2], (200, 2)).astype(np.float32)
    actions = rng.uniform(-1, 1, (200, 2)).astype(np.float32)
    executed, report = tested.filter(observations, actions)
    runtime = ShieldRuntime(tested, 200)
    runtime.observe(observations, [{}] * 200)
    np.testing.assert_array_equal(runtime.filter(actions).executed, executed)
    env = SafetyShield(gym.make(BOAT), tested)
    passed = 0
    for i in range(200):
        env.reset(options={"state": observations[i].astype(float)})
        *_, info = env.step(actions[i])
        short = tested.accepts(tested.states(observations[i : i + 1]), actions[i])
        assert (short is None) == info["shield/intervened"] == bool(report.intervened[i])
        np.testing.assert_allclose(info["action_executed"], executed[i], atol=1e-4)
        passed += short is not None
    assert 20 < passed < 180


def test_not_a_number_never_passes(tested: Shield) -> None:
    for observation, action in (
        ([np.nan, 0.0], [1.0, 0.0]),
        ([1.5, 0.0], [np.nan, 0.0]),
        ([1.5, 0.0], [np.inf, 0.0]),
    ):
        executed, report = tested.filter(np.array(observation), np.array(action))
        assert report.intervened
        assert not report.valid
        assert (np.abs(executed) <= 1).all()
        known = bool(np.isfinite(observation).all())
        assert bool(report.supported) == bool(report.acceptable) == known
    networks = {
        **tested.model.networks,
        BEHAVIOUR: {k: np.full_like(v, 3e38) for k, v in tested.model.networks[BEHAVIOUR].items()},
    }
    broken = replace(tested, model=replace(tested.model, networks=networks))
    with np.errstate(all="ignore"):
        executed, report = broken.filter(np.zeros((5, 2)), np.full((5, 2), 0.5))
    assert np.asarray(report.intervened).all()
    assert not np.asarray(report.supported).any()
    assert np.isfinite(executed).all()


def record(delta: float) -> CalibrationRecord:
    return CalibrationRecord(
        delta=delta,
        epsilon=0.1,
        confidence=0.9,
        policies=(PolicyResult("random", 40, 1, upper_bound(40, 1, 0.9), 0.25),),
        environment=BOAT,
        start_distribution="its own reset does",
        start_share=0.9,
        walk=(Rung(delta, "random", 40, 1, upper_bound(40, 1, 0.9), True),),
        seed=0,
        date="2026-01-01T00:00:00+00:00",
        versions={"python": "3.11"},
    )


def test_the_old_promise_is_dropped_and_calibration_keeps_the_test(
    plain: Shield, held_out: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated = replace(plain, record=record(plain.delta))
    shield = calibrated.with_support(held_out)
    assert shield.record is None
    assert shield.delta == plain.delta
    assert calibrated.record is not None
    assert calibrated.support is None
    asked = 0
    accepts = SupportTest.accepts

    def counted(self: SupportTest, *arguments: Any) -> Any:  # noqa: ANN401
        nonlocal asked
        asked += len(arguments[2])
        return accepts(self, *arguments)

    monkeypatch.setattr(SupportTest, "accepts", counted)
    again = shield.calibrate(
        gym.make(BOAT, max_episode_steps=8), epsilon=0.3, confidence=0.8, deltas=[0.3]
    )
    assert again.record is not None
    assert again.support is shield.support
    assert again.with_delta(0.4).support is shield.support
    assert asked > 100


def test_the_adversary_proposes_what_is_accepted(tested: Shield) -> None:
    observations = np.random.default_rng(0).uniform([-3, -2], [2, 2], (300, 2)).astype(np.float32)
    proposed = Adversary(tested)(observations, np.random.default_rng(0))
    _, report = tested.filter(observations, proposed)
    calm = np.asarray(report.state_value) < -0.2
    assert calm.any()
    assert not np.asarray(report.intervened)[calm].any()
    blind = Adversary(replace(tested, support=None))(observations, np.random.default_rng(0))
    assert np.asarray(tested.filter(observations, blind)[1].intervened)[calm].mean() > 0.2


def test_without_a_test_nothing_is_asked(
    plain: Shield, held_out: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:  # noqa: ANN401
        raise AssertionError("no support test was asked for")

    for name in ("accepts", "scores", "proposals", "first", "choose"):
        monkeypatch.setattr(SupportTest, name, fails)
    _, report = plain.filter(held_out.observations[:50], held_out.actions[:50])
    assert np.asarray(report.supported).all()
    _, one = plain.filter(held_out.observations[0], held_out.actions[0])
    assert one.supported


def test_the_words_of_the_promise(tested: Shield) -> None:
    assert tested.support is not None
    kept = tested.support.record
    assert (kept.alpha, kept.share, kept.episodes, kept.score) == (0.1, 0.01, 27, "noise")
    for words in (
        "at least 0.9 over the draw of 27 held-out episodes and one more",
        "at most 0.01 of the steps",
        "not promised, nor is safety",
    ):
        assert words in kept.promise


# -- files --------------------------------------------------------------------------------------


def test_the_file_keeps_the_test(tested: Shield, tmp_path: Path) -> None:
    path = tmp_path / "shield.safetensors"
    tested.save(path)
    twins = [Shield.load(path), pickle.loads(pickle.dumps(tested)), copy.deepcopy(tested)]
    rng = np.random.default_rng(0)
    observations = rng.uniform([-3, -2], [2, 2], (200, 2)).astype(np.float32)
    actions = rng.uniform(-1, 1, (200, 2)).astype(np.float32)
    executed, report = tested.filter(observations, actions)
    for twin in twins:
        assert twin.support is not None
        assert tested.support is not None
        assert twin.support.record == tested.support.record
        again, told = twin.filter(observations, actions)
        np.testing.assert_array_equal(again, executed)
        np.testing.assert_array_equal(told.supported, report.supported)


def test_inspect_tells_of_the_test(tested: Shield, plain: Shield, tmp_path: Path) -> None:
    from safeshield.cli.kinds import describe

    for shield in (tested, plain):
        shield.save(tmp_path / "shield.safetensors")
        told = describe(tmp_path / "shield.safetensors")["support"]
        assert told == (None if shield.support is None else shield.support.record.promise)


def test_a_file_from_before_there_were_support_tests_loads(plain: Shield, tmp_path: Path) -> None:
    path = tmp_path / "shield.safetensors"
    plain.save(path)
    write_header(path, lambda header: header.pop("support"))
    assert Shield.load(path).support is None


def write_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header and give the file a digest that fits."""
    file = read_tensors(path, "safeshield-shield")
    arrays, header = file.load(file.shapes, file.dtypes), file.header
    change(header)
    digest = sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    text = json.dumps({"header": header, "sha256": digest.hexdigest()})
    path.write_bytes(format_safetensors(arrays, {"safeshield": text.replace("Infinity", "1e999")}))


def set_to(**changes: Any) -> Callable[[dict[str, Any]], object]:  # noqa: ANN401
    return lambda header: header["support"].update(changes)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "a list": lambda h: h.update(support=[]),
    "true": lambda h: h.update(support=True),
    "lacks a field": lambda h: h["support"].pop("level"),
    "one more": set_to(more=1),
    "level a string": set_to(level="-3"),
    "level infinite": set_to(level=float("1e999")),
    "level true": set_to(level=True),
    "level huge": set_to(level=10**400),
    "level null": set_to(level=None),
    "alpha zero": set_to(alpha=0.0),
    "alpha a string": set_to(alpha="0.1"),
    "share one": set_to(share=1.0),
    "share negative": set_to(share=-0.1),
    "episodes a float": set_to(episodes=27.0),
    "episodes too few": set_to(episodes=8),
    "score unknown": set_to(score="os.system"),
    "score a list": set_to(score=["noise"]),
    "score of other actions": set_to(score="probability"),
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_header_is_refused(
    damage: Callable[[dict[str, Any]], object], tested: Shield, tmp_path: Path
) -> None:
    path = tmp_path / "shield.safetensors"
    tested.save(path)
    write_header(path, lambda header: None)
    assert Shield.load(path).support is not None
    write_header(path, damage)
    with pytest.raises(ValueError, match=r"does not describe a shield|was edited"):
        Shield.load(path)


def test_a_test_without_its_network_is_refused(tested: Shield, tmp_path: Path) -> None:
    path = tmp_path / "shield.safetensors"
    networks = {k: v for k, v in tested.model.networks.items() if k != BEHAVIOUR}
    bare = replace(tested.model, networks=networks, behaviour_actor=None)
    replace(tested, model=bare).save(path)
    with pytest.raises(ValueError, match="needs the network of the log's behaviour"):
        Shield.load(path)


class Northing:
    """A score of one's own."""

    name = "northing"

    def check(self, model: Any) -> None:  # noqa: ANN401
        pass

    def __call__(self, model: Any, states: Any, actions: Any) -> Any:  # noqa: ANN401
        return np.asarray(actions, np.float64)[:, 1]


def test_a_score_of_ones_own_filters_and_is_not_saved(
    plain: Shield, held_out: OfflineDataset, tmp_path: Path
) -> None:
    shield = plain.with_support(held_out, score=Northing())
    assert shield.support is not None
    assert shield.support.record.score == "northing"
    observations = np.tile([[1.5, 0.0]], (2, 1))
    _, report = shield.filter(observations, np.array([[0.5, 0.5], [0.5, -0.5]], np.float32))
    assert np.asarray(report.intervened).tolist() == [False, True]
    with pytest.raises(ValueError, match="which is your own"):
        shield.save(tmp_path / "shield.safetensors")


# -- discrete actions ---------------------------------------------------------------------------

# The lookout: at home one stays by actions 1, 2, 3 and goes to the edge by action 0; there 24 of 25
# fell into the pit, by actions 0, 1, 2, and one of 25 took action 3 and reached the shore.
HOME, EDGE, PIT, SHORE = range(4)


def lookout(episodes: int, seed: int) -> OfflineDataset:
    """Short episodes of a chain."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, int, int, bool]] = []
    ends: list[bool] = []
    for _ in range(episodes):
        for step in range(6):
            action = int(rng.integers(4))
            reached = EDGE if action == 0 else HOME
            rows.append((HOME, action, reached, False))
            if reached == EDGE:
                escape = rng.random() < 0.04
                rows.append(
                    (
                        EDGE,
                        3 if escape else int(rng.integers(3)),
                        *((SHORE, False) if escape else (PIT, True)),
                    )
                )
            ends += [False] * (len(rows) - len(ends))
            if reached == EDGE or step == 5:
                ends[-1] = True
                break
    states, actions, reached_states, falls = (np.array(x) for x in zip(*rows, strict=True))
    over = np.array(ends)
    return OfflineDataset.from_arrays(
        observations=states[:, None],
        actions=actions[:, None],
        rewards=np.zeros(len(rows)),
        next_observations=reached_states[:, None],
        terminated=falls,
        truncated=over & ~falls,
        costs=falls.astype(float),
        observation_space=gym.spaces.Discrete(4),
        action_space=gym.spaces.Discrete(4),
    )


SMALL = ShieldConfig(
    critic_hidden=(32,),
    behaviour_hidden=(32,),
    fallback_hidden=(16,),
    batch_size=256,
    learning_rate=3e-3,
    safety_backup_steps=(1,),
    polyak=0.02,
    near_share=0.0,
)


@pytest.fixture(scope="module")
def chain() -> OfflineDataset:
    return lookout(3000, seed=0)


@pytest.fixture(scope="module")
def discrete(chain: OfflineDataset) -> Shield:
    return ShieldTrainer(SMALL, device="cpu").fit(chain, steps=1500).shield()


def test_discrete_scores_are_the_logs_frequencies(discrete: Shield) -> None:
    states = discrete.states(np.array([[HOME], [EDGE]]).repeat(4, axis=0))
    actions = np.tile(np.arange(4), 2)[:, None]
    score = support_score(None, discrete.model)
    assert score.name == "probability"
    p = np.exp(score(discrete.model, states, actions)).reshape(2, 4)
    np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-5)
    np.testing.assert_allclose(p[0], 0.25, atol=0.03)
    np.testing.assert_allclose(p[1], [0.32, 0.32, 0.32, 0.04], atol=0.03)


def test_the_index_of_a_combination_is_its_place_among_the_choices(discrete: Shield) -> None:
    from safeshield.nn.mlp import EnsembleMLP
    from safeshield.spaces.rows import flat_actions

    for space in (
        gym.spaces.MultiDiscrete([2, 3]),
        gym.spaces.Discrete(5, start=-2),
        gym.spaces.MultiBinary(3),
    ):
        played = flat_actions(space)
        count = len(played.choices)
        params = EnsembleMLP(4, count, (8,)).init(torch.Generator().manual_seed(0))
        low, high = (x.astype(np.float32) for x in (played.low, played.high))
        old = discrete.model.scaling
        scaling = Scaling(
            old.observation_mean, old.observation_spread, low, high,
            old.observation_categories, played.categories,
        )  # fmt: skip
        model = replace(
            discrete.model,
            action_space=space,
            scaling=scaling,
            networks={BEHAVIOUR: {k: v.numpy() for k, v in params.items()}},
        )
        inputs = np.tile(np.eye(4, dtype=np.float32)[1], (count, 1))
        scores = SCORES["probability"](model, StateValue(inputs, inputs[:, 0]), played.choices)
        logits = EnsembleMLP(4, count, (8,))(params, torch.tensor(inputs))[0, 0]
        np.testing.assert_allclose(scores, torch.log_softmax(logits, -1), atol=1e-5)


def test_discrete_the_rare_action_is_refused(discrete: Shield, chain: OfflineDataset) -> None:
    shield = discrete.with_delta(0.0).with_support(lookout(400, seed=1), alpha=0.1)
    states, actions = np.full(4, HOME), np.arange(4)
    assert shield.support is not None
    assert np.log(0.1) < shield.support.record.level < np.log(0.26)
    _, report = shield.filter(np.full(4, EDGE), actions)
    # Only at the edge is an action rare; the others are supported, and fall.
    assert np.asarray(report.intervened).all()
    executed, report = shield.filter(EDGE, 3)
    assert executed in (0, 1, 2)
    assert report.supported
    assert not report.acceptable
    assert np.asarray(shield.filter(states, actions)[1].supported).all()
    for wrong in (7, -1, 2.5, float("nan")):
        executed, report = shield.filter(HOME, wrong)
        assert report.intervened
        assert report.supported
        assert executed in (0, 1, 2, 3)


# -- inside the backup --------------------------------------------------------------------------


def test_the_value_does_not_trust_an_escape_that_was_hardly_ever_seen(
    discrete: Shield, chain: OfflineDataset, tmp_path: Path
) -> None:
    # One in 25 escapes from the edge: without the support that is a way out, with it none.
    config = replace(SMALL, support_weight=1.0)
    foresees = ShieldTrainer(config, device="cpu").fit(chain, steps=1500).shield()
    assert discrete.value(EDGE) < 0 < foresees.value(EDGE)
    assert discrete.value(HOME, 0) < 0 < foresees.value(HOME, 0)
    for action in (1, 2, 3):
        assert foresees.value(HOME, action) < 0
    tested = discrete.with_delta(0.0).with_support(lookout(400, seed=1))
    # The test of the present action alone lets one go to the edge, and sees there that it is late.
    assert not tested.filter(HOME, 0)[1].intervened
    assert not tested.filter(EDGE, 3)[1].acceptable
    executed, report = foresees.filter(HOME, 0)
    assert report.intervened
    assert report.acceptable
    assert executed in (1, 2, 3)
    assert not foresees.filter(EDGE, 3)[1].acceptable
    assert foresees.support is not None
    assert foresees.support.record.episodes == 300
    assert foresees.support.record.score == "probability"
    assert foresees.record is None
    path = tmp_path / "shield.safetensors"
    foresees.save(path)
    again = Shield.load(path)
    assert again.support is not None
    assert again.support.record == foresees.support.record


def tensors(log: OfflineDataset) -> tuple[SafetyLog, LogTensors]:
    scaling = Scaling.of(log)
    rows = LogTensors.of(log, scaling, torch.device("cpu"))
    critics = SafetyCritics(
        scaling.observation_features, scaling.action_features, (8,), safety_scale(log)
    )
    return SafetyLog(critics, rows, SafetyConfig()), rows


@pytest.mark.parametrize("window", [1, 5])
def test_absent_or_harmless_the_term_changes_no_bit(half_log: OfflineDataset, window: int) -> None:
    safety, rows = tensors(half_log.select(range(5)))
    drawn = torch.arange(0, len(rows), 3)
    without = safety.batch(drawn, window)
    harmless = safety.batch(drawn, window, torch.full((len(rows),), -torch.inf))
    assert without.extra is None
    networks = safety.critics.init(torch.Generator().manual_seed(0))
    for name in ("constraints", "window_constraints"):
        assert torch.equal(getattr(without, name), getattr(harmless, name))
    for mine, theirs in zip(without.window, harmless.window, strict=True):
        assert torch.equal(mine, theirs)
    losses = [
        safety.critics.losses(networks, networks, b, expectile=0.9, one_step=window == 1)[0]
        for b in (without, harmless)
    ]
    assert torch.equal(*losses)


def test_the_term_joins_the_maximum(half_log: OfflineDataset) -> None:
    log = half_log.select(range(3))
    safety, rows = tensors(log)
    extra = torch.tensor(np.random.default_rng(0).normal(size=len(rows)).astype(np.float32))
    one = safety_windows(
        rows.constraints, rows.next_constraints, rows.terminated, rows.episode_last, 0.9, 1, extra
    )
    m = torch.maximum(torch.maximum(rows.constraints, rows.next_constraints), extra)
    assert torch.equal(one.floor, m)
    # As if the constraint itself had been that high on both sides of the step.
    plain = safety_windows(m, m, rows.terminated, rows.episode_last, 0.9, 4)
    several = safety_windows(
        rows.constraints, rows.next_constraints, rows.terminated, rows.episode_last, 0.9, 4, extra
    )
    for mine, theirs in zip(several, plain, strict=True):
        assert torch.equal(mine, theirs)
    # V is fitted to it, with windows and without; Q_h only through V: the test judges its action.
    drawn = torch.arange(200)
    networks = safety.critics.init(torch.Generator().manual_seed(0))
    worse = torch.full((len(rows),), 3.0)
    for window in (1, 2):
        plainly, worsened = (
            safety.critics.losses(
                networks, networks, safety.batch(drawn, window, e), expectile=0.9,
                one_step=window == 1,
            )[1]
            for e in (None, worse)
        )  # fmt: skip
        assert worsened["safety/value_loss"] > 2 * plainly["safety/value_loss"]
        assert worsened["safety/advantage_loss"] == plainly["safety/advantage_loss"]


def test_training_without_the_term_runs_as_before(chain: OfflineDataset, tmp_path: Path) -> None:
    from safeshield.algorithms.shield_trainer import ShieldRun

    log = chain.select(range(60))
    _, rows = tensors(log)
    config = replace(SMALL, safety_backup_steps=(2, 1))
    model = ShieldTrainer(config, device="cpu")._describe(log)
    run = ShieldRun(model, rows, config, 100)
    assert [phase.name for phase in run.phases()] == ["critics 1", "critics 2", "behaviour"]
    assert ShieldTrainer(config, device="cpu").fit(log, steps=20).shield().support is None


def test_with_the_term_a_run_in_instalments_ends_with_the_same_weights(
    half_log: OfflineDataset, tmp_path: Path
) -> None:
    log = half_log.select(range(40))
    config = ShieldConfig(
        critic_hidden=(8,), behaviour_hidden=(8,), fallback_hidden=(8,), batch_size=32,
        support_weight=0.5, support_held_out=0.25,
    )  # fmt: skip
    whole = ShieldTrainer(config, device="cpu").fit(log, steps=60).shield()
    path = tmp_path / "checkpoint.safetensors"
    from safeshield.training import checkpoint as training

    # Stop in the middle of the critics, after the behaviour: the labels are made again.
    kept, stop = training.save_checkpoint, 35

    def stops(path: Path, state: Any, done: int, *rest: Any) -> None:  # noqa: ANN401
        kept(path, state, done, *rest)
        if done == stop:
            raise KeyboardInterrupt

    training.save_checkpoint = stops
    try:
        with pytest.raises(KeyboardInterrupt):
            ShieldTrainer(config, device="cpu").fit(
                log, steps=60, checkpoint=path, checkpoint_every=5
            )
    finally:
        training.save_checkpoint = kept
    again = ShieldTrainer(config, device="cpu").fit(log, steps=60, checkpoint=path).shield()
    np.testing.assert_array_equal(
        whole.value(log.observations, log.actions), again.value(log.observations, log.actions)
    )
    assert whole.support is not None
    assert again.support is not None
    assert whole.support.record == again.support.record


def test_the_behaviour_does_not_see_the_episodes_that_set_the_level(
    half_log: OfflineDataset,
) -> None:
    log = half_log.select(range(40))
    config = ShieldConfig(support_weight=1.0, support_held_out=0.25, seed=3)
    term = ShieldTrainer(config, device="cpu")._describe(log).term
    assert term is not None
    drawn = term.learned_from(torch.arange(len(log)))
    episode = np.repeat(np.arange(40), log.episode_lengths)[drawn.numpy()]
    held = held_out_episodes(40, 0.25, 0.1, 3)
    assert held.sum() == 10
    assert set(episode) == set(np.flatnonzero(~held))


# -- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, float("nan"), True, "0.1"])
def test_alpha_must_lie_inside_0_and_1(
    plain: Shield,
    held_out: OfflineDataset,
    alpha: Any,  # noqa: ANN401
) -> None:
    with pytest.raises(ValueError, match=r"alpha must be a number inside \(0, 1\)"):
        plain.with_support(held_out, alpha=alpha)


def test_bad_input(plain: Shield, held_out: OfflineDataset, discrete: Shield) -> None:
    with pytest.raises(ValueError, match=r"share must be a number in \[0, 1\)"):
        plain.with_support(held_out, share=1.0)
    with pytest.raises(ValueError, match=r"8 held-out episodes .* at least 9 are needed"):
        plain.with_support(held_out.select(range(8)))
    known = r"\['density', 'ensemble', 'noise', 'probability'\], got 'likelihood'"
    with pytest.raises(ValueError, match=known):
        plain.with_support(held_out, score="likelihood")
    with pytest.raises(TypeError, match=r"or a SupportScore, got int"):
        plain.with_support(held_out, score=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be an OfflineDataset"):
        plain.with_support(held_out.observations)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="held_out's observation_space mismatch"):
        discrete.with_support(held_out)
    with pytest.raises(ValueError, match="needs a Box of actions"):
        discrete.with_support(lookout(50, 0), score="noise")
    with pytest.raises(ValueError, match="needs discrete actions"):
        plain.with_support(held_out, score="probability")
    networks = {k: v for k, v in plain.model.networks.items() if k != BEHAVIOUR}
    bare = replace(plain, model=replace(plain.model, networks=networks, behaviour_actor=None))
    with pytest.raises(ValueError, match=r"which this shield does not have"):
        bare.with_support(held_out)
    assert bare.with_support(held_out, score="ensemble").support is not None
    advantage = {k: v[:1] for k, v in plain.model.networks["advantage"].items()}
    alone = replace(plain.model, networks={**networks, "advantage": advantage})
    with pytest.raises(ValueError, match="at least 2 members, the shield has 1"):
        calibrate_support(alone, held_out, score="ensemble")
    with pytest.raises(ValueError, match="episodes must be an integer of at least 9"):
        SupportRecord(0.1, 0.01, 3, "noise", -1.0)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"support_weight": 0.0}, "support_weight must be above 0"),
        ({"support_weight": float("inf")}, "support_weight must be a finite number or None"),
        ({"support_alpha": 0.0}, "support_alpha must be a number inside"),
        ({"support_share": 1.0}, "support_share must be a number in"),
        ({"support_held_out": 1.0}, "support_held_out must be a number inside"),
    ],
)
def test_bad_configurations(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ShieldConfig(**wrong)


def test_the_labels_are_the_formula_and_the_level_that_of_the_held_out_episodes(
    half_log: OfflineDataset,
) -> None:
    log = half_log.select(range(40))
    config = ShieldConfig(
        critic_hidden=(8,), behaviour_hidden=(8,), fallback_hidden=(8,), batch_size=32,
        support_weight=0.5, support_held_out=0.25, support_share=0.05, support_alpha=0.2,
    )  # fmt: skip
    shield = ShieldTrainer(config, device="cpu").fit(log, steps=60).shield()
    held = np.flatnonzero(held_out_episodes(40, 0.25, 0.2, config.seed))
    assert shield.support is not None
    outside = calibrate_support(shield.model, log.select(held), alpha=0.2, share=0.05)
    assert outside.record == shield.support.record
    term = ShieldTrainer(config, device="cpu")._describe(log).term
    assert term is not None
    behaviour = {k: torch.tensor(v) for k, v in shield.model.networks[BEHAVIOUR].items()}
    labels = term.read(behaviour)[1].numpy()
    level = shield.support.record.level
    states = shield.states(log.observations)
    scores = shield.support.scores(shield.model, states, log.actions).astype(np.float64)
    mine = np.isin(np.repeat(np.arange(40), log.episode_lengths), held)
    unit = 0.5 * float(log.constraints.std(dtype=np.float64))
    expected = unit * np.minimum((level - scores) / scores[mine].std(), 1.0)
    np.testing.assert_allclose(labels[scores < level], expected[scores < level], atol=1e-4)
    assert (labels[scores >= level] == -np.inf).all()
    np.testing.assert_array_equal(labels > 0, scores < level)
    assert 0 < (labels > 0).mean() < 0.1
    assert labels.max() == pytest.approx(unit, rel=1e-5)  # cut off there


def test_too_few_episodes_to_hold_out_are_told_before_training(half_log: OfflineDataset) -> None:
    config = ShieldConfig(support_weight=1.0)
    with pytest.raises(ValueError, match=r"holds out 4, but alpha 0\.1 needs at least 9"):
        ShieldTrainer(config, device="cpu").fit(half_log.select(range(40)), steps=10)


def test_other_ways_to_replace_do_not_go_with_it(tested: Shield) -> None:
    with pytest.raises(ValueError, match="support test replaces actions by NearestAcceptable"):
        tested.with_replacement(ProjectedGradient())


def test_masks_and_sampling_ask_the_support_test_too(tested: Shield) -> None:
    rng = np.random.default_rng(5)
    observations = rng.uniform(-1.5, 1.5, (40, 2)).astype(np.float32)
    actions = rng.uniform(-1, 1, (40, 6, 2)).astype(np.float32)
    states = tested.states(observations)
    admitted, _ = tested.acceptable(states, observations, actions)
    for i in range(6):
        _, report = tested.filter(observations, actions[:, i])
        np.testing.assert_array_equal(admitted[:, i], ~np.asarray(report.intervened))
    assert 0 < admitted.mean() < 1
