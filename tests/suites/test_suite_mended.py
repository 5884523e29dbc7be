"""Each thing that is mended, in the package that needs it: broken without, whole with, put back."""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import pickle
import random
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest

from safeshield.suites import TASKS, bullet, compat, safety_gymnasium


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )  # fmt: skip


# -- arrays as defaults of dataclasses ---------------------------------------------------------


def test_without_it_python_refuses_safety_gymnasium() -> None:
    result = python("import safety_gymnasium.builder")
    assert "mutable default <class 'numpy.ndarray'>" in result.stderr


def test_array_defaults_are_copied_and_the_decorator_is_put_back() -> None:
    code = """
import dataclasses, inspect, sys
original = dataclasses.dataclass
import safeshield.suites
from safeshield.suites import safety_gymnasium
safety_gymnasium.UPSTREAM.load("this test")
from safety_gymnasium.assets.color import COLOR
from safety_gymnasium.assets.geoms import Goal, GEOMS_REGISTER
from safety_gymnasium.assets.free_geoms import FREE_GEOMS_REGISTER
from safety_gymnasium.assets.mocaps import MOCAPS_REGISTER
assert dataclasses.dataclass is original
others = [m for m in sys.modules.values() if getattr(m, "dataclass", original) is not original]
assert not others, others
kinds = [*GEOMS_REGISTER, *FREE_GEOMS_REGISTER, *MOCAPS_REGISTER]
assert len(kinds) >= 10
for kind in kinds:
    field = kind.__dataclass_fields__["color"]
    one, other = field.default_factory(), field.default_factory()
    assert one is not other and (one == other).all() and one.shape == (4,)
goal = Goal()
assert (goal.color == COLOR["goal"]).all()
goal.color[:] = 0.5
assert not (Goal().color == goal.color).all()
print("fine")
"""
    result = python(code)
    assert result.stdout.strip() == "fine", result.stderr


def test_everything_that_is_imported_late_is_imported_while_it_is_mended() -> None:
    # Its own `make` would import the builder and the tasks when nothing is mended any more.
    code = """
import gymnasium, sys
import safeshield.suites
assert "safety_gymnasium" in sys.modules and "safety_gymnasium.builder" not in sys.modules
import safety_gymnasium
for make in (safety_gymnasium.make, gymnasium.make):
    env = make("SafetyPointGoal1-v0")
    env.reset(seed=0)
    assert len(env.unwrapped.step(env.action_space.sample())) == 6
env = gymnasium.make("SafetyAntVelocityGymnasium-v0")
env.reset(seed=0)
assert len(env.step(env.action_space.sample())) == 5
print("fine")
"""
    result = python(code)
    assert result.stdout.strip() == "fine", result.stderr


def test_nothing_warns_whoever_imports_what_first() -> None:
    imports = ["import safeshield.suites", "import safety_gymnasium", "import bullet_safety_gym"]
    for order in (imports, imports[::-1]):
        code = "\n".join([
            "import gymnasium, warnings", "warnings.simplefilter('error', UserWarning)", *order,
            "env = gymnasium.make('SafetyCarGoal2Gymnasium-v0')", "env.reset(seed=0)",
            "env = gymnasium.make('SafetyBallRun-v0')", "env.reset(seed=0)", "print('fine')",
        ])  # fmt: skip
        result = python(code)
        assert result.stdout.strip() == "fine", result.stderr


def test_a_list_is_an_action() -> None:
    env = gym.make("SafetyPointGoal1Gymnasium-v0", disable_env_checker=True)
    env.reset(seed=0)
    from_list = env.step([0.5, -0.25])
    env = gym.make("SafetyPointGoal1Gymnasium-v0", disable_env_checker=True)
    env.reset(seed=0)
    np.testing.assert_array_equal(env.step(np.array([0.5, -0.25]))[0], from_list[0])


# -- Bullet: streams, seeds, rendering ---------------------------------------------------------


def test_environments_are_made_where_streams_have_no_file() -> None:
    bullet.UPSTREAM.load("this test")
    from bullet_safety_gym.envs.builder import RedirectStream

    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        with pytest.raises(io.UnsupportedOperation), RedirectStream(sys.stdout):
            pass
        env = gym.make("SafetyBallRun-v0")
        offline = gym.make("OfflineBallRun-v0")
        assert (sys.stdout, sys.stderr) == (out, err)
    env.reset(seed=0)
    offline.reset(seed=0)
    env.close()
    offline.close()


def trajectory(env: gym.Env[Any, Any], seed: int | None, count: int = 60) -> list[Any]:
    rows: list[Any] = [env.reset(seed=seed)[0]]
    rng = np.random.default_rng(0)
    for _ in range(count):
        observation, reward, terminated, truncated, info = env.step(
            rng.uniform(-1, 1, env.action_space.shape).astype("f4")
        )
        rows += [observation, reward, info["cost"]]
        if terminated or truncated:
            break
    return rows


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left, right))


# Boxes that move by the clock: no seed makes two runs of these alike.
CLOCKED = ("SafetyBallReach-v0", "SafetyAntReach-v0", "SafetyDroneReach-v0")


@pytest.mark.parametrize("env_id", [one for one in bullet.IDS if one not in CLOCKED])
def test_a_seed_gives_a_new_environments_trajectory(env_id: str) -> None:
    env = gym.make(env_id)
    first = trajectory(env, 0)
    others = [trajectory(env, 5), trajectory(env, 7, count=7), trajectory(env, None)]
    assert not any(same(other, first) for other in others)
    assert same(trajectory(env, 0), first)
    assert same(trajectory(gym.make(env_id), 0), first)
    env.close()


@pytest.mark.parametrize("name", ["CarCircle", "DroneRun"])
def test_it_is_bullets_own_trajectory_and_global_draws_go_on(name: str) -> None:
    env = gym.make(TASKS[name].env_id)
    env.reset(seed=9)
    np.random.seed(3)  # noqa: NPY002
    expected_draws = np.random.RandomState(3).uniform(size=2)
    random.seed(3)
    expected_python = random.Random(3).random()
    ours = trajectory(env, 5)
    np.testing.assert_array_equal(np.random.uniform(size=2), expected_draws)  # noqa: NPY002
    assert random.random() == expected_python

    with compat.streams_with_files():
        upstream_class = type(env.unwrapped).__mro__[3]
        assert upstream_class.__module__ == "bullet_safety_gym.envs.builder"
        spec = bullet.UPSTREAM.specs[TASKS[name].env_id]
        upstream: Any = upstream_class(**spec.kwargs)
    with compat.Draws(5).in_place():
        theirs = trajectory(upstream, None)
    assert same(ours, theirs)
    env.close()


def test_without_a_seed_it_is_left_to_the_global_generators() -> None:
    env = gym.make("SafetyBallCircle-v0")
    starts = []
    for _ in range(2):
        np.random.seed(11)  # noqa: NPY002
        starts.append(env.reset()[0])
    np.testing.assert_allclose(*starts)
    env.close()


def test_pictures_of_bullet_need_no_display(monkeypatch: pytest.MonkeyPatch) -> None:
    for env_id in ("SafetyBallRun-v0", "OfflineBallRun-v0"):
        env = gym.make(env_id, render_mode="rgb_array")
        env.reset(seed=0)
        picture: Any = env.render()
        assert picture.shape[2] == 3
        assert picture.dtype == np.uint8
        assert picture.std() > 1
        env.close()
    env = gym.make("SafetyBallRun-v0", render_mode="rgb_array_list")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert len(env.render()) == 2  # type: ignore[arg-type]
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(ValueError, match="no display here"):
        gym.make("SafetyBallRun-v0", render_mode="human")
    with pytest.raises(ValueError, match="must be None or one of"):
        bullet.make("SafetyBallRun-v0", render_mode="depth_array")
    with pytest.raises(ValueError, match="render_mode='rgb_array'"):
        gym.make("SafetyBallRun-v0").unwrapped.render()


# -- DSRL: quiet, without its server -----------------------------------------------------------

QUIET = """
import os
import pickle
import gymnasium, warnings
warnings.simplefilter("error", UserWarning)
import safeshield.suites
before = dict(os.environ)
env = gymnasium.make("OfflinePointGoal1Gymnasium-v0")
env.reset(seed=0)
assert dict(os.environ) == before
assert gymnasium.spec("OfflineBallRun-v0").entry_point.startswith("safeshield.suites.dsrl:")
print("fine")
"""


def test_dsrl_is_imported_without_a_word_and_without_taking_its_ids(tmp_path: Path) -> None:
    result = python(QUIET, DSRL_DATASET_DIR=str(tmp_path / "sets"))
    assert result.stdout.strip() == "fine", result.stderr
    assert "failed to import" not in result.stderr
    loud = python("import dsrl", DSRL_DATASET_DIR=str(tmp_path / "sets"))
    assert "failed to import" in loud.stderr  # of old gym, for MetaDrive


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    result = python(QUIET, DSRL_DATASET_DIR=str(file / "sets"))
    assert "environment variable DSRL_DATASET_DIR" in result.stderr


def test_its_datasets_are_read_from_files_and_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a connection to {args}, {kwargs}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    env = gym.make("OfflineBallRun-v0")
    env.reset(seed=0)
    reference: Any = env.unwrapped
    with h5py.File(tmp_path / "log.hdf5", "w") as file:
        for key, width in {"observations": 7, "next_observations": 7, "actions": 2}.items():
            file[key] = np.zeros((5, width), "f4")
        for key in ("rewards", "costs", "terminals", "timeouts"):
            file[key] = np.arange(5.0)
    assert reference.get_dataset(h5path=str(tmp_path / "log.hdf5"))["rewards"].tolist() == [
        0.0, 1.0, 2.0, 3.0, 4.0
    ]  # fmt: skip
    reference.set_target_cost(10)
    task = TASKS["BallRun"]
    normalised = reference.get_normalized_score(task.max_return, 5.0)
    assert normalised == (1.0, 0.5)
    env.close()


# -- the loaders themselves --------------------------------------------------------------------


def test_a_failing_import_says_so_and_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    original = dataclasses.dataclass
    registered = dict(gym.registry)

    def broken(name: str) -> object:
        raise RuntimeError(f"no {name} today")

    monkeypatch.setattr("importlib.import_module", broken)
    safety_gymnasium.UPSTREAM.loaded = False
    bullet.UPSTREAM.loaded = False
    with pytest.raises(gym.error.DependencyNotInstalled, match="no safety_gymnasium today"):
        safety_gymnasium.UPSTREAM.load("this test")
    with pytest.raises(gym.error.DependencyNotInstalled, match=r"no bullet_safety_gym\.envs"):
        bullet.UPSTREAM.load("this test")
    assert dataclasses.dataclass is original
    assert gym.registry == registered


def test_what_is_loaded_is_not_looked_for_again() -> None:
    """Making one leaves the registry alone: other threads may be making theirs."""
    for env_id in ("SafetyPointGoal1Gymnasium-v0", "SafetyBallRun-v0", "OfflineBallRun-v0"):
        gym.make(env_id).close()
    order = list(gym.registry)
    for env_id in ("SafetyPointGoal1Gymnasium-v0", "SafetyBallRun-v0", "OfflineBallRun-v0"):
        gym.make(env_id).close()
    assert list(gym.registry) == order


def test_a_package_that_comes_after_the_suites_is_found() -> None:
    code = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in hidden else found(name)
hidden = {"safety_gymnasium", "bullet_safety_gym"}
import gymnasium, safeshield.suites
assert not hidden & set(sys.modules)
hidden = set()
for env_id in ("SafetyPointGoal1Gymnasium-v0", "SafetyBallRun-v0"):
    env = gymnasium.make(env_id)
    env.reset(seed=0)
print("fine")
"""
    result = python(code)
    assert result.stdout.strip() == "fine", result.stderr


# -- drawing, and pickling ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "env_id", ["SafetyPointGoal1Gymnasium-v0", "SafetyHopperVelocity-v1", "OfflinePointGoal1-v0"]
)
def test_without_a_display_drawing_is_refused_before_mujoco_fails(
    env_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    env = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True)
    env.reset(seed=0)
    with pytest.raises(RuntimeError, match=r"there is no display .* MUJOCO_GL=egl"):
        env.render()
    monkeypatch.setenv("MUJOCO_GL", "egl")
    with pytest.raises(RuntimeError, match=r"'human' opens a window"):
        safety_gymnasium.check_display("human")
    safety_gymnasium.check_display("rgb_array")
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(RuntimeError, match="there is no display"):
        safety_gymnasium.check_display("rgb_array")
    monkeypatch.setenv("DISPLAY", ":0")
    safety_gymnasium.check_display("human")


def test_observations_that_are_pictures_need_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    env = gym.make("SafetyPointGoal1VisionGymnasium-v0", disable_env_checker=True)
    with pytest.raises(RuntimeError, match=r"there is no display .* MUJOCO_GL=egl"):
        env.reset(seed=0)


@pytest.mark.parametrize(
    "env_id",
    [
        "SafetyBallRun-v0", "OfflineBallRun-v0", "SafetyPointGoal1Gymnasium-v0",
        "SafetyPointGoal1-v0", "OfflinePointGoal1Gymnasium-v0", "SafetyHopperVelocityGymnasium-v1",
    ],
)  # fmt: skip
def test_an_environment_is_pickled_as_how_it_was_made(env_id: str) -> None:
    env = gym.make(env_id, render_mode="rgb_array", disable_env_checker=True)
    env.reset(seed=0)
    env.unwrapped.step(env.action_space.sample())
    for again in (pickle.loads(pickle.dumps(env)), copy.deepcopy(env)):
        assert again.spec == env.spec
        assert again.unwrapped.render_mode == "rgb_array"
        first, second = again.unwrapped.reset(seed=5)[0], env.unwrapped.reset(seed=5)[0]
        np.testing.assert_array_equal(first, second)
        assert again.unwrapped is not env.unwrapped
        again.close()
    env.close()
