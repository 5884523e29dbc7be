"""Stable-Baselines3: one shield for a `VecEnv`, what buffers store, what the callback counts."""

from __future__ import annotations

import ctypes
import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch
from fitted import DT
from hostile import hostile
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecMonitor,
    VecNormalize,
)
from test_shield import record

from safeshield.policies import ShieldedPolicy
from safeshield.policies.callback import ShieldCallback
from safeshield.policies.replay_buffer import ShieldedDictReplayBuffer, ShieldedReplayBuffer
from safeshield.shield import Shield
from safeshield.wrappers import SafetyShield
from safeshield.wrappers.sb3 import VecSafetyShield, worker_env

pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning", "ignore::UserWarning"
)
BOAT = "safeshield/Boat-v0"
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
Array = npt.NDArray[Any]


class River(gym.Wrapper):
    """A boat whose episodes start upstream of a rock; notes the actions that reach it."""

    def __init__(self, env: Env, last: float = 99.0, broken_at: int = -1) -> None:
        super().__init__(env)
        self.last, self.broken_at = last, broken_at
        self.seen: list[tuple[Array, Array]] = []
        self.rng = np.random.default_rng(0)

    def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
        start = [self.rng.uniform(-2.2, -1.6), self.rng.uniform(0.2, 0.8)]
        kwargs["options"] = kwargs.get("options") or {"state": start}
        self.at, info = self.env.reset(**kwargs)
        return self.at, {**info, "start": start}

    def step(self, action: Any) -> Any:  # noqa: ANN401
        self.seen.append((self.at, np.array(action)))
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.at = observation
        if len(self.seen) == self.broken_at:
            observation = np.full_like(observation, np.nan)
        return observation, reward, terminated or bool(observation[0] > self.last), truncated, info


def small() -> Any:  # noqa: ANN401
    """Arguments of a small agent; made anew, for some algorithms write into them."""
    return {"policy_kwargs": {"net_arch": [16]}, "device": "cpu", "seed": 0}


def river(steps: int = 25, **kwargs: Any) -> Env:  # noqa: ANN401
    return gym.wrappers.TimeLimit(River(gym.make(BOAT, dt=DT).unwrapped, **kwargs), steps)


def rivers(count: int, **kwargs: Any) -> DummyVecEnv:  # noqa: ANN401
    return DummyVecEnv([lambda: river(**kwargs)] * count)


def seen(envs: VecEnv) -> list[list[tuple[Array, Array]]]:
    notes: list[list[tuple[Array, Array]]] = envs.get_attr("seen")
    return notes


@pytest.fixture(scope="module")
def calibrated(shield: Shield) -> Shield:
    return dataclasses.replace(shield, record=record(0.05))


@pytest.fixture(scope="module")
def path(calibrated: Shield, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("shield") / "boat.safetensors"
    calibrated.save(file)
    return file


@pytest.fixture(scope="module")
def skewed(shield: Shield) -> tuple[Shield, gym.spaces.Box]:
    """The boat's shield for a helm that counts from -3 to 1 and from 0 to 10."""
    box = gym.spaces.Box(np.array([-3.0, 0.0], "f4"), np.array([1.0, 10.0], "f4"))
    scaling = dataclasses.replace(
        shield.model.scaling, action_low=box.low.copy(), action_high=box.high.copy()
    )
    model = dataclasses.replace(shield.model, action_space=box, scaling=scaling)
    return dataclasses.replace(shield, model=model), box


# -- one shield for all environments ------------------------------------------------------------


def assert_same_infos(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        if key in KEYS:
            assert type(value) is type(other[key]) is KEYS[key], key
            if KEYS[key] is np.ndarray:
                assert value.dtype == other[key].dtype
        np.testing.assert_allclose(value, other[key], atol=1e-5, err_msg=key)


def test_it_equals_a_vecenv_of_single_shields_across_ends_of_episodes(calibrated: Shield) -> None:
    # Some end by their time limit, others by themselves further downstream.
    makers = [
        partial(river, steps, last=last)
        for steps, last in ((3, 99.0), (25, -1.0), (40, 99.0), (40, 1.0))
    ]
    together = VecSafetyShield(DummyVecEnv(makers), calibrated)
    alone = DummyVecEnv([partial(lambda make: SafetyShield(make(), calibrated), m) for m in makers])
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(together.reset(), alone.reset())
    certified, ends, intervened = [], [], []
    for _ in range(90):
        for one, other in zip(together.reset_infos, alone.reset_infos, strict=True):
            assert_same_infos(one, other)
        actions = rng.uniform(-1, 1, (4, 2)).astype(np.float32)
        actions[0, 0] = 1.0
        mine, theirs = together.step(actions), alone.step(actions)
        for one, other in zip(mine[:3], theirs[:3], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
        for one, other in zip(mine[3], theirs[3], strict=True):
            assert_same_infos(one, other)
            intervened.append(one["shield/intervened"])
            certified.append(one["shield/safe_set"])
            ends.append(("terminal_observation" in one, one["TimeLimit.truncated"]))
    np.testing.assert_allclose(
        [[a for _, a in notes] for notes in seen(together)],
        [[a for _, a in notes] for notes in seen(alone)],
        atol=1e-5,
    )
    assert {True, False} == set(intervened) == set(certified)
    assert {(False, False), (True, False), (True, True)} == set(ends)


def test_certified_speaks_of_the_end_and_not_of_the_next_start(calibrated: Shield) -> None:
    """An episode that ends inside a rock, and one whose successor starts inside one."""

    class Two(gym.Wrapper):
        starts = ((-0.55, 0.5), (1.5, 0.0))

        def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
            self.starts = self.starts[::-1]
            return self.env.reset(options={"state": self.starts[0]})

    envs = VecSafetyShield(
        DummyVecEnv([lambda: gym.wrappers.TimeLimit(Two(gym.make(BOAT, dt=DT).unwrapped), 1)]),
        calibrated,
    )
    envs.reset()
    for turn in range(4):
        safe = turn % 2 == 0
        assert envs.reset_infos[0]["shield/certified"] is safe
        observations, _, dones, infos = envs.step(np.zeros((1, 2), np.float32))
        assert dones[0]
        assert infos[0]["shield/certified"] is safe
        end = infos[0]["terminal_observation"]
        assert infos[0]["shield/safe_set"] == bool(calibrated.certified(end))
        assert not np.array_equal(observations[0], end)
        assert envs.reset_infos[0]["shield/certified"] is not safe


def test_what_was_judged_is_sent_however_the_actions_change_meanwhile(shield: Shield) -> None:
    class Notes(VecEnvWrapper):
        def reset(self) -> Any:  # noqa: ANN401
            return self.venv.reset()

        def step_async(self, actions: Any) -> None:  # noqa: ANN401
            self.sent = actions
            self.venv.step_async(actions)

        def step_wait(self) -> Any:  # noqa: ANN401
            return self.venv.step_wait()

    notes = Notes(rivers(2))
    envs = VecSafetyShield(notes, shield)
    mild = np.full((2, 2), -0.1)
    for actions in (mild, *hostile(mild)):
        envs.reset()
        infos = envs.step(actions)[3]
        assert type(notes.sent) is np.ndarray
        assert notes.sent.tobytes() == mild.astype(np.float32).tobytes()
        for info in infos:
            assert not info["shield/intervened"]
            assert info["action_proposed"].tobytes() == mild[0].tobytes()
            assert info["action_executed"].tobytes() == notes.sent[0].tobytes()


def test_accepted_actions_reach_the_dynamics_bit_for_bit(shield: Shield) -> None:
    envs = VecSafetyShield(rivers(6, steps=1000), shield)
    rng = np.random.default_rng(1)
    envs.reset()
    kinds = set()
    for _ in range(20):
        actions = rng.uniform(-1, 1, (6, 2)).astype(np.float32)
        kept = actions.copy()
        envs.step_async(actions)
        actions[:] = np.nan  # the caller's array is the caller's
        infos = envs.step_wait()[3]
        for i, info in enumerate(infos):
            sent = seen(envs)[i][-1][1]
            assert info["action_proposed"].tobytes() == kept[i].tobytes()
            assert info["action_executed"].tobytes() == sent.tobytes()
            assert (sent.tobytes() == kept[i].tobytes()) is not info["shield/intervened"]
            kinds.add(info["shield/intervened"])
    assert kinds == {True, False}


@pytest.mark.parametrize("bad", [[np.nan, 0.0], [np.inf, 0.0], [3.0, 0.0]])
def test_no_broken_action_reaches_the_dynamics(shield: Shield, bad: list[float]) -> None:
    envs = VecSafetyShield(rivers(3), shield)
    envs.reset()
    infos = envs.step(np.array([bad, [0.0, 0.0], bad], np.float32))[3]
    assert [info["shield/intervened"] for info in infos][::2] == [True, True]
    sent = np.array([notes[-1][1] for notes in seen(envs)])
    assert (np.abs(sent) <= 1).all()


def test_a_broken_observation_is_flagged_and_the_fallback_acts(calibrated: Shield) -> None:
    envs = VecSafetyShield(rivers(2, broken_at=2), calibrated)
    envs.reset()
    still = np.zeros((2, 2), np.float32)
    safe = [envs.step(still)[3][0]["shield/safe_set"] for _ in range(2)]
    assert safe == [True, False]
    infos = envs.step(still)[3]
    assert infos[0]["shield/intervened"]
    assert infos[0]["shield/value"] == np.inf
    assert np.isfinite(seen(envs)[0][-1][1]).all()
    assert np.isfinite(envs.step(still)[3][0]["shield/value"])


def test_what_it_has_seen_cannot_be_changed_from_outside(shield: Shield) -> None:
    envs = VecSafetyShield(rivers(2, broken_at=1), shield)
    envs.reset()
    observations = envs.step(np.zeros((2, 2), np.float32))[0]
    observations[:] = [1.9, 0.0]
    assert all(i["shield/intervened"] for i in envs.step(np.zeros((2, 2), np.float32))[3])


def test_the_penalty_is_for_interventions_and_in_a_new_array(shield: Shield) -> None:
    free, fined = rivers(4), VecSafetyShield(rivers(4), shield, intervention_penalty=0.25)
    twin = VecSafetyShield(free, shield)
    twin.reset(), fined.reset()
    rng = np.random.default_rng(2)
    flags = []
    for _ in range(30):
        actions = rng.uniform(-1, 1, (4, 2)).astype(np.float32)
        plain, rewards = twin.step(actions)[1], fined.step(actions)
        intervened = np.array([info["shield/intervened"] for info in rewards[3]])
        np.testing.assert_allclose(rewards[1], plain - 0.25 * intervened, rtol=1e-6)
        assert rewards[1].dtype == plain.dtype == np.float32
        assert [info["shield/penalty"] for info in rewards[3]] == (0.25 * intervened).tolist()
        flags += intervened.tolist()
    assert {True, False} == set(flags)
    assert "shield/penalty" not in twin.step(np.zeros((4, 2), np.float32))[3][0]


def test_rewards_of_the_inner_environment_are_not_touched(shield: Shield) -> None:
    class Keeps(VecCheckNan):
        def step_wait(self) -> Any:  # noqa: ANN401
            self.mine = super().step_wait()
            self.copy = self.mine[1].copy()
            self.infos = [dict(info) for info in self.mine[3]]
            return self.mine

    inner = Keeps(rivers(3), raise_exception=True)
    envs = VecSafetyShield(inner, shield, intervention_penalty=1.0)
    envs.reset()
    envs.step(np.full((3, 2), np.nan, np.float32))
    np.testing.assert_array_equal(inner.mine[1], inner.copy)
    assert [set(info) for info in inner.mine[3]] == [set(info) for info in inner.infos]


class Named(gym.ObservationWrapper):
    """The boat's position under a name, beside something else."""

    def __init__(self, env: Env) -> None:
        super().__init__(env)
        self.observation_space = gym.spaces.Dict(
            {"at": env.observation_space, "step": gym.spaces.Box(0, 9, (1,))}
        )

    def observation(self, observation: Array) -> dict[str, Array]:
        return {"at": observation, "step": np.zeros(1, np.float32)}


class NamedShield(Shield):
    """A shield that reads one entry of a dict."""

    @property
    def observation_space(self) -> Any:  # noqa: ANN401
        box = super().observation_space
        return gym.spaces.Dict({"at": box, "step": gym.spaces.Box(0, 9, (1,))})

    def observation_rows(self, observations: Any) -> tuple[Array, bool]:  # noqa: ANN401
        rows = observations["at"]
        return (rows[None], True) if rows.ndim == 1 else (rows, False)

    def value(self, observation: Any, action: Any = None, **_: Any) -> Array:  # noqa: ANN401
        return self.states(self.observation_rows(observation)[0]).value


def test_dicts_of_observations(calibrated: Shield) -> None:
    fields = {f.name: getattr(calibrated, f.name) for f in dataclasses.fields(calibrated) if f.init}
    named = VecSafetyShield(
        DummyVecEnv([lambda: Named(river(5))] * 3),
        NamedShield(**fields),
    )
    plain = VecSafetyShield(rivers(3, steps=5), calibrated)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(named.reset()["at"], plain.reset())
    for _ in range(12):
        actions = rng.uniform(-1, 1, (3, 2)).astype(np.float32)
        mine, theirs = named.step(actions), plain.step(actions)
        np.testing.assert_array_equal(mine[0]["at"], theirs[0])
        for one, other in zip(mine[3], theirs[3], strict=True):
            assert {k: str(one[k]) for k in KEYS} == {k: str(other[k]) for k in KEYS}


# -- among the wrappers of Stable-Baselines3 ----------------------------------------------------


def test_inside_vecmonitor_and_vecnormalize(shield: Shield) -> None:
    bare = VecSafetyShield(rivers(3), shield)
    outer = VecNormalize(VecMonitor(VecSafetyShield(rivers(3), shield)))
    bare.reset(), outer.reset()
    for step in range(30):
        actions = np.tile(np.array([1.0, 0.1 * np.sin(step)], np.float32), (3, 1))
        plain, normal = bare.step(actions), outer.step(actions)
        np.testing.assert_array_equal(outer.get_original_obs(), plain[0])
        np.testing.assert_array_equal(outer.get_original_reward(), plain[1])
        np.testing.assert_array_equal(normal[2], plain[2])
        for one, other in zip(normal[3], plain[3], strict=True):
            assert {k: str(one[k]) for k in KEYS} == {k: str(other[k]) for k in KEYS}
            assert ("episode" in one) == ("terminal_observation" in other)


def test_the_vecenv_interface_passes_through(shield: Shield) -> None:
    envs = VecMonitor(VecSafetyShield(rivers(2), shield))
    assert envs.seed(7) == [7, 8]
    envs.set_options({"state": [1.0, 1.5]})
    np.testing.assert_array_equal(envs.reset(), [[1.0, 1.5]] * 2)
    assert envs.get_attr("last") == [99.0, 99.0]
    envs.set_attr("marked", 3)
    assert envs.env_method("get_wrapper_attr", "marked", indices=[1]) == [3]
    for name in ("reset", "step"):
        with pytest.raises(ValueError, match=f"'{name}' of the environments themselves"):
            envs.env_method(name, np.zeros(2, np.float32))
        with pytest.raises(ValueError, match=f"'{name}' of the environments themselves"):
            envs.set_attr(name, print)
    assert envs.env_is_wrapped(gym.wrappers.TimeLimit) == [True, True]
    assert envs.shield is shield
    twin = VecSafetyShield(DummyVecEnv([lambda: gym.make(BOAT)] * 2), shield)
    twin.seed(7)
    first = twin.reset()
    twin.seed(7)
    np.testing.assert_array_equal(twin.reset(), first)
    assert not np.array_equal(first[0], first[1])
    for info in twin.reset_infos:
        assert {key: type(info[key]) for key in KEYS} == KEYS
        assert np.isnan(info["action_executed"]).all()
        assert info["constraint"] is not None
    envs.close()


@pytest.mark.parametrize("given", ["path", "text", "shield", "agent"])
def test_a_path_a_shield_or_an_agent(path: Path, shield: Shield, given: str) -> None:
    class Agent:
        def shield(self) -> Shield:
            return shield

    value: Any = {"path": path, "text": str(path), "shield": shield, "agent": Agent()}[given]
    envs = VecSafetyShield(rivers(2), value)
    envs.reset()
    assert envs.step(np.zeros((2, 2)))[3][0]["shield/threshold"] == -0.05


def test_what_cannot_be_shielded(shield: Shield) -> None:
    with pytest.raises(TypeError, match="use SafetyShield"):
        VecSafetyShield(river(), shield)
    with pytest.raises(TypeError, match="shield must be"):
        VecSafetyShield(rivers(1), 3)
    with pytest.raises(ValueError, match=r"observation_space mismatch .*expected Box.*got Box"):
        VecSafetyShield(DummyVecEnv([lambda: gym.make("safeshield/DoubleIntegrator-v0")]), shield)
    rescaled = DummyVecEnv([lambda: gym.wrappers.RescaleAction(river(), -2.0, 2.0)])
    with pytest.raises(ValueError, match=r"action_space mismatch"):
        VecSafetyShield(rescaled, shield)
    with pytest.raises(ValueError, match=r"VecNormalize\(VecSafetyShield"):
        VecSafetyShield(VecMonitor(VecNormalize(rivers(1))), shield)
    VecSafetyShield(VecNormalize(rivers(1), norm_obs=False), shield)
    with pytest.raises(ValueError, match="shielded already"):
        VecSafetyShield(VecMonitor(VecSafetyShield(rivers(1), shield)), shield)
    with pytest.raises(ValueError, match="shielded already"):
        VecSafetyShield(DummyVecEnv([lambda: Monitor(SafetyShield(river(), shield))]), shield)
    for penalty in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="intervention_penalty"):
            VecSafetyShield(rivers(1), shield, penalty)


def test_steps_out_of_order_execute_nothing(shield: Shield) -> None:
    envs = VecSafetyShield(rivers(2), shield)
    still = np.zeros((2, 2), np.float32)
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(still)
    envs.reset()
    with pytest.raises(RuntimeError, match="step_async"):
        envs.step_wait()
    envs.step(still)
    count = len(seen(envs)[0])
    with pytest.raises(RuntimeError, match="step_async"):
        envs.step_wait()
    envs.step_async(still)
    with pytest.raises(RuntimeError, match="step_wait"):
        envs.step_async(still)
    envs.reset()
    with pytest.raises(RuntimeError, match="step_async"):
        envs.step_wait()
    for wrong in (still[0], still[:1], np.zeros((2, 3)), np.zeros((2, 2, 1)), [["a", "b"]] * 2):
        with pytest.raises(ValueError, match="action"):
            envs.step(wrong)
    assert len(seen(envs)[0]) == count


def test_six_values_are_explained_and_need_a_reset(shield: Shield) -> None:
    class Six(gym.Wrapper):
        def step(self, action: Any) -> Any:  # noqa: ANN401
            return (*self.env.step(action), 0.0)

    envs = VecSafetyShield(DummyVecEnv([lambda: Six(river())]), shield)
    envs.reset()
    with pytest.raises(ValueError, match="Safety-Gymnasium"):
        envs.step(np.zeros((1, 2)))
    with pytest.raises(RuntimeError, match="reset"):
        envs.step(np.zeros((1, 2)))


# -- what is stored -----------------------------------------------------------------------------

HELM = gym.spaces.Box(np.array([-3.0, 0.0], "f4"), np.array([1.0, 10.0], "f4"))
SIGHT = gym.spaces.Box(-9.0, 9.0, (3,))


def told(
    proposed: Array,
    executed: Array,
    penalty: float = 0.0,
    **more: Any,  # noqa: ANN401
) -> dict[str, Any]:
    return {
        "shield/intervened": not np.array_equal(proposed, executed),
        "shield/penalty": penalty,
        "action_proposed": proposed,
        "action_executed": executed,
        **more,
    }


def scaled(action: Array) -> Array:
    """By hand: -3 to 1 and 0 to 10 become -1 to 1."""
    return np.array([(action[0] + 1.0) / 2.0, (action[1] - 5.0) / 5.0], np.float32)


def fill(buffer: ReplayBuffer, rows: int, penalty: float = 0.0, seed: int = 0) -> list[Any]:
    """Add steps of two environments; in the second the shield replaces every third action."""
    rng = np.random.default_rng(seed)
    out = []
    for step in range(rows):
        proposed = rng.uniform(HELM.low, HELM.high, (2, 2)).astype(np.float32)
        executed = proposed.copy()
        if step % 3 == 0:
            executed[1] = rng.uniform(HELM.low, HELM.high).astype(np.float32)
        fine = penalty * (step % 3 == 0)
        infos = [told(proposed[0], executed[0]), told(proposed[1], executed[1], fine)]
        infos[0]["TimeLimit.truncated"] = step == 2
        obs, after = rng.normal(size=(2, 2, 3)).astype(np.float32)
        reward = rng.normal(size=2).astype(np.float32)
        done = np.array([step == 2, False])
        fined = reward - np.array([0.0, fine], np.float32)
        actions = np.stack([scaled(a) for a in proposed])
        if isinstance(buffer, DictReplayBuffer):
            buffer.add({"a": obs}, {"a": after}, actions, fined, done, infos)
        else:
            buffer.add(obs, after, actions, fined, done, infos)
        out.append((obs, after, actions, np.stack([scaled(a) for a in executed]), reward, done))
    return out


@pytest.mark.parametrize("dicts", [False, True])
@pytest.mark.parametrize("store", ["proposed", "executed", "both"])
def test_the_buffer_stores_what_a_hand_computation_says(store: str, dicts: bool) -> None:
    kind: Any = ShieldedDictReplayBuffer if dicts else ShieldedReplayBuffer
    space = gym.spaces.Dict({"a": SIGHT}) if dicts else SIGHT
    buffer = kind(10, space, HELM, device="cpu", n_envs=2, store=store)
    rows = fill(buffer, 4, penalty=0.5)
    assert buffer.pos == 4
    observations = buffer.observations["a"] if dicts else buffer.observations
    for i, (obs, _, proposed, executed, reward, _) in enumerate(rows):
        np.testing.assert_array_equal(observations[i], obs)
        if store == "proposed":
            np.testing.assert_array_equal(buffer.actions[i], proposed)
            fine = np.array([0.0, 0.5 * (i % 3 == 0)])
            np.testing.assert_allclose(buffer.rewards[i], reward - fine, atol=1e-6)
        else:
            np.testing.assert_allclose(buffer.actions[i], executed, atol=1e-6)
            np.testing.assert_allclose(buffer.rewards[i], reward, atol=1e-6)
            if i % 3:
                np.testing.assert_array_equal(buffer.actions[i], proposed)
            else:
                assert np.abs(buffer.actions[i][1] - proposed[1]).max() > 0.1


@pytest.mark.parametrize("optimised", [False, True])
def test_without_interventions_every_store_samples_what_the_plain_buffer_does(
    optimised: bool,
) -> None:
    options = {"optimize_memory_usage": optimised, "handle_timeout_termination": not optimised}
    plain = ReplayBuffer(12, SIGHT, HELM, "cpu", n_envs=2, **options)
    rng = np.random.default_rng(3)
    for store in ("proposed", "executed", "both"):
        buffer = ShieldedReplayBuffer(
            12,
            SIGHT,
            HELM,
            "cpu",
            n_envs=2,
            store=store,
            **options,
        )
        for each in (plain, buffer):
            rng = np.random.default_rng(3)
            each.reset()
            for step in range(9):  # it wraps around
                actions = rng.uniform(HELM.low, HELM.high, (2, 2)).astype(np.float32)
                each.add(
                    rng.normal(size=(2, 3)),
                    rng.normal(size=(2, 3)),
                    np.stack([scaled(a) for a in actions]),
                    rng.normal(size=2),
                    np.array([step % 2 == 0, False]),
                    [told(a, a, **{"TimeLimit.truncated": step == 4}) for a in actions],
                )
        set_random_seed(5)
        one = plain.sample(64)
        set_random_seed(5)
        other = buffer.sample(64)
        for a, b in zip(one[:5], other[:5], strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype


@pytest.mark.parametrize("dicts", [False, True])
def test_both_draws_either_action_of_a_transition_with_its_own_reward(dicts: bool) -> None:
    kind: Any = ShieldedDictReplayBuffer if dicts else ShieldedReplayBuffer
    space = gym.spaces.Dict({"a": SIGHT}) if dicts else SIGHT
    buffer = kind(12, space, HELM, device="cpu", n_envs=2, store="both")
    rows = fill(buffer, 6, penalty=0.5)
    set_random_seed(0)
    drawn = buffer.sample(6000)
    observations = drawn.observations["a"] if dicts else drawn.observations
    after = drawn.next_observations["a"] if dicts else drawn.next_observations
    counts = np.zeros((6, 2, 2))
    assert drawn.rewards.dtype == torch.float32
    for j in range(600):
        step, column = next(
            (i, c)
            for i, row in enumerate(rows)
            for c in range(2)
            if np.array_equal(row[0][c], observations[j])
        )
        _, later, proposed, executed, reward, done = (part for part in rows[step])
        replaced = column == 1 and step % 3 == 0
        action = drawn.actions[j].numpy()
        mine = np.allclose(action, proposed[column], atol=1e-6)
        assert mine or np.allclose(action, executed[column], atol=1e-6)
        counts[step, column, int(mine)] += 1
        fine = 0.5 if replaced and mine else 0.0
        assert float(drawn.rewards[j]) == pytest.approx(float(reward[column]) - fine, abs=1e-6)
        np.testing.assert_array_equal(after[j], later[column])
        assert bool(drawn.dones[j]) == (bool(done[column]) and step != 2)
    # 600 draws from 12 transitions: some 25 of each action of the two that were replaced.
    for step in (0, 3):
        assert counts[step, 1].min() > 8
    assert counts.sum(axis=2).min() > 25  # and no transition counts twice


def test_integers_are_stored_as_they_are() -> None:
    buffer = ShieldedReplayBuffer(
        4, SIGHT, gym.spaces.Discrete(5), "cpu", n_envs=2, store="executed"
    )
    sight = np.zeros((2, 3))
    infos = [told(np.int64(3), np.int64(1)), told(np.int64(2), np.int64(2))]
    buffer.add(sight, sight, np.array([3, 2]), np.zeros(2), np.zeros(2), infos)
    assert buffer.actions[0].tolist() == [[1], [2]]
    with pytest.raises(ValueError, match="not those of the agent"):
        buffer.add(sight, sight, np.array([4, 2]), np.zeros(2), np.zeros(2), infos)


def test_buffers_say_what_they_need() -> None:
    with pytest.raises(ValueError, match=r"one of \['proposed', 'executed', 'both'\], got 'all'"):
        ShieldedReplayBuffer(4, SIGHT, HELM, store="all")
    action, sight = np.zeros((1, 2), np.float32), np.zeros((1, 3))
    add = [sight, sight, action, np.zeros(1), np.zeros(1)]
    for store in ("executed", "both"):
        buffer = ShieldedReplayBuffer(4, SIGHT, HELM, "cpu", store=store)
        with pytest.raises(ValueError, match="put SafetyShield around"):
            buffer.add(*add, [{"shield/intervened": False}])
        with pytest.raises(ValueError, match="RescaleAction"):
            buffer.add(*add, [told(np.array([0.0, 0.0]), np.array([0.0, 0.0]))])
        assert buffer.size() == 0
    plain = ShieldedReplayBuffer(4, SIGHT, HELM, "cpu")
    plain.add(*add, [{}])
    assert plain.size() == 1


@pytest.mark.parametrize("store", ["executed", "both"])
def test_with_rescale_action_around_the_shield_the_buffer_is_told_its_box(store: str) -> None:
    outer, inner = gym.spaces.Box(-1.0, 1.0, (2,)), gym.spaces.Box(-4.0, 2.0, (2,))
    sight = np.zeros((1, 3))
    buffer = ShieldedReplayBuffer(4, SIGHT, outer, "cpu", store=store, shield_space=inner)
    proposed = np.array([[0.5, -1.0]], np.float32)
    # RescaleAction: 0.5 of [-1, 1] is 0.5 of [-4, 2], and so on.
    info = told(np.array([0.5, -4.0], np.float32), np.array([-1.0, 2.0], np.float32))
    buffer.add(sight, sight, proposed, np.zeros(1), np.zeros(1), [info])
    np.testing.assert_allclose(buffer.actions[0], [[0.0, 1.0]], atol=1e-6)
    for wrong in (gym.spaces.Discrete(3), gym.spaces.Box(-4.0, 2.0, (3,))):
        with pytest.raises(ValueError, match="shield_space must be a Box"):
            ShieldedReplayBuffer(4, SIGHT, outer, "cpu", store=store, shield_space=wrong)
    other = ShieldedReplayBuffer(4, SIGHT, outer, "cpu", store=store)
    with pytest.raises(ValueError, match=r"shield_space=shield\.action_space"):
        other.add(sight, sight, proposed, np.zeros(1), np.zeros(1), [info])


def test_sac_under_a_rescaled_shield_stores_what_ran(shield: Shield) -> None:
    env = gym.wrappers.RescaleAction(
        SafetyShield(gym.make(BOAT), shield.with_delta(0.8)), np.float32(0), np.float32(4)
    )
    model = SAC(
        "MlpPolicy", env, buffer_size=100, learning_starts=100, device="cpu", seed=0,
        policy_kwargs={"net_arch": [4]}, replay_buffer_class=ShieldedReplayBuffer,
        replay_buffer_kwargs={"store": "executed", "shield_space": shield.action_space},
    )  # fmt: skip
    notes = Notes()
    model.learn(60, callback=notes)
    ran = np.stack([infos[0]["action_executed"] for infos, _ in notes.rows])
    assert any(infos[0]["shield/intervened"] for infos, _ in notes.rows)
    assert model.replay_buffer is not None
    np.testing.assert_allclose(model.replay_buffer.actions[: len(ran), 0], ran, atol=1e-5)


def test_dicts_of_observations_have_a_buffer_of_their_own() -> None:
    dicts = gym.spaces.Dict(sight=SIGHT)
    with pytest.raises(TypeError, match="ShieldedDictReplayBuffer"):
        ShieldedReplayBuffer(4, dicts, HELM, "cpu")  # type: ignore[arg-type]


class Notes(BaseCallback):
    """Everything that a step tells, kept."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[list[dict[str, Any]], Array]] = []

    def _on_step(self) -> bool:
        self.rows.append((list(self.locals["infos"]), np.array(self.locals["dones"])))
        return True

    def stack(self, key: str) -> Array:
        return np.array([[info[key] for info in infos] for infos, _ in self.rows])


@pytest.mark.parametrize("store", ["executed", "proposed", "both"])
def test_sac_stores_exactly_what_ran_in_an_uneven_action_box(
    skewed: tuple[Shield, gym.spaces.Box], store: str
) -> None:
    shield, box = skewed
    inner = DummyVecEnv([lambda: gym.wrappers.RescaleAction(river(), box.low, box.high)] * 2)
    model = SAC(
        "MlpPolicy",
        VecSafetyShield(inner, shield),
        learning_starts=40,
        batch_size=16,
        buffer_size=1000,
        replay_buffer_class=ShieldedReplayBuffer,
        replay_buffer_kwargs={"store": store},
        **small(),
    )
    notes = Notes()
    model.learn(120, notes)
    buffer = model.replay_buffer
    assert isinstance(buffer, ShieldedReplayBuffer)
    key = "action_proposed" if store == "proposed" else "action_executed"
    ran = notes.stack(key)
    expected = (ran - box.low) / (box.high - box.low) * 2 - 1
    np.testing.assert_allclose(buffer.actions[: buffer.pos], expected, atol=1e-6)
    assert 0 < notes.stack("shield/intervened").sum() < 120
    # And what the infos say ran is what the dynamics felt, in their own units.
    felt = np.array([[a for _, a in steps] for steps in seen(model.env)])
    np.testing.assert_allclose(felt.swapaxes(0, 1), model.policy.scale_action(
        notes.stack("action_executed")), atol=1e-6)  # fmt: skip


def test_saved_buffers_and_dict_policies(shield: Shield, tmp_path: Path) -> None:
    inner = DummyVecEnv([lambda: Named(SafetyShield(river(), shield))] * 2)
    model = SAC(
        "MultiInputPolicy",
        inner,
        learning_starts=10,
        batch_size=8,
        buffer_size=200,
        replay_buffer_class=ShieldedDictReplayBuffer,
        replay_buffer_kwargs={"store": "both"},
        **small(),
    )
    model.learn(40)
    model.save_replay_buffer(tmp_path / "buffer.pkl")
    kept = model.replay_buffer
    model.load_replay_buffer(tmp_path / "buffer.pkl")
    again = model.replay_buffer
    assert isinstance(kept, ShieldedDictReplayBuffer)
    assert isinstance(again, ShieldedDictReplayBuffer)
    np.testing.assert_array_equal(again.proposed_actions, kept.proposed_actions)
    model.learn(10, reset_num_timesteps=False)


def test_ppo_keeps_the_proposed_actions(shield: Shield) -> None:
    envs = VecMonitor(VecSafetyShield(rivers(2), shield))
    model = PPO("MlpPolicy", envs, n_steps=64, batch_size=64, n_epochs=1, **small())
    notes = Notes()
    model.learn(128, notes)
    # The buffer is flat after training: environment by environment.
    stored = model.rollout_buffer.actions.reshape(2, 64, 2).swapaxes(0, 1)
    proposed, executed = notes.stack("action_proposed"), notes.stack("action_executed")
    np.testing.assert_array_equal(np.clip(stored, -1, 1), proposed)
    assert 0 < (proposed != executed).any(axis=-1).sum() < 128


def test_random_warm_up_actions_are_covered(calibrated: Shield) -> None:
    for inside in (True, False):
        if inside:
            envs: VecEnv = DummyVecEnv([lambda: Monitor(SafetyShield(river(), calibrated))])
        else:
            envs = VecSafetyShield(rivers(1), calibrated)
        model = SAC("MlpPolicy", envs, learning_starts=100, buffer_size=200, **small())
        notes = Notes()
        model.learn(100, notes)
        states, actions = map(np.array, zip(*seen(envs)[0], strict=True))
        proposed = notes.stack("action_proposed")[:, 0]
        executed, report = calibrated.filter(states, proposed)
        assert len(actions) == 100
        np.testing.assert_allclose(actions, executed, atol=1e-5)
        # All that ran is acceptable but for the critics' error, and not for want of trying.
        assert (np.asarray(calibrated.value(states, actions)) <= 0.0).all()
        assert np.asarray(report.intervened).sum() > 3
        assert notes.stack("cost").sum() == 0


# -- what is counted ----------------------------------------------------------------------------


class Memory(KVWriter):
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:  # noqa: ANN401
        self.rows.append({"step": step, **key_values})

    def close(self) -> None: ...


def by_hand(notes: Notes, begin: int, end: int) -> dict[str, float]:
    """The callback's lines, from everything that the steps [begin, end) told."""
    infos = [info for row, _ in notes.rows[begin:end] for info in row]
    values = np.sort([info["shield/value"] for info in infos])
    quantiles = {
        f"shield/value_q{q:02d}": values[int(np.ceil(len(values) * q / 100)) - 1]
        for q in (5, 50, 95)
    }
    episodes, violations = 0, 0
    count = len(notes.rows[0][0])
    for i in range(count):
        violated = False
        for row, dones in notes.rows[:end]:
            if row[i]["constraint"] > 0 and not violated:
                violated = True
                violations += 1
            if dones[i]:
                episodes += 1
                violated = False
    return {
        **quantiles,
        "shield/intervention_rate": np.mean([info["shield/intervened"] for info in infos]),
        "shield/certified_share": np.mean([info["shield/certified"] for info in infos]),
        "shield/violations": violations,
        "shield/episodes": episodes,
    }


def into_the_rock() -> Env:
    """Half of the starts are inside a rock's shadow, where no shield helps."""

    class Doomed(gym.Wrapper):
        turn = 0

        def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
            self.turn += 1
            start = [-1.05, 0.5] if self.turn % 2 else [-2.0, 0.2]
            return self.env.reset(options={"state": start})

    return gym.wrappers.TimeLimit(Doomed(gym.make(BOAT, dt=DT).unwrapped), 17)


def test_the_callback_counts_what_a_hand_count_does_on_policy(calibrated: Shield) -> None:
    envs = VecSafetyShield(DummyVecEnv([into_the_rock] * 2), calibrated)
    model = PPO("MlpPolicy", envs, n_steps=40, batch_size=40, n_epochs=1, **small())
    memory, notes, callback = Memory(), Notes(), ShieldCallback()
    model.set_logger(Logger(None, [memory]))
    model.learn(240, [notes, callback], log_interval=1)
    assert [row["step"] for row in memory.rows] == [80, 160, 240]
    for i, row in enumerate(memory.rows):
        expected = by_hand(notes, 40 * i, 40 * (i + 1))
        assert {key: row[key] for key in row if key.startswith("shield/")} == pytest.approx(
            expected
        )
    assert callback.steps == 240
    assert callback.interventions == notes.stack("shield/intervened").sum() > 0
    assert callback.episodes == 2 * (120 // 17)
    assert 0 < callback.violating_episodes < callback.episodes


def test_the_callback_counts_off_policy_from_the_first_warm_up_step(calibrated: Shield) -> None:
    envs = VecSafetyShield(DummyVecEnv([into_the_rock]), calibrated)
    model = SAC("MlpPolicy", envs, learning_starts=60, batch_size=8, buffer_size=200, **small())
    memory, notes, callback = Memory(), Notes(), ShieldCallback()
    model.set_logger(Logger(None, [memory]))
    model.learn(110, [notes, callback], log_interval=2)
    assert [row["step"] for row in memory.rows] == [34, 68, 102]
    for i, row in enumerate(memory.rows):
        expected = by_hand(notes, 34 * i, 34 * (i + 1))
        assert {key: row[key] for key in row if key.startswith("shield/")} == pytest.approx(
            expected
        )
    totals = by_hand(notes, 0, 110)
    # The one that training cut off in a rock counts as well.
    assert callback.violating_episodes == totals["shield/violations"] == 4
    assert callback.episodes == 6
    assert callback.steps == 110
    assert callback.interventions == notes.stack("shield/intervened").sum()
    # Going on goes on counting; the unfinished episode does not count twice.
    model.learn(7, [notes, callback], reset_num_timesteps=False)
    assert callback.episodes == 6
    assert callback.violating_episodes == 4
    model.learn(9, [notes, callback], reset_num_timesteps=True)
    assert callback.steps == 126


def test_the_callback_beside_an_unshielded_environment() -> None:
    envs = DummyVecEnv([into_the_rock])
    model = PPO("MlpPolicy", envs, n_steps=34, batch_size=34, n_epochs=1, **small())
    with pytest.raises(ValueError, match="put SafetyShield around"):
        model.learn(34, ShieldCallback())
    callback = ShieldCallback(require_shield=False)
    model.learn(34, callback)
    assert (callback.episodes, callback.steps, callback.interventions) == (2, 34, 0)
    assert callback.violating_episodes >= 1


def test_the_callback_says_that_nothing_reports_violations() -> None:
    class Silent(gym.Wrapper):
        def step(self, action: Any) -> Any:  # noqa: ANN401
            return (*self.env.step(action)[:4], {})

    envs = DummyVecEnv([lambda: Silent(river())])
    model = PPO("MlpPolicy", envs, n_steps=8, batch_size=8, **small())  # fmt: skip
    memory = Memory()
    model.set_logger(Logger(None, [memory]))
    with pytest.warns(UserWarning, match="violations could not be counted"):
        model.learn(8, ShieldCallback(require_shield=False))
    assert "shield/violations" not in memory.rows[0]


@pytest.mark.parametrize("report", [{"cost": 1.0}, {"constraint": np.nan}, {"cost": np.int64(1)}])
def test_what_counts_as_a_violation(report: dict[str, Any]) -> None:
    callback = ShieldCallback(require_shield=False)
    callback._violated = np.zeros(2, dtype=bool)
    for info in ({"cost": 0.0, "constraint": -0.1}, report, report):
        callback._count_violation(1, info)
    assert callback.violating_episodes == 1


# -- evaluation ---------------------------------------------------------------------------------


class Downstream:
    """Always with the current, whatever lies there."""

    def predict(self, observation: Array, state: Any = None, **_: Any) -> tuple[Array, Any]:  # noqa: ANN401
        return np.tile(np.array([1.0, 0.0], np.float32), (len(observation), 1)), state


def test_evaluate_policy_gives_the_same_behind_predict_and_around_the_environment(
    shield: Shield,
) -> None:
    results = []
    for policy, envs in (
        (Downstream(), VecSafetyShield(DummyVecEnv([lambda: Monitor(river(60))] * 2), shield)),
        (Downstream(), VecMonitor(VecSafetyShield(rivers(2, steps=60), shield))),
        (Downstream(), DummyVecEnv([lambda: Monitor(SafetyShield(river(60), shield))] * 2)),
        (ShieldedPolicy(Downstream(), shield), DummyVecEnv([lambda: Monitor(river(60))] * 2)),
        (Downstream(), DummyVecEnv([lambda: Monitor(river(60))] * 2)),
    ):
        costs: list[float] = []
        returns, lengths = evaluate_policy(
            policy,
            envs,
            n_eval_episodes=4,
            return_episode_rewards=True,
            callback=lambda scope, _, costs=costs: costs.append(scope["info"]["cost"]),
        )
        assert lengths == [60] * 4
        results.append((returns, sum(costs)))
    for returns, cost in results[:4]:
        np.testing.assert_allclose(returns, results[0][0], atol=1e-3)
        assert cost == 0
    assert results[4][1] > 0


def test_evalcallback_on_shielded_environments(shield: Shield, tmp_path: Path) -> None:
    training = VecMonitor(VecSafetyShield(rivers(2), shield))
    evaluation = VecMonitor(VecSafetyShield(rivers(1), shield))
    callback = EvalCallback(evaluation, n_eval_episodes=2, eval_freq=32, verbose=0,
                            best_model_save_path=str(tmp_path))  # fmt: skip
    model = PPO("MlpPolicy", training, n_steps=32, batch_size=32, n_epochs=1, **small())
    model.learn(128, [callback, ShieldCallback()])
    assert np.isfinite(callback.best_mean_reward)
    assert (tmp_path / "best_model.zip").is_file()


def test_dqn_needs_a_shield_of_its_own_actions(shield: Shield) -> None:
    """A shield of continuous helms is refused by name around discrete ones."""

    class Keys(gym.ActionWrapper):
        def __init__(self, env: Env) -> None:
            super().__init__(env)
            self.action_space = gym.spaces.Discrete(4)

        def action(self, action: Any) -> Array:  # noqa: ANN401
            angle = 0.5 * np.pi * float(action)
            return np.array([np.cos(angle), np.sin(angle)], np.float32)

    with pytest.raises(ValueError, match="action_space mismatch"):
        VecSafetyShield(DummyVecEnv([lambda: Keys(river())]), shield)
    # Inside the shield's own units an agent of any kind may steer: here the shield is below.
    envs = DummyVecEnv([lambda: Keys(SafetyShield(river(), shield))])
    with pytest.raises(ValueError, match="RescaleAction"):
        DQN("MlpPolicy", envs, buffer_size=50, replay_buffer_class=ShieldedReplayBuffer,
            replay_buffer_kwargs={"store": "executed"}, **small()).learn(5)  # fmt: skip


# -- worker processes ---------------------------------------------------------------------------


def blas_threads() -> list[int]:
    names = ("scipy_openblas_get_num_threads64_", "openblas_get_num_threads64_")
    out = []
    for library in Path(np.__file__).parent.with_name("numpy.libs").glob("*openblas*"):
        loaded = ctypes.CDLL(str(library))
        out += [getattr(loaded, name)() for name in names if hasattr(loaded, name)]
    return out


def steps_of(envs: VecEnv, actions: Array) -> list[Any]:
    envs.reset()
    results = [envs.step(batch) for batch in actions]
    envs.close()
    return results


def boat_maker() -> Callable[[], Env]:
    # Made in a function, so that it is pickled by value: workers need not import the tests.
    def make() -> Env:
        import gymnasium

        env = gymnasium.make("safeshield/Boat-v0", dt=0.02, max_episode_steps=4)

        class Counts(gymnasium.Wrapper):
            def blas(self) -> int:
                import ctypes
                from pathlib import Path

                import numpy

                for library in Path(numpy.__file__).parent.with_name("numpy.libs").glob("*blas*"):
                    get = getattr(ctypes.CDLL(str(library)), "scipy_openblas_get_num_threads64_", 0)
                    if get:
                        return int(get())
                return 1

            def reset(self, **kwargs: Any) -> Any:  # noqa: ANN401
                return self.env.reset(options={"state": [-1.32, 0.6]})

        return Counts(env)

    return make


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_subprocesses_do_what_one_process_does(
    path: Path, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Workers must not owe their one thread to the variables of this process.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    make = boat_maker()
    actions = np.random.default_rng(0).uniform(-1, 1, (10, 2, 2)).astype(np.float32)
    actions[:, :, 0] = 1.0
    here = steps_of(DummyVecEnv([lambda: SafetyShield(make(), path)] * 2), actions)
    there = SubprocVecEnv([worker_env(make, path)] * 2, start_method=start)
    assert there.env_is_wrapped(SafetyShield) == [True, True]
    assert there.env_method("blas") == [1, 1]
    flags = []
    for one, other in zip(here, steps_of(there, actions), strict=True):
        np.testing.assert_allclose(one[0], other[0], atol=1e-5)
        np.testing.assert_array_equal(one[2], other[2])
        for mine, theirs in zip(one[3], other[3], strict=True):
            assert_same_infos(mine, theirs)
            flags.append(mine["shield/intervened"])
    assert {True, False} == set(flags)


def test_a_shield_around_subprocesses(path: Path) -> None:
    make = boat_maker()
    actions = np.random.default_rng(0).uniform(-1, 1, (6, 2, 2)).astype(np.float32)
    here = steps_of(VecSafetyShield(DummyVecEnv([make] * 2), path), actions)
    forked = SubprocVecEnv([make] * 2, start_method="fork")
    there = steps_of(VecSafetyShield(forked, path, intervention_penalty=0.5), actions)
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        fines = [info.pop("shield/penalty") for info in other[3]]
        np.testing.assert_allclose(one[1] - fines, other[1], atol=1e-6)
        for mine, theirs in zip(one[3], other[3], strict=True):
            assert_same_infos(mine, theirs)


def test_make_vec_env_takes_the_wrapper_and_a_path(path: Path) -> None:
    envs = make_vec_env(
        BOAT,
        2,
        env_kwargs={"dt": DT},
        wrapper_class=SafetyShield,
        wrapper_kwargs={"shield": str(path)},
        vec_env_cls=SubprocVecEnv,
        vec_env_kwargs={"start_method": "fork"},
    )
    infos = steps_of(envs, np.zeros((1, 2, 2), np.float32))[0][3]
    assert all(KEYS.keys() <= info.keys() for info in infos)


def test_environment_functions_and_shielded_environments_pickle(path: Path, shield: Shield) -> None:
    for given in (path, str(path), shield):
        make = cloudpickle.loads(cloudpickle.dumps(worker_env(boat_maker(), given)))
        before = blas_threads()
        env = make()
        assert blas_threads() == before  # this is no worker
        assert isinstance(env, SafetyShield)
        twin = cloudpickle.loads(cloudpickle.dumps(env))
        (one, _), (other, _) = env.reset(seed=1), twin.reset(seed=1)
        np.testing.assert_array_equal(one, other)
    small = len(cloudpickle.dumps(worker_env(boat_maker(), path)))
    assert small < 10_000  # the model is read in the worker


def test_a_worker_is_not_started_for_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no shield's file"):
        worker_env(river, tmp_path / "none.safetensors")
    with pytest.raises(TypeError, match="shield must be"):
        worker_env(river, 3)


def test_an_uncalibrated_shield_warns_once(shield: Shield) -> None:
    fresh = shield.with_delta(0.05)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        envs = VecSafetyShield(rivers(2), fresh)
        steps_of(envs, np.zeros((3, 2, 2), np.float32))
    assert sum("not calibrated" in str(one.message) for one in caught) == 1
