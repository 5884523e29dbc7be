"""Constraints of the benchmark tasks: their sign is the cost's, their size is a distance."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from suite_rollouts import rollout

from safeshield.data import OfflineDataset, collect
from safeshield.suites import constraints, logged
from safeshield.suites.constraints import ConstraintFromState, with_constraint
from safeshield.suites.labels import MENDED, agreement, label, log_label
from safeshield.suites.metadrive import METADRIVE_TASKS
from safeshield.suites.tasks import TASKS, Family, find_task

VELOCITY = [
    f"Safety{robot}VelocityGymnasium-v{version}"
    for robot in ("Ant", "HalfCheetah", "Hopper", "Humanoid", "Swimmer", "Walker2d")
    for version in (0, 1)
]
BULLET = [
    f"Safety{robot}{task}-v0"
    for robot in ("Ant", "Ball", "Car", "Drone")
    for task in ("Circle", "Run")
]
NAVIGATION = [
    f"Safety{robot}{task}{level}Gymnasium-v0"
    for robot in ("Point", "Car")
    for task in ("Goal", "Button", "Push", "Circle")
    for level in (1, 2)
]
OTHER_ROBOTS = [
    "SafetyPointRun0Gymnasium-v0",
    "SafetyRacecarGoal2Gymnasium-v0",
    "SafetyDoggoCircle2Gymnasium-v0",
    "SafetyAntPush2Gymnasium-v0",
]
CONTACTS = [name for name in NAVIGATION if "Button" in name or "Goal2" in name or "Push2" in name]
LOGGED = [
    *(name for name in VELOCITY if "Humanoid" not in name),
    *BULLET,
    *(name for name in NAVIGATION if name not in CONTACTS),
]


# -- live --------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", [*VELOCITY, *BULLET, *NAVIGATION])
def test_the_sign_is_that_of_the_cost_at_every_step(env_id: str) -> None:
    run = rollout(env_id)
    violated = run.log.costs > 0
    np.testing.assert_array_equal(run.live > 0, violated)
    assert violated.any(), "a policy that breaks no rule tests nothing"
    assert not violated.all()
    assert run.kinds == {float}
    assert np.isfinite(run.live).all()


@pytest.mark.parametrize("env_id", OTHER_ROBOTS)
def test_other_robots_and_tasks(env_id: str) -> None:
    run = rollout(env_id, 150)
    np.testing.assert_array_equal(run.live > 0, run.log.costs > 0)
    assert (run.starts <= 0).all()


@pytest.mark.parametrize("env_id", NAVIGATION)
def test_fast_and_obvious_ways_to_read_it_agree(env_id: str) -> None:
    run = rollout(env_id)
    np.testing.assert_allclose(run.live, run.obvious, rtol=0, atol=1e-12)
    # A contact counts as much as a place inside a hazard.
    assert run.live[run.live > 0].max() >= (constraints.CONTACT if env_id in CONTACTS else 0.0)


@pytest.mark.parametrize("env_id", ["SafetyPointGoal1Gymnasium-v0", "SafetyBallCircle-v0"])
def test_starts_are_safe_and_labelled(env_id: str) -> None:
    env = with_constraint(gym.make(env_id, disable_env_checker=True))
    starts = [env.reset(seed=seed)[1]["constraint"] for seed in range(5)]
    assert len(set(starts)) == 5
    assert max(starts) < 0
    env.close()


def test_a_start_is_judged_by_its_momentary_speed() -> None:
    for name, column in (("Hopper", 5), ("Swimmer", 3)):
        env = with_constraint(gym.make(f"Safety{name}VelocityGymnasium-v1"))
        observation, info = env.reset(seed=0)
        limit = logged.VELOCITY_TASKS[f"{name}Velocity"].limit
        assert info["constraint"] == pytest.approx(observation[column] - limit, abs=1e-12)


def test_the_humanoids_speed_is_that_of_its_centre_of_mass() -> None:
    env = with_constraint(gym.make("SafetyHumanoidVelocityGymnasium-v1"))
    _, info = env.reset(seed=0)
    inner: Any = env.unwrapped
    before, wanted = _centre(inner), info["constraint"] + inner._velocity_threshold
    import mujoco

    inner.model.opt.timestep = 1e-6
    mujoco.mj_step(inner.model, inner.data)
    mujoco.mj_forward(inner.model, inner.data)
    assert np.hypot(*(_centre(inner) - before)) / 1e-6 == pytest.approx(wanted, rel=1e-2)


def _centre(inner: Any) -> np.ndarray:  # noqa: ANN401 - of a package without types
    mass = inner.model.body_mass[:, None]
    return np.asarray(((mass * inner.data.xipos).sum(0) / mass.sum())[:2])


# -- the wrapper -------------------------------------------------------------------------------


def test_it_is_put_around_once_and_the_spec_rebuilds_it() -> None:
    env = with_constraint(gym.make("SafetyBallRun-v0"))
    assert with_constraint(env) is env
    assert with_constraint(gym.wrappers.ClipAction(env)).env is env  # type: ignore[attr-defined]
    assert env.spec is not None
    twin = gym.make(env.spec)
    one, other = (each.reset(seed=1)[1]["constraint"] for each in (env, twin))
    assert one == other
    with pytest.raises(ValueError, match=r"reports info\['constraint'\] itself"):
        ConstraintFromState(env).reset()
    env.close()
    twin.close()


@pytest.mark.parametrize(
    "env_id", ["SafetyPointGoal0Gymnasium-v0", "SafetyBallReach-v0", "Pendulum-v1"]
)
def test_what_has_no_distance_is_left_as_it_is(env_id: str) -> None:
    env = gym.make(env_id)
    assert with_constraint(env) is env
    with pytest.raises(ValueError, match=r"no constraint is known for .*ConstraintFromFunction"):
        ConstraintFromState(env)
    env.close()


def test_steps_of_six_values_keep_the_sixth() -> None:
    env = with_constraint(gym.make("SafetyPointCircle1-v0").unwrapped)
    _, info = env.reset(seed=0)
    assert info["constraint"] < 0
    *_, cost, _, _, info = env.step(env.action_space.sample())
    assert cost == 0
    assert info["constraint"] < 0
    env.close()


def test_a_collected_log_has_them() -> None:
    env = with_constraint(gym.make("SafetyBallRun-v0"))
    log = collect(env, "random", episodes=2, seed=0)
    env.close()
    assert log.constraint_kind == "continuous"
    np.testing.assert_array_equal(log.next_constraints > 0, log.costs > 0)
    named = label(log, "BallRun")
    assert named.constraint_source == "BallRun@1"
    np.testing.assert_array_equal(named.next_constraints, log.next_constraints)


# -- logs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", LOGGED)
def test_what_observations_tell_is_what_the_environment_tells(env_id: str) -> None:
    run = rollout(env_id)
    counts = agreement(run.log, env_id)
    assert counts is not None
    assert counts.states == len(run.log)
    assert counts.violations == (run.log.costs > 0).sum()
    # The speed across is read off two observations, not off a way; a car's lidar tilts with it.
    across = "AntVelocity" in env_id or "SwimmerVelocityGymnasium-v0" in env_id
    slack = 0.5 if across else 0.01 if "Car" in env_id and env_id in NAVIGATION else 1e-4
    assert counts.disagreements + counts.unseen <= (0.05 * counts.violations if across else 0)
    labelled = label(run.log, env_id)
    assert labelled.constraint_kind == "continuous"
    np.testing.assert_array_equal(labelled.next_constraints > 0, run.log.costs > 0)
    np.testing.assert_allclose(labelled.next_constraints, run.live, rtol=1e-4, atol=slack)
    starts = labelled.constraints[labelled.episode_starts]
    np.testing.assert_allclose(starts, run.starts, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("env_id", CONTACTS)
def test_contacts_are_told_by_the_logged_cost(env_id: str) -> None:
    run = rollout(env_id)
    counts = agreement(run.log, env_id)
    assert counts is not None
    assert counts.invented == counts.unseen == 0
    labelled = label(run.log, env_id)
    np.testing.assert_array_equal(labelled.next_constraints > 0, run.log.costs > 0)
    # Corners and tilts: bounding circles are those of the robot at rest.
    difference = np.abs(labelled.next_constraints - run.live)
    assert difference.max() < 0.1
    assert np.mean(difference > 0.01) < 0.02


def test_a_cost_far_from_everything_is_no_contact() -> None:
    log = rollout("SafetyPointPush2Gymnasium-v0").log
    counts = agreement(log, "PointPush2")
    far = int(np.argmin(label(log, "PointPush2").next_constraints))
    assert log.costs[far] == 0
    costs = np.array(log.costs)
    costs[far] = 1.0
    odd = agreement(dataclasses.replace(log, costs=costs), "PointPush2")
    assert counts is not None
    assert odd is not None
    assert (counts.missed, odd.missed) == (0, 1)


def test_humanoids_logs_stay_binary() -> None:
    log = rollout("SafetyHumanoidVelocityGymnasium-v1").log
    assert label(log, "SafetyHumanoidVelocityGymnasium-v1") is log
    assert agreement(log, "HumanoidVelocity") is None


def test_every_task_of_dsrl_is_known_by_each_of_its_names() -> None:
    for task in TASKS.values():
        found = log_label(task)
        assert found is not None
        assert log_label(task.name) is log_label(task.env_id) is log_label(task.offline_id) is found
        assert log_label(f"safeshield.suites:{task.env_id}") is found
    assert log_label("SafetyHopperVelocity-v0") is not log_label("SafetyHopperVelocity-v1")
    with pytest.raises(ValueError, match=r"task must be one of .*PointGoal1.* got 'Pendulum'"):
        log_label("Pendulum-v1")


def _ball_log(costs: np.ndarray | None = None, scale: float = 1.0) -> OfflineDataset:
    log = rollout("SafetyBallRun-v0").log
    return OfflineDataset.from_arrays(
        observations=log.observations * scale,
        actions=log.actions,
        rewards=log.rewards,
        next_observations=log.next_observations * scale,
        terminated=log.terminated,
        truncated=log.truncated,
        costs=log.costs if costs is None else costs,
    )


def test_the_cost_overrules_a_sign_that_disagrees() -> None:
    costs = np.array(rollout("SafetyBallRun-v0").log.costs)
    unsafe, safe = np.flatnonzero(costs > 0)[3], np.flatnonzero(costs == 0)[3]
    costs[unsafe], costs[safe] = 0.0, 1.0
    log = _ball_log(costs)
    counts = agreement(log, "BallRun")
    assert counts is not None
    assert (counts.missed, counts.invented, counts.disagreements) == (1, 1, 2)
    assert counts.share == pytest.approx(2 / counts.violations)
    assert f"{len(costs) - 2} of {len(costs)} states agree" in str(counts)
    labelled = label(log, "BallRun")
    assert labelled.next_constraints[unsafe] == np.float32(-MENDED)
    assert labelled.next_constraints[safe] == np.float32(MENDED)
    untouched = np.delete(np.arange(len(costs)), [unsafe, safe])
    whole = label(_ball_log(), "BallRun")
    np.testing.assert_array_equal(
        labelled.next_constraints[untouched], whole.next_constraints[untouched]
    )
    with pytest.raises(ValueError, match=r"more than max_disagreement 0\.0 per violation"):
        label(log, "BallRun", max_disagreement=0.0)


def test_logs_of_something_else_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels of BallRun must agree .* raw observations"):
        label(_ball_log(scale=0.5), "BallRun")
    hopper = rollout("SafetyHopperVelocityGymnasium-v1").log
    with pytest.raises(ValueError, match=r"labels of HopperVelocity-v0 must agree"):
        label(hopper, "SafetyHopperVelocityGymnasium-v0")
    scaled = dataclasses.replace(hopper, rewards=0.1 * hopper.rewards)
    with pytest.raises(ValueError, match=r"is this a log of that task and version"):
        label(scaled, "HopperVelocity")
    with pytest.raises(ValueError, match="observations of BallCircle must have 8 numbers, got 7"):
        label(_ball_log(), "BallCircle")
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"max_disagreement must lie in \[0, 1\]"):
            label(_ball_log(), "BallRun", max_disagreement=wrong)


def test_beyond_its_lidar_the_circle_is_out_of_sight() -> None:
    log = rollout("SafetyPointCircle1Gymnasium-v0").log
    blind = np.array(log.next_observations)
    blind[[10, 390], 12:] = 0.0
    hidden = dataclasses.replace(log, next_observations=blind)
    counts = agreement(hidden, "PointCircle1")
    assert counts is not None
    assert counts.unseen == 2
    assert counts.disagreements == 0
    labelled = label(hidden, "PointCircle1").next_constraints
    for row in (10, 390):
        assert labelled[row] == np.float32(MENDED if log.costs[row] > 0 else -MENDED)


def test_logs_of_dsrls_fork_of_metadrive_are_named() -> None:
    rows = np.full((3, 261), 0.5, np.float32)
    log = OfflineDataset.from_arrays(
        observations=rows, actions=np.zeros((3, 2)), rewards=np.zeros(3), next_observations=rows,
        terminated=[0, 0, 0], truncated=[0, 0, 1], costs=[0, 0, 1],
    )  # fmt: skip
    for ask in (label, agreement):
        with pytest.raises(ValueError, match=r"259 numbers, got 261; .*fork of MetaDrive \(2022\)"):
            ask(log, "OfflineMetadrive-easysparse-v0")  # type: ignore[operator]


# -- the numbers that labels of logs rest on ----------------------------------------------------

# Ji et al. 2023, "Safety-Gymnasium", version 1 of the tasks: half the speed of a trained PPO.
DOCUMENTED = {
    "Ant": 2.6222,
    "HalfCheetah": 3.2096,
    "Hopper": 0.7402,
    "Humanoid": 1.4149,
    "Swimmer": 0.2282,
    "Walker2d": 2.3415,
}


@pytest.mark.parametrize("env_id", VELOCITY)
def test_velocity_tasks(env_id: str) -> None:
    env = gym.make(env_id)
    inner: Any = env.unwrapped
    robot, version = env_id[6:].split("Velocity")[0], env_id[-1]
    if version == "1":
        assert inner._velocity_threshold == DOCUMENTED[robot]
    if robot == "Humanoid":
        return
    task = logged.VELOCITY_TASKS[f"{robot}Velocity" + ("-v0" if version == "0" else "")]
    assert task.limit == inner._velocity_threshold
    assert task.width == env.observation_space.shape[0]  # type: ignore[index]
    assert task.effort == inner._ctrl_cost_weight
    assert task.alive == getattr(inner, "_healthy_reward", 0.0)
    assert getattr(inner, "_terminate_when_unhealthy", True)
    assert getattr(inner, "_forward_reward_weight", 1.0) == 1.0
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation[task.column :][:2], inner.data.qvel[:2])


@pytest.mark.parametrize("env_id", NAVIGATION)
def test_arenas(env_id: str) -> None:
    env = gym.make(env_id)
    observation, _ = env.reset(seed=0)
    inner: Any = env.unwrapped
    task = inner.task
    robot, level = find_task(env_id).name[: -len("Goal1")], find_task(env_id).name
    robot = "Point" if level.startswith("Point") else "Car"
    sensors, reach = logged.ROBOTS[robot]
    assert reach == pytest.approx(constraints._reach(inner, task.agent.pos), abs=1e-3)
    field = inner.task.agent.mat.T @ inner.task.model.opt.magnetic
    np.testing.assert_allclose(observation[9:12], field, atol=1e-9)
    if "Circle" in level:
        assert task.sigwalls.locate_factor == logged.CIRCLE_WALL
        assert task.lidar_conf.max_dist == 6.0
        return
    arena = logged.ARENAS[level.removeprefix(robot)]
    seen = tuple(item.name for item in task._obstacles if item.is_lidar_observed)
    assert seen == arena.lidars
    assert sensors + 16 * len(seen) == len(observation)
    assert arena.hazard_radius == task.hazards.size
    assert task.lidar_conf.max_dist == 3.0
    watched = {item.name: item.size for item in task._obstacles if item.is_constrained}
    assert watched == {"hazards": arena.hazard_radius, **arena.fragile}
    env.close()


@pytest.mark.parametrize("env_id", BULLET)
def test_bullet_robots(env_id: str) -> None:
    env = gym.make(env_id)
    inner: Any = env.unwrapped
    name = find_task(env_id).name
    robot = logged.BULLET_ROBOTS[name.removesuffix("Run").removesuffix("Circle")]
    assert env.observation_space.shape == (robot.width + name.endswith("Circle"),)
    assert robot.speed_limit == inner.agent.velocity_constraint
    wall = inner.task.x_lim if name.endswith("Circle") else inner.task.y_lim
    assert wall == logged.BULLET_WALLS["Circle" if name.endswith("Circle") else "Run"]
    env.close()


def test_tasks_are_those_of_the_table() -> None:
    assert {task.name for task in TASKS.values() if task.family is Family.metadrive} == set(
        METADRIVE_TASKS
    )
