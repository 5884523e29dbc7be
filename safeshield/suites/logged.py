"""Constraints h computed from logged steps: which numbers of an observation tell a distance.

The tables hold the limits of the environments (safety-gymnasium 0.4.1, bullet-safety-gym 1.4.0);
nothing of those packages is needed here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from safeshield.data import OfflineDataset
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

Floats = npt.NDArray[np.float64]
OfState = Callable[[Floats], Floats]
"""Observations (N, width) -> h (N,), NaN where they do not tell."""
OfStep = Callable[[OfflineDataset], Floats]
"""A log -> h of the state that each step reached (N,)."""


@dataclass(frozen=True)
class LogLabel:
    """How h is computed from a log of one task."""

    width: int
    """Numbers in an observation."""
    of_state: OfState
    """h of the state that an observation shows."""
    of_step: OfStep | None = None
    """h of the state a step reached, where its cost is that of the step: a mean speed, a crash."""


# -- Safety-Gymnasium: velocity ----------------------------------------------------------------


@dataclass(frozen=True)
class VelocityTask:
    """The numbers of one velocity task.

    Its reward is ``weight * vx + alive - effort * sum(action^2)``, vx the mean speed along x over
    the step; its cost is ``speed > limit``, speed being vx or, `planar`, that in the plane.
    """

    limit: float
    """m/s."""
    width: int
    """Numbers in an observation."""
    column: int
    """Of the momentary speed along x in an observation; that along y stands beside it."""
    effort: float
    """Weight of the control cost."""
    alive: float = 0.0
    """Reward of every step."""
    planar: bool = False
    """Whether the cost takes the speed in the plane."""


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
"""Numbers of a robot's own sensors, which stand before the lidars (its magnetometer is the fourth
triple); radius of a circle that holds all of it, m."""
_BINS = 16
"""Directions of one lidar."""
_LIDAR_RANGE = 3.0
_CIRCLE_LIDAR_RANGE = 6.0
CIRCLE_WALL = 1.125
"""Distance of the walls of the Circle tasks from the centre, m."""
_TOUCH = 0.1
"""How far apart bounding circles may be, m, when a cost is put down to a contact: corners of boxes
stand out of theirs, and a vase that was pushed slides on."""


@dataclass(frozen=True)
class Arena:
    """What lies about in a navigation task."""

    lidars: tuple[str, ...]
    """What its lidars see, in the order of the observation."""
    hazard_radius: float
    """m."""
    fragile: dict[str, float]
    """What costs when it is touched, and its radius, m."""


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
            # The button that is the goal stands where the goal does, and costs nothing.
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
    """Where the robot is, (N, 2) metres, from its magnetometer and its lidar of the centre.

    The bin that holds the centre reads ``s = 1 - distance / 6``, the next ``a s``, the one before
    ``(1 - a) s``, the centre lying the share a of a bin into its own. The magnetic field points
    along -y of the world.
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
    """Where a robot's place and speed stand in its observations, and its speed limit."""

    width: int
    """Numbers in an observation of the Run task; Circle adds one."""
    speed_columns: tuple[int, int]
    """Of the speeds along x and y."""
    speed_scale: float
    """A reading times this is m/s."""
    speed_limit: float
    """m/s."""


BULLET_ROBOTS = {
    "Ant": BulletRobot(33, (3, 4), 1.0 / 0.3, 1.5),
    "Ball": BulletRobot(7, (2, 3), 1.0 / 0.2, 2.5),
    "Car": BulletRobot(7, (2, 3), 1.0, 1.5),
    "Drone": BulletRobot(17, (3, 4), 1.0 / 0.2, 1.5),
}
_PLACE_SCALE = 10.0
BULLET_WALLS = {"Circle": 6.0, "Run": 2.0}
"""Distance of the walls from the axis, m: in x for Circle, in y for Run."""


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
"""Of the car, km/h: its reading is (speed + 1) / (top speed + 1)."""


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
    # Its speed is that of a centre of mass, which no number of its observation tells.
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
"""DSRL's name of a task -> how its logs are labelled; None: by their costs alone, binary."""
