from __future__ import annotations

from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from safeshield.evaluation.episodes import (
    Evaluation,
    UnshieldedAdversary,
    as_calibrated,
    evaluate,
    filtered_episodes,
)
from safeshield.evaluation.intervals import binomial_interval, mean_interval
from safeshield.evaluation.tables import format_table
from safeshield.policies import ShieldedPolicy
from safeshield.rollouts.recorded import Episode
from safeshield.shield.critics import SafetyModel
from safeshield.shield.shield import Shield, UncalibratedShieldWarning
from safeshield.spaces.scaling import Scaling
from safeshield.values.units import SafetyScale

pytestmark = pytest.mark.filterwarnings("ignore::safeshield.UncalibratedShieldWarning")


Array = npt.NDArray[Any]
Reset = tuple[Array, dict[str, Any]]


class Walk(gym.Env[Any, Any]):
    """x' = x + a for 5 steps from x in [-1, 1]; h = x, reward = a, cost = 2 where h > 0."""

    observation_space = gym.spaces.Box(-10.0, 10.0, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, constraint: bool = True) -> None:
        self.constraint = constraint

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Reset:
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-1.0, 1.0), 0
        return self._see()

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        self.x += float(action[0])
        self.t += 1
        observation, info = self._see()
        return observation, float(action[0]), False, self.t == 5, info

    def _see(self) -> Reset:
        info = {"cost": 2.0 * (self.x > 0)}
        if self.constraint:
            info["constraint"] = self.x
        return np.array([self.x], np.float32), info


def linear_shield(delta: float = 0.0) -> Shield:
    """A shield of `Walk` whose critics are exact: V_h(x) = x, Q_h(x, a) = x + a.

    Without hidden layers to hold a linear function in ReLUs, x = relu(x) - relu(-x).
    """

    def linear(weights: list[float], members: int = 1) -> dict[str, Any]:
        into = np.array([[[w, -w] for w in weights]], np.float32)
        out = np.array([[[1.0], [-1.0]]], np.float32)
        return {
            "0.weight": np.repeat(into, members, 0),
            "0.bias": np.zeros((members, 1, 2), np.float32),
            "1.weight": np.repeat(out, members, 0),
            "1.bias": np.zeros((members, 1, 1), np.float32),
        }

    one = np.ones(1, np.float32)
    low = SafetyScale(offset=0.0, spread=1.0, step_rms=1.0)
    floor = linear([0.0])
    floor["1.bias"] = np.full((1, 1, 1), -100.0, np.float32)
    excess = linear([1.0 / low.excess])
    excess["1.bias"] = np.full((1, 1, 1), 100.0 / low.excess, np.float32)
    model = SafetyModel.of_networks(
        observation_space=Walk.observation_space,
        action_space=Walk.action_space,
        scaling=Scaling(0.0 * one, one, -one, one),
        scale=low,
        networks={
            "constraint": floor,
            "excess": excess,
            "advantage": linear([0.0, 1.0], members=2),
            "student": linear([0.0, 0.0]),
        },
    )
    return Shield(model, delta=delta)


def up(observation: Array) -> Array:
    return np.array([0.5])


def down(observation: Array) -> Array:
    return np.array([-1.0])


def test_the_test_shield_is_exact() -> None:
    shield = linear_shield()
    assert shield.value([0.25]) == pytest.approx(0.25, abs=1e-4)
    assert shield.value([0.25], [-0.75]) == pytest.approx(-0.5, abs=1e-4)


@pytest.mark.parametrize("constraint", [True, False])
def test_counts_are_those_of_the_episodes(constraint: bool) -> None:
    result = evaluate(Walk(constraint), up, episodes=10, seed=1)
    assert (result.episodes, result.violating, result.violation_rate) == (10, 10, 1.0)
    assert result.mean_return == pytest.approx(2.5)
    assert result.return_interval == pytest.approx((2.5, 2.5))
    # x starts in [-1, 1] and rises by 0.5: above 0 after at most 2 of 5 steps, so 3 to 5 times 2.
    assert 6.0 <= result.mean_cost <= 10.0
    assert result.intervention_rate is None
    assert (result.starts, result.start_share, result.shielded) == ("all", None, False)


def test_a_violating_start_is_a_violation() -> None:
    result = evaluate(Walk(), down, episodes=400, seed=0)
    # Half of all starts are above 0, and no step leads there from below.
    assert 0.4 < result.violation_rate < 0.6
    low, high = result.violation_interval
    assert low < 0.5 < high


def test_certified_starts_leave_the_violating_ones_out() -> None:
    result = evaluate(
        Walk(), down, episodes=100, seed=0, starts="certified", certified_by=linear_shield()
    )
    assert (result.episodes, result.violating, result.shielded) == (100, 0, False)
    assert result.start_share == pytest.approx(0.5, abs=0.15)


def test_starts_that_are_not_certified_are_not_played() -> None:
    steps = []

    class Counted(Walk):
        def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
            steps.append(self.x)
            return super().step(action)

    # About 3% of the starts in [-1, 1] are at most -0.95.
    strict = linear_shield(0.95)
    result = evaluate(Counted(), down, 20, seed=0, starts="certified", certified_by=strict)
    assert result.start_share is not None
    assert result.start_share < 0.1
    assert len(steps) == 20 * 5


def test_an_environment_that_does_not_start_alike_is_judged_by_the_start_played() -> None:
    class Anywhere(Walk):
        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Reset:
            return super().reset(seed=next(seeds), options=options)

    seeds = iter(range(10_000))
    result = evaluate(
        Anywhere(), down, 50, seed=0, starts="certified", certified_by=linear_shield()
    )
    assert (result.episodes, result.violating) == (50, 0)


def test_the_shield_prevents_what_happens_without_it_from_the_same_starts() -> None:
    shield = linear_shield(0.1)
    common: dict[str, Any] = {
        "episodes": 50,
        "seed": 3,
        "starts": "certified",
        "certified_by": shield,
    }
    without = evaluate(Walk(), up, **common)
    behind = evaluate(Walk(), up, shield=shield, **common)
    assert (without.violating, behind.violating) == (50, 0)
    assert without.start_share == behind.start_share
    assert behind.intervention_rate is not None
    # 0.5 upwards from [-1, -0.1] passes once or not at all: 4 or 5 replacements in 5 steps.
    assert 0.8 <= behind.intervention_rate <= 1.0


def test_starts_are_paired(monkeypatch: pytest.MonkeyPatch) -> None:
    import safeshield.evaluation.episodes as module

    starts: list[list[float]] = []
    original = module.summarise

    def spy(runs: list[Episode], **rest: object) -> Evaluation:
        starts.append([float(run.observations[0, 0]) for run in runs])
        return original(runs, **cast(Any, rest))

    monkeypatch.setattr(module, "summarise", spy)
    shield = linear_shield(0.2)
    for policy in (up, down, "random"):
        for behind in (None, shield):
            evaluate(Walk(), policy, 30, 5, shield=behind, starts="certified", certified_by=shield)
    assert all(row == starts[0] for row in starts)
    assert max(starts[0]) <= -0.2
    assert len(set(starts[0])) == 30


def test_interventions_are_those_of_each_episode() -> None:
    for run in filtered_episodes(Walk(), up, 5, 0, shield=linear_shield()):
        assert run.intervened is not None
        start = run.observations[:, 0]
        # What passes is exactly what Q_h = x + 0.5 allows.
        np.testing.assert_array_equal(run.intervened, start + 0.5 > 1e-4)
        np.testing.assert_array_equal(run.intervened, run.actions[:, 0] != 0.5)


def test_intervals_are_scipys() -> None:
    for k, n in [(0, 10), (3, 10), (10, 10), (5, 1000)]:
        # Clopper and Pearson's formula: quantiles of beta distributions.
        low = stats.beta.ppf(0.025, k, n - k + 1) if k else 0.0
        high = stats.beta.ppf(0.975, k + 1, n - k) if k < n else 1.0
        assert binomial_interval(k, n) == pytest.approx((low, high), abs=1e-12)
    values = np.random.default_rng(0).normal(3.0, 2.0, 17)
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert mean_interval(values) == pytest.approx((expected.low, expected.high))
    assert mean_interval([1.0]) is None


def test_the_saboteur_takes_the_worst_action() -> None:
    actions = UnshieldedAdversary(linear_shield())(
        np.zeros((3, 1), np.float32), np.random.default_rng(0)
    )
    np.testing.assert_allclose(actions, 1.0)


def test_the_table_is_aligned_and_holds_every_agent() -> None:
    results = [
        evaluate(Walk(), up, 5, 0, name="up"),
        evaluate(Walk(), down, 12, 0, shield=linear_shield(), name="down, slowly"),
    ]
    lines = format_table(results).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("up ")
    assert lines[3].startswith("down, slowly")
    end = lines[0].index("violating") + len("violating")
    assert [line[:end].split()[-1] for line in lines[2:]] == [
        str(result.violating) for result in results
    ]
    with pytest.raises(ValueError, match="at least one"):
        format_table([])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"episodes": 0}, "episodes must be at least 1"),
        ({"starts": "certified"}, "needs a shield"),
        ({"starts": "safe"}, "must be None or 'certified'"),
        ({"certified_by": linear_shield()}, "pass both"),
        ({"starts": "certified", "certified_by": linear_shield(5.0)}, "almost everywhere outside"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"episodes": 3, "seed": 0, **change}
    with pytest.raises(ValueError, match=message):
        evaluate(Walk(), up, **arguments)


def test_json_holds_the_rate() -> None:
    import json

    result = evaluate(Walk(), up, 1, 0)
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["violation_rate"] == 1.0
    assert data["return_interval"] is None


def test_an_uncalibrated_shield_warns() -> None:
    with pytest.warns(UncalibratedShieldWarning):
        evaluate(Walk(), up, 2, 0, shield=linear_shield())


class Noisy:
    """A policy whose mean action is 1 and whose noisy action is -1."""

    def predict(
        self, observation: Array, state: None = None, episode_start: None = None,
        deterministic: bool = False,
    ) -> tuple[Array, None]:  # fmt: skip
        return np.full((len(observation), 1), 1.0 if deterministic else -1.0, np.float32), state


def test_evaluation_plays_the_policy_with_its_noise_when_asked() -> None:
    assert evaluate(Walk(), Noisy(), 3, 0).mean_return == 5.0
    assert evaluate(Walk(), Noisy(), 3, 0, deterministic=False).mean_return == -5.0
    assert evaluate(Walk(), Noisy(), 3, 0, deterministic=False).policy == "Noisy"


@pytest.mark.parametrize("deterministic", [True, False])
def test_how_the_policy_acted_is_in_the_record_and_in_the_result(deterministic: bool) -> None:
    shield = linear_shield(0.1).calibrate(
        Walk(), policy=Noisy(), epsilon=0.5, confidence=0.6, deterministic=deterministic
    )
    assert as_calibrated(shield) == deterministic
    result = evaluate(
        Walk(), Noisy(), 3, 0, starts="certified", certified_by=shield,
        deterministic=as_calibrated(shield),
    )  # fmt: skip
    assert result.deterministic == deterministic
    assert result.mean_return == (5.0 if deterministic else -5.0)
    row = format_table([result]).splitlines()[-1].split()
    assert row[:4] == ["Noisy", "no", "no" if deterministic else "yes", "certified"]
    assert as_calibrated(linear_shield())


class OwnNoise:
    """An agent with a generator of its own, as the package's agents have."""

    def __init__(self) -> None:
        self.noise = np.random.default_rng(0)

    def predict(
        self, observation: Array, state: None = None, episode_start: None = None,
        deterministic: bool = False,
    ) -> tuple[Array, None]:  # fmt: skip
        return self.noise.uniform(-1.0, 1.0, (len(observation), 1)).astype(np.float32), state


def test_the_noise_of_an_agent_follows_from_the_seed() -> None:
    agent = OwnNoise()
    own = agent.noise
    first, again, other = (
        evaluate(Walk(), agent, 5, seed, deterministic=False).mean_return for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    assert agent.noise is own


def test_a_shielded_policy_counts_as_shielded() -> None:
    shield = linear_shield(0.1)
    with pytest.warns(UncalibratedShieldWarning):
        assert evaluate(Walk(), ShieldedPolicy(up, shield), 3, 0).shielded
