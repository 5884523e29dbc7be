"""`SafeSupportPolicy`: nothing outside the safe support, and densities that are the samples'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch
from fitted import DT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binom, chisquare, kstest
from tables import table_shield

from safeshield.algorithms.safefql import SafeFQL
from safeshield.calibration.proposers import battery
from safeshield.data import collect
from safeshield.envs.boat import STATE_HIGH, STATE_LOW
from safeshield.nn.actor import FlowActor
from safeshield.nn.flow import euler_sample, velocity_network
from safeshield.policies import SafeSupportPolicy
from safeshield.rollouts.episodes import run_episodes
from safeshield.rollouts.policies import batch_policy
from safeshield.shield import Shield
from safeshield.values.units import BEHAVIOUR

pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning", "ignore::UserWarning"
)
Array = npt.NDArray[Any]
EDGE = np.array([-1.3, 0.5], np.float32)  # a rock ahead: about half of the actions still do
LOST = np.array([-0.5, 0.5], np.float32)  # on the rock


@pytest.fixture(scope="module")
def taught(agent: SafeFQL) -> Shield:
    """A learned shield: it knows what the log does."""
    return agent.shield().with_delta(0.02)


def states(count: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return rng.uniform(STATE_LOW, STATE_HIGH, (count, 2)).astype(np.float32)


def reckless(observation: Any, state: Any = None, **_: Any) -> Any:  # noqa: ANN401
    """Downstream, give or take."""
    return np.array([1.0, 0.0]), state


class Helm:
    """Gaussian about "downstream", cut to the box, with its own density and memory."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)
        self.calls: list[tuple[Any, Any, bool]] = []

    def predict(
        self,
        observation: Array,
        state: tuple[Array] | None = None,
        episode_start: Array | None = None,
        deterministic: bool = False,
    ) -> tuple[Array, tuple[Array]]:
        self.calls.append((state, episode_start, deterministic))
        count = np.zeros(1) if state is None else state[0] + 1
        noise = 0.0 if deterministic else 0.5 * self.rng.standard_normal((len(observation), 2))
        return np.tile([0.5, 0.0], (len(observation), 1)) + noise, (count,)

    def log_prob(self, observations: Any, actions: Array) -> Array:  # noqa: ANN401
        scaled = (actions - [0.5, 0.0]) / 0.5
        return -0.5 * (scaled**2).sum(-1) - np.log(2 * np.pi * 0.25)


# -- nothing outside ------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", ["uniform", "behaviour", "random", "policy", "model"])
def test_nothing_outside_the_safe_support_is_ever_sampled(taught: Shield, proposal: str) -> None:
    given: Any = proposal
    if proposal == "random":
        given = battery(taught)["random"]
    elif proposal == "policy":
        given = batch_policy(lambda o, rng: rng.normal([0.9, 0.0], 0.5, (len(o), 2)))
    elif proposal == "model":
        given = Helm()
    policy = SafeSupportPolicy(taught, given, seed=1)
    seen = states(3000)
    actions, _ = policy.predict(seen)
    assert actions.shape == (3000, 2)
    assert actions.dtype == np.float32
    assert all(map(taught.action_space.contains, actions))
    report = policy.report
    assert report is not None
    inside = taught.value(seen, actions) <= taught.threshold
    np.testing.assert_array_equal(inside, report.acceptable)
    # Where it was a sample it is inside; where the shield had to look for one it says so.
    assert inside[~report.intervened].all()
    # And it gave up nowhere where there is something to find; a policy need not look there.
    safe = taught.value(seen) < -0.1
    assert safe.mean() > 0.3
    if proposal not in ("policy", "model"):
        assert not report.intervened[safe].any()


@given(
    q=arrays(np.float64, (5, 6), elements=st.integers(-3, 5).map(float)),
    p=arrays(np.float64, (5, 6), elements=st.sampled_from([0.0, 1e-25, 0.1, 1.0, 5.0])),
    delta=st.sampled_from([0.0, 1.5]),
    proposal=st.sampled_from(["uniform", "behaviour"]),
    deterministic=st.booleans(),
)
@settings(max_examples=60)
def test_discrete_actions_are_acceptable_or_the_least_bad(
    q: Array, p: Array, delta: float, proposal: str, deterministic: bool
) -> None:
    p = (p + 1e-28) / (p + 1e-28).sum(1, keepdims=True)
    shield = table_shield(q, gym.spaces.MultiDiscrete([2, 3]), p).with_delta(delta)
    policy = SafeSupportPolicy(shield, proposal, seed=0)
    seen = np.tile(np.arange(5), 30)
    actions, _ = policy.predict(seen, deterministic=deterministic)
    index = actions @ [3, 1]
    values = q[seen, index]
    some = (q <= -delta).any(axis=1)[seen]
    assert (values[some] <= -delta).all()
    assert (values[~some] == q.min(axis=1)[seen][~some]).all()
    assert policy.report is not None
    np.testing.assert_array_equal(policy.report.intervened, ~some)
    if deterministic:
        weights = np.where(p > 0, p, 0) if proposal == "behaviour" else np.ones_like(p)
        best = np.where(q <= -delta, weights, -1.0).max(axis=1)[seen]
        chosen = weights[seen, index][some]
        np.testing.assert_allclose(chosen, best[some], rtol=1e-3, atol=1e-27)


# -- densities of discrete actions ----------------------------------------------------------------

qs = np.array([[-1.0, -2.0, 1.0, -3.0], [2.0, -1.0, 2.0, 2.0], [5.0, 4.0, 3.0, 6.0]])
P = np.array([[0.1, 0.2, 0.65, 0.05], [0.9, 1e-4, 0.05, 0.0499], [0.25, 0.25, 0.25, 0.25]])


class Four:
    """A policy over four actions that knows its probabilities, and how to draw."""

    batched = True

    def __call__(self, observations: Array, rng: np.random.Generator) -> Array:
        return np.array([rng.choice(4, p=P[state]) for state in observations]) + 2

    def log_prob(self, observations: Array, actions: Array) -> Array:
        return np.log(P[observations, actions - 2])


@pytest.mark.parametrize("proposal", ["uniform", "behaviour", "policy"])
def test_discrete_densities_sum_to_one_and_are_those_of_the_samples(proposal: str) -> None:
    shield = table_shield(qs, gym.spaces.Discrete(4, start=2), P)
    policy = SafeSupportPolicy(shield, Four() if proposal == "policy" else proposal, seed=0)
    weights = np.where(qs <= 0, np.ones_like(P) if proposal == "uniform" else P, 0.0)
    weights[2] = [0, 0, 1, 0]  # nothing is acceptable there: the least bad
    exact = weights / weights.sum(axis=1, keepdims=True)
    for state in range(3):
        every = np.arange(2, 6)
        density = policy.log_density(np.full(4, state), every)
        np.testing.assert_allclose(np.exp(density.value), exact[state], atol=1e-6)
        assert np.exp(density.value).sum() == pytest.approx(1.0, abs=1e-12)
        assert (density.error == 0).all()
        draws, _ = policy.predict(np.full(20_000, state))
        counts = np.bincount(draws - 2, minlength=4)
        possible = exact[state] > 0
        assert counts[~possible].sum() == 0
        if possible.sum() > 1:
            assert chisquare(counts[possible], 20_000 * exact[state][possible]).pvalue > 1e-3
        one = policy.log_prob(state, 3)
        assert np.shape(one) == ()
        assert one == policy.log_prob(np.full(4, state), every)[1]
    for wrong in (0, 6, 2.5, np.nan):
        assert policy.log_prob(0, wrong) == -np.inf


def test_a_policy_that_never_does_what_may_be_done_leaves_the_choice_among_that() -> None:
    shield = table_shield(qs, gym.spaces.Discrete(4, start=2))
    stubborn = Four()
    stubborn.log_prob = lambda o, a: np.where(a == 4, 0.0, -np.inf)  # type: ignore[method-assign]
    policy = SafeSupportPolicy(shield, stubborn, seed=0)
    density = np.exp(policy.log_prob(np.zeros(4, int), np.arange(2, 6)))
    np.testing.assert_allclose(density, [1 / 3, 1 / 3, 0, 1 / 3])
    assert set(policy.predict(np.zeros(200, int))[0]) == {2, 3, 5}


def test_a_policy_without_a_density_is_drawn_from_by_rejection() -> None:
    shield = table_shield(qs, gym.spaces.Discrete(4, start=2))
    asked = Four()
    policy = SafeSupportPolicy(shield, batch_policy(lambda o, rng: asked(o, rng)), rounds=20)
    actions = policy(np.zeros(4000, int), np.random.default_rng(0))
    counts = np.bincount(actions - 2, minlength=4)
    expected = np.where(qs[0] <= 0, P[0], 0)
    assert counts[2] == 0
    kept = [0, 1, 3]
    assert policy.report is not None
    assert policy.report.intervened.mean() == pytest.approx(0.65**20, abs=0.002)
    assert chisquare(counts[kept], 4000 * (expected / expected.sum())[kept]).pvalue > 1e-3
    with pytest.raises(TypeError, match=r"no density for a policy without a method log_prob"):
        policy.log_prob(0, 2)


# -- densities in a box ---------------------------------------------------------------------------


def grid(width: int = 200) -> Array:
    line = (np.arange(width) + 0.5) / width * 2 - 1
    return np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)


@pytest.mark.parametrize("proposal", ["uniform", "policy"])
def test_in_a_box_the_density_integrates_to_one_and_is_that_of_the_samples(
    shield: Shield, proposal: str
) -> None:
    points = grid()
    seen = np.tile(EDGE, (len(points), 1))
    inside = shield.value(seen, points) <= shield.threshold
    assert 0.1 < inside.mean() < 0.9
    given = "uniform" if proposal == "uniform" else Helm()
    policy = SafeSupportPolicy(shield, given, rounds=8 if proposal == "uniform" else 100, seed=0)
    some = policy.log_density(EDGE, points[inside][0], samples=20_000)
    # Z is the same for all actions: integrate q over the accepted cells and divide by it.
    ratio = some.value - (
        -np.log(4.0) if proposal == "uniform" else Helm().log_prob(None, points[inside][:1])[0]
    )
    q = np.full(len(points), 0.25) if proposal == "uniform" else np.exp(Helm().log_prob(0, points))
    integral = (q * np.exp(ratio))[inside].sum() * 4.0 / len(points)
    assert 0 < some.error < 0.02
    assert np.log(integral) == pytest.approx(0.0, abs=4 * some.error + 0.005)
    values = policy.log_prob(seen[:3000], points[:3000], samples=16)
    np.testing.assert_array_equal(np.isfinite(values), inside[:3000])
    # The samples: a cell's share is its integral.
    actions, _ = policy.predict(np.tile(EDGE, (20_000, 1)))
    assert policy.report is not None
    assert policy.report.intervened.mean() < 1e-3
    cells = np.floor((points + 1) * 4).astype(int) @ [8, 1]
    weights = np.bincount(cells, np.where(inside, q, 0.0), minlength=64)
    drawn = np.clip(np.floor((actions + 1) * 4), 0, 7).astype(int) @ [8, 1]
    counts = np.bincount(drawn, minlength=64)
    large = weights / weights.sum() > 2e-3
    expected = weights[large] / weights[large].sum() * counts[large].sum()
    assert counts[~large].mean() < 60
    # Cells that the support's edge cuts are known up to the grid: a little slack, in variance.
    statistic = ((counts[large] - expected) ** 2 / (expected + (0.03 * expected) ** 2)).sum()
    assert statistic < 2.0 * large.sum()


@pytest.mark.parametrize("z", [0.02, 0.3, 0.9])
def test_the_estimate_is_as_good_as_it_says(z: float) -> None:
    """Exactly, over the binomial draw of k: its bias is small beside its error, which is right."""
    samples = 1024
    k = np.arange(samples + 1)
    weight = binom.pmf(k, samples, z)
    estimate = np.log((k + 0.5) / (samples + 0.5)) - np.log(z)
    spread = np.sqrt((weight * estimate**2).sum())
    error = np.sqrt((samples - k + 0.5) / (samples + 1.0) / (k + 0.5))
    assert abs((weight * estimate).sum()) < 0.05 * spread
    assert np.sqrt((weight * error**2).sum()) == pytest.approx(spread, rel=0.1)


def test_the_stated_error_is_that_of_repeated_estimates(shield: Shield) -> None:
    class Seeded(Helm):
        """Draws anew at every estimate."""

    action = next(a for a in grid(9) if shield.value(EDGE, a) <= shield.threshold)
    policy = SafeSupportPolicy(shield, Seeded(), seed=0)
    runs = [policy.log_density(EDGE, action, samples=200) for _ in range(60)]
    values = np.array([run.value for run in runs])
    assert values.std() == pytest.approx(np.mean([run.error for run in runs]), rel=0.35)
    # The uniform box is measured with the same points each time, in every state and batch.
    uniform = SafeSupportPolicy(shield, "uniform")
    both = uniform.log_prob(np.stack([EDGE, EDGE]), np.stack([action, action]))
    assert both[0] == both[1] == uniform.log_prob(EDGE, action)


def test_each_state_is_measured_with_the_policys_actions_there(shield: Shield) -> None:
    class Turning:
        """Downstream beside the rock, upstream in front of it."""

        batched = True

        def __call__(self, observations: Array, rng: np.random.Generator) -> Array:
            away = np.where(observations[:, 1:] > 0.55, 0.8, -0.8) * [1.0, 0.0]
            return away + rng.uniform(-0.2, 0.2, (len(observations), 2))

        def log_prob(self, observations: Array, actions: Array) -> Array:
            return np.full(len(actions), -np.log(0.4**2))

    policy = SafeSupportPolicy(shield, Turning(), seed=0)
    seen = np.array([EDGE, [-1.18, 0.6], [-1.1, 0.3]], np.float32)
    actions, _ = policy.predict(seen)
    together = policy.log_density(seen, actions)
    for i in range(3):
        alone = policy.log_density(seen[i], actions[i])
        assert alone.value == pytest.approx(together.value[i], abs=5 * alone.error)  # type: ignore[index]
    assert (np.abs(together.value - np.log(1 / 0.4**2)) < 0.02).any()  # where all is accepted
    assert np.ptp(together.value) > 0.2


def test_where_there_is_no_density(shield: Shield, taught: Shield) -> None:
    zero = np.zeros(2, np.float32)
    with pytest.raises(TypeError, match="no density for the behaviour of a Box"):
        SafeSupportPolicy(taught, "behaviour").log_prob(EDGE, zero)
    with pytest.raises(TypeError, match="no density for a policy without"):
        SafeSupportPolicy(shield, reckless).log_prob(EDGE, zero)
    uniform = SafeSupportPolicy(shield, "uniform")
    for wrong in (np.array([np.nan, 0.0]), np.array([2.0, 0.0])):
        assert uniform.log_prob(EDGE, wrong.astype(np.float32)) == -np.inf
    assert uniform.log_prob(np.array([np.nan, 0.0], np.float32), zero) == -np.inf
    assert (uniform.log_prob(np.tile(LOST, (50, 1)), grid(50)[:50]) == -np.inf).all()
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        uniform.log_prob(EDGE, zero, samples=0)
    with pytest.raises(ValueError, match="2 observations and 1 actions"):
        uniform.log_prob(np.stack([EDGE, EDGE]), zero[None])
    for bad, match in ((np.nan, "below infinity, got nan"), (np.inf, "below infinity, got inf")):
        odd = Helm()
        odd.log_prob = lambda o, a, bad=bad: np.full(len(a), bad)  # type: ignore[method-assign]
        with pytest.raises(ValueError, match=match):
            SafeSupportPolicy(shield, odd).log_prob(EDGE, zero)
    odd.log_prob = lambda o, a: np.zeros((len(a), 2))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"a number for each of 1 actions, got shape \(1, 2\)"):
        SafeSupportPolicy(shield, odd).log_prob(EDGE, zero)


# -- the behaviour --------------------------------------------------------------------------------


def test_the_flow_in_numpy_is_the_flow_in_torch(taught: Shield) -> None:
    model = taught.model
    seen = states(40)
    view = model.states(seen)
    noise = np.random.default_rng(0).standard_normal((40, 3, 2)).astype(np.float32)
    got = model.behaviour(view, noise)
    params = {key: torch.tensor(array) for key, array in model.networks[BEHAVIOUR].items()}
    flow = model.behaviour_actor
    assert isinstance(flow, FlowActor)
    network = velocity_network(2, 2, flow.hidden)
    expected = euler_sample(
        network, params, torch.tensor(np.repeat(view.inputs, 3, 0)),
        torch.tensor(noise.reshape(-1, 2)), flow.flow_steps,
    ).numpy()  # fmt: skip
    np.testing.assert_allclose(got.reshape(-1, 2), model.scaling.to_box(expected), atol=1e-5)
    assert np.abs(got).max() <= 1.0


def test_where_all_is_accepted_samples_are_the_flows_own(taught: Shield) -> None:
    loose = taught.with_delta(0.0)
    loose.delta = -1e6
    policy = SafeSupportPolicy(loose, "behaviour", seed=0)
    seen = np.tile(np.array([-2.0, 0.0], np.float32), (4000, 1))
    actions, _ = policy.predict(seen)
    noise = np.random.default_rng(5).standard_normal((4000, 1, 2)).astype(np.float32)
    direct = loose.model.behaviour(loose.model.states(seen), noise)[:, 0]
    for column in range(2):
        assert kstest(actions[:, column], direct[:, column]).pvalue > 1e-3
    middle, _ = policy.predict(seen[0], deterministic=True)
    np.testing.assert_allclose(
        middle,
        loose.model.behaviour(loose.model.states(seen[:1]), np.zeros((1, 1, 2), np.float32))[0, 0],
    )


# -- the two faces --------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_actions_and_single_is_a_batch_of_one(taught: Shield) -> None:
    seen = states(50)
    for proposal in ("uniform", "behaviour"):
        first, again, other = (SafeSupportPolicy(taught, proposal, seed=s) for s in (1, 1, 2))
        a, b, c = (policy.predict(seen)[0] for policy in (first, again, other))
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)
        one, state = SafeSupportPolicy(taught, proposal, seed=4).predict(seen[0], None)
        batch, _ = SafeSupportPolicy(taught, proposal, seed=4).predict(seen[:1])
        np.testing.assert_array_equal(one, batch[0])
        assert one.shape == (2,)
        assert state is None
        rng = np.random.default_rng
        np.testing.assert_array_equal(first(seen, rng(3)), other(seen, rng(3)))
    single = SafeSupportPolicy(taught, seed=0)
    single.predict(EDGE)
    assert single.report is not None
    assert np.ndim(single.report.value) == 0


def test_deterministic_actions_are_the_filtered_middle_or_the_policys_own(shield: Shield) -> None:
    seen = states(300)
    for proposal, proposed in (
        ("uniform", np.zeros((300, 2), np.float32)),
        (Helm(), np.tile(np.array([0.5, 0.0], np.float32), (300, 1))),
    ):
        actions, _ = SafeSupportPolicy(shield, proposal).predict(seen, deterministic=True)
        np.testing.assert_array_equal(actions, shield.filter(seen, proposed)[0])


def test_a_policys_memory_advances_once_a_step_however_often_it_is_asked(shield: Shield) -> None:
    helm = Helm()
    policy = SafeSupportPolicy(shield, helm, rounds=5, seed=0)
    # On the rock nothing is acceptable: all rounds are used.
    seen = np.stack([[-2.5, 1.5], LOST]).astype(np.float32)
    starts = np.array([True, False])
    actions, memory = policy.predict(seen, (np.array([4.0]),), starts)
    assert memory is not None
    assert memory[0] == 5.0
    assert len(helm.calls) == 5
    assert all(call[0][0] == 4.0 and call[1] is starts and not call[2] for call in helm.calls)
    assert policy.report is not None
    assert policy.report.intervened.tolist() == [False, True]
    assert actions.shape == (2, 2)
    # As a batch policy it keeps its memory itself, and forgets it where a wave begins.
    helm.calls.clear()
    policy.start_wave(2)
    rng = np.random.default_rng(0)
    for _ in range(3):
        policy(seen, rng)
    told = [None if call[0] is None else call[0][0].item() for call in helm.calls]
    assert told == [None] * 5 + [0.0] * 5 + [1.0] * 5
    assert [bool(call[1].all()) for call in helm.calls] == [True] * 5 + [False] * 10
    policy.start_wave(2)
    policy(seen, rng)
    assert helm.calls[-1][0] is None


def test_not_a_number_is_replaced_and_said(shield: Shield) -> None:
    seen = np.array([[np.nan, 0.0], [-2.5, 1.5]], np.float32)

    class Strict(Helm):
        def predict(self, observation: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            assert np.isfinite(observation).all()
            return super().predict(observation, *args, **kwargs)

    for proposal in ("uniform", Strict(), lambda o: np.array([np.nan, 0.0])):
        policy = SafeSupportPolicy(shield, proposal, seed=0)
        actions, _ = policy.predict(seen)
        assert np.isfinite(actions).all()
        assert policy.report is not None
        assert policy.report.intervened[0]
        assert not policy.report.valid[0]
        assert shield.value(seen[1], actions[1]) <= shield.threshold
    table = table_shield(qs, behaviour=P)
    actions, _ = SafeSupportPolicy(table, "behaviour", seed=0).predict(np.array([99, 0]))
    assert actions[0] in range(4)
    assert qs[0, actions[1]] <= 0


def test_collecting_running_calibrating_and_evaluating_take_it(
    shield: Shield, tmp_path: Path
) -> None:
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    path = tmp_path / "shield.safetensors"
    shield.save(path)
    policy = SafeSupportPolicy(path, "uniform", seed=0)  # a path will do
    env = gym.make("safeshield/Boat-v0", dt=DT, max_episode_steps=100)
    log = collect(env, policy, episodes=60, seed=0)
    twice = collect(env, SafeSupportPolicy(shield, "uniform", seed=9), episodes=60, seed=0)
    np.testing.assert_array_equal(log.actions, twice.actions)
    assert (shield.value(log.observations, log.actions) <= -0.05).mean() > 0.5
    runs = run_episodes(env, policy, episodes=40, seed=1)
    certain = [run for run in runs if shield.value(run.observations[0]) <= -0.05]
    assert len(certain) > 15
    assert sum(run.violated for run in certain) <= 1
    record = shield.calibrate(
        env, policy=policy, epsilon=0.1, confidence=0.9, deltas=[0.05], episodes=40
    ).record
    assert record is not None
    assert record.policies[0].intervention_rate < 0.05
    mean, _ = evaluate_policy(policy, Monitor(env), n_eval_episodes=2)  # type: ignore[arg-type]
    assert np.isfinite(mean)


def test_after_a_prediction_that_fails_there_is_no_report_of_an_earlier_one(shield: Shield) -> None:
    policy = SafeSupportPolicy(shield, "uniform", seed=0)
    policy.predict(states(3))
    assert policy.report is not None
    with pytest.raises(ValueError, match="observation must be numbers"):
        policy.predict(np.zeros((3, 5)))
    assert policy.report is None


def test_bad_input(shield: Shield) -> None:
    with pytest.raises(ValueError, match=r"proposal must be one of \['uniform', 'behaviour'\]"):
        SafeSupportPolicy(shield, "random")
    with pytest.raises(ValueError, match=r"has no such network.*ShieldTrainer"):
        SafeSupportPolicy(shield, "behaviour")
    with pytest.raises(TypeError, match="policy must be"):
        SafeSupportPolicy(shield, 3)
    with pytest.raises(TypeError, match="shield must be a Shield"):
        SafeSupportPolicy(None)  # type: ignore[arg-type]
    for rounds in (0, 2.0, True):
        with pytest.raises(ValueError, match="rounds must be an integer of at least 1"):
            SafeSupportPolicy(shield, rounds=rounds)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="observation must be numbers of shape"):
        SafeSupportPolicy(shield).predict(np.zeros(3))
    alone = batch_policy(lambda o, rng: np.zeros((1, 2)))
    with pytest.raises(ValueError, match="returned 1 actions for 4 observations"):
        SafeSupportPolicy(shield, alone).predict(states(4))
