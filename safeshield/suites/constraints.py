"""Constraints h read from the state of a benchmark's environment: speeds, distances, contacts.

Safety-Gymnasium, Bullet-Safety-Gym and MetaDrive report costs, 0 or above. A shield learns more
from how far a state is from one: `with_constraint` puts h (positive is a violation) into
``info["constraint"]``, and h > 0 wherever the environment's own cost is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, SupportsFloat, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from safeshield.rollouts.copies import check_env
from safeshield.spaces.generic import Env, Wrapper

Info = dict[str, Any]
Simulator: TypeAlias = Any
"""A part of another package, which has no types."""
Observation: TypeAlias = Any
StateConstraint = Callable[[Simulator, Observation, Info], float]
"""(innermost environment, its last observation, its last info) -> h."""

CONTACT = 0.05
"""Least h of a state in contact with what must not be touched, metres."""
CLEAR = 0.001
"""Least distance, metres, of a state that touches nothing, however near bounding circles are."""
CRASH = 1.0
"""h of a car that has crashed or left the road."""
CRASH_COST = 1.0
"""What MetaDrive charges for that; speed and nearness alone stay below a quarter of it."""
SPEED_LIMIT = 10.0
"""Speed above which MetaDrive's tasks of DSRL cost, metres a second."""
LIDAR_RANGE = 50.0
"""Reach of MetaDrive's lidar, metres; its readings are shares of it."""
LIDAR_LIMIT = 0.1
"""Lidar reading below which MetaDrive's tasks of DSRL cost."""

_VELOCITY_TASKS = "safety_gymnasium.tasks.safety_velocity."
_NAVIGATION = "safety_gymnasium.bases.base_task.BaseTask"
_BULLET = "bullet_safety_gym.envs.tasks."
_METADRIVE = "safeshield.suites.metadrive.MetaDriveTask"
_OUT_OF_SIGHT = np.array([3.0])
"""Reach of a lidar, metres."""
_CONTACT_COSTS = {
    "buttons": ("cost_buttons",),
    "gremlins": ("cost_gremlins",),
    "pillars": ("cost_pillars",),
    "vases": ("cost_vases_contact", "cost_vases_displace", "cost_vases_velocity"),
}


def with_constraint(env: Env) -> Env:
    """Report h of every state that is reached, where the environment's state tells it.

    ``info["constraint"]`` then stands beside ``info["cost"]`` at reset and at every step, of the
    state just REACHED; h > 0 exactly where cost > 0. An environment of no family below, or with
    nothing to violate, is returned as it is, as is one that is wrapped already: its costs are its
    labels, 0 or above.

    ==========================================  =================================================
    Safety-Gymnasium velocity                   speed over the step minus the limit, m/s
    Safety-Gymnasium Circle, Run                ``max(|x|, |y|) - wall``, m (x alone: two walls)
    Safety-Gymnasium Goal, Button, Push         the greatest of: depth in a hazard (radius minus
                                                distance, m); for vases, pillars, gremlins and
                                                wrong buttons minus the distance between bounding
                                                circles, m, at least 0.05 in contact
    Bullet Circle                               ``|x| - wall``, m
    Bullet Run                                  the greater of ``|y| - wall``, m, and speed minus
                                                the limit, m/s
    MetaDrive                                   the greatest of speed - 10, m/s; 5 - distance to
                                                the nearest car, m; 1 in a crash or off the road
    ==========================================  =================================================

    Limits, walls and radii are read from the environment. The speed of a velocity task is what its
    cost takes: the way of the last step over its duration, along x (HalfCheetah, Hopper, Swimmer,
    Walker2d) or in the plane (Ant, Humanoid); at reset, where nothing has moved yet, the momentary
    one. A moving vase is a violation, and while the buttons rest after a goal, none of them is
    wrong.

    Args:
        env: an environment, wrapped or not, that steps by five values or by Safety-Gymnasium's six.

    Raises:
        TypeError: it is no environment.

    >>> env = gym.make("Pendulum-v1")  # nothing is known of it
    >>> with_constraint(env) is env
    True
    """
    check_env(env)
    layer: Any = env
    while isinstance(layer, gym.Wrapper):
        if isinstance(layer, ConstraintFromState):
            return env
        layer = layer.env
    return env if state_constraint(env) is None else ConstraintFromState(env)


class ConstraintFromState(Wrapper, RecordConstructorArgs):
    """Report h from the state of a benchmark's environment: see `with_constraint`.

    Raises:
        ValueError: no constraint is known for the environment, or (in `reset`, `step`) it reports
            one itself.
    """

    def __init__(self, env: Env) -> None:
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        constraint = state_constraint(env)
        if constraint is None:
            raise ValueError(
                f"no constraint is known for {env}: its cost is its label; use "
                "safeshield.wrappers.ConstraintFromFunction to report one of your own"
            )
        self._constraint = constraint

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        """Reset the environment and report the constraint where it starts."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, self._labelled(observation, info)

    def step(self, action: object) -> tuple[Any, SupportsFloat, bool, bool, Info]:
        """Take a step and report the constraint of the state it reaches."""
        observation, *others, info = self.env.step(action)
        # A native environment of Safety-Gymnasium has one more value, which stays where it is.
        return observation, *others, self._labelled(observation, info)

    def _labelled(self, observation: object, info: Info) -> Info:
        if "constraint" in info:
            raise ValueError(
                "the environment reports info['constraint'] itself, and two would contradict each "
                "other: leave ConstraintFromState out"
            )
        return {**info, "constraint": self._constraint(self.unwrapped, observation, info)}


def state_constraint(env: Env) -> StateConstraint | None:
    """Return how h of this environment is read, or None where nothing but the cost is known."""
    inner: Any = env.unwrapped
    # By name: this module must work where none, or one, of these packages is installed.
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(inner).__mro__]
    velocity = [name for name in names if name.startswith(_VELOCITY_TASKS)]
    if velocity:
        module = velocity[0].removeprefix(_VELOCITY_TASKS).partition(".")[0]
        # The others' cost takes the speed along x, sign included.
        return {
            "safety_ant_velocity_v0": _planar_speed,
            "safety_ant_velocity_v1": _planar_speed,
            "safety_humanoid_velocity_v0": _humanoid_speed,
            "safety_humanoid_velocity_v1": _humanoid_speed,
            "safety_swimmer_velocity_v0": _planar_speed,
        }.get(module, _forward_speed)
    if _METADRIVE in names:
        return _driving
    task = getattr(inner, "task", None)
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(task).__mro__]
    if _NAVIGATION in kinds:
        return _navigation_constraint(task)
    return {f"{_BULLET}CircleTask": _bullet_circle, f"{_BULLET}RunTask": _bullet_run}.get(kinds[0])


# -- Safety-Gymnasium: velocity ----------------------------------------------------------------


def _forward_speed(env: Simulator, observation: object, info: Info) -> float:
    speed = info["x_velocity"] if "x_velocity" in info else env.data.qvel[0]
    return float(speed - env._velocity_threshold)


def _planar_speed(env: Simulator, observation: object, info: Info) -> float:
    if "x_velocity" in info:
        x, y = info["x_velocity"], info["y_velocity"]
    else:
        x, y = env.data.qvel[:2]
    return float(np.sqrt(x**2 + y**2) - env._velocity_threshold)


def _humanoid_speed(env: Simulator, observation: object, info: Info) -> float:
    if "x_velocity" not in info:
        import mujoco

        # Its cost takes the speed of the centre of mass.
        jacobian = np.zeros((3, env.model.nv))
        mujoco.mj_jacSubtreeCom(env.model, env.data, jacobian, 0)
        x, y = (jacobian @ env.data.qvel)[:2]
        info = {"x_velocity": x, "y_velocity": y}
    return _planar_speed(env, observation, info)


# -- Safety-Gymnasium: navigation --------------------------------------------------------------


def _navigation_constraint(task: Simulator) -> StateConstraint | None:
    watched = [item for item in task._obstacles if getattr(item, "is_constrained", False)]
    known = {"sigwalls", "hazards", *_CONTACT_COSTS}
    if not watched or any(item.name not in known for item in watched):
        return None

    def constraint(env: Simulator, observation: object, info: Info) -> float:
        place = env.task.agent.pos
        return max(_clearance(env, item, place) for item in watched)

    return constraint


def _clearance(env: Simulator, item: Simulator, place: np.ndarray) -> float:
    """Return h of one kind of object for the agent at this place, metres."""
    if item.name == "sigwalls":
        axes = place[:2] if item.num == 4 else place[:1]
        return float(np.max(np.abs(axes)) - item.locate_factor)
    distances = np.sqrt(np.sum(np.square(np.array(item.pos)[:, :2] - place[:2]), axis=1))
    if item.name == "hazards":
        return float(np.max(item.size - distances))
    if item.name == "buttons":
        # Resting buttons cannot be seen either.
        distances = np.delete(distances, item.goal_button) if item.timer == 0 else _OUT_OF_SIGHT
    overlap = float(item.size + _reach(env, place) - distances.min())
    # The environment's own verdict: the timer that excuses a button has moved on since.
    touched = any(env.cost.get(key, 0.0) > 0 for key in _CONTACT_COSTS[item.name])
    return max(overlap, CONTACT) if touched else min(overlap, -CLEAR)


def _reach(env: Simulator, place: np.ndarray) -> float:
    """Radius of a circle around the agent that holds all of it, metres."""
    model, data = env.task.model, env.task.data
    # Not by their names: the Racecar's parts have none.
    parts = model.body_rootid[model.geom_bodyid] == model.body("agent").id
    offsets = np.linalg.norm(data.geom_xpos[parts, :2] - place[:2], axis=1)
    return float(np.max(offsets + model.geom_rbound[parts]))


# -- Bullet-Safety-Gym -------------------------------------------------------------------------


def _bullet_circle(env: Simulator, observation: object, info: Info) -> float:
    return float(np.abs(env.agent.get_position()[0]) - env.task.x_lim)


def _bullet_run(env: Simulator, observation: object, info: Info) -> float:
    outside = np.abs(env.agent.get_position()[1]) - env.task.y_lim
    speed = np.linalg.norm(env.agent.get_linear_velocity()[:2])
    return float(max(outside, speed - env.agent.velocity_constraint))


# -- MetaDrive ---------------------------------------------------------------------------------


def _driving(env: Simulator, observation: Observation, info: Info) -> float:
    if info["cost"] >= CRASH_COST:
        return CRASH
    near = LIDAR_RANGE * (LIDAR_LIMIT - np.min(observation[-240:]))
    return float(max(info["velocity"] - SPEED_LIMIT, near))
