"""`SafetyShield`: the Gymnasium contract, what the dynamics see, and what `info` says of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from fitted import DT
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from hostile import hostile
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor
from test_shield import record

from safeshield.algorithms.safefql import SafeFQL, SafeFQLConfig
from safeshield.data import collect
from safeshield.envs.boat import CURRENT
from safeshield.evaluation.episodes import evaluate
from safeshield.rollouts.copies import environment_kwargs
from safeshield.shield import OtherEnvironmentWarning, Shield, UncalibratedShieldWarning
from safeshield.shield.record import EnvironmentWrapper
from safeshield.spaces.generic import BEFORE_1_0
from safeshield.wrappers import SafetyShield, VecSafetyShield, VectorSafetyShield
from safeshield.wrappers.faults import DelayedActuator

pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning", "ignore::UserWarning"
)
BOAT = "safeshield/Boat-v0"
UPSTREAM = {"state": [-1.6, 0.5]}  # head-on towards a rock
KEYS = {
    "shield/intervened": bool,
    "shield/value": float,
    "shield/threshold": float,
    "shield/certified": bool,
    "shield/safe_set": bool,
    "action_proposed": np.ndarray,
    "action_executed": np.ndarray,
}
Env = gym.Env[Any, Any]


class Watch(gym.Wrapper):  # type: ignore[type-arg]
    """Notes what reaches the dynamics; optionally breaks things."""

    def __init__(self, env: Env, broken_at: int = -1, sixth: bool = False) -> None:
        super().__init__(env)
        self.seen: list[Any] = []
        self.results: list[Any] = []
        self.broken_at, self.sixth = broken_at, sixth

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.seen.append(action)
        result = self.env.step(action)
        if len(self.seen) == self.broken_at:
            result = (np.full_like(result[0], np.nan), *result[1:])
        self.results.append(result)
        return (*result, 0.0) if self.sixth else result


def boat(**kwargs: Any) -> Env:  # noqa: ANN401
    return gym.make(BOAT, dt=DT, max_episode_steps=100, **kwargs)


def watched(shield: Shield, **kwargs: Any) -> tuple[SafetyShield, Watch]:  # noqa: ANN401
    watch = Watch(gym.make(BOAT, dt=DT).unwrapped, **kwargs)
    return SafetyShield(watch, shield), watch


@pytest.fixture(scope="module")
def cart_agent() -> SafeFQL:
    log = collect(gym.make("safeshield/DoubleIntegrator-v0"), "random", episodes=5, seed=0)
    config = SafeFQLConfig(critic_hidden=(8,), flow_hidden=(8,), student_hidden=(8,))
    return SafeFQL(config, device="cpu").fit(log, steps=20)


@pytest.fixture(scope="module")
def path(shield: Shield, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("shield") / "boat.safetensors"
    shield.save(file)
    return file


def test_check_env(shield: Shield, cart_agent: SafeFQL) -> None:
    check_env(SafetyShield(gym.make(BOAT).unwrapped, shield), skip_render_check=True)
    cart = gym.make("safeshield/DoubleIntegrator-v0").unwrapped
    check_env(SafetyShield(cart, cart_agent.shield()), skip_render_check=True)


def assert_infos(info: dict[str, Any]) -> None:
    for key, kind in KEYS.items():
        assert type(info[key]) is kind, key
    for key in ("action_proposed", "action_executed"):
        assert info[key].shape == (2,)
    assert info["shield/threshold"] == -0.05
    assert isinstance(info["cost"], float)
    assert isinstance(info["constraint"], float)


def test_every_info_at_reset_and_at_every_step(shield: Shield) -> None:
    env = SafetyShield(boat(), shield)
    observation, info = env.reset(seed=0, options=UPSTREAM)
    assert_infos(info)
    assert not info["shield/intervened"]
    assert info["shield/value"] == pytest.approx(float(shield.value(observation)), abs=1e-6)
    assert np.isnan(info["action_proposed"]).all()
    rng = np.random.default_rng(0)
    intervened = []
    for _ in range(60):
        action = rng.uniform(-1, 1, 2).astype(np.float32)
        expected, report = shield.filter(observation, action)
        observation, _, _, _, info = env.step(action)
        assert_infos(info)
        intervened.append(info["shield/intervened"])
        np.testing.assert_array_equal(info["action_proposed"], action)
        np.testing.assert_allclose(info["action_executed"], expected, atol=1e-6)
        assert info["shield/intervened"] == report.intervened
        assert info["shield/value"] == pytest.approx(float(report.value), abs=1e-5)
    assert True in intervened
    assert False in intervened


def test_the_dynamics_see_what_info_says_and_an_accepted_action_untouched(shield: Shield) -> None:
    env, watch = watched(shield)
    rng = np.random.default_rng(1)
    env.reset(seed=0, options=UPSTREAM)
    for _ in range(60):
        action = rng.uniform(-1, 1, 2).astype(np.float32)
        kept = action.copy()
        info = env.step(action)[4]
        np.testing.assert_array_equal(action, kept)
        np.testing.assert_array_equal(watch.seen[-1], info["action_executed"])
        if info["shield/intervened"]:
            assert watch.seen[-1] in env.action_space
            assert not np.array_equal(info["action_executed"], action)
        else:
            assert watch.seen[-1].dtype == action.dtype
            assert watch.seen[-1].tobytes() == action.tobytes()
        assert not np.shares_memory(watch.seen[-1], action)
        assert not np.shares_memory(info["action_executed"], action)
        assert not np.shares_memory(info["action_proposed"], action)


def test_what_was_judged_is_sent_however_the_action_changes_meanwhile(shield: Shield) -> None:
    env, watch = watched(shield)
    still = np.zeros(2, np.float32)
    for action in hostile(still):
        env.reset(options={"state": [1.9, 0.0]})
        info = env.step(action)[4]
        assert type(watch.seen[-1]) is np.ndarray
        assert not info["shield/intervened"]
        for array in (watch.seen[-1], info["action_proposed"], info["action_executed"]):
            assert array.tobytes() == still.tobytes()


@pytest.mark.parametrize("kind", ["f2", "f4", ">f4", "f8", "i1", "i8", "list"])
def test_an_action_is_converted_to_the_dtype_of_the_space_before_it_is_judged(
    shield: Shield, kind: str
) -> None:
    env, watch = watched(shield)
    observation, _ = env.reset(options={"state": [1.9, 0.0]})
    numbers = np.array([1, -1]) if kind in ("i1", "i8") else np.array([0.1, -0.3])
    action: Any = numbers.tolist() if kind == "list" else numbers.astype(kind)
    converted = np.array(action, np.float32)
    info = env.step(action)[4]
    sent = watch.seen[-1]
    assert sent in env.action_space
    assert sent.dtype == np.float32
    assert sent.tobytes() == converted.tobytes() == info["action_executed"].tobytes()
    np.testing.assert_array_equal(info["action_proposed"], action)
    assert info["shield/value"] == pytest.approx(float(shield.value(observation, converted)))
    assert not info["shield/intervened"]


def test_it_changes_nothing_but_the_action(shield: Shield) -> None:
    env, watch = watched(shield)
    assert env.observation_space is watch.observation_space
    assert env.action_space is watch.action_space
    env.reset(seed=3)
    for _ in range(50):
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        own = watch.results[-1]
        assert observation is own[0]
        assert (reward, terminated, truncated) == own[1:4]
        assert {key: info[key] for key in own[4]} == own[4]
        assert set(info) == {*own[4], *KEYS}


def test_it_never_ends_an_episode(shield: Shield) -> None:
    env, _ = watched(shield)
    env.reset(options={"state": [-0.5, 0.5]})  # inside a rock: nothing is acceptable
    for _ in range(20):
        _, _, terminated, truncated, info = env.step(np.zeros(2, np.float32))
        assert not terminated
        assert not truncated
    # Nothing vouches for a shield without a record, wherever it is.
    _, info = env.reset(options={"state": [1.9, 0.0]})
    assert not info["shield/certified"]


def test_it_keeps_the_boat_off_the_rocks(shield: Shield) -> None:
    into = np.array([1.0, 0.0], np.float32)
    env, watch = watched(shield)
    hit = {}
    for name, runner in (("shielded", env), ("bare", watch)):
        _, info = runner.reset(options={"state": [-2.0, -1.2]})
        hit[name] = info["cost"]
        for _ in range(60):
            hit[name] += runner.step(into)[4]["cost"]
    assert hit["bare"] > 0
    assert hit["shielded"] == 0


def test_certified_needs_a_record_and_a_value_below_the_threshold(shield: Shield) -> None:
    env, _ = watched(replace(shield, record=record(0.05)))
    for state, inside in (([1.9, 0.0], True), ([-0.5, 0.5], False)):
        _, info = env.reset(options={"state": state})
        assert info["shield/certified"] is inside
        assert env.step(np.zeros(2, np.float32))[4]["shield/certified"] is inside


# -- specs --------------------------------------------------------------------------------------


def test_the_spec_rebuilds_the_env_where_the_shield_is_a_path(path: Path) -> None:
    env = SafetyShield(boat(), path)
    assert env.spec is not None
    texts = env.spec.to_json()
    for spec in (env.spec, EnvSpec.from_json(texts)):
        twin = gym.make(spec)
        assert isinstance(twin, SafetyShield)
        one, _ = env.reset(seed=5, options=UPSTREAM)
        other, _ = twin.reset(seed=5, options=UPSTREAM)
        for _ in range(30):
            action = np.array([1.0, 0.3], np.float32)
            one, _, _, _, info = env.step(action)
            other, _, _, _, again = twin.step(action)
            np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(info["action_executed"], again["action_executed"])


def test_a_shield_in_memory_has_a_spec_too_and_is_not_copied(shield: Shield) -> None:
    env = gym.wrappers.RecordEpisodeStatistics(SafetyShield(boat(), shield))
    assert env.spec is not None
    inner = [w for w in env.spec.additional_wrappers if w.name == "SafetyShield"]
    assert len(inner) == 1
    assert inner[0].kwargs is not None
    assert inner[0].kwargs["shield"].model is shield.model
    twin = gym.make(env.spec)
    assert twin.get_wrapper_attr("shield").model is shield.model


# -- composition --------------------------------------------------------------------------------


def test_below_and_above_the_usual_wrappers(shield: Shield) -> None:
    inside = SafetyShield(gym.wrappers.TimeLimit(gym.make(BOAT).unwrapped, 7), shield)
    outer = gym.wrappers.RecordEpisodeStatistics(
        gym.wrappers.TimeLimit(SafetyShield(boat().unwrapped, shield), 7)
    )
    for env in (inside, outer):
        env.reset(seed=0)
        ends = [env.step(np.zeros(2, np.float32))[3] for _ in range(7)]
        assert ends == [False] * 6 + [True]
    _, info = outer.reset(seed=0)
    assert set(KEYS) <= set(info)


def test_inside_rescale_action_it_sees_actions_in_the_units_of_its_training(shield: Shield) -> None:
    env = gym.wrappers.RescaleAction(SafetyShield(boat(), shield), 0.0, 1.0)
    env.reset(seed=0, options={"state": [1.5, 1.0]})
    info = env.step(np.array([1.0, 0.5], np.float32))[4]
    np.testing.assert_allclose(info["action_proposed"], [1.0, 0.0], atol=1e-7)
    with pytest.raises(ValueError, match=r"action_space mismatch .*Box\(-1\.0.*Box\(0\.0"):
        SafetyShield(gym.wrappers.RescaleAction(boat(), 0.0, 1.0), shield)


def test_executed_actions_have_the_dtype_of_the_env_and_lie_in_its_box(shield: Shield) -> None:
    class Double(gym.ActionWrapper):  # type: ignore[type-arg]
        def __init__(self, env: Env) -> None:
            super().__init__(env)
            self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float64)

        def action(self, action: Any) -> Any:  # noqa: ANN401
            assert action in self.action_space
            return action

    env = SafetyShield(Double(boat()), shield)
    env.reset(seed=0, options={"state": [-0.8, 0.5]})
    infos = [env.step(np.array([1.0, 0.1]))[4] for _ in range(5)]
    assert any(info["shield/intervened"] for info in infos)
    env.reset(seed=0, options={"state": [-0.8, 0.5]})
    info = env.step(np.array([1.0, 0.1], np.float32))[4]
    assert info["shield/intervened"]


# -- what can go wrong --------------------------------------------------------------------------


def test_another_environment_is_refused_by_name(shield: Shield) -> None:
    with pytest.raises(ValueError, match=r"observation_space mismatch .*expected Box.*got Box"):
        SafetyShield(gym.make("safeshield/DoubleIntegrator-v0"), shield)


@pytest.mark.parametrize("checked", [False, True])
def test_six_values_are_explained(shield: Shield, checked: bool) -> None:
    inner: Env = Watch(gym.make(BOAT).unwrapped, sixth=True)
    env = SafetyShield(gym.wrappers.TimeLimit(inner, 5) if checked else inner, shield)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"Safety-Gymnasium.*wrappers\.CostFromStep"):
        env.step(np.zeros(2, np.float32))


def test_stepping_before_reset(shield: Shield) -> None:
    env, _ = watched(shield)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(2, np.float32))


class Fails(gym.Wrapper):  # type: ignore[type-arg]
    """Moves, and then fails in a way of its own; counts the steps that it takes."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        self.how = ""
        self.steps = 0

    def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
        return self._result(self.env.reset(**kwargs))

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.steps += 1
        return self._result(self.env.step(action))

    def _result(self, result: Any) -> Any:  # noqa: ANN401
        if self.how == "raises":
            raise OSError("the connection was lost")
        if self.how == "stops":
            raise KeyboardInterrupt
        if self.how == "shape":
            return (result[0][:1], *result[1:])
        if self.how == "batch":
            return (np.array([result[0]] * 2), *result[1:])
        if self.how == "four":
            return result[1:]
        return (*result[:-1], None) if self.how == "infos" else result


@pytest.mark.parametrize("how", ["raises", "stops", "shape", "batch", "four", "infos"])
@pytest.mark.parametrize("where", ["step", "reset"])
def test_no_action_runs_after_a_failure_until_a_reset(shield: Shield, how: str, where: str) -> None:
    fails = Fails(gym.make(BOAT, dt=DT).unwrapped)
    env = SafetyShield(fails, shield)
    start = {"state": [1.9, 0.0]}
    action = np.array([1.0, 0.0], np.float32)
    env.reset(seed=0, options=start)
    env.step(action)
    fails.how = how
    with pytest.raises((OSError, ValueError, KeyboardInterrupt)):
        env.step(action) if where == "step" else env.reset(options=UPSTREAM)
    fails.how, steps = "", fails.steps
    for _ in range(3):
        with pytest.raises(gym.error.ResetNeeded, match=r"step or reset that failed.*call reset\("):
            env.step(action)
    assert fails.steps == steps
    observation, _ = env.reset(options=UPSTREAM)
    expected = float(shield.filter(observation, action)[1].value)
    assert env.step(action)[4]["shield/value"] == pytest.approx(expected, abs=1e-5)


def test_a_refused_action_needs_no_reset(shield: Shield) -> None:
    env, watch = watched(shield)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action must"):
        env.step(np.zeros(3))
    env.step(np.zeros(2, np.float32))
    assert len(watch.seen) == 1


@pytest.mark.parametrize("action", [0.0, [0.0], np.zeros(3), np.zeros((1, 2)), ["a", "b"]])
def test_actions_of_another_shape_or_kind(shield: Shield, action: Any) -> None:  # noqa: ANN401
    env, watch = watched(shield)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action must"):
        env.step(action)
    assert watch.seen == []


@pytest.mark.parametrize("action", [[np.nan, 0.0], [np.inf, 0.0], [3.0, 0.0], [1e300, -1e300]])
def test_no_broken_action_reaches_the_dynamics(shield: Shield, action: Any) -> None:  # noqa: ANN401
    env, watch = watched(shield)
    env.reset(seed=0, options={"state": [1.5, 0.0]})
    info = env.step(np.array(action))[4]
    assert info["shield/intervened"]
    assert np.isfinite(watch.seen[-1]).all()
    assert (np.abs(watch.seen[-1]) <= 1).all()


def test_a_broken_observation_is_flagged_and_the_fallback_acts(shield: Shield) -> None:
    env, watch = watched(replace(shield, record=record(0.05)), broken_at=2)
    env.reset(seed=0, options={"state": [1.5, 0.0]})
    proposal = np.array([0.25, 0.75], np.float32)
    assert env.step(proposal)[4]["shield/safe_set"]
    assert not env.step(proposal)[4]["shield/safe_set"]
    info = env.step(proposal)[4]
    assert info["shield/intervened"]
    assert info["shield/value"] == np.inf
    assert np.isfinite(watch.seen[-1]).all()
    assert not np.array_equal(watch.seen[-1], proposal)
    # And the next good observation is judged as ever.
    assert env.step(proposal)[4]["shield/value"] < 0


def test_an_observation_of_another_shape_is_an_error(shield: Shield) -> None:
    class Narrow(gym.Wrapper):  # type: ignore[type-arg]
        def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
            observation, info = self.env.reset(**kwargs)
            return observation[:1], info

    with pytest.raises(ValueError, match="observation must be numbers of shape"):
        SafetyShield(Narrow(gym.make(BOAT).unwrapped), shield).reset(seed=0)


def test_a_path_a_shield_or_an_agent(
    path: Path, shield: Shield, cart_agent: SafeFQL, tmp_path: Path
) -> None:
    for given in (path, str(path), shield):
        assert SafetyShield(boat(), given).shield.delta == 0.05
    cart = gym.make("safeshield/DoubleIntegrator-v0")
    assert SafetyShield(cart, cart_agent).shield.delta == 0.0
    for wrong in (None, 3, {"a": 1}, np.zeros(2)):
        with pytest.raises(TypeError, match="shield must be a Shield, a path"):
            SafetyShield(boat(), wrong)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        SafetyShield(boat(), tmp_path / "none")
    with pytest.raises(ValueError, match=r"got the log 'data\.hdf5': train a shield on it"):
        SafetyShield(boat(), "data.hdf5")


def test_uncalibrated_warns_once_an_env(shield: Shield) -> None:
    env, _ = watched(shield.with_delta(0.05))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        env.reset(seed=0)
        for _ in range(5):
            env.step(np.array([0.9, 0.9], np.float32))
    assert [w.category for w in caught] == [UncalibratedShieldWarning]


# -- Stable-Baselines3 --------------------------------------------------------------------------


def test_ppo_trains_in_a_shielded_env(shield: Shield) -> None:
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    envs = DummyVecEnv([lambda: SafetyShield(boat(), shield) for _ in range(2)])
    model = PPO("MlpPolicy", envs, n_steps=32, batch_size=32, n_epochs=1, device="cpu", seed=0)
    model.learn(128)
    observations = envs.reset()
    assert not np.isnan(observations).any()
    _, _, _, infos = envs.step(np.zeros((2, 2), np.float32))
    assert all(set(KEYS) <= set(info) for info in infos)


def test_a_vector_environment_needs_its_own_wrapper(shield: Shield) -> None:
    vector = gym.vector.SyncVectorEnv([boat, boat])
    with pytest.raises(TypeError, match=r"got a vector environment: use .*VectorSafetyShield"):
        SafetyShield(vector, shield)


def test_a_record_of_another_environment_is_told(shield: Shield) -> None:
    told = record(shield.delta)
    calibrated = replace(shield, record=replace(told, environment="Other-v0"))
    with pytest.warns(OtherEnvironmentWarning, match="its id is safeshield.*, not Other-v0"):
        SafetyShield(boat(), calibrated)
    vector = gym.vector.SyncVectorEnv([boat, boat])
    with pytest.warns(OtherEnvironmentWarning):
        VectorSafetyShield(vector, calibrated)
    with pytest.warns(OtherEnvironmentWarning):
        VecSafetyShield(DummyVecEnv([boat]), calibrated)
    same = replace(shield, record=replace(told, environment=BOAT))
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherEnvironmentWarning)
        SafetyShield(boat(), same)
        VectorSafetyShield(vector, same)
        VecSafetyShield(DummyVecEnv([boat]), same)


AT_EASE = {"state": [1.9, 0.0]}  # downstream of the rocks: V_h is far below -delta


def first_certified(kind: str, shield: Shield, **kwargs: Any) -> list[bool]:  # noqa: ANN401
    """What each way to shield two boats says of the same harmless start, and of a step from it."""

    def make() -> Env:
        return gym.make(BOAT, **kwargs)

    start = np.zeros((2, 2), np.float32)
    if kind == "single":
        env = SafetyShield(make(), shield)
        told = env.reset(options=AT_EASE)[1], env.step(start[0])[4]
        return [bool(info["shield/certified"]) for info in told]
    if kind == "DummyVecEnv":
        venv = VecSafetyShield(DummyVecEnv([make] * 2), shield)
        venv.set_options(AT_EASE)
        venv.reset()
        both = [*venv.reset_infos, *venv.step(start)[3]]
        return [bool(info["shield/certified"]) for info in both]
    if kind == "Sync":
        vector: Any = gym.vector.SyncVectorEnv([make] * 2)
    else:
        vector = gym.make_vec(BOAT, num_envs=2, vectorization_mode=kind, **kwargs)
    envs = VectorSafetyShield(vector, shield)
    infos = [envs.reset(options=AT_EASE)[1], envs.step(start)[4]]
    envs.close()
    return [bool(one) for info in infos for one in info["shield/certified"]]


# In Gymnasium 0.29 make_vec's own copies are experimental, of a class that no shield goes around.
MADE = ["custom"] if gym.__version__.startswith("0.") else ["sync", "async", "vector_entry_point"]
KINDS = ["single", "Sync", "DummyVecEnv", *MADE]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_certified_where_the_arguments_are_others(shield: Shield, kind: str) -> None:
    """The record speaks of the environment with its keyword arguments, not of its id alone."""
    told = replace(record(shield.delta), environment_kwargs={"dt": DT})
    calibrated = replace(shield, record=told)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherEnvironmentWarning)
        certified = first_certified(kind, calibrated, dt=DT)
    assert certified
    assert all(certified)
    match = f"its arguments are .*'current': 0.5.*, not .*'dt': {DT}"
    with pytest.warns(OtherEnvironmentWarning, match=match):
        assert not any(first_certified(kind, calibrated, dt=DT, current=0.5))
    with pytest.warns(OtherEnvironmentWarning, match="its arguments are {}"):
        assert not any(first_certified(kind, calibrated))


@pytest.mark.parametrize("kind", KINDS)
def test_an_argument_that_is_given_its_default_is_no_difference(shield: Shield, kind: str) -> None:
    default = CURRENT
    for tested, made in (({}, {"current": default}), ({"current": default}, {})):
        told = replace(record(shield.delta), environment_kwargs={"dt": DT, **tested})
        with warnings.catch_warnings():
            warnings.simplefilter("error", OtherEnvironmentWarning)
            assert all(first_certified(kind, replace(shield, record=told), dt=DT, **made))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_certified_where_the_id_is_another(shield: Shield, kind: str) -> None:
    told = replace(record(shield.delta), environment="Other-v0", environment_kwargs=None)
    with pytest.warns(OtherEnvironmentWarning):
        assert not any(first_certified(kind, replace(shield, record=told), dt=DT))


def test_what_is_not_known_or_changes_no_dynamics_is_not_compared(shield: Shield) -> None:
    told = record(shield.delta)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherEnvironmentWarning)
        # A record from before the arguments were kept; then an environment without a spec.
        assert all(first_certified("single", replace(shield, record=told), dt=DT, current=0.5))
        known = replace(shield, record=replace(told, environment_kwargs={"dt": DT}))
        plain = gym.make(BOAT, dt=DT, current=0.5).unwrapped
        plain.spec = None
        assert SafetyShield(plain, known).reset(options=AT_EASE)[1]["shield/certified"]
        seen = boat(render_mode="rgb_array")
        assert SafetyShield(seen, known).reset(options=AT_EASE)[1]["shield/certified"]


class PassesThrough(gym.Wrapper):  # type: ignore[type-arg]
    """Overrides nothing."""

    purpose: str


class Prepares(gym.Wrapper):  # type: ignore[type-arg]
    """May change the environment when it is made."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)


def with_own_step(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    wrapper = PassesThrough(env)
    wrapper.step = lambda action: env.step(-action)  # type: ignore[method-assign]
    return wrapper


def test_a_wrapper_that_overrides_nothing_is_no_difference(shield: Shield) -> None:
    told = replace(record(shield.delta), environment_kwargs={"dt": DT}, wrappers=())
    known = replace(shield, record=told)
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherEnvironmentWarning)
        env = SafetyShield(gym.Wrapper(PassesThrough(boat())), known)
        assert env.reset(options=AT_EASE)[1]["shield/certified"]
    for other in (Doubles, Prepares, with_own_step):
        with pytest.warns(OtherEnvironmentWarning, match=r"its wrappers are \[\('"):
            SafetyShield(other(boat()), known)


def without_a_spec() -> Env:
    env = boat().unwrapped
    env.spec = None
    return env


def late(make: Callable[[], Env] = boat, steps: int = 2) -> Env:
    return DelayedActuator(make(), steps)


LATE = (EnvironmentWrapper("DelayedActuator", {"steps": 2, "first": None}),)


def test_what_an_environment_without_a_spec_shows_is_compared(shield: Shield) -> None:
    told = replace(record(shield.delta), environment_kwargs={"dt": DT}, wrappers=(), horizon=120)
    plain = replace(shield, record=told)
    faulty = replace(shield, record=replace(told, wrappers=LATE))
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherEnvironmentWarning)
        for env, known in (
            (without_a_spec(), plain),
            (gym.wrappers.TimeLimit(without_a_spec(), 120), plain),
            (late(without_a_spec), faulty),
        ):
            assert SafetyShield(env, known).reset(options=AT_EASE)[1]["shield/certified"]
    for env, known, match in (
        (late(without_a_spec), plain, "DelayedActuator"),
        (Doubles(without_a_spec()), plain, "Doubles"),
        (without_a_spec(), faulty, r"its wrappers are \[\], not"),
        (late(without_a_spec, 5), faulty, "'steps': 5"),
        (gym.wrappers.TimeLimit(without_a_spec(), 5000), plain, "up to 5000 steps, not 120"),
    ):
        with pytest.warns(OtherEnvironmentWarning, match=match):
            shielded = SafetyShield(env, known)
        assert not shielded.reset(options=AT_EASE)[1]["shield/certified"]


def certified_by_vector(vector: Any, shield: Shield) -> bool:  # noqa: ANN401
    """Whether the first state of two boats is certified, in a vector environment of any kind."""
    if isinstance(vector, gym.vector.VectorEnv):
        envs = VectorSafetyShield(vector, shield)
        told = envs.reset(options=AT_EASE)[1]["shield/certified"].tolist()
        envs.close()
    else:
        venv = VecSafetyShield(vector, shield)
        venv.set_options(AT_EASE)
        venv.reset()
        told = [info["shield/certified"] for info in venv.reset_infos]
        venv.close()
    assert told[0] == told[1]
    return bool(told[0])


def in_processes(makers: list[Callable[[], Env]]) -> list[Any]:
    return [
        *([] if BEFORE_1_0 else [gym.vector.AsyncVectorEnv(makers)]),
        VecMonitor(SubprocVecEnv(makers, start_method="fork")),
    ]


def test_wrappers_of_environments_in_worker_processes_are_compared(shield: Shield) -> None:
    told = replace(record(shield.delta), wrappers=(), horizon=100)
    plain = replace(shield, record=told)
    faulty = replace(shield, record=replace(told, wrappers=LATE))
    known = replace(shield, record=replace(told, environment_kwargs={"dt": DT}))
    other = replace(shield, record=replace(told, environment="Other-v0"))
    short = replace(shield, record=replace(told, horizon=10))
    for vector in in_processes([boat, boat]):
        with pytest.warns(OtherEnvironmentWarning, match="its arguments cannot be compared"):
            assert certified_by_vector(vector, known)
    for makers, one, match in (
        ([late] * 2, plain, r"its wrappers are \[\('DelayedActuator', None\)\], not \[\]"),
        ([boat, late], plain, "none.*DelayedActuator"),
        ([boat] * 2, faulty, r"its wrappers are \[\], not"),
        ([late] * 2, faulty, r"None\)\], not .*its arguments are not known"),
        ([lambda: Doubles(boat())] * 2, plain, "Doubles"),
        ([boat] * 2, other, "its id is safeshield/Boat-v0"),
        ([boat] * 2, short, "steps, not 10"),
    ):
        for vector in in_processes(makers):
            with pytest.warns(OtherEnvironmentWarning, match=match):
                assert not certified_by_vector(vector, one)


@pytest.mark.skipif(BEFORE_1_0, reason="make_vec is experimental in Gymnasium 0.29")
def test_wrappers_that_make_vec_was_asked_for_are_compared_with_their_arguments(
    shield: Shield,
) -> None:
    told = replace(record(shield.delta), environment_kwargs={"dt": DT})
    plain = replace(shield, record=replace(told, wrappers=()))
    faulty = replace(shield, record=replace(told, wrappers=LATE))

    def made(kind: str, *wrappers: Any) -> Any:  # noqa: ANN401
        return gym.make_vec(BOAT, 2, vectorization_mode=kind, wrappers=list(wrappers), dt=DT)

    for kind in ("sync", "async"):
        with warnings.catch_warnings():
            warnings.simplefilter("error", OtherEnvironmentWarning)
            assert certified_by_vector(made(kind), plain)
            assert certified_by_vector(made(kind, partial(DelayedActuator, steps=2)), faulty)
        for one, steps in ((plain, 2), (faulty, 5)):
            vector = made(kind, partial(DelayedActuator, steps=steps))
            with pytest.warns(OtherEnvironmentWarning, match=f"'steps': {steps}"):
                assert not certified_by_vector(vector, one)


def test_members_that_do_not_answer_are_told(shield: Shield) -> None:
    class Silent(gym.Wrapper):  # type: ignore[type-arg]
        def __str__(self) -> str:
            return "a boat"

    told = replace(record(shield.delta), wrappers=())
    for vector in in_processes([lambda: Silent(boat())] * 2):
        with pytest.warns(OtherEnvironmentWarning, match="wrappers cannot be compared"):
            assert certified_by_vector(vector, replace(shield, record=told))
    faulty = replace(shield, record=replace(told, wrappers=LATE))
    for vector in in_processes([lambda: Silent(boat())] * 2):
        with pytest.warns(OtherEnvironmentWarning, match="its wrappers are not known"):
            assert not certified_by_vector(vector, faulty)


def test_wrappers_of_one_member_are_not_those_of_all(shield: Shield) -> None:
    faulty = replace(shield, record=replace(record(shield.delta), wrappers=LATE))
    for vector in (
        gym.vector.SyncVectorEnv([boat, late]),
        DummyVecEnv([boat, late]),
        VecMonitor(DummyVecEnv([boat, late])),
    ):
        with pytest.warns(OtherEnvironmentWarning, match="'none', None"):
            assert not certified_by_vector(vector, faulty)


def test_members_that_differ_are_not_taken_for_the_first(shield: Shield) -> None:
    told = replace(record(shield.delta), environment_kwargs={"dt": DT})
    makers = [boat, lambda: boat(current=0.5)]
    for vector in (gym.vector.SyncVectorEnv(makers), DummyVecEnv(makers)):
        assert environment_kwargs(vector) == {"dt": [DT], "current": [None, 0.5]}
    with pytest.warns(OtherEnvironmentWarning, match="'current': "):
        envs = VectorSafetyShield(gym.vector.SyncVectorEnv(makers), replace(shield, record=told))
    assert not envs.reset(options=AT_EASE)[1]["shield/certified"].any()


def test_a_penalty_is_taken_off_where_the_shield_steps_in(shield: Shield) -> None:
    plain, _ = watched(shield)
    priced = SafetyShield(gym.make(BOAT, dt=DT).unwrapped, shield, intervention_penalty=2.5)
    for env in (plain, priced):
        env.reset(seed=0, options=UPSTREAM)
    replaced = 0
    for _ in range(40):
        action = np.array([1.0, 0.0], np.float32)
        _, reward, *_, info = plain.step(action)
        _, less, *_, told = priced.step(action)
        assert told["shield/penalty"] == 2.5 * info["shield/intervened"]
        assert less == pytest.approx(float(reward) - told["shield/penalty"])
        assert "shield/penalty" not in info
        replaced += info["shield/intervened"]
    assert 0 < replaced < 40
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="intervention_penalty must be finite"):
            SafetyShield(boat(), shield, intervention_penalty=wrong)
    vector = VectorSafetyShield(
        gym.vector.SyncVectorEnv([boat] * 2), shield, intervention_penalty=1.0
    )
    vector.reset(seed=0)
    infos = vector.step(np.array([[np.nan, 0], [0, 0]], np.float32))[4]
    assert infos["shield/penalty"][0] == 1.0
    np.testing.assert_array_equal(infos["shield/penalty"], infos["shield/intervened"] * 1.0)


class Doubles(gym.Wrapper):  # type: ignore[type-arg]
    """Doubles the first entry of its action in place."""

    def step(self, action: Any) -> Any:  # noqa: ANN401
        result = self.env.step(action)
        action[0] *= 2.0
        return result


def test_what_the_environment_does_to_the_array_is_not_told_and_not_the_callers(
    shield: Shield,
) -> None:
    env = SafetyShield(Doubles(boat().unwrapped), shield)
    env.reset(seed=0, options=UPSTREAM)
    intervened = []
    for sent in ([0.4, 0.4], [1.0, 0.0]) * 20:
        action = np.array(sent, np.float32)
        info = env.step(action)[4]
        np.testing.assert_array_equal(action, np.array(sent, np.float32))
        np.testing.assert_array_equal(info["action_proposed"], action)
        assert info["action_executed"] in env.action_space
        intervened.append(info["shield/intervened"])
        if not intervened[-1]:
            np.testing.assert_array_equal(info["action_executed"], action)
    assert set(intervened) == {True, False}
    given = [0.25, 0.5]  # neither an array
    env.step(given)  # type: ignore[arg-type]
    assert given == [0.25, 0.5]


def test_one_shield_only(shield: Shield) -> None:
    inner = gym.wrappers.RecordEpisodeStatistics(SafetyShield(boat(), shield))
    with pytest.raises(ValueError, match=r"shielded already \(SafetyShield\)"):
        SafetyShield(inner, shield)
    with pytest.raises(ValueError, match=r"shielded already \(SafetyShield\)"):
        evaluate(inner, "random", 1, 0, shield=shield)
    assert evaluate(inner, "random", 1, 0).episodes == 1

    class Foreign(gym.Wrapper):  # type: ignore[type-arg]
        def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
            observation, info = self.env.reset(**kwargs)
            return observation, {**info, "shield/intervened": False}

    with pytest.raises(ValueError, match="shielded already"):
        SafetyShield(Foreign(boat()), shield).reset(seed=0)


@pytest.mark.parametrize("where", ["reset", "step"])
def test_infos_that_are_none_are_told(shield: Shield, where: str) -> None:
    class Mute(gym.Wrapper):  # type: ignore[type-arg]
        def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
            observation, info = self.env.reset(**kwargs)
            return observation, None if where == "reset" else info

        def step(self, action: Any) -> Any:  # noqa: ANN401
            return (*self.env.step(action)[:4], None)

    env = SafetyShield(Mute(boat().unwrapped), shield)
    if where == "step":
        env.reset(seed=0)
    with pytest.raises(ValueError, match=f"{where} must return its infos as a dict.*NoneType"):
        env.reset(seed=0) if where == "reset" else env.step(np.zeros(2, np.float32))
