"""Converters: labels belong to the state reached, nothing else changes, nothing odd passes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from safeshield.data import collect
from safeshield.wrappers.converters import ConstraintFromFunction, CostFromFunction, CostFromStep

Env = gym.Env[Any, Any]
PENDULUM = "Pendulum-v1"
SIX = "TestSixValues-v0"
LIMIT = 4.0
"""Pendulum, rad/s: a random policy passes it within an episode."""


def speed_limit(observation: Any) -> float:  # noqa: ANN401
    return abs(float(observation[2])) - LIMIT


class SixValues(gym.Env[Any, Any]):
    """A walk on a line; the cost of a step is 1 where it reaches a negative place."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gym.spaces.Box(-100.0, 100.0, (1,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, render_mode: str | None = None, count: int = 6) -> None:
        self.render_mode = render_mode
        self.count = count
        self.place = 0.0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:  # noqa: ANN401
        super().reset(seed=seed)
        self.place = float(self.np_random.uniform(-1, 1))
        return np.array([self.place], np.float32), {"start": True}

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.place += float(action[0])
        observation = np.array([self.place], np.float32)
        cost = np.float64(self.place < 0)
        six = (observation, -self.place, cost, self.place > 9, False, {"place": self.place})
        return six[: self.count] if self.count != 5 else (*six[:2], *six[3:])

    def render(self) -> Any:  # noqa: ANN401
        return np.zeros((8, 8, 3), np.uint8)


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    gym.register(SIX, entry_point=SixValues, max_episode_steps=7)
    yield
    del gym.registry[SIX]


class Scripted(gym.Env[Any, Any]):
    """Goes through given observations (one array, written over), with given infos."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, places: list[float], info: dict[str, Any] | None = None) -> None:
        self.places, self.info = places, info or {}
        self.here = np.zeros(1, np.float32)

    def _go(self) -> Any:  # noqa: ANN401
        self.here[0] = self.places[self.time]
        return self.here, dict(self.info)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:  # noqa: ANN401
        super().reset(seed=seed)
        self.time = 0
        return self._go()

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.time += 1
        observation, info = self._go()
        return observation, 1.0, self.time == len(self.places) - 1, False, info


def known_warnings_only(env: Env) -> None:
    """`check_env`, with no warning but those about the environment itself."""
    known = (
        "is different from the unwrapped",
        "symmetric and normalized",
        "infinity. This is probably",
        "env.seed to get variables from other wrappers",  # 0.29's own question
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(env, skip_render_check=True)
    texts = [str(warning.message) for warning in caught]
    assert [text for text in texts if not any(part in text for part in known)] == []


def rollout(env: Env, steps: int = 30, seed: int = 3) -> list[Any]:
    env.action_space.seed(seed)
    results = [env.reset(seed=seed)]
    for _ in range(steps):
        results.append(env.step(env.action_space.sample()))
        if results[-1][-3] or results[-1][-2]:  # of five values, or six
            break
    return results


# -- six values ---------------------------------------------------------------------------------


def test_six_values_become_five_and_nothing_else_changes() -> None:
    six, five = (rollout(env, steps=200) for env in (SixValues(), CostFromStep(SixValues())))
    assert five[0] == six[0]
    assert len(five) == len(six) > 20
    for before, after in zip(six[1:], five[1:], strict=True):
        observation, reward, cost, terminated, truncated, info = before
        np.testing.assert_array_equal(after[0], observation)
        assert after[1:4] == (reward, terminated, truncated)
        assert after[4] == {**info, "cost": cost}
        assert type(after[4]["cost"]) is float
        assert after[4]["cost"] == (after[4]["place"] < 0)
        assert "cost" not in info
    assert {after[4]["cost"] for after in five[1:]} == {0.0, 1.0}


def test_what_gym_make_adds_is_no_obstacle() -> None:
    made = gym.make(SIX)
    env = CostFromStep(made)
    for runner in (env, gym.make(env.spec)):
        results = rollout(runner)
        assert [result[3] for result in results[1:]] == [False] * 6 + [True]
        assert all("cost" in result[4] for result in results[1:])
        assert runner.spec is not None
        assert [wrapper.name for wrapper in runner.spec.additional_wrappers] == ["CostFromStep"]
    # What was passed in is as it was: its time limit still stumbles.
    made.reset()
    with pytest.raises(Exception, match=r"six|too many values|actual number of elements"):
        made.step(made.action_space.sample())
    with pytest.raises(gym.error.ResetNeeded):
        CostFromStep(gym.make(SIX)).step(made.action_space.sample())
    assert env.unwrapped is made.unwrapped


def test_six_values_under_a_list_of_frames() -> None:
    env = CostFromStep(gym.make(SIX, render_mode="rgb_array_list"))
    rollout(env, steps=5)
    assert len(env.render()) == 6  # type: ignore[arg-type]


def test_check_env_with_six_values() -> None:
    known_warnings_only(CostFromStep(SixValues()))
    known_warnings_only(CostFromStep(gym.make(SIX)))


def test_a_log_of_six_values_has_the_costs() -> None:
    log = collect(CostFromStep(gym.make(SIX)), "random", episodes=5, seed=0)
    np.testing.assert_array_equal(log.costs, log.next_observations[:, 0] < 0)


@pytest.mark.parametrize(
    ("count", "message"), [(5, "five values already"), (4, r"must return \(observation")]
)
def test_another_number_of_values(count: int, message: str) -> None:
    env = CostFromStep(SixValues(count=count))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(np.zeros(1))


def test_six_values_in_another_order_and_odd_costs() -> None:
    class Odd(SixValues):
        def step(self, action: Any) -> Any:  # noqa: ANN401
            return self.odd(*super().step(action))

    cases: list[tuple[Callable[..., Any], str]] = [
        (lambda o, r, c, te, tr, i: (o, r, te, tr, i, c), r"ndarray, float, bool, bool, dict"),
        (lambda o, r, c, te, tr, i: (o, r, np.nan, te, tr, i), "must be finite, got nan"),
        (lambda o, r, c, te, tr, i: (o, r, -1.0, te, tr, i), "at least 0"),
        (lambda o, r, c, te, tr, i: (o, r, np.ones(2), te, tr, i), "must be one number"),
        (lambda o, r, c, te, tr, i: (o, r, None, te, tr, i), "must be one number"),
    ]
    for odd, message in cases:
        env = CostFromStep(Odd())
        env.unwrapped.odd = odd  # type: ignore[attr-defined]
        env.reset(seed=0)
        with pytest.raises(ValueError, match=message):
            env.step(np.zeros(1))


def test_a_wrapper_that_stumbles_inside_is_named() -> None:
    env = CostFromStep(gym.wrappers.RecordEpisodeStatistics(SixValues()))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"directly around the environment.*RecordEpisode"):
        env.step(np.zeros(1, np.float32))


# -- a constraint from a function ---------------------------------------------------------------


def test_the_constraint_is_that_of_the_state_reached() -> None:
    env = ConstraintFromFunction(gym.make(PENDULUM), speed_limit)
    results, bare = rollout(env, steps=200), rollout(gym.make(PENDULUM), steps=200)
    assert len(results) == 201
    for result, own in zip(results, bare, strict=True):
        np.testing.assert_array_equal(result[0], own[0])
        assert result[1:-1] == own[1:-1]
        h = speed_limit(own[0])
        assert result[-1] == {**own[-1], "constraint": h, "cost": float(h > 0)}
        assert type(result[-1]["constraint"]) is float
        assert type(result[-1]["cost"]) is float
    assert {result[-1]["cost"] for result in results} == {0.0, 1.0}


def test_the_violation_that_ends_an_episode_is_labelled() -> None:
    env = ConstraintFromFunction(Scripted([-1.0, -1.0, 2.0]), lambda obs: obs[0])
    env.reset()
    assert env.step(0)[4]["cost"] == 0.0
    *_, terminated, _, info = env.step(0)
    assert terminated
    assert info == {"constraint": 2.0, "cost": 1.0}


def test_it_ends_episodes_only_where_asked() -> None:
    places = [1.0, -1.0, 0.0, 0.5, -1.0, -1.0]
    for asked, ends in ((False, [0, 0, 0, 0, 1]), (True, [0, 0, 1, 0, 1])):
        env = ConstraintFromFunction(Scripted(places), lambda obs: obs[0], asked)
        _, info = env.reset()
        assert info["cost"] == 1.0
        assert [env.step(0)[2] for _ in range(5)] == ends


def test_a_cost_of_the_environment_stays() -> None:
    env = ConstraintFromFunction(Scripted([1.0, 1.0, 1.0], {"cost": 0.25}), lambda obs: obs[0])
    assert env.reset()[1] == {"cost": 0.25, "constraint": 1.0}
    assert env.step(0)[4] == {"cost": 0.25, "constraint": 1.0}


def test_a_constraint_of_the_environment_is_not_hidden() -> None:
    env = ConstraintFromFunction(gym.make("safeshield/Boat-v0"), lambda obs: 0.0)
    with pytest.raises(ValueError, match=r"reports info\['constraint'\] itself"):
        env.reset()


def test_a_log_has_continuous_constraints_that_meet() -> None:
    env = ConstraintFromFunction(gym.make(PENDULUM), speed_limit)
    log = collect(env, "random", episodes=3, seed=0)
    expected = np.abs(log.next_observations[:, 2]) - LIMIT
    np.testing.assert_allclose(log.next_constraints, expected, atol=1e-6)
    np.testing.assert_allclose(log.constraints, np.abs(log.observations[:, 2]) - LIMIT, atol=1e-6)
    np.testing.assert_array_equal(log.costs, expected > 0)


def test_dict_observations_and_one_number_in_an_array() -> None:
    class Named(Scripted):
        def _go(self) -> Any:  # noqa: ANN401
            observation, info = super()._go()
            return {"place": observation.copy()}, info

    env = ConstraintFromFunction(Named([1.0, -2.0]), lambda obs: obs["place"])
    assert env.reset()[1]["constraint"] == 1.0
    assert env.step(0)[4] == {"constraint": -2.0, "cost": 0.0}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "must be finite, got nan"),
        (np.inf, "must be finite, got inf"),
        (np.zeros(2), "must be one number.*name each of several"),
        (None, "must be one number, got None"),
        ("safe", "must be one number, got 'safe'"),
        (1j, "must be one number"),
    ],
)
def test_anything_but_one_finite_number(value: Any, message: str) -> None:  # noqa: ANN401
    env: Env = ConstraintFromFunction(Scripted([0.0, 0.0]), lambda obs: value)
    with pytest.raises(ValueError, match=r"constraint_fn\(observation\) " + message):
        env.reset()
    env = CostFromFunction(Scripted([0.0, 0.0]), lambda *args: value)
    env.reset()
    with pytest.raises(ValueError, match=r"cost_fn\(observation, .*\) " + message.split(".*")[0]):
        env.step(0)


def test_functions_that_are_none() -> None:
    for wrapper in (ConstraintFromFunction, CostFromFunction):
        with pytest.raises(TypeError, match=r"_fn must be a function, called as .*got 3"):
            wrapper(gym.make(PENDULUM), 3)  # type: ignore[arg-type]


def test_in_a_vector_environment_around_each_copy() -> None:
    def one() -> Env:
        return ConstraintFromFunction(gym.make(PENDULUM), speed_limit)

    envs = gym.vector.SyncVectorEnv([one, one, one])
    observations, infos = envs.reset(seed=0)
    np.testing.assert_allclose(infos["constraint"], np.abs(observations[:, 2]) - LIMIT, atol=1e-6)
    observations, _, _, _, infos = envs.step(envs.action_space.sample())
    np.testing.assert_allclose(infos["constraint"], np.abs(observations[:, 2]) - LIMIT, atol=1e-6)
    assert infos["_constraint"].all()


# -- a cost from a function ---------------------------------------------------------------------


def test_the_cost_of_a_step_sees_the_whole_transition() -> None:
    seen: list[Any] = []

    def cost_fn(*transition: Any) -> float:  # noqa: ANN401
        seen.append(copy.deepcopy(transition))
        return 3.0 * len(seen)

    # The environment writes every observation into the same array.
    env = CostFromFunction(Scripted([1.0, 2.0, 3.0], {"a": 1}), cost_fn)
    assert env.reset()[1] == {"a": 1, "cost": 0.0}
    assert env.step(0)[4] == {"a": 1, "cost": 3.0}
    result = env.step(1)
    assert result[2]
    assert result[4] == {"a": 1, "cost": 6.0}
    assert [(float(s[0]), a, float(after[0]), i) for s, a, after, i in seen] == [
        (1.0, 0, 2.0, {"a": 1}),
        (2.0, 1, 3.0, {"a": 1}),
    ]
    env.reset()
    env.step(0)
    assert float(seen[-1][0][0]) == 1.0


def test_inside_a_shield_the_cost_is_that_of_the_action_that_ran() -> None:
    class Replace(gym.ActionWrapper):  # type: ignore[type-arg]
        def action(self, action: Any) -> Any:  # noqa: ANN401
            return 0.5 * action

    inner = CostFromFunction(gym.make(PENDULUM), lambda s, a, after, info: abs(a[0]))
    env = Replace(inner)
    env.reset(seed=0)
    assert env.step(np.array([1.0], np.float32))[4]["cost"] == 0.5


def test_negative_costs_known_costs_and_no_reset() -> None:
    env = CostFromFunction(Scripted([0.0, 0.0]), lambda *args: -1.0)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    env.reset()
    with pytest.raises(ValueError, match="at least 0"):
        env.step(0)
    known = CostFromFunction(Scripted([0.0, 0.0], {"cost": 0.0}), lambda *args: 1.0)
    with pytest.raises(ValueError, match=r"reports info\['cost'\] itself"):
        known.reset()


def test_both_together() -> None:
    inner = CostFromFunction(gym.make(PENDULUM), lambda s, a, after, info: 0.125)
    _, info = ConstraintFromFunction(inner, speed_limit).reset(seed=0)
    assert info["cost"] == 0.0
    assert info["constraint"] < 0


# -- Gymnasium's contract -----------------------------------------------------------------------


def by_speed(env: Env) -> Env:
    return ConstraintFromFunction(env, speed_limit)


def by_torque(env: Env) -> Env:
    return CostFromFunction(env, lambda s, a, after, info: abs(float(a[0])))


@pytest.mark.parametrize("wrap", [by_speed, by_torque])
def test_check_env(wrap: Callable[[Env], Env]) -> None:
    known_warnings_only(wrap(gym.make(PENDULUM).unwrapped))
    known_warnings_only(wrap(gym.make(PENDULUM)))


@pytest.mark.parametrize("wrap", [by_speed, by_torque])
def test_the_spec_rebuilds_it_in_the_same_process(wrap: Callable[[Env], Env]) -> None:
    env = gym.wrappers.RecordEpisodeStatistics(wrap(gym.make(PENDULUM)))
    assert env.spec is not None
    twin = gym.make(env.spec)
    for one, other in zip(rollout(env), rollout(twin), strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        for key in ("cost", "constraint"):
            assert one[-1].get(key) == other[-1].get(key)


def test_a_function_with_state_is_not_copied_into_the_spec() -> None:
    class Counting:
        calls = 0

        def __call__(self, observation: Any) -> float:  # noqa: ANN401
            self.calls += 1
            return -1.0

        def __deepcopy__(self, memo: object) -> Any:  # noqa: ANN401
            raise AssertionError

    count = Counting()
    env = ConstraintFromFunction(gym.make(PENDULUM), count)
    assert env.spec is not None
    gym.make(env.spec).reset()
    assert count.calls == 1


def test_functions_that_cannot_be_called_like_that_are_told_so_when_they_are_given() -> None:
    pendulum = gym.make("Pendulum-v1")
    with pytest.raises(
        TypeError, match=r"cost_fn\(observation, action, next_observation, info\).*of \(obs\)"
    ):
        CostFromFunction(pendulum, lambda obs: 0.0)  # type: ignore[misc, arg-type]
    with pytest.raises(TypeError, match=r"called as constraint_fn\(observation\).*of \(a, b\)"):
        ConstraintFromFunction(pendulum, lambda a, b: 0.0)  # type: ignore[misc, arg-type]
    for fine in (lambda *a: 0.0, lambda o, a, n, i, k=1: 0.0, min):
        CostFromFunction(pendulum, fine)


def test_an_environment_that_writes_into_its_action_is_charged_for_what_it_was_given() -> None:
    class Wipes(gym.Wrapper):  # type: ignore[type-arg]
        def step(self, action: Any) -> Any:  # noqa: ANN401
            result = self.env.step(action)
            action[:] = 0.0
            return result

    env = CostFromFunction(
        Wipes(gym.make("Pendulum-v1")), lambda obs, action, after, info: float(action[0])
    )
    env.reset(seed=0)
    assert env.step(np.array([1.5], np.float32))[4]["cost"] == 1.5
