"""What a shield lets pass, what it puts in place, and that nothing broken slips through."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from hostile import Changes, hostile
from hypothesis import given, settings
from hypothesis import strategies as st

from safeshield.calibration import upper_bound
from safeshield.shield import (
    CandidateSet,
    FilterReport,
    NearestAcceptable,
    Shield,
    UncalibratedShieldWarning,
)
from safeshield.shield.critics import SafetyModel
from safeshield.shield.record import CalibrationRecord, PolicyResult, Rung
from safeshield.shield.runtime import ShieldRuntime
from safeshield.spaces.scaling import Scaling

pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning"
)
LOW, HIGH = np.array([-3.0, -2.0]), np.array([2.0, 2.0])


def record(delta: float) -> CalibrationRecord:
    return CalibrationRecord(
        delta=delta,
        epsilon=0.1,
        confidence=0.9,
        policies=(PolicyResult("random", 40, 1, upper_bound(40, 1, 0.9), 0.25),),
        environment="safeshield/Boat-v0",
        start_distribution="its own reset does",
        start_share=0.9,
        walk=(Rung(delta, "random", 40, 1, upper_bound(40, 1, 0.9), True),),
        seed=0,
        date="2026-01-01T00:00:00+00:00",
        versions={"python": "3.11"},
    )


def draws(count: int, seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    observations = rng.uniform(LOW, HIGH, (count, 2)).astype(np.float32)
    return observations, rng.uniform(-1, 1, (count, 2)).astype(np.float32)


def near_the_edge(shield: Shield, count: int = 400) -> tuple[Any, Any]:
    """States in which some actions are accepted and others are not."""
    observations, actions = draws(20_000, seed=5)
    order = np.argsort(np.abs(np.asarray(shield.value(observations)) - shield.threshold))
    return observations[order[:count]], actions[:count]


# -- what passes --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i1", "i8"])
def test_an_accepted_action_passes_in_the_dtype_of_the_space(shield: Shield, kind: str) -> None:
    observations, actions = draws(200)
    actions = (actions * 1.4).astype(kind)  # some integers are not zero
    passed = 0
    for observation, action in zip(observations, actions, strict=True):
        executed, report = shield.filter(observation, action)
        if not report.intervened:
            passed += 1
            assert executed.dtype == np.float32
            assert executed.tobytes() == action.astype(np.float32).tobytes()
            assert report.acceptable
            assert report.value == report.proposed_value <= shield.threshold
    assert passed > 20


def test_what_was_judged_is_returned_however_the_action_changes_meanwhile(shield: Shield) -> None:
    one, many = np.array([1.9, 0.0], np.float32), np.full((3, 2), [1.9, 0.0], np.float32)
    runtime = ShieldRuntime(shield, 3)
    runtime.observe(many, [{}] * 3)

    def decide(action: Any) -> tuple[Any, Any]:  # noqa: ANN401
        decision = runtime.filter(action)
        return decision.executed, decision

    for act, shape in (
        (partial(shield.filter, one), (2,)),
        (partial(shield.filter, many), (3, 2)),
        (decide, (3, 2)),
    ):
        for action in hostile(np.zeros(shape, np.float32)):
            executed, report = act(action)
            assert not np.any(report.intervened)
            assert type(executed) is np.ndarray
            assert executed.tobytes() == np.zeros(shape, np.float32).tobytes()
            given = action.action if isinstance(action, Changes) else np.asarray(action)
            assert not np.shares_memory(executed, given)


def test_in_a_batch_accepted_rows_keep_their_bits(shield: Shield) -> None:
    observations, actions = near_the_edge(shield)
    for dtype in (np.float32, np.float64):
        proposed = actions.astype(dtype) * (1 - 2**-20)
        executed, report = shield.filter(observations, proposed)
        assert 0 < report.intervened.sum() < len(observations)  # type: ignore[union-attr]
        assert executed.dtype == np.float32
        kept = ~np.asarray(report.intervened)
        assert executed[kept].tobytes() == proposed[kept].astype(np.float32).tobytes()


def test_intervened_exactly_where_the_proposal_is_not_acceptable(shield: Shield) -> None:
    observations, actions = near_the_edge(shield)
    _, report = shield.filter(observations, actions)
    q = np.asarray(shield.value(observations, actions))
    np.testing.assert_array_equal(report.proposed_value, q)
    np.testing.assert_array_equal(report.intervened, ~(q <= shield.threshold))
    np.testing.assert_array_equal(report.state_value, shield.value(observations))


@given(seed=st.integers(0, 10_000), small=st.floats(0, 0.3), more=st.floats(0, 0.3))
@settings(max_examples=25)
def test_a_larger_delta_accepts_a_subset(
    shield: Shield, seed: int, small: float, more: float
) -> None:
    observations, actions = draws(300, seed)
    loose = shield.with_delta(small).filter(observations, actions)[1]
    strict = shield.with_delta(small + more).filter(observations, actions)[1]
    assert (np.asarray(strict.intervened) >= np.asarray(loose.intervened)).all()


# -- what replaces ------------------------------------------------------------------------------


def candidates_of(shield: Shield, observation: Any, action: Any) -> Any:  # noqa: ANN401
    states = shield.states(observation[None])
    wanted = np.clip(action[None], shield.action_space.low, shield.action_space.high)
    assert isinstance(shield.replacement, NearestAcceptable)
    candidates = shield.replacement.candidates
    found = candidates.actions(shield.model, states, wanted.astype(np.float32))
    return np.concatenate([wanted[:, None], found], axis=1)[0].astype(np.float32)


def test_the_replacement_is_the_nearest_acceptable_candidate(shield: Shield) -> None:
    observations, actions = near_the_edge(shield)
    replaced = hopeless = 0
    for observation, action in zip(observations, actions, strict=True):
        executed, report = shield.filter(observation, action)
        if not report.intervened:
            continue
        options = candidates_of(shield, observation, action)
        q = np.asarray(shield.value(np.tile(observation, (len(options), 1)), options))
        good = q <= shield.threshold
        if np.abs(q - shield.threshold).min() < 1e-5:
            continue  # rounding decides
        assert report.acceptable == good.any()
        if good.any():
            replaced += 1
            distance = np.linalg.norm(options - action, axis=1)
            assert report.value <= shield.threshold
            mine = np.linalg.norm(executed - action)
            assert mine == pytest.approx(distance[good].min(), abs=1e-5)
        else:
            hopeless += 1
            assert report.value == pytest.approx(q.min(), abs=1e-6)
        assert report.value == pytest.approx(shield.value(observation, executed), abs=1e-6)
    assert replaced > 20
    assert hopeless > 20


def test_inside_a_rock_nothing_is_acceptable_and_it_says_so(shield: Shield) -> None:
    executed, report = shield.filter([-0.5, 0.5], [0.3, 0.4])
    assert report.intervened
    assert not report.acceptable
    assert report.valid
    assert report.value > 0
    assert executed.astype(np.float32) in shield.action_space


def test_out_of_the_box_is_clipped_and_counts_as_an_intervention(shield: Shield) -> None:
    # Safe water: every action of the box is acceptable, so the nearest is the clipped one.
    for proposal in ([3.0, 0.2], [-1.0000001, 0.0], [1e30, -1e300]):
        executed, report = shield.filter([1.0, 0.0], np.array(proposal))
        assert report.intervened
        assert report.acceptable
        assert report.valid
        assert report.proposed_value == np.inf
        np.testing.assert_allclose(executed, np.clip(proposal, -1, 1), rtol=1e-7)


@given(
    observation=st.lists(st.floats(width=64), min_size=2, max_size=2),
    action=st.lists(st.floats(width=64), min_size=2, max_size=2),
    kinds=st.tuples(st.sampled_from(["f4", "f8"]), st.sampled_from(["f4", "f8"])),
)
@settings(max_examples=150)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_whatever_comes_in_an_action_of_the_box_comes_out(
    shield: Shield, observation: list[float], action: list[float], kinds: tuple[str, str]
) -> None:
    seen, proposed = np.array(observation, kinds[0]), np.array(action, kinds[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        executed, report = shield.filter(seen, proposed)
    assert np.isfinite(executed).all()
    assert (np.abs(executed) <= 1).all()
    assert not np.isnan([float(x) for x in report]).any()
    broken = not (np.isfinite(seen).all() and np.isfinite(proposed).all())
    assert report.intervened or not broken
    assert not report.valid or not broken
    if not np.isfinite(seen).all():
        assert report.value == report.state_value == np.inf
        assert not report.acceptable
        assert not shield.certified(seen)


def test_an_absurd_reading_is_as_broken_as_nan(shield: Shield) -> None:
    for reading in (1e30, -1e38, 1e300):
        executed, report = shield.filter(np.array([reading, 0.0]), np.array([0.5, 0.5]))
        assert report.intervened
        assert not report.valid
        assert not report.acceptable
        assert report.state_value == np.inf
        assert np.isfinite(executed).all()
        assert shield.value(np.array([reading, 0.0])) == np.inf


def test_networks_that_overflow_let_nothing_pass(shield: Shield) -> None:
    # Finite weights, but products beyond float32: NaN inside, which a file may well hold.
    networks = {
        name: {key: np.full_like(array, 3e38) for key, array in weights.items()}
        for name, weights in shield.model.networks.items()
    }
    broken = replace(shield, model=replace(shield.model, networks=networks))
    observations, actions = draws(20)
    with np.errstate(all="ignore"):
        executed, report = broken.filter(observations, actions)
    assert np.asarray(report.intervened).all()
    assert not np.asarray(report.acceptable).any()
    assert (np.abs(executed) <= 1).all()
    assert not np.isnan(np.asarray(report.value)).any()


def test_one_broken_row_does_not_touch_the_others(shield: Shield) -> None:
    observations, actions = draws(6)
    clean, expected = shield.filter(observations, actions)
    observations[2], actions[4] = np.nan, np.inf
    executed, report = shield.filter(observations, actions)
    others = [0, 1, 3, 5]
    np.testing.assert_array_equal(executed[others], clean[others])
    np.testing.assert_array_equal(
        np.asarray(report.value)[others], np.asarray(expected.value)[others]
    )
    np.testing.assert_array_equal(report.valid, [True, True, False, True, False, True])
    assert np.isfinite(executed).all()


# -- shapes and kinds ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("observation", "action"),
    [
        (np.zeros(3), np.zeros(2)),
        (np.zeros(2), np.zeros(3)),
        (np.zeros(2), 0.0),
        (np.zeros((2, 2)), np.zeros((3, 2))),
        (np.zeros((1, 1, 2)), np.zeros((1, 1, 2))),
        (np.zeros(2), np.array(["a", "b"])),
        (np.zeros(2), np.array([None, 1.0])),
        (np.zeros(2, complex), np.zeros(2)),
    ],
)
def test_wrong_shapes_and_kinds_are_errors(shield: Shield, observation: Any, action: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=r"must be numbers of shape|observations and"):
        shield.filter(observation, action)
    with pytest.raises(ValueError, match=r"must be numbers of shape|observations and"):
        shield.value(observation, action)


def test_single_equals_batched(shield: Shield) -> None:
    observations, actions = near_the_edge(shield, 100)
    many, reports = shield.filter(observations, actions)
    for i in range(len(many)):
        one, report = shield.filter(observations[i], actions[i])
        if abs(report.proposed_value - shield.threshold) < 1e-5:
            continue  # a matrix product may round differently for one row
        assert one.shape == (2,)
        assert report.intervened == np.asarray(reports.intervened)[i]
        np.testing.assert_allclose(one, many[i], atol=1e-5)
        for name in FilterReport._fields:
            assert float(getattr(report, name)) == pytest.approx(
                float(np.asarray(getattr(reports, name))[i]), abs=1e-5
            )


def test_value_of_states_and_of_actions(shield: Shield) -> None:
    observations, actions = draws(50)
    v, q = np.asarray(shield.value(observations)), np.asarray(shield.value(observations, actions))
    assert v.shape == q.shape == (50,)
    assert np.shape(shield.value(observations[0])) == ()
    np.testing.assert_allclose(shield.value(observations[0]), v[0], atol=1e-5)
    np.testing.assert_allclose(shield.value(observations[0], actions[0]), q[0], atol=1e-5)
    assert shield.value([-0.5, 0.5]) > 0 > shield.value([1.9, 1.9])
    assert shield.value([0.0, 0.0], [2.0, 0.0]) == np.inf
    assert shield.value([0.0, np.nan], [0.0, 0.0]) == np.inf


def test_the_callers_arrays_are_left_alone(shield: Shield) -> None:
    observations, actions = near_the_edge(shield)
    actions = actions * 3
    observations[0, 0], actions[1, 0] = np.nan, np.inf
    before = observations.copy(), actions.copy()
    for array in (observations, actions):
        array.flags.writeable = False
    executed, _ = shield.filter(observations, actions)
    shield.value(observations, actions)
    np.testing.assert_array_equal(observations, before[0])
    np.testing.assert_array_equal(actions, before[1])
    assert not np.shares_memory(executed, actions)


def shield_with_box(shield: Shield, box: gym.spaces.Box) -> Shield:
    old = shield.model.scaling
    scaling = Scaling(
        old.observation_mean,
        old.observation_spread,
        box.low.astype(np.float32),
        box.high.astype(np.float32),
    )
    model = SafetyModel.of_networks(
        shield.observation_space, box, scaling, shield.model.scale, shield.model.networks
    )
    return replace(shield, model=model)


def test_replacements_lie_inside_a_float64_box_to_the_last_bit(shield: Shield) -> None:
    # float32(0.1) > 0.1 and float32(-0.7) < -0.7: neither may be executed.
    box = gym.spaces.Box(np.array([-0.7, -0.7]), np.array([0.1, 0.1]), dtype=np.float64)
    narrow = shield_with_box(shield, box)
    observations, _ = near_the_edge(shield)
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        proposals = (rng.choice([-9.0, 9.0], (len(observations), 2))).astype(dtype)
        executed, report = narrow.filter(observations, proposals)
        assert np.asarray(report.intervened).all()
        assert (executed >= box.low).all()
        assert (executed <= box.high).all()
        assert (np.abs(executed - box.high) < 1e-6).any()  # it does reach the corner


# -- warnings, thresholds, copies ---------------------------------------------------------------


def test_uncalibrated_warns_once_for_each_shield(shield: Shield) -> None:
    fresh = shield.with_delta(0.02)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            fresh.filter([0.0, 0.0], [0.0, 0.0])
            fresh.filter(np.zeros((2, 2)), np.zeros((2, 2)))
        assert [w.category for w in caught] == [UncalibratedShieldWarning]
        shield.with_delta(0.02).filter([0.0, 0.0], [0.0, 0.0])
        assert len(caught) == 2
        replace(fresh, record=record(0.02)).filter([0.0, 0.0], [0.0, 0.0])
        assert len(caught) == 2


@pytest.mark.parametrize("delta", [-0.1, np.nan, np.inf])
def test_a_threshold_is_finite_and_not_negative(shield: Shield, delta: float) -> None:
    with pytest.raises(ValueError, match="delta must be finite and at least 0"):
        shield.with_delta(delta)


def test_another_delta_drops_the_promise(shield: Shield) -> None:
    calibrated = replace(shield, delta=0.1, record=record(0.1))
    assert calibrated.threshold == -0.1
    assert calibrated.certified([1.9, 1.9])
    assert not calibrated.certified([-0.5, 0.5])
    moved = calibrated.with_delta(0.2)
    assert moved.record is None
    assert not moved.certified([1.9, 1.9])
    with pytest.raises(ValueError, match=r"record was made for delta 0\.1"):
        replace(calibrated, delta=0.2)


def test_pickle_and_deepcopy_give_the_same_shield(shield: Shield) -> None:
    calibrated = replace(shield, delta=0.1, record=record(0.1))
    observations, actions = near_the_edge(calibrated, 50)
    expected = calibrated.filter(observations, actions)
    for twin in (pickle.loads(pickle.dumps(calibrated)), copy.deepcopy(calibrated)):
        executed, report = twin.filter(observations, actions)
        np.testing.assert_array_equal(executed, expected[0])
        for mine, theirs in zip(report, expected[1], strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert twin.record == calibrated.record


def test_decisions_can_be_replayed(shield: Shield) -> None:
    observations, actions = near_the_edge(shield)
    first, _ = shield.filter(observations, actions)
    np.random.seed(1)  # noqa: NPY002
    again, _ = shield.with_delta(shield.delta).filter(observations, actions)
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("width", [1, 2, 3, 20])
@pytest.mark.parametrize("counts", [(1, 0, 0), (8, 24, 32), (2, 3, 5)])
def test_candidates_lie_in_the_box_and_are_as_many_as_said(
    shield: Shield, width: int, counts: tuple[int, int, int]
) -> None:
    import torch

    from safeshield.nn.mlp import EnsembleMLP
    from safeshield.values.units import FALLBACK

    chosen = CandidateSet(*counts)
    box = gym.spaces.Box(-2.0, 3.0, (width,))
    student = EnsembleMLP(2 + width, width, (4,)).init(torch.Generator().manual_seed(0))
    student = {name: tensor.numpy() * 5 for name, tensor in student.items()}
    old = shield.model
    scaling = Scaling(
        old.scaling.observation_mean, old.scaling.observation_spread, box.low, box.high
    )
    networks = {**old.networks, FALLBACK: student}
    model = SafetyModel.of_networks(old.observation_space, box, scaling, old.scale, networks)
    states = model.states(draws(5)[0])
    proposals = np.random.default_rng(0).uniform(-2, 3, (5, width)).astype(np.float32)
    found = chosen.actions(model, states, proposals)
    assert found.shape == (5, chosen.total, width)
    assert (found >= -2).all()
    assert (found <= 3).all()
    if chosen.box:
        np.testing.assert_allclose(found[:, -chosen.box], 0.5)  # the centre is always there


def test_candidate_counts_are_checked() -> None:
    with pytest.raises(ValueError, match="fallback must be at least 1"):
        CandidateSet(fallback=0)
