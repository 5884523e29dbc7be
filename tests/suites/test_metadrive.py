"""DSRL's MetaDrive tasks on today's simulator: what they cost, how they end, seeds, the engine."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv
from typer.testing import CliRunner

import safeshield.suites  # noqa: F401 - registers them
from safeshield.cli import app
from safeshield.data import OfflineDataset, collect
from safeshield.evaluation import play
from safeshield.suites import packages
from safeshield.suites.labels import agreement, label
from safeshield.suites.metadrive import (
    DENSITIES,
    METADRIVE_TASKS,
    ROADS,
    MetaDriveTask,
    register_metadrive,
)

Env = gym.Env[Any, Any]
Steps = list[tuple[Any, ...]]
IDS = [f"OfflineMetadrive-{name}-v0" for name in METADRIVE_TASKS]
EASY = IDS[0]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    assert register_metadrive() is None


@pytest.fixture
def env() -> Iterator[Env]:
    made = gym.make(EASY)
    yield made
    made.close()


def drive(env: Env, seed: int, steps: int, throttle: float = 0.5, steer: float = 0.0) -> Steps:
    """Reset and hold one action; one row for each state."""
    observation, info = env.reset(seed=seed)
    rows: Steps = [(observation, 0.0, False, False, info)]
    while len(rows) <= steps and not (rows[-1][2] or rows[-1][3]):
        rows.append(env.step(np.array([steer, throttle], np.float32)))
    return rows


@pytest.mark.parametrize("env_id", IDS)
def test_every_task_runs(env_id: str) -> None:
    env = gym.make(env_id)
    try:
        rows = drive(env, seed=1, steps=25, throttle=1.0)
        assert env.spec is not None
        assert env.spec.max_episode_steps == 1000
        inner: Any = env.unwrapped
        simulator = inner._simulator
        assert env.observation_space == simulator.observation_space
        assert simulator.action_space.shape == (2,)
        road = next(road for road in ROADS if inner.name.startswith(road))
        blocks = "".join(block.ID for block in simulator.current_map.blocks[1:])
        assert (blocks, simulator.current_seed) == ROADS[road]
        assert simulator.engine.traffic_manager.density == DENSITIES[inner.name[len(road) :]]
        for observation, _, _, _, info in rows:
            assert env.observation_space.contains(observation)
            assert (info["constraint"] > 0) == (info["cost"] > 0)
        assert rows[-1][4]["velocity"] > 5.0
    finally:
        env.close()


def test_settings_are_those_of_dsrl() -> None:
    from metadrive.policy.idm_policy import IDMPolicy

    env = MetaDriveTask("mediumdense")
    env.reset(seed=0)
    settings: Any = env._simulator.config
    wanted = {
        "start_seed": 100, "num_scenarios": 1, "traffic_density": 0.2, "accident_prob": 0.0,
        "horizon": 1000, "random_traffic": True, "traffic_mode": "hybrid", "use_render": False,
        "crash_vehicle_penalty": 0.0, "crash_vehicle_cost": 1.0, "out_of_road_cost": 1.0,
    }  # fmt: skip
    assert {key: settings[key] for key in wanted} == wanted
    road = settings["map_config"]
    assert (road["type"], road["config"]) == ("block_sequence", "XST")
    env.close()
    assert (IDMPolicy.NORMAL_SPEED, IDMPolicy.ACC_FACTOR, IDMPolicy.DEACC_FACTOR) == (30, 1, -5)


def test_costs_and_ends(env: Env) -> None:
    kinds = set()
    for seed, throttle, steer in ((1, 1.0, 0.0), (2, 0.6, 0.0), (3, 1.0, 0.3), (4, 0.35, 0.0)):
        rows = drive(env, seed, 300, throttle, steer)
        for observation, _, terminated, truncated, info in rows:
            fast = 0.01 * max(0.0, info["velocity"] - 10.0)
            near = 0.01 * max(0.0, 0.1 - float(observation[-240:].min())) ** 2
            wrecked = info["crash"] or info["out_of_road"]
            assert info["cost"] == pytest.approx(wrecked + fast + near, abs=1e-12)
            assert info["velocity_cost"] == pytest.approx(fast)
            assert info["proximity_cost"] == pytest.approx(near)
            assert terminated == (wrecked or info["arrive_dest"])
            assert not truncated
            assert (info["constraint"] > 0) == (info["cost"] > 0)
            gap = 50.0 * (0.1 - float(observation[-240:].min()))
            expected = 1.0 if wrecked else max(info["velocity"] - 10.0, gap)
            assert info["constraint"] == pytest.approx(expected, abs=1e-5)
            kinds.add((bool(wrecked), fast > 0, near > 0))
            flags = {key for key, value in info.items() if type(value) is bool}
            assert flags == {"crash", "out_of_road", "arrive_dest", "max_step"}
            assert all(type(info[key]) is float for key in info.keys() - flags)
    assert {kind[0] for kind in kinds} == {True, False}
    assert (False, True, False) in kinds, "speed alone costs"
    assert any(kind[2] for kind in kinds), "nearness costs"


def test_a_thousand_steps_are_a_truncation(env: Env) -> None:
    inner: Any = env.unwrapped
    env.reset(seed=0)
    inner._simulator.episode_lengths["default_agent"] = 998
    assert env.step(np.zeros(2, np.float32))[2:4] == (False, False)
    _, _, terminated, truncated, info = env.step(np.zeros(2, np.float32))
    assert (terminated, truncated, info["max_step"]) == (False, True, True)


def test_the_same_seed_gives_the_same_trajectory(env: Env) -> None:
    first = drive(env, 3, 120)
    other = drive(env, 4, 60, throttle=1.0)
    again = drive(env, 3, 120)
    env.close()
    anew = drive(env, 3, 120)
    assert len(first) == len(again) == len(anew)
    for one, two, three in zip(first, again, anew, strict=True):
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[0], three[0])
        assert one[1:] == two[1:] == three[1:]
    shortest = min(len(first), len(other))
    assert any((first[i][0] != other[i][0]).any() for i in range(min(5, shortest)))


def test_resets_without_a_seed_follow_the_last_one(env: Env) -> None:
    def starts() -> list[Any]:
        env.reset(seed=5)
        seen = []
        for _ in range(3):
            env.reset()
            seen.append(env.step(np.array([0.0, 1.0], np.float32))[0])
            manager = env.unwrapped._simulator.engine.traffic_manager  # type: ignore[attr-defined]
            seen.append(sorted(tuple(v.position) for v in manager.vehicles))
        return seen

    one, two = starts(), starts()
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)
    assert one[1] != one[3], "traffic is drawn anew at every reset"


def test_check_env(env: Env) -> None:
    env.reset(seed=0)  # the engine's first start, with what it warns of
    check_env(env.unwrapped, skip_render_check=True)


def test_one_engine_in_a_process(env: Env) -> None:
    other = gym.make(IDS[4])
    env.reset(seed=0)
    with pytest.raises(
        RuntimeError, match=r"another task \(easysparse\) holds it: close\(\).*Async"
    ):
        other.reset(seed=0)
    env.step(np.zeros(2, np.float32))
    env.close()
    with pytest.raises(gym.error.ResetNeeded, match="nor after close"):
        env.unwrapped.step(np.zeros(2, np.float32))
    other.reset(seed=0)
    # Thrown away open: the next one takes the engine over.
    del other
    gc.collect()
    env.reset(seed=0)


def test_an_engine_of_somebody_else_is_left_alone(env: Env) -> None:
    from metadrive.engine.engine_utils import engine_initialized

    foreign = MetaDriveTask("easymean")
    foreign.reset(seed=0)
    simulator: Any = foreign._simulator
    foreign._simulator = None
    from safeshield.suites import metadrive

    held, metadrive._holder = metadrive._holder, None
    try:
        with pytest.raises(RuntimeError, match="something else holds it"):
            env.reset(seed=0)
        assert engine_initialized()
    finally:
        metadrive._holder, foreign._simulator = held, simulator
        foreign.close()
    assert not engine_initialized()


def test_several_in_processes_of_their_own(env: Env) -> None:
    seeds = [3, 4]
    envs = gym.vector.AsyncVectorEnv([lambda: gym.make(EASY)] * 2)
    try:
        observations, infos = envs.reset(seed=seeds)
        rows = [observations]
        for _ in range(20):
            observations, *_, infos = envs.step(np.array([[0.0, 0.5]] * 2, np.float32))
            rows.append(observations)
        assert infos["cost"].shape == infos["constraint"].shape == (2,)
    finally:
        envs.close()
    for index, seed in enumerate(seeds):
        alone = drive(env, seed, 20)
        for row, (observation, *_) in zip(rows, alone, strict=True):
            np.testing.assert_array_equal(row[index], observation)


def test_a_forked_process_is_told_to_close_first(env: Env) -> None:
    env.reset(seed=0)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            gym.make(EASY).reset(seed=0)
        except RuntimeError as error:
            code = 0 if "before AsyncVectorEnv" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_road_is_drawn_from_above_and_nothing_else_changes(env: Env) -> None:
    rows = drive(env, 3, 30)
    env.close()
    assert env.render() is None
    shown = gym.make(EASY, render_mode="rgb_array")
    with pytest.raises(gym.error.ResetNeeded, match="cannot render before reset"):
        shown.unwrapped.render()
    pictures: list[Any] = []
    observation, _ = shown.reset(seed=3)
    for row in rows:
        np.testing.assert_array_equal(observation, row[0])
        pictures.append(shown.render())
        observation, *_ = shown.step(np.array([0.0, 0.5], np.float32))
    shown.close()
    assert all(one.shape == (500, 500, 3) and one.dtype == np.uint8 for one in pictures)
    assert all(one.std() > 1.0 for one in pictures)
    assert (pictures[0] != pictures[-1]).any()
    with pytest.raises(ValueError, match=r"None or 'rgb_array' .* got 'human'.*3-d assets"):
        MetaDriveTask("easysparse", "human")


def test_stable_baselines3_makes_several_of_an_id() -> None:
    envs = make_vec_env(EASY, 2, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"})
    try:
        assert envs.reset().shape == (2, 259)
        _, _, _, infos = envs.step(np.array([[0.0, 0.5]] * 2, np.float32))
        assert all("cost" in info for info in infos)
        assert all(one.shape == (500, 500, 3) for one in envs.env_method("render"))
    finally:
        envs.close()


def test_workers_and_learners_run_it(tmp_path: Path) -> None:
    def steady(_: Any) -> Any:  # noqa: ANN401
        return np.array([0.0, 0.6], np.float32)

    env = gym.make(EASY)
    alone = play(env, steady, 0, episodes=2)
    env.close()
    assert play(env, steady, 0, episodes=2, workers=2) == alone
    out = tmp_path / "log.hdf5"
    command = ["collect", EASY, out, "--limits", "none,5", "--steps", "64", "--set",
               "rollout_steps=64", "--set", "batch_size=32", "--set", "epochs=1"]  # fmt: skip
    result = CliRunner().invoke(app, [str(one) for one in command])
    assert result.exit_code == 0, result.output
    gc.collect()  # the command leaves its environment to the end of the process
    log = OfflineDataset.load(out)
    assert log.provenance is not None
    assert log.provenance["settings"]["num_envs"] == 1
    assert log.constraint_kind == "continuous"


def test_nothing_is_printed_or_fetched(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from metadrive.engine.base_engine import BaseEngine

    def fetched() -> None:
        raise AssertionError("assets were asked for")

    monkeypatch.setattr(BaseEngine, "try_pull_asset", staticmethod(fetched))
    env = gym.make(EASY)
    env.reset(seed=0)
    env.step(np.zeros(2, np.float32))
    env.close()
    shown = gym.make(EASY, render_mode="rgb_array")
    shown.reset(seed=0)
    shown.render()
    shown.close()
    assert BaseEngine.try_pull_asset is fetched, "what was patched is put back"
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def test_a_log_is_collected_and_labelled_in_one_process(env: Env) -> None:
    log = collect(env, lambda observation: np.array([0.0, 0.8], np.float32), episodes=3, seed=0)
    assert log.constraint_kind == "continuous"
    np.testing.assert_array_equal(log.next_constraints > 0, log.costs > 0)
    plain = type(log).from_arrays(
        **{
            name: getattr(log, name)
            for name in ("observations", "actions", "rewards", "next_observations", "terminated",
                         "truncated", "costs")
        }
    )  # fmt: skip
    counts = agreement(plain, "easysparse")
    assert counts is not None
    assert counts.violations > 20
    assert counts.disagreements == 0
    labelled = label(plain, EASY)
    # An observation shows no speed above 80 km/h.
    for name in ("constraints", "next_constraints"):
        shown = np.minimum(getattr(log, name), 80.0 / 3.6 - 10.0)
        np.testing.assert_allclose(getattr(labelled, name), shown, atol=1e-4)
    with pytest.raises(ValueError, match=r"num_envs must be 1 .* hold one only; got 2.*AsyncVec"):
        collect(env, "random", episodes=2, seed=0, num_envs=2)


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = packages.Package.version

    def version(self: packages.Package) -> str | None:
        return None if self.module == "metadrive" else real.fget(self)  # type: ignore[attr-defined,no-any-return]

    monkeypatch.setattr(packages.Package, "version", property(version))
    explanation = register_metadrive()
    assert explanation is not None
    assert "pip install --no-deps metadrive-simulator==0.4.3" in explanation
    with pytest.raises(gym.error.DependencyNotInstalled, match="metadrive-simulator"):
        gym.make(EASY)


def test_another_version_of_the_simulator(env: Env, monkeypatch: pytest.MonkeyPatch) -> None:
    from metadrive.policy.idm_policy import IDMPolicy

    monkeypatch.setattr(IDMPolicy, "NORMAL_SPEED", 40)
    with pytest.raises(
        RuntimeError, match=r"drive as in DSRL's tasks .*install metadrive-simulator"
    ):
        env.reset(seed=0)


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"name must be one of easysparse, .* got 'easy'"):
        MetaDriveTask("easy")
