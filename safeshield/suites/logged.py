"""Functions that compute the constraint h from the numbers of logged steps.

The tables hold the limits of the environments (safety-gymnasium 0.4.1, bullet-safety-gym 1.4.0), so
those packages are not needed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from safeshield.suites.constraints import (
    CLEAR,
    CONTACT,
    CRASH,
    CRASH_COST,
    LIDAR_LIMIT,
    LIDAR_RANGE,
    SPEED_LIMIT,
)
from safeshield.suites.metadrive import METADRIVE_TASKS, METADRIVE_WIDTH
from safeshield.values.constraint import register_constraint

if TYPE_CHECKING:
    from safeshield.data import OfflineDataset

Floats = npt.NDArray[np.float64]
OfState = Callable[[Floats], Floats]
"""Function: observations (N, width) -> h (N,), NaN where an observation does not determine h."""
OfStep = Callable[["OfflineDataset"], Floats]
"""Function: log -> h (N,) of the state that each step reached."""


@dataclass(frozen=True)
class LogLabel:
    """The functions that compute h from a log of one task."""

    width: int
    """Number of entries of an observation."""
    of_state: OfState
    """Computes h of the state that an observation describes."""
    of_step: OfStep | None = None
    """Computes h of the state that a step reached, for tasks whose cost depends on the step (a mean
    speed, a crash); None where `of_state` of the next observation is used."""


# -- Safety-Gymnasium: velocity ----------------------------------------------------------------


@dataclass(frozen=True)
class VelocityTask:
    """The constants of one velocity task.

    Its reward is ``weight * vx + alive - effort * sum(action^2)``, where vx is the mean speed along
    x over the step. Its cost is ``speed > limit``, where the speed is vx or, if `planar`, the speed
    in the plane.
    """

    limit: float
    """Speed limit, m/s."""
    width: int
    """Number of entries of an observation."""
    column: int
    """Column of the momentary speed along x in an observation; the next column is that along y."""
    effort: float
    """Weight of the control cost."""
    alive: float = 0.0
    """Reward of every step."""
    planar: bool = False
    """Whether the cost is of the speed in the plane."""


VELOCITY_TASKS = {
    "AntVelocity": VelocityTask(2.6222, 27, 13, 0.5, 1.0, planar=True),
    "AntVelocity-v0": VelocityTask(2.5745, 27, 13, 0.5, 1.0, planar=True),
    "HalfCheetahVelocity": VelocityTask(3.2096, 17, 8, 0.1),
    "HalfCheetahVelocity-v0": VelocityTask(2.8795, 17, 8, 0.1),
    "HopperVelocity": VelocityTask(0.7402, 11, 5, 1e-3, 1.0),
    "HopperVelocity-v0": VelocityTask(0.37315, 11, 5, 1e-3, 1.0),
    "SwimmerVelocity": VelocityTask(0.2282, 8, 3, 1e-4),
    "SwimmerVelocity-v0": VelocityTask(0.04845, 8, 3, 1e-4, planar=True),
    "Walker2dVelocity": VelocityTask(2.3415, 17, 8, 1e-3, 1.0),
    "Walker2dVelocity-v0": VelocityTask(1.7075, 17, 8, 1e-3, 1.0),
}


def _velocity(task: VelocityTask) -> LogLabel:
    def of_state(observations: Floats) -> Floats:
        along = observations[:, task.column]
        across = observations[:, task.column + 1]
        speed = np.hypot(along, across) if task.planar else along
        return np.asarray(speed - task.limit)

    def of_step(log: OfflineDataset) -> Floats:
        effort = task.effort * np.square(log.actions, dtype=np.float64).sum(axis=1)
        along = log.rewards.astype(np.float64) - task.alive + effort
        if not task.planar:
            return np.asarray(along - task.limit)
        across = 0.5 * (
            log.observations[:, task.column + 1].astype(np.float64)
            + log.next_observations[:, task.column + 1]
        )
        return np.asarray(np.hypot(along, across) - task.limit)

    return LogLabel(task.width, of_state, of_step)


# -- Safety-Gymnasium: navigation --------------------------------------------------------------

ROBOTS = {"Point": (12, 0.1866), "Car": (24, 0.2623)}
"""Number of entries of a robot's own sensors, which precede the lidars in an observation (the
magnetometer is the fourth triple), and radius, m, of a circle that contains the robot."""
_BINS = 16
"""Number of directions of one lidar."""
_LIDAR_RANGE = 3.0
_CIRCLE_LIDAR_RANGE = 6.0
CIRCLE_WALL = 1.125
"""Distance of the walls of the Circle tasks from the centre, m."""
_TOUCH = 0.1
"""Largest distance between bounding circles, m, at which a cost is attributed to a contact. It is
above 0 because corners of boxes lie outside their circles, and a vase slides on after a push."""


@dataclass(frozen=True)
class Arena:
    """The objects of a navigation task."""

    lidars: tuple[str, ...]
    """Kinds of objects that the lidars show, in the order of the observation."""
    hazard_radius: float
    """Radius of a hazard, m."""
    fragile: dict[str, float]
    """Kinds of objects that have a cost when touched, with their radius, m."""


_GOAL = ("goal", "hazards", "vases")
_BUTTON = ("buttons", "goal", "hazards", "gremlins")
_PUSH = ("goal", "hazards", "pillars", "push_box")
ARENAS = {
    "Goal1": Arena(_GOAL, 0.2, {}),
    "Goal2": Arena(_GOAL, 0.2, {"vases": 0.1}),
    "Button1": Arena(_BUTTON, 0.2, {"buttons": 0.1, "gremlins": 0.1}),
    "Button2": Arena(_BUTTON, 0.2, {"buttons": 0.1, "gremlins": 0.1}),
    "Push1": Arena(_PUSH, 0.3, {}),
    "Push2": Arena(_PUSH, 0.3, {"pillars": 0.2}),
}


def _arena(robot: str, arena: Arena) -> LogLabel:
    sensors, reach = ROBOTS[robot]

    def lidar(name: str, observations: Floats) -> Floats:
        first = sensors + _BINS * arena.lidars.index(name)
        return observations[:, first : first + _BINS]

    def distance(name: str, observations: Floats) -> Floats:
        readings = lidar(name, observations)
        if name == "buttons":
            # The goal button has the same readings as the goal and no cost, so it is left out.
            readings = np.where(readings == lidar("goal", observations), 0.0, readings)
        return np.asarray(_LIDAR_RANGE * (1.0 - readings.max(axis=1)))

    def overlap(observations: Floats) -> Floats:
        parts = [
            radius + reach - distance(name, observations) for name, radius in arena.fragile.items()
        ]
        return np.asarray(np.max(parts, axis=0))

    def of_state(observations: Floats) -> Floats:
        depth = arena.hazard_radius - distance("hazards", observations)
        if not arena.fragile:
            return np.asarray(depth)
        return np.asarray(np.maximum(depth, np.minimum(overlap(observations), -CLEAR)))

    def of_step(log: OfflineDataset) -> Floats:
        reached = log.next_observations.astype(np.float64)
        h, near = of_state(reached), overlap(reached)
        touched = (log.costs > 0) & (h <= 0) & (near > -_TOUCH)
        return np.where(touched, np.maximum(near, CONTACT), h)

    width = sensors + _BINS * len(arena.lidars)
    return LogLabel(width, of_state, of_step if arena.fragile else None)


def _circle(robot: str, level: str) -> LogLabel:
    first, _ = ROBOTS[robot]
    axes = slice(0, 2 if level == "Circle2" else 1)

    def of_state(observations: Floats) -> Floats:
        place = _place_in_circle(observations[:, 9:12], observations[:, first : first + _BINS])
        return np.asarray(np.abs(place[:, axes]).max(axis=1) - CIRCLE_WALL)

    return LogLabel(first + _BINS, of_state)


def _place_in_circle(compass: Floats, lidar: Floats) -> Floats:
    """Return the robot's position (N, 2), m, from its magnetometer and its lidar of the centre.

    The bin that contains the centre reads ``s = 1 - distance / 6``, the next bin ``a s`` and the
    previous bin ``(1 - a) s``, where a is the position of the centre within its bin, as a share of
    the bin's width. The magnetic field points along -y of the world.
    """
    rows = np.arange(len(lidar))
    own = lidar.argmax(axis=1)
    strength = lidar[rows, own]
    seen = strength > 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        share = lidar[rows, (own + 1) % _BINS] / strength
    angle = (own + share) * (2.0 * np.pi / _BINS) + np.arctan2(-compass[:, 0], -compass[:, 1])
    distance = _CIRCLE_LIDAR_RANGE * (1.0 - strength)
    place = -distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.where(seen[:, None], place, np.nan)


# -- Bullet-Safety-Gym -------------------------------------------------------------------------


@dataclass(frozen=True)
class BulletRobot:
    """Layout of a robot's observations, and its speed limit."""

    width: int
    """Number of entries of an observation in the Run task; the Circle task has one more."""
    speed_columns: tuple[int, int]
    """Columns of the speeds along x and y."""
    speed_scale: float
    """Factor that converts a speed reading to m/s."""
    speed_limit: float
    """Speed limit, m/s."""


BULLET_ROBOTS = {
    "Ant": BulletRobot(33, (3, 4), 1.0 / 0.3, 1.5),
    "Ball": BulletRobot(7, (2, 3), 1.0 / 0.2, 2.5),
    "Car": BulletRobot(7, (2, 3), 1.0, 1.5),
    "Drone": BulletRobot(17, (3, 4), 1.0 / 0.2, 1.5),
}
_PLACE_SCALE = 10.0
BULLET_WALLS = {"Circle": 6.0, "Run": 2.0}
"""Distance of the walls from the axis, m, along x for Circle and along y for Run."""


def _bullet_circle(robot: BulletRobot) -> LogLabel:
    def of_state(observations: Floats) -> Floats:
        return _PLACE_SCALE * np.abs(observations[:, 0]) - BULLET_WALLS["Circle"]

    return LogLabel(robot.width + 1, of_state)


def _bullet_run(robot: BulletRobot) -> LogLabel:
    def of_state(observations: Floats) -> Floats:
        outside = _PLACE_SCALE * np.abs(observations[:, 1]) - BULLET_WALLS["Run"]
        along, across = (observations[:, column] for column in robot.speed_columns)
        speed = robot.speed_scale * np.hypot(along, across)
        return np.maximum(outside, speed - robot.speed_limit)

    return LogLabel(robot.width, of_state)


# -- MetaDrive ---------------------------------------------------------------------------------

_SPEED_COLUMN = 3
_RAYS = 240
_TOP_SPEED = 80.0
"""Top speed of the car, km/h; the speed reading is (speed + 1) / (top speed + 1)."""


def _driving_state(observations: Floats) -> Floats:
    speed = (observations[:, _SPEED_COLUMN] * (_TOP_SPEED + 1.0) - 1.0) / 3.6
    near = LIDAR_RANGE * (LIDAR_LIMIT - observations[:, -_RAYS:].min(axis=1))
    return np.asarray(np.maximum(speed - SPEED_LIMIT, near))


def _driving_step(log: OfflineDataset) -> Floats:
    after = _driving_state(log.next_observations.astype(np.float64))
    return np.where(log.costs >= CRASH_COST, CRASH, after)


# -- the tasks ---------------------------------------------------------------------------------

LOG_LABELS: dict[str, LogLabel | None] = {
    **{name: _velocity(task) for name, task in VELOCITY_TASKS.items()},
    # The cost is of the speed of the centre of mass, which the observation does not contain.
    "HumanoidVelocity": None,
    "HumanoidVelocity-v0": None,
    **{
        f"{robot}{level}": _arena(robot, arena)
        for robot in ROBOTS
        for level, arena in ARENAS.items()
    },
    **{
        f"{robot}{level}": _circle(robot, level)
        for robot in ROBOTS
        for level in ("Circle1", "Circle2")
    },
    **{f"{name}Circle": _bullet_circle(robot) for name, robot in BULLET_ROBOTS.items()},
    **{f"{name}Run": _bullet_run(robot) for name, robot in BULLET_ROBOTS.items()},
    **{name: LogLabel(METADRIVE_WIDTH, _driving_state, _driving_step) for name in METADRIVE_TASKS},
}
"""DSRL's name of a task -> how h is computed from its logs; None where labels stay binary."""

SOURCES: dict[str, str] = {}
"""DSRL's name of a task -> name of the function that computes h from an observation. Tasks whose
constraint an observation does not determine (a mean speed, a contact, a crash) are missing."""


def _register(name: str, of_state: OfState) -> None:
    SOURCES[name] = f"{name}@1"

    @register_constraint(SOURCES[name])
    def observed(observations: Floats) -> Floats:
        return of_state(np.asarray(observations, np.float64))


for _name, _label in LOG_LABELS.items():
    if _label is not None and _label.of_step is None:
        _register(_name, _label.of_state)
