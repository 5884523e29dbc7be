"""Ways to replace an action: what all of them keep, and what each of them adds."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch
from fitted import DT
from test_files import _write_raw
from test_shield import near_the_edge, record, shield_with_box

from safeshield import SafetyShield
from safeshield.files.tensors import read_tensors
from safeshield.nn.mlp import EnsembleMLP, largest_and_gradient, layers
from safeshield.rollouts.policies import as_batch_policy, batch_policy
from safeshield.shield import (
    CandidateSet,
    CommittedFallback,
    FallbackPolicy,
    NearestAcceptable,
    OwnSamples,
    ProjectedGradient,
    Rejected,
    Replacement,
    Shield,
)
from safeshield.shield.critics import SafetyModel
from safeshield.shield.record import CalibrationRecord
from safeshield.shield.replacement import describe
from safeshield.spaces.batches import Batch
from safeshield.spaces.rows import SpaceCodec, flat_actions, flat_observations
from safeshield.spaces.scaling import Scaling
from safeshield.values.units import FALLBACK, SAFETY_NETWORKS, SafetyScale

pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning"
)
Array = npt.NDArray[Any]
COUNT = 6
FEW = CandidateSet(1, 2, 2)


@batch_policy
def fan(observations: Batch, rng: np.random.Generator) -> Array:
    """The k-th of `COUNT` draws for an observation: k sixths of a turn from its own bearing."""
    each = np.arange(len(observations)) % COUNT
    angle = observations.sum(axis=1) + 2 * np.pi * each / COUNT
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)


STRATEGIES: dict[str, Replacement] = {
    "nearest": NearestAcceptable(),
    "fallback": FallbackPolicy(),
    "gradient": ProjectedGradient(),
    "own samples": OwnSamples(fan, COUNT),
}
each_strategy = pytest.mark.parametrize("name", STRATEGIES)
each_other = pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "nearest"])


def rejected_by(shield: Shield, count: int = 400) -> tuple[Array, Array, Rejected]:
    """Observations and actions that the shield rejects, and the question put to a strategy."""
    observations, actions = near_the_edge(shield, count)
    reject = ~(np.asarray(shield.value(observations, actions)) <= shield.threshold)
    observations, actions = observations[reject], actions[reject]
    yes = np.ones(len(actions), bool)
    box = shield.action_space
    assert isinstance(box, gym.spaces.Box)
    question = Rejected(
        shield.model, shield.states(observations), observations, actions, yes, yes,
        np.full(len(actions), shield.threshold), box.low, box.high,
    )  # fmt: skip
    return observations, actions, question


def untrained(actions: gym.Space[Any], observations: gym.Space[Any] | None = None) -> Shield:
    seen = flat_observations(observations or gym.spaces.Box(-1, 1, (3,)))
    played = flat_actions(actions)
    scaling = Scaling(
        np.zeros(seen.width, "f4"), np.ones(seen.width, "f4"),
        played.low.astype("f4"), played.high.astype("f4"),
        seen.categories if any(seen.categories) else (),
        played.categories if played.discrete else (),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    widths = scaling.observation_features, scaling.action_features
    nets = {name: EnsembleMLP(widths[0], 1, (4,)) for name in SAFETY_NETWORKS}
    nets["advantage"] = EnsembleMLP(sum(widths), 1, (16, 16), members=3)
    if not played.discrete:
        nets[FALLBACK] = EnsembleMLP(sum(widths), widths[1], (8,))
    networks = {
        name: {key: 2 * tensor.numpy() for key, tensor in net.init(generator).items()}
        for name, net in nets.items()
    }
    return Shield(
        SafetyModel.of_networks(seen.space, played.space, scaling, SafetyScale(0, 1, 1), networks)
    )


def limit_for(shield: Shield, observations: Array, actions: Array, share: float) -> Array:
    """A threshold for each observation that accepts this share of the actions."""
    table = np.stack([shield.row_values(observations, np.tile(a, (len(observations), 1)))
                      for a in actions])  # fmt: skip
    return np.quantile(table, share, axis=0)


# -- what all of them keep ------------------------------------------------------------------------


@each_other
def test_what_is_accepted_is_left_alone_by_every_strategy(shield: Shield, name: str) -> None:
    observations, actions = near_the_edge(shield)
    actions = actions.astype(np.float64) * (1 - 2**-40)
    expected = shield.filter(observations, actions)[1]
    executed, report = shield.with_replacement(STRATEGIES[name]).filter(observations, actions)
    kept = ~np.asarray(report.intervened)
    assert 50 < kept.sum() < len(kept) - 50
    assert executed[kept].tobytes() == actions[kept].astype(np.float32).tobytes()
    np.testing.assert_array_equal(report.intervened, expected.intervened)
    np.testing.assert_array_equal(report.proposed_value, expected.proposed_value)


@each_other
@pytest.mark.parametrize("candidates", [CandidateSet(), FEW])
def test_each_finds_an_acceptable_action_wherever_the_default_does(
    shield: Shield, name: str, candidates: CandidateSet
) -> None:
    observations, actions, _ = rejected_by(shield, 800)
    strategy = dataclasses.replace(STRATEGIES[name], candidates=candidates)  # type: ignore[type-var]
    default = shield.with_replacement(NearestAcceptable(candidates)).filter(observations, actions)
    executed, report = shield.with_replacement(strategy).filter(observations, actions)
    found, hopeless = np.asarray(default[1].acceptable), ~np.asarray(report.acceptable)
    assert (np.asarray(report.acceptable) >= found).all()
    assert found.sum() > 30
    assert hopeless.sum() > 30
    # Of all that was looked at, the lowest.
    lowest, theirs = np.asarray(report.value)[hopeless], np.asarray(default[1].value)[hopeless]
    assert (lowest <= theirs + 1e-6).all()
    assert not np.array_equal(executed, default[0])


@each_strategy
def test_the_report_tells_the_value_of_what_runs(shield: Shield, name: str) -> None:
    observations, actions, _ = rejected_by(shield)
    executed, report = shield.with_replacement(STRATEGIES[name]).filter(observations, actions)
    value = np.asarray(shield.value(observations, executed))
    np.testing.assert_allclose(report.value, value, atol=1e-5)
    sure = np.abs(value - shield.threshold) > 1e-5
    np.testing.assert_array_equal(
        np.asarray(report.acceptable)[sure], (value <= shield.threshold)[sure]
    )


@each_strategy
def test_all_of_it_lies_inside_a_float64_box_to_the_last_bit(shield: Shield, name: str) -> None:
    box = gym.spaces.Box(np.array([-0.7, -0.7]), np.array([0.1, 0.1]), dtype=np.float64)
    narrow = shield_with_box(shield, box).with_replacement(STRATEGIES[name])
    observations, _ = near_the_edge(shield)
    rng = np.random.default_rng(0)
    for proposals in (
        rng.choice([-9.0, 9.0], (len(observations), 2)),
        rng.uniform(box.low, box.high, (len(observations), 2)),
    ):
        executed, report = narrow.filter(observations, proposals)
        assert np.asarray(report.intervened).any()
        assert (executed >= box.low).all()
        assert (executed <= box.high).all()


@each_strategy
def test_outside_the_box_the_clipped_action_runs_where_it_is_acceptable(
    shield: Shield, name: str
) -> None:
    acting = shield.with_replacement(STRATEGIES[name])
    proposals = np.array([[3.0, 0.2], [-1.0000001, 0.0], [1e30, -1e300]])
    executed, report = acting.filter(np.tile([1.0, 0.0], (3, 1)), proposals)
    assert np.asarray(report.intervened).all()
    assert np.asarray(report.acceptable).all()
    np.testing.assert_array_equal(executed, np.clip(proposals, -1, 1).astype("f4"))


@each_strategy
def test_nothing_broken_comes_out_and_no_row_disturbs_another(shield: Shield, name: str) -> None:
    acting = shield.with_replacement(STRATEGIES[name])
    observations, actions, _ = rejected_by(shield)
    clean, expected = acting.filter(observations[:60], actions[:60])
    observations, actions = observations[:60].copy(), actions[:60].copy()
    observations[::6], actions[1::6] = np.nan, np.inf
    observations[2::6, 0], actions[3::6, 1] = 1e30, np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        executed, report = acting.filter(observations, actions)
    assert np.isfinite(executed).all()
    assert (np.abs(executed) <= 1).all()
    assert not np.isnan(np.asarray(report.value)).any()
    unseen = np.isin(np.arange(60) % 6, (0, 2))
    assert (np.asarray(report.value)[unseen] == np.inf).all()
    assert not np.asarray(report.acceptable)[unseen].any()
    np.testing.assert_array_equal(report.valid, np.isin(np.arange(60) % 6, (4, 5)))
    good = np.asarray(report.valid)
    same = np.abs(executed - clean).max(axis=1) < 1e-4
    assert same[good].mean() > 0.9  # rounding may send a walk another way
    np.testing.assert_allclose(
        np.asarray(report.value)[good & same], np.asarray(expected.value)[good & same], atol=1e-4
    )


@pytest.mark.parametrize("name", ["nearest", "fallback", "gradient"])
def test_without_an_observation_the_fallback_is_wanted_not_the_proposal(
    shield: Shield, name: str
) -> None:
    acting = shield.with_replacement(STRATEGIES[name])
    _, actions = near_the_edge(shield, 30)
    broken, _ = acting.filter(np.full((30, 2), np.nan), actions)
    mean = np.tile(shield.model.scaling.observation_mean, (30, 1))
    expected, _ = acting.filter(mean, np.full((30, 2), np.nan))
    np.testing.assert_array_equal(broken, expected)


@each_strategy
def test_networks_that_overflow_let_nothing_pass(shield: Shield, name: str) -> None:
    networks = {
        key: {entry: np.full_like(array, 3e38) for entry, array in weights.items()}
        for key, weights in shield.model.networks.items()
    }
    broken = replace(
        shield,
        model=replace(shield.model, networks=networks),
        replacement=STRATEGIES[name],
    )
    observations, actions = near_the_edge(shield, 20)
    with np.errstate(all="ignore"):
        executed, report = broken.filter(observations, actions)
    assert np.asarray(report.intervened).all()
    assert not np.asarray(report.acceptable).any()
    assert (np.abs(executed) <= 1).all()
    assert not np.isnan(np.asarray(report.value)).any()


@each_strategy
def test_single_equals_batched(shield: Shield, name: str) -> None:
    acting = shield.with_replacement(STRATEGIES[name])
    observations, actions, _ = rejected_by(shield, 200)
    many, reports = acting.filter(observations, actions)
    far = 0
    for i in range(len(many)):
        one, report = acting.filter(observations[i], actions[i])
        assert one.shape == (2,)
        assert report.intervened == np.asarray(reports.intervened)[i]
        # A matrix product may round differently for one row, and decide otherwise at an edge.
        far += bool(np.abs(one - many[i]).max() > 1e-4)
    assert far <= 0.03 * len(many)


# -- the nearest ----------------------------------------------------------------------------------


def test_of_discrete_actions_the_one_that_differs_in_the_fewest_entries() -> None:
    space = gym.spaces.MultiDiscrete([3, 4, 2])
    shield = untrained(space)
    rng = np.random.default_rng(1)
    observations = rng.uniform(-1, 1, (200, 3)).astype("f4")
    proposals = shield.model.action_codec.choices[rng.integers(24, size=200)].astype(np.int64)
    choices = shield.model.action_codec.choices
    limit = limit_for(shield, observations, choices, 0.25)
    states = shield.states(observations)
    executed, report = shield.filter_rows(states, observations, proposals, limit)
    replaced = 0
    for i in np.flatnonzero(report.intervened):
        q = shield.row_values(np.tile(observations[i], (24, 1)), choices)
        if np.abs(q - limit[i]).min() < 1e-6:
            continue
        differ = (choices != proposals[i]).sum(axis=1)
        good = q <= limit[i]
        least = np.flatnonzero(good & (differ == differ[good].min()))
        np.testing.assert_array_equal(executed[i], choices[least[q[least].argmin()]])
        replaced += 1
    assert replaced > 50


# -- the fallback ---------------------------------------------------------------------------------


def test_the_fallbacks_own_action_runs_wherever_it_is_acceptable(shield: Shield) -> None:
    observations, actions, _ = rejected_by(shield)
    executed, report = shield.with_replacement(FallbackPolicy()).filter(observations, actions)
    fallback = shield.model.fallback(shield.states(observations), np.zeros((1, 2), "f4"))[:, 0]
    q = np.asarray(shield.value(observations, fallback))
    good = q < shield.threshold - 1e-5
    assert 10 < good.sum() < len(good) - 10
    np.testing.assert_allclose(executed[good], fallback[good], atol=1e-6)
    elsewhere = (q > shield.threshold + 1e-5) & np.asarray(report.acceptable)
    assert elsewhere.any()
    assert np.abs(executed - fallback)[elsewhere].max() > 0.1


def test_a_committed_fallback_runs_wherever_a_proposal_is_rejected(shield: Shield) -> None:
    """Acceptable or not; so between neighbouring states the replacement moves as little as mu."""
    observations, actions, _ = rejected_by(shield)
    committed = shield.with_replacement(CommittedFallback())
    executed, report = committed.filter(observations, actions)
    fallback = shield.model.fallback(shield.states(observations), np.zeros((1, 2), "f4"))[:, 0]
    np.testing.assert_allclose(executed, fallback, atol=1e-6)
    q = np.asarray(shield.value(observations, fallback))
    np.testing.assert_allclose(report.value, q, atol=1e-5)
    far = np.abs(q - shield.threshold) > 1e-5
    np.testing.assert_array_equal(report.acceptable[far], (q <= shield.threshold)[far])
    assert not report.acceptable.all(), "the test must meet states where the fallback is rejected"
    # An action outside the box is clipped first, and runs where the clipped one is acceptable.
    accepted = np.asarray(shield.value(observations, fallback)) < shield.threshold - 1e-5
    outside = np.where(np.abs(fallback) >= 0.99, 3.0 * np.sign(fallback), fallback)
    at = accepted & (outside != fallback).any(axis=1)
    if at.any():
        ran, _ = committed.filter(observations[at], outside[at].astype("f4"))
        np.testing.assert_allclose(ran, np.clip(outside[at], -1, 1), atol=1e-6)


def test_discrete_fallback_is_the_lowest_value() -> None:
    shield = untrained(gym.spaces.MultiDiscrete([3, 4])).with_replacement(FallbackPolicy())
    rng = np.random.default_rng(0)
    observations = rng.uniform(-1, 1, (50, 3)).astype("f4")
    choices = shield.model.action_codec.choices
    table = np.stack([shield.row_values(np.tile(o, (12, 1)), choices) for o in observations])
    proposals = choices[table.argmax(axis=1)].astype(np.int64)
    limit = np.median(table, axis=1)
    executed, report = shield.filter_rows(
        shield.states(observations), observations, proposals, limit
    )
    assert np.asarray(report.intervened).all()
    np.testing.assert_array_equal(executed, choices[table.argmin(axis=1)])


# -- the gradient ---------------------------------------------------------------------------------


def autograd(shield: Shield, observations: Array, actions: Array) -> tuple[Array, Array]:
    """Q_h and dQ_h/du by PyTorch."""
    model = shield.model
    params = {name: torch.tensor(array) for name, array in model.networks["advantage"].items()}
    members, _, _ = params["0.weight"].shape
    hidden = tuple(params[f"{i}.weight"].shape[2] for i in range(len(params) // 2 - 1))
    scaled = torch.tensor(model.scaling.actions(actions), requires_grad=True)
    seen = torch.tensor(model.scaling.observations(observations))
    inputs = torch.cat([seen, scaled], -1)
    network = EnsembleMLP(inputs.shape[1], 1, hidden, members)
    worst = network(params, inputs)[..., 0].max(0).values * model.scale.step_rms
    (gradient,) = torch.autograd.grad(worst.sum(), scaled)
    value = worst.detach().numpy() + model.states(observations).value
    return value, gradient.numpy()


@pytest.mark.parametrize("count", [1, 300, 5000])
def test_the_gradient_is_autograds(shield: Shield, count: int) -> None:
    wide = untrained(gym.spaces.Box(-2, 5, (7,)))
    rng = np.random.default_rng(0)
    for acting in (shield, wide):
        box = acting.action_space
        assert isinstance(box, gym.spaces.Box)
        observations = rng.uniform(-1, 1, (count, acting.model.observation_codec.width)).astype(
            "f4"
        )
        actions = rng.uniform(box.low, box.high, (count, *box.shape)).astype("f4")
        values, slopes = acting.model.action_gradients(acting.states(observations), actions)
        expected, gradient = autograd(acting, observations, actions)
        scale = np.abs(gradient).max()
        assert scale > 0
        # Where a neuron is within rounding of its kink, either slope is right.
        off = np.abs(slopes - gradient).max(axis=1) > 1e-4 * scale
        assert off.mean() < 0.002
        np.testing.assert_allclose(values, expected, atol=1e-5)


def test_at_a_kink_the_slope_is_autograds_too() -> None:
    params = {
        "0.weight": np.array([[[1.0], [1.0]]], "f4"), "0.bias": np.zeros((1, 1, 1), "f4"),
        "1.weight": np.ones((1, 1, 1), "f4"), "1.bias": np.zeros((1, 1, 1), "f4"),
    }  # fmt: skip
    _, slope = largest_and_gradient(layers(params), np.array([[1.0, -1.0], [2.0, 0.0]], "f4"))
    assert slope.tolist() == [[0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("width", [2, 7])
def test_along_the_walk_the_value_only_falls_and_the_first_acceptable_ends_it(
    shield: Shield, width: int
) -> None:
    if width == 2:
        _, actions, question = rejected_by(shield)
    else:
        wide = untrained(gym.spaces.Box(-1, 1, (width,)))
        rng = np.random.default_rng(0)
        observations = rng.uniform(-1, 1, (300, 3)).astype("f4")
        actions = rng.uniform(-1, 1, (300, width)).astype("f4")
        limit = limit_for(wide, observations, actions[:100], 0.2)
        yes = np.ones(300, bool)
        question = Rejected(
            wide.model, wide.states(observations), observations, actions, yes, yes, limit,
            *(np.full(width, x, "f4") for x in (-1, 1)),
        )  # fmt: skip
    at = actions
    before = question.values(actions[:, None])[:, 0]
    started, moves, over = before, 0, before <= question.limit
    for steps in range(1, 13):
        walked, values = ProjectedGradient(steps, 0.25).walk(question)
        assert (values <= before + 1e-6).all()
        np.testing.assert_array_equal(walked[over], at[over])
        moved = np.linalg.norm(walked - at, axis=1)
        assert moved.max() <= 0.25 * (1 + 1e-5)
        assert (values < before)[moved > 1e-6].all()
        np.testing.assert_allclose(values, question.values(walked[:, None])[:, 0], atol=1e-5)
        moves += int((moved > 0).sum())
        at, before, over = walked, values, values <= question.limit
    assert moves > len(actions)
    assert (over & ~(started <= question.limit)).sum() > 30


def linear(weights: list[float], bias: float = 0.0, below: float = -1.0) -> Shield:
    """Q_h(s, u) = relu(x) + below relu(-x) + bias, x = w . u: by default x + bias, exactly."""
    width = len(weights)
    shield = untrained(gym.spaces.Box(-1, 1, (width,)))
    w = np.array(weights, "f4")
    first = np.zeros((1, 3 + width, 2), "f4")
    first[0, 3:, 0], first[0, 3:, 1] = w, -w
    advantage = {
        "0.weight": first, "0.bias": np.zeros((1, 1, 2), "f4"),
        "1.weight": np.array([[[1.0], [below]]], "f4"), "1.bias": np.full((1, 1, 1), bias, "f4"),
    }  # fmt: skip
    networks = {**shield.model.networks, "advantage": advantage}
    for name in ("constraint", "excess"):
        networks[name] = {k: np.zeros_like(v) for k, v in shield.model.networks[name].items()}
    return replace(shield, model=replace(shield.model, networks=networks))


def test_on_a_linear_value_one_step_crosses_the_threshold_by_a_tenth() -> None:
    acting = linear([0.6, 0.8]).with_replacement(ProjectedGradient(1, 2.0))
    executed, report = acting.filter(np.zeros(3), np.array([0.3, 0.4]))
    # Q_h is 0.5 there; the threshold lies 0.5 half widths away.
    np.testing.assert_allclose(executed, [0.3 - 0.55 * 0.6, 0.4 - 0.55 * 0.8], atol=1e-6)
    assert report.value == pytest.approx(-0.05, abs=1e-6)


def test_short_steps_arrive_later() -> None:
    _, report = (
        linear([0.6, 0.8])
        .with_replacement(ProjectedGradient(1, 0.1))
        .filter(np.zeros(3), np.array([0.3, 0.4]))
    )
    assert report.acceptable  # by the candidates
    acting = linear([0.6, 0.8]).with_replacement(ProjectedGradient(6, 0.1))
    executed, report = acting.filter(np.zeros(3), np.array([0.3, 0.4]))
    # Five steps of 0.1 end at the threshold itself, or beyond it by less than the sixth.
    assert np.linalg.norm(executed - [0.3, 0.4]) == pytest.approx(0.5, abs=2e-3)
    assert report.acceptable


def test_a_step_that_goes_too_far_is_taken_back_and_halved() -> None:
    # Acceptable is u in [-0.0002, 0.02]; one tenth too far is up a wall a hundred times as steep.
    walled = linear([1.0], -0.02, below=100.0)
    question = Rejected(
        walled.model, walled.states(np.zeros((1, 3), "f4")), np.zeros((1, 3)),
        np.array([[0.5]], "f4"), np.ones(1, bool), np.ones(1, bool), np.zeros(1),
        np.array([-1], "f4"), np.array([1], "f4"),
    )  # fmt: skip
    ways = [ProjectedGradient(steps, 1.0).walk(question) for steps in (1, 2, 5)]
    first, second, last = (float(actions[0, 0]) for actions, _ in ways)
    assert first == 0.5
    assert second == pytest.approx(0.5 - 1.1 * 0.48 / 2, abs=1e-6)
    assert -2e-4 <= last <= 0.02
    assert ways[2][1][0] <= 0


def test_at_a_face_of_the_box_it_walks_along_the_face() -> None:
    acting = linear([-0.8, 0.6], 1.0).with_replacement(ProjectedGradient(1, 2.0))
    # Downhill leads out of the box to the right: what is left is straight down, 0.5 / 0.6 far.
    executed, _ = acting.filter(np.zeros(3), np.array([1.0, 0.5]))
    np.testing.assert_allclose(executed, [1.0, 0.5 - 1.1 * 0.5 / 0.6], atol=1e-5)


def test_in_a_corner_that_it_cannot_leave_the_walk_ends() -> None:
    acting = linear([-0.8, 0.6], 2.0).with_replacement(ProjectedGradient())
    executed, report = acting.filter(np.zeros(3), np.array([1.0, -1.0]))
    assert not report.acceptable
    assert report.value == pytest.approx(0.6)
    np.testing.assert_array_equal(executed, [1.0, -1.0])


@pytest.mark.parametrize(
    "arguments", [(0,), (1001,), (True,), (2.0,), (8, 0.0), (8, -1.0), (8, np.nan), (8, np.inf)]
)
def test_steps_and_their_size_are_checked(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"steps must be an integer|step_size must be at least"):
        ProjectedGradient(*arguments)


def test_discrete_actions_have_no_gradient() -> None:
    shield = untrained(gym.spaces.Discrete(4))
    with pytest.raises(TypeError, match="no gradient between discrete actions; use Nearest"):
        shield.with_replacement(ProjectedGradient())


# -- the agent's own samples ----------------------------------------------------------------------


def test_the_first_acceptable_of_its_own_draws_in_order(shield: Shield) -> None:
    observations, actions, _ = rejected_by(shield, 600)
    executed, _ = shield.with_replacement(OwnSamples(fan, COUNT)).filter(observations, actions)
    rng = np.random.default_rng(0)
    seen = {k: 0 for k in range(COUNT)}
    none = 0
    for observation, action in zip(observations, executed, strict=True):
        draws = fan(np.tile(observation, (COUNT, 1)), rng)
        q = np.asarray(shield.value(np.tile(observation, (COUNT, 1)), draws))
        if np.abs(q - shield.threshold).min() < 1e-5:
            continue
        good = q <= shield.threshold
        if good.any():
            np.testing.assert_allclose(action, draws[good.argmax()], atol=1e-6)
            seen[int(good.argmax())] += 1
        else:
            none += 1
    assert min(list(seen.values())[:3]) > 0
    assert none > 0


class Predictor:
    """Stable-Baselines3's signature; remembers how it was called."""

    def __init__(self, act: Callable[[Any], Array]) -> None:
        self.act, self.calls = act, []  # type: ignore[var-annotated]

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None,  # noqa: ANN401
        deterministic: bool = True,
    ) -> Any:  # noqa: ANN401  # fmt: skip
        self.calls.append((observation, state, deterministic))
        return self.act(observation), (np.ones(1),)


def test_predict_is_asked_for_noisy_draws_without_a_memory(shield: Shield) -> None:
    model = Predictor(lambda o: fan(o, np.random.default_rng(0)))
    observations, actions, _ = rejected_by(shield)
    acting = shield.with_replacement(OwnSamples(model, COUNT))
    executed, _ = acting.filter(observations, actions)
    expected, _ = shield.with_replacement(OwnSamples(fan, COUNT)).filter(observations, actions)
    np.testing.assert_array_equal(executed, expected)
    acting.filter(observations, actions)
    assert [(len(o), state, noisy) for o, state, noisy in model.calls] == [
        (COUNT * len(actions), None, False)
    ] * 2


def test_it_is_not_asked_what_to_do_where_nothing_can_be_seen(shield: Shield) -> None:
    model = Predictor(lambda o: fan(o, np.random.default_rng(0)))
    acting = shield.with_replacement(OwnSamples(model, COUNT))
    executed, _ = acting.filter([np.nan, 0.0], [0.1, 0.2])
    assert not model.calls
    np.testing.assert_array_equal(executed, shield.filter([np.nan, 0.0], [0.1, 0.2])[0])
    # But without a proposal, its own draw is better than anybody else's action.
    at = np.array([1.0, 0.0], "f4")
    executed, report = acting.filter(at, [np.nan, 0.0])
    np.testing.assert_allclose(executed, fan(at[None], np.random.default_rng(0))[0], atol=1e-6)
    assert report.acceptable
    assert not report.valid


def test_broken_draws_are_passed_over(shield: Shield) -> None:
    at = np.tile(np.array([1.0, 0.0], "f4"), (2, 1))
    draws = np.array([[np.nan, 0], [np.inf, 0], [0.3, -7.0], [0.1, 0.1]])
    model = Predictor(lambda o: np.tile(draws, (len(o) // 4, 1)))
    executed, report = shield.with_replacement(OwnSamples(model, 4)).filter(at, [[np.nan, 0]] * 2)
    # The third is clipped into the box, as a proposal would be.
    np.testing.assert_allclose(executed, [[0.3, -1.0]] * 2)
    assert np.asarray(report.acceptable).all()


def test_broken_discrete_draws_are_passed_over() -> None:
    shield = untrained(gym.spaces.Discrete(4, start=1))
    choices = shield.model.action_codec.choices
    rng = np.random.default_rng(0)
    observations = rng.uniform(-1, 1, (60, 3)).astype("f4")
    table = np.stack([shield.row_values(np.tile(o, (4, 1)), choices) for o in observations])
    order = table.argsort(axis=1)
    proposals = choices[order[:, 3], 0].astype(np.int64)
    limit = np.take_along_axis(table, order, 1)[:, 1:3].mean(axis=1)  # two of four pass
    draws = np.array([0, 5, 3, 1, 2, 4])
    model = Predictor(lambda o: np.tile(draws, len(o) // 6))
    acting = shield.with_replacement(OwnSamples(model, 6))
    executed, report = acting.filter_rows(
        acting.states(observations), observations, proposals[:, None], limit
    )
    good = table[:, draws[2:] - 1] <= limit[:, None]
    np.testing.assert_array_equal(executed[:, 0], draws[2:][good.argmax(axis=1)])
    assert np.asarray(report.intervened).all()


def test_dicts_reach_the_policy_as_its_environment_makes_them() -> None:
    space = gym.spaces.Dict(
        at=gym.spaces.Discrete(5, start=2),
        v=gym.spaces.Box(-1, 1, (2,)),
        picture=gym.spaces.Box(0, 255, (2, 2), np.uint8),
    )
    shield = untrained(gym.spaces.Box(-1, 1, (1,)), space)
    model = Predictor(lambda o: np.full((len(o["at"]), 1), 0.5))
    acting = shield.with_replacement(OwnSamples(model, 3))
    space.seed(0)
    point = space.sample()
    with np.errstate(all="ignore"):
        acting.filter(point, np.array([np.nan]))
    ((asked, _, _),) = model.calls
    for key in space.spaces:
        np.testing.assert_array_equal(asked[key], np.stack([point[key]] * 3))
        assert asked[key].dtype == space[key].dtype


def test_policies_of_every_kind_and_seeds(shield: Shield) -> None:
    observations, actions, _ = rejected_by(shield)
    first, again, other = (
        shield.with_replacement(OwnSamples("random", 4, seed=seed)).filter(observations, actions)[0]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    still = OwnSamples(lambda observation: np.zeros(2, "f4"), 2)
    executed, _ = shield.with_replacement(still).filter([1.0, 0.0], [np.nan, 0.0])
    np.testing.assert_array_equal(executed, [0, 0])


def test_what_cannot_be_asked_is_refused(shield: Shield) -> None:
    box = shield.action_space
    with pytest.raises(ValueError, match="policy must have no memory"):
        OwnSamples(as_batch_policy(Predictor(lambda o: o), box))
    for count in (0, 4097, 2.0):
        with pytest.raises(ValueError, match="count must be an integer"):
            OwnSamples("random", count)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="policy must be 'random', have act_batch or predict"):
        shield.with_replacement(OwnSamples(3))
    short = OwnSamples(Predictor(lambda o: np.zeros((1, 2), "f4")), 4)
    with pytest.raises(ValueError, match="must return 4 actions for 4 observations"):
        shield.with_replacement(short).filter([-0.5, 0.5], [0.0, 0.0])
    wrong = OwnSamples(Predictor(lambda o: np.zeros((len(o), 3), "f4")), 4)
    with pytest.raises(ValueError, match="a draw of the policy of OwnSamples must be numbers of"):
        shield.with_replacement(wrong).filter([-0.5, 0.5], [0.0, 0.0])


def test_a_copied_shield_goes_on_asking_the_same_agent(shield: Shield) -> None:
    model = Predictor(lambda o: fan(o, np.random.default_rng(0)))
    acting = shield.with_replacement(OwnSamples(model, COUNT))
    twin = copy.deepcopy(acting)
    assert isinstance(twin.replacement, OwnSamples)
    assert twin.replacement.policy is model
    random = pickle.loads(pickle.dumps(shield.with_replacement(OwnSamples("random", 3))))
    assert random.filter([-0.5, 0.5], [0.0, 0.0])[1].intervened


# -- one's own ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claims:
    """Says that anything is as safe as can be."""

    action: tuple[float, ...]

    def choose(self, rejected: Rejected, /) -> tuple[Array, Array]:
        count = len(rejected.wanted)
        return np.tile(np.array(self.action), (count, 1)), np.full(count, -1e9)


@pytest.mark.parametrize("action", [(0.5, -7.0), (np.nan, 0.0), (np.inf, 0.0)])
def test_what_a_strategy_of_ones_own_returns_is_judged_again(
    shield: Shield, action: tuple[float, ...]
) -> None:
    observations, actions, _ = rejected_by(shield)
    executed, report = shield.with_replacement(Claims(action)).filter(observations, actions)
    assert (np.abs(executed) <= 1).all()
    np.testing.assert_allclose(report.value, shield.value(observations, executed), atol=1e-5)
    np.testing.assert_array_equal(report.acceptable, np.asarray(report.value) <= shield.threshold)
    expected = actions if not np.isfinite(action).all() else np.tile([0.5, -1], (len(actions), 1))
    np.testing.assert_allclose(executed, expected)
    with pytest.raises(ValueError, match=r"Claims.choose must return actions of shape"):
        shield.with_replacement(Claims((0.0,))).filter(observations, actions)


@dataclass(frozen=True)
class Brake:
    """Halves the proposal until it is acceptable: a new way to replace actions is one class."""

    times: int = 4

    def check_actions(self, codec: SpaceCodec) -> None:
        if codec.discrete:
            raise TypeError(f"Brake needs actions of a Box, got {codec.space}")

    def choose(self, rejected: Rejected, /) -> tuple[Array, Array]:
        scales = 0.5 ** np.arange(1, self.times + 1)
        options = rejected.wanted[:, None] * scales[:, None]
        values = rejected.values(options)
        good = values <= rejected.limit[:, None]
        best = np.where(good.any(axis=1), good.argmax(axis=1), values.argmin(axis=1))
        each = np.arange(len(best))
        return options[each, best], values[each, best]


def test_a_new_way_to_replace_actions_is_one_class(shield: Shield, tmp_path: Path) -> None:
    observations, actions, _ = rejected_by(shield)
    braking = shield.with_replacement(Brake())
    executed, report = braking.filter(observations, actions)
    wanted = np.clip(actions, -1, 1)
    options = [0.5**k * wanted for k in range(1, 5)]
    each = np.stack([shield.value(observations, one) for one in options])
    first = np.where(
        (each <= shield.threshold).any(0), (each <= shield.threshold).argmax(0), each.argmin(0)
    )
    np.testing.assert_allclose(executed, np.stack(options)[first, np.arange(len(actions))])
    np.testing.assert_array_equal(report.acceptable, report.value <= shield.threshold)
    env = SafetyShield(gym.make("safeshield/Boat-v0"), braking)
    env.reset(seed=0)
    env.step(np.ones(2, np.float32))
    assert "Brake" in repr(braking)
    with pytest.raises(ValueError, match=r"Brake holds what no file can .*NearestAcceptable"):
        braking.save(tmp_path / "braking.safetensors")


@pytest.mark.parametrize("wrong", ["nearest", CandidateSet(), FallbackPolicy, None, 3])
def test_what_is_no_strategy_is_refused(shield: Shield, wrong: Any) -> None:  # noqa: ANN401
    with pytest.raises(TypeError, match=r"replacement must be one of NearestAcceptable\(...\), F"):
        shield.with_replacement(wrong)


# -- promises and files ---------------------------------------------------------------------------


def test_a_promise_is_for_one_strategy(shield: Shield) -> None:
    calibrated = replace(shield, delta=0.1, record=record(0.1))
    moved = calibrated.with_replacement(FallbackPolicy())
    assert moved.record is None
    assert moved.delta == 0.1
    assert calibrated.record is not None
    with pytest.raises(ValueError, match="record was made for replacement by default, the shield"):
        replace(calibrated, replacement=FallbackPolicy())
    with pytest.raises(ValueError, match="record was made for replacement"):
        replace(calibrated, replacement=NearestAcceptable(FEW))
    assert "FallbackPolicy()" in repr(moved)
    assert "Nearest" not in repr(shield)


def test_calibration_names_the_strategy_that_it_tested(shield: Shield, tmp_path: Path) -> None:
    asked: list[int] = []

    @batch_policy
    def aside(observations: Batch, rng: np.random.Generator) -> Array:
        asked.append(len(observations))
        return fan(observations, rng)

    env = gym.make("safeshield/Boat-v0", dt=DT, max_episode_steps=100)
    settings: dict[str, Any] = {
        "epsilon": 0.3, "confidence": 0.9, "policy": fan, "deltas": [0.3],
    }  # fmt: skip
    default = shield.calibrate(env, **settings).record
    assert default is not None
    assert default.replacement == ""
    for strategy, words in (
        (OwnSamples(aside, COUNT), "OwnSamples(policy=aside, count=6, seed=0)"),
        (ProjectedGradient(3), "ProjectedGradient(steps=3, step_size=0.25)"),
    ):
        acting = shield.with_replacement(strategy).calibrate(env, **settings)
        assert acting.record is not None
        assert acting.record.replacement == words
        assert f", which replaces actions by {words}, violates" in acting.record.promise
        assert CalibrationRecord.from_json(acting.record.to_json()) == acting.record
    assert asked
    assert "replaces actions" not in default.promise
    acting.save(tmp_path / "s")
    assert Shield.load(tmp_path / "s").record == acting.record


def test_a_record_of_before_is_one_of_the_default() -> None:
    old = record(0.1).to_json()
    del old["replacement"]
    assert CalibrationRecord.from_json(old) == record(0.1)
    for broken in ({"replacement": 3}, {"replacement": None}, {"more": ""}):
        with pytest.raises(ValueError, match="record"):
            CalibrationRecord.from_json(old | broken)


IN_FILES = [
    NearestAcceptable(),
    NearestAcceptable(CandidateSet(2, 0, 1)),
    FallbackPolicy(CandidateSet(1, 5, 0)),
    CommittedFallback(),
    ProjectedGradient(3, 0.1 + 1e-17, FEW),
]


@pytest.mark.parametrize("strategy", IN_FILES, ids=describe)
def test_a_file_holds_the_strategy(shield: Shield, strategy: Replacement, tmp_path: Path) -> None:
    path = tmp_path / "shield.safetensors"
    vouched = replace(record(0.05), replacement=describe(strategy))
    replace(shield, record=vouched, replacement=strategy).save(path)
    again = Shield.load(path)
    assert again.replacement == strategy
    assert again.record == vouched
    env = SafetyShield(gym.make("safeshield/Boat-v0", dt=DT), path)
    assert env.spec is not None
    assert gym.make(env.spec).get_wrapper_attr("shield").replacement == strategy


@pytest.mark.parametrize("strategy", [OwnSamples("random"), Claims((0.0, 0.0))], ids=describe)
def test_what_no_file_can_hold_is_refused(
    shield: Shield, strategy: Replacement, tmp_path: Path
) -> None:
    path = tmp_path / "shield.safetensors"
    with pytest.raises(ValueError, match="save the shield without it"):
        shield.with_replacement(strategy).save(path)
    assert not path.exists()


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "by import": lambda r: r.update(kind="safeshield.shield.OwnSamples"),
    "a class": lambda r: r.update(kind="ProjectedGradient"),
    "own samples": lambda r: r.update(kind="own_samples"),
    "a list": lambda r: r.update(kind=["projected_gradient"]),
    "none": lambda r: r.update(kind=None),
    "missing": lambda r: r.pop("kind"),
    "another's fields": lambda r: r.update(kind="fallback_policy"),
    "one more": lambda r: r.update(policy="os.system"),
    "one less": lambda r: r.pop("steps"),
    "no candidates": lambda r: r.pop("candidates"),
    "candidates many": lambda r: r["candidates"].update(box=10**9),
    "candidates unknown": lambda r: r["candidates"].update(os=1),
    "steps true": lambda r: r.update(steps=True),
    "steps a float": lambda r: r.update(steps=8.0),
    "steps many": lambda r: r.update(steps=10**9),
    "step_size a string": lambda r: r.update(step_size="0.1"),
    "step_size infinite": lambda r: r.update(step_size=float("1e999")),
    "step_size negative": lambda r: r.update(step_size=-0.1),
    "step_size true": lambda r: r.update(step_size=True),
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_strategy_is_refused(
    shield: Shield, damage: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    path = tmp_path / "shield.safetensors"
    shield.with_replacement(ProjectedGradient()).save(path)
    file = read_tensors(path, "safeshield-shield")
    arrays, header = file.load(file.shapes, file.dtypes), file.header
    _write_raw(path, arrays, header)
    assert Shield.load(path).replacement == ProjectedGradient()
    damage(header["replacement"])
    _write_raw(path, arrays, header)
    with pytest.raises(ValueError, match="the header does not describe a shield") as caught:
        Shield.load(path)
    if "kind" in header["replacement"] and header["replacement"]["kind"] not in (
        "projected_gradient", "fallback_policy",
    ):  # fmt: skip
        for known in ("nearest_acceptable", "fallback_policy", "projected_gradient"):
            assert f"'{known}'" in str(caught.value)


def test_a_strategy_that_is_no_object_is_refused(shield: Shield, tmp_path: Path) -> None:
    path = tmp_path / "shield.safetensors"
    shield.save(path)
    file = read_tensors(path, "safeshield-shield")
    arrays = file.load(file.shapes, file.dtypes)
    for wrong in ("fallback_policy", None, [], 3):
        _write_raw(path, arrays, file.header | {"replacement": wrong})
        with pytest.raises(ValueError, match="the header does not describe a shield"):
            Shield.load(path)


def test_a_gradient_over_discrete_actions_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shield.safetensors"
    untrained(gym.spaces.Discrete(3)).save(path)
    file = read_tensors(path, "safeshield-shield")
    gradient = {"kind": "projected_gradient", **dataclasses.asdict(ProjectedGradient())}
    _write_raw(path, file.load(file.shapes, file.dtypes), file.header | {"replacement": gradient})
    with pytest.raises(ValueError, match="no gradient between discrete actions"):
        Shield.load(path)


def test_a_file_of_before_replaces_by_the_nearest(shield: Shield, tmp_path: Path) -> None:
    path = tmp_path / "shield.safetensors"
    shield.save(path)
    file = read_tensors(path, "safeshield-shield")
    arrays, header = file.load(file.shapes, file.dtypes), file.header
    header["candidates"] = header.pop("replacement")["candidates"] | {"box": 7}
    _write_raw(path, arrays, header)
    assert Shield.load(path).replacement == NearestAcceptable(CandidateSet(box=7))
