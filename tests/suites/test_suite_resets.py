"""Resets of navigation tasks: without the sky, bit for bit what Safety-Gymnasium's own are."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
from PIL import Image

from safeshield.suites import TASKS, Family, safety_gymnasium

# Seeds whose episodes cost something, beside others.
SEEDS = {"Goal1": (0, 1, 2), "Button1": (0, 1), "Push1": (0, 3, 4), "Circle1": (0, 1, 4)}
STEPS = 200
SKY = int(mujoco.mjtTexture.mjTEXTURE_SKYBOX)


def textures(env: gym.Env[Any, Any]) -> list[int]:
    model: Any = env.unwrapped
    return [int(kind) for kind in model.task.world.model.tex_type]


def actions(env: gym.Env[Any, Any], seed: int) -> list[np.ndarray]:
    """Each held for twenty steps, strong enough to get somewhere."""
    rng = np.random.default_rng(seed)
    held = [rng.uniform(-1, 1, env.action_space.shape) for _ in range(STEPS // 20)]
    return [np.clip(2 * action, -1, 1) for action in held for _ in range(20)]


@pytest.fixture
def small_sky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give Safety-Gymnasium a sky of small pictures: the same model, built in no time."""
    safety_gymnasium.UPSTREAM.load("this test")
    from safety_gymnasium import world

    home = Path(world.BASE_DIR)
    (tmp_path / "assets" / "textures").mkdir(parents=True)
    for part in ("configs", "assets/xmls", "assets/meshes"):
        (tmp_path / part).symlink_to(home / part)
    for picture in (home / "assets" / "textures").glob("star_hd.*.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "assets" / "textures" / picture.name)
    monkeypatch.setattr(world, "BASE_DIR", str(tmp_path))


def compare_with_upstream(name: str, seeds: Sequence[int]) -> tuple[float, float, float]:
    """Return the shortest reset with the sky, the longest without (CPU s), the sum of costs."""
    task = TASKS[name]
    env = gym.make(task.env_id)
    safety_gymnasium.UPSTREAM.load("this test")
    from safety_gymnasium.builder import Builder

    robot = "Car" if name.startswith("Car") else "Point"
    native = safety_gymnasium.native_id(task.env_id)
    theirs = Builder(task_id=native, config={"agent_name": robot})
    with_sky, without, costs = [], [], 0.0
    for seed in seeds:
        started = time.process_time()
        expected, _ = theirs.reset(seed=seed)
        with_sky.append(time.process_time() - started)
        started = time.process_time()
        observation, _ = env.reset(seed=seed)
        without.append(time.process_time() - started)
        np.testing.assert_array_equal(observation, expected)
        assert SKY in [int(kind) for kind in theirs.task.world.model.tex_type]
        assert SKY not in textures(env)
        for action in actions(env, seed):
            expected, reward, cost, *ends, _ = theirs.step(action)
            observation, *rest, info = env.step(action)
            np.testing.assert_array_equal(observation, expected)
            assert rest == [reward, *ends]
            assert info["cost"] == cost
            costs += cost
    return min(with_sky), max(without), costs


@pytest.mark.usefixtures("small_sky")
@pytest.mark.parametrize("task", SEEDS)
@pytest.mark.parametrize("robot", ["Point", "Car"])
def test_trajectories_are_the_same_with_a_sky_and_without(robot: str, task: str) -> None:
    # The first reset of an environment goes another way than later ones.
    _, _, costs = compare_with_upstream(f"{robot}{task}", SEEDS[task])
    assert costs > 0


@pytest.mark.parametrize("name", ["PointGoal1", "CarCircle1"])
def test_they_are_with_the_stars_and_resets_are_faster(name: str) -> None:
    with_sky, without, _ = compare_with_upstream(name, seeds=(0, 1))
    assert with_sky > 10 * without


@pytest.mark.usefixtures("small_sky")
def test_rendering_brings_the_sky_back() -> None:
    env = gym.make(TASKS["CarGoal1"].env_id, render_mode="rgb_array")
    env.reset(seed=0)
    assert SKY in textures(env)
    bare = gym.make(TASKS["CarGoal1"].env_id)
    bare.reset(seed=0)
    assert SKY not in textures(bare)
    inner: Any = bare.unwrapped
    inner.render_parameters.mode = "rgb_array"  # from the next reset on
    bare.reset(seed=0)
    assert SKY in textures(bare)


def test_what_looks_at_pictures_keeps_them() -> None:
    env: Any = gym.make("SafetyPointGoal1Vision-v0").unwrapped
    assert safety_gymnasium._renders(env)
    debug: Any = gym.make("SafetyPointGoal1Debug-v0").unwrapped
    assert safety_gymnasium._renders(debug)


PICTURES = """
import gymnasium
import safeshield.suites
for render_mode in ("rgb_array", None):
    env = gymnasium.make("SafetyPointGoal1Gymnasium-v0", render_mode=render_mode)
    env.reset(seed=0)
    inner = env.unwrapped
    picture = env.render() if render_mode else inner.task.render(256, 256, "rgb_array", cost={})
    assert picture.shape == (256, 256, 3), picture.shape
    print(len({tuple(pixel) for pixel in picture[:60].reshape(-1, 3)}))
"""


def test_a_picture_shows_stars() -> None:
    """Where there is a library to draw with; elsewhere the error is about that."""
    result = subprocess.run(
        [sys.executable, "-c", PICTURES], capture_output=True, text=True, timeout=120,
        env={**os.environ, "MUJOCO_GL": "egl"},
    )  # fmt: skip
    if ctypes.util.find_library("EGL"):
        stars, none = map(int, result.stdout.split())
        assert stars > 5 * none, result.stderr  # colours of the upper quarter
    else:
        assert "EGL" in result.stderr


@pytest.mark.parametrize("name", ["PointButton2", "CarPush2"])
def test_layouts_are_drawn_as_theirs_are(name: str) -> None:
    env: Any = gym.make(TASKS[name].env_id).unwrapped
    env.reset(seed=0)
    generator = env.task.random_generator
    from safety_gymnasium.utils.random_generator import RandomGenerator

    outcomes = set()
    for seed in range(60):
        generator.set_random_seed(seed)
        theirs = RandomGenerator()
        theirs.set_placements_info(generator.placements, generator.placements_extents,
                                   generator.placements_margin)  # fmt: skip
        theirs.set_random_seed(seed)
        done = theirs.sample_layout()
        assert generator.sample_layout() is done
        outcomes.add(done)
        ours, other = generator.random_generator, theirs.random_generator
        assert ours.uniform() == other.uniform()  # as many draws
        if done:
            assert generator.layout.keys() == theirs.layout.keys()
            for key, place in theirs.layout.items():
                np.testing.assert_array_equal(generator.layout[key], place)
    assert True in outcomes or name == "PointButton2"
    assert False in outcomes or name == "CarPush2"


def test_every_navigation_task_resets_for_many_seeds() -> None:
    for task in TASKS.values():
        if task.family is Family.navigation and "Button" not in task.name:
            env = gym.make(task.env_id, disable_env_checker=True)
            for seed in range(5):
                assert env.observation_space.contains(env.reset(seed=seed)[0])
