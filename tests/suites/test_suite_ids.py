"""Every id of every suite: made, reset, stepped, shielded, copied, and sent to other processes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from shields import untrained_shield
from stable_baselines3.common.vec_env import SubprocVecEnv

import safeshield.suites
from safeshield.rollouts.copies import vectorise
from safeshield.suites import TASKS, Family, Task, bullet, safety_gymnasium
from safeshield.suites.safety_gymnasium import five_values_id, native_ids
from safeshield.wrappers import CostFromStep, SafetyShield, VectorSafetyShield

Env = gym.Env[Any, Any]

# MetaDrive's engine exists once in a process: what takes several copies is tested beside it.
COPIED = [task for task in TASKS.values() if task.family is not Family.metadrive]
ONE_OF_EACH = ["PointGoal1", "SwimmerVelocity", "CarRun"]
OFFLINE_OF_EACH = [TASKS["CarCircle1"].offline_id, TASKS["HopperVelocity"].offline_id,
                   TASKS["BallCircle"].offline_id]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def steps(env: Env, seed: int, count: int) -> list[Any]:
    """The observations, rewards and costs of `count` steps of random actions."""
    observation, _ = env.reset(seed=seed)
    env.action_space.seed(seed)
    rows: list[Any] = [observation]
    for _ in range(count):
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
        rows += [observation, reward, info["cost"]]
        if terminated or truncated:
            break
    return rows


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left, right))


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_task_is_made_reset_stepped_and_shielded(task: Task) -> None:
    env = gym.make(f"safeshield.suites:{task.env_id}")
    assert env.spec is not None
    assert env.spec.max_episode_steps == task.horizon
    # So strict that it accepts nothing: each step executes what the shield has chosen.
    shielded = SafetyShield(env, untrained_shield(env).with_delta(1e3))
    observation, _ = shielded.reset(seed=0)
    assert env.observation_space.contains(observation)
    env.action_space.seed(0)
    for _ in range(10):
        action = env.action_space.sample()
        observation, reward, terminated, truncated, info = shielded.step(action)
        assert env.observation_space.contains(observation)
        assert np.isfinite(float(reward))
        assert info["cost"] >= 0
        assert info["shield/intervened"]
        assert not np.array_equal(info["action_executed"], action)
        if terminated or truncated:
            break
    shielded.close()


@pytest.mark.parametrize("task", COPIED, ids=lambda task: task.name)
def test_dsrls_own_environments_are_the_same_tasks(task: Task) -> None:
    plain, offline = gym.make(task.env_id), gym.make(task.offline_id)
    assert same(steps(plain, 3, 20), steps(offline, 3, 20))
    reference: Any = offline.unwrapped
    assert reference.min_episode_reward == task.min_return
    assert reference.max_episode_reward == task.max_return
    plain.close()
    offline.close()


@pytest.mark.parametrize("family", [safety_gymnasium, bullet])
def test_every_id_that_a_package_registers_is_registered(family: ModuleType) -> None:
    code = (
        f"import json, gymnasium as gym; b = set(gym.registry); import {family.UPSTREAM.package}\n"
        + (
            "print(json.dumps({i: [s.max_episode_steps, s.reward_threshold]"
            " for i, s in gym.registry.items() if i not in b}))"
        )
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    theirs = json.loads(result.stdout)
    ids = bullet.IDS if family is bullet else safety_gymnasium._ALL
    assert set(theirs) == set(ids)
    for env_id, (horizon, threshold) in theirs.items():
        spec = gym.spec(env_id)
        assert str(spec.entry_point).startswith(f"{family.__name__}:")
        assert (spec.max_episode_steps, spec.reward_threshold) == (horizon, threshold)


def test_what_another_package_has_registered_over_it_is_taken_back() -> None:
    task = TASKS["BallRun"]
    entry_point = gym.spec(task.env_id).entry_point
    gym.register(task.env_id, entry_point="bullet_safety_gym.envs.builder:EnvironmentBuilder")
    gym.register(task.offline_id, entry_point="dsrl.offline_bullet_safety_gym.gym_envs:x")
    safeshield.suites.register_envs()
    assert gym.spec(task.env_id).entry_point == entry_point
    assert gym.spec(task.env_id).max_episode_steps == task.horizon
    assert len(steps(gym.make(task.offline_id), 0, 500)) == 1 + 3 * task.horizon


@pytest.mark.parametrize("robot", ["Point", "Car", "Doggo", "Racecar", "Ant"])
def test_the_other_robots(robot: str) -> None:
    env = gym.make(f"Safety{robot}Run0Gymnasium-v0")
    assert len(steps(env, 0, 3)) == 10
    env.close()


@pytest.mark.parametrize(
    "native", ["SafetyCarGoal1-v0", "SafetyWalker2dVelocity-v1", "OfflinePointPush1-v0"]
)
def test_native_ids_have_six_values_and_become_five(native: str) -> None:
    assert native in native_ids() or native.startswith("Offline")
    expected = steps(gym.make(five_values_id(native)), 5, 30)
    converted = CostFromStep(gym.make(native))
    assert same(steps(converted, 5, 30), expected)
    assert converted.spec is not None
    assert same(steps(gym.make(converted.spec), 5, 30), expected)
    inner = gym.make(native).unwrapped
    inner.reset(seed=0)
    assert len(inner.step(inner.action_space.sample())) == 6


def test_six_values_are_told_where_five_are_needed() -> None:
    env = gym.make("SafetyHopperVelocity-v1", disable_env_checker=True)
    envs = vectorise(env, 1)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="SafetyPointGoal1Gymnasium-v0"):
        envs.step(envs.action_space.sample())


@pytest.mark.parametrize("env_id", [*(TASKS[name].env_id for name in ONE_OF_EACH),
                                    *OFFLINE_OF_EACH])  # fmt: skip
def test_specs_rebuild_it_and_copies_are_the_same(env_id: str) -> None:
    env = gym.make(env_id)
    assert env.spec is not None
    expected = steps(env, 1, 10)
    assert same(steps(gym.make(env.spec), 1, 10), expected)
    assert same(steps(gym.make(EnvSpec.from_json(env.spec.to_json())), 1, 10), expected)
    makers: list[Callable[[], Any]] = [
        lambda: vectorise(env, 2),
        lambda: gym.make_vec(env_id, num_envs=2, vectorization_mode="sync"),
        lambda: gym.vector.SyncVectorEnv([lambda: gym.make(env_id)] * 2),
        lambda: gym.make_vec(env_id, num_envs=2, vectorization_mode="async"),
    ]
    for make in makers:
        envs = make()
        observations, _ = envs.reset(seed=1)
        np.testing.assert_array_equal(observations[0], expected[0])
        actions = np.stack([np.zeros(env.action_space.shape, "f4")] * 2)
        _, _, _, _, infos = envs.step(actions)
        assert np.shape(infos["cost"]) == (2,)
        envs.close()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_shielded_one_is_rebuilt_from_its_specs_json(name: str, tmp_path: Path) -> None:
    env = gym.make(TASKS[name].env_id)
    file = tmp_path / "shield.safetensors"
    untrained_shield(env).save(file)
    shielded = SafetyShield(env, file)
    assert shielded.spec is not None
    rebuilt = gym.make(EnvSpec.from_json(shielded.spec.to_json()))
    assert isinstance(rebuilt, SafetyShield)
    assert same(steps(rebuilt, 2, 10), steps(shielded, 2, 10))


def test_a_vector_of_them_is_shielded() -> None:
    env = gym.make(TASKS["PointCircle1"].env_id)
    envs = VectorSafetyShield(vectorise(env, 3), untrained_shield(env))
    envs.reset(seed=0)
    _, _, _, _, infos = envs.step(np.ones((3, 2)))
    assert infos["shield/intervened"].shape == infos["cost"].shape == (3,)
    envs.close()


@pytest.mark.parametrize("env_id", [TASKS["PointGoal1"].env_id, TASKS["AntRun"].env_id,
                                    TASKS["HopperVelocity"].env_id])  # fmt: skip
def test_check_env(env_id: str) -> None:
    check_env(gym.make(env_id, disable_env_checker=True).unwrapped, skip_render_check=True)


# In a module of its own, so that a process that starts afresh can import it, and nothing else.
WORKER = """
import gymnasium as gym
import numpy as np

def main():
    import safeshield.suites
    from gymnasium.vector import AsyncVectorEnv
    {body}

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_make_them_from_a_spec_or_from_an_id_that_names_its_module(
    tmp_path: Path, start: str
) -> None:
    script = tmp_path / "workers.py"
    script.write_text(
        WORKER.format(
            body=f"""
    for env_id in {[TASKS[name].env_id for name in ONE_OF_EACH]}:
        env = gym.make(env_id)
        spec = env.spec
        expected, _ = env.reset(seed=4)
        makers = [lambda: gym.make(spec), lambda: gym.make("safeshield.suites:" + env_id)]
        envs = AsyncVectorEnv(makers, context="{start}")
        observations, _ = envs.reset(seed=[4, 4])
        assert np.array_equal(observations, np.stack([expected] * 2)), env_id
        _, _, _, _, infos = envs.step(envs.action_space.sample())
        assert infos["cost"].shape == (2,)
        envs.close()
        print(env_id)
    """
        )
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == len(ONE_OF_EACH)


def test_stable_baselines3s_workers_make_them() -> None:
    spec = gym.spec(TASKS["BallCircle"].env_id)
    envs = SubprocVecEnv([lambda: gym.make(spec)] * 2, start_method="fork")
    envs.seed(4)
    observations = envs.reset()
    env = gym.make(spec)
    np.testing.assert_allclose(observations[0], env.reset(seed=4)[0])  # type: ignore[index]
    _, _, _, infos = envs.step(np.zeros((2, 2), "f4"))
    assert all("cost" in info for info in infos)
    envs.close()
