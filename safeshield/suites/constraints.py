"""Constraints h computed from the state of a benchmark environment: speeds, distances, contacts.

Safety-Gymnasium, Bullet-Safety-Gym and MetaDrive report costs of at least 0. A shield learns more
from the distance of a state to a violation. `with_constraint` therefore reports h in
``info["constraint"]``, which is positive wherever the environment's own cost is positive.
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
"""An object of another package, which has no type annotations."""
Observation: TypeAlias = Any
StateConstraint = Callable[[Simulator, Observation, Info], float]
"""Function (innermost environment, its last observation, its last info) -> h."""

CONTACT = 0.05
"""Smallest h, metres, of a state in contact with an object that must not be touched."""
CLEAR = 0.001
"""Smallest value of -h, metres, of a state without contact, even where bounding circles overlap."""
CRASH = 1.0
"""h of a car that has crashed or left the road."""
CRASH_COST = 1.0
"""MetaDrive's cost of a crash or of leaving the road; the costs of speed and of near objects stay
below a quarter of it."""
SPEED_LIMIT = 10.0
"""Speed, metres per second, above which DSRL's MetaDrive tasks have a cost."""
LIDAR_RANGE = 50.0
"""Range of MetaDrive's lidar, metres; its readings are shares of this range."""
LIDAR_LIMIT = 0.1
"""Lidar reading below which DSRL's MetaDrive tasks have a cost."""

_VELOCITY_TASKS = "safety_gymnasium.tasks.safety_velocity."
_NAVIGATION = "safety_gymnasium.bases.base_task.BaseTask"
_BULLET = "bullet_safety_gym.envs.tasks."
_METADRIVE = "safeshield.suites.metadrive.MetaDriveTask"
_OUT_OF_SIGHT = np.array([3.0])
"""Range of Safety-Gymnasium's lidars, metres."""
_CONTACT_COSTS = {
    "buttons": ("cost_buttons",),
    "gremlins": ("cost_gremlins",),
    "pillars": ("cost_pillars",),
    "vases": ("cost_vases_contact", "cost_vases_displace", "cost_vases_velocity"),
}


def with_constraint(env: Env) -> Env:
    """Wrap an environment so that it reports h of every state, where h is known.

    At reset and at every step ``info["constraint"]`` then holds h of the state just REACHED, and
    h > 0 exactly where ``info["cost"]`` > 0. An environment is returned unchanged if it belongs to
    none of the families below, if it has nothing to violate (its costs of at least 0 are then its
    labels), or if it is wrapped already. The constraints are:

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

    Limits, walls and radii are read from the environment. The speed of a velocity task is the speed
    of its cost: the distance of the last step over its duration, along x (HalfCheetah, Hopper,
    Swimmer, Walker2d) or in the plane (Ant, Humanoid). At reset, before the first step, it is the
    momentary speed. A moving vase is a violation. While the buttons are inactive after a goal, no
    button is wrong.

    Args:
        env: An environment, wrapped or not, whose step returns Gymnasium's five values or
            Safety-Gymnasium's six.

    Raises:
        TypeError: `env` is not an environment.

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
    """Wrapper that reports h of a benchmark environment, as described in `with_constraint`.

    `env` is the environment.

    Raises:
        ValueError: No constraint is known for the environment, or (in `reset` and `step`) the
            environment already reports ``info["constraint"]``.
    """

    def __init__(self, env: Env) -> None:
        RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        constraint = state_constraint(env)
        if constraint is None:
            raise ValueError(
                f"no constraint is known for {env}, only its cost; use "
                "safeshield.wrappers.ConstraintFromFunction to report one of your own"
            )
        self._constraint = constraint

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, Info]:
        """Reset the environment and report the constraint of its first state.

        `seed` and `options` are passed to the environment. The result is its observation, and its
        info with the constraint.
        """
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, self._labelled(observation, info)

    def step(self, action: object) -> tuple[Any, SupportsFloat, bool, bool, Info]:
        """Take a step by `action` and report the constraint of the state that it reaches.

        The result is that of the environment, with the constraint in the info.
        """
        observation, *others, info = self.env.step(action)
        # A native environment of Safety-Gymnasium returns one more value, which is passed on.
        return observation, *others, self._labelled(observation, info)

    def _labelled(self, observation: object, info: Info) -> Info:
        if "constraint" in info:
            raise ValueError(
                "the environment reports info['constraint'] itself, and two would contradict each "
                "other: leave ConstraintFromState out"
            )
        return {**info, "constraint": self._constraint(self.unwrapped, observation, info)}


def state_constraint(env: Env) -> StateConstraint | None:
    """Return the function that computes h of `env`, or None where only costs exist."""
    inner: Any = env.unwrapped
    # Classes are compared by name, because this module must work without these packages.
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(inner).__mro__]
    velocity = [name for name in names if name.startswith(_VELOCITY_TASKS)]
    if velocity:
        module = velocity[0].removeprefix(_VELOCITY_TASKS).partition(".")[0]
        # The cost of the other tasks is of the signed speed along x.
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

        # The cost is of the speed of the centre of mass.
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
    """Return h, in metres, of one kind of object for the agent at this place."""
    if item.name == "sigwalls":
        axes = place[:2] if item.num == 4 else place[:1]
        return float(np.max(np.abs(axes)) - item.locate_factor)
    distances = np.sqrt(np.sum(np.square(np.array(item.pos)[:, :2] - place[:2]), axis=1))
    if item.name == "hazards":
        return float(np.max(item.size - distances))
    if item.name == "buttons":
        # While the buttons are inactive, the lidar does not show them either.
        distances = np.delete(distances, item.goal_button) if item.timer == 0 else _OUT_OF_SIGHT
    overlap = float(item.size + _reach(env, place) - distances.min())
    # The contact is taken from the environment's own cost, because the timer of the buttons has
    # advanced since the cost was computed.
    touched = any(env.cost.get(key, 0.0) > 0 for key in _CONTACT_COSTS[item.name])
    return max(overlap, CONTACT) if touched else min(overlap, -CLEAR)


def _reach(env: Simulator, place: np.ndarray) -> float:
    """Return the radius, in metres, of a circle around the agent that contains all its parts."""
    model, data = env.task.model, env.task.data
    # Parts are found by their root body, because the Racecar's parts have no names.
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
