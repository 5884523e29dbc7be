"""The 38 tasks of DSRL: ids, lengths of episodes, reference returns, the papers' cost limits.

The numbers are those of DSRL 0.1.0 (Liu et al. 2024, "Datasets and Benchmarks for Offline Safe
Reinforcement Learning"). The package itself is not needed here.
"""

from __future__ import annotations

import csv
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Family(StrEnum):
    """A family of tasks that share a simulator and a kind of constraint."""

    navigation = "navigation"
    """Safety-Gymnasium: Point and Car among hazards."""
    velocity = "velocity"
    """Safety-Gymnasium: MuJoCo's runners under a speed limit."""
    bullet = "bullet"
    """Bullet-Safety-Gym: Run and Circle between walls."""
    metadrive = "metadrive"
    """MetaDrive: driving through traffic."""


COST_LIMIT = 10.0
"""Cost of an episode that the papers allow (FISOR, FLRP; R2PAC on Safety-Gymnasium)."""
TIGHT_COST_LIMIT = 5.0
"""Cost of an episode that R2PAC's table allows on Bullet."""


@dataclass(frozen=True)
class Task:
    """One task of DSRL."""

    name: str
    """DSRL's name, such as ``PointGoal1``, ``AntVelocity``, ``BallRun``, ``easysparse``."""
    family: Family
    """Suite to which the task belongs."""
    env_id: str
    """Id of the environment, whose step returns Gymnasium's five values with ``info["cost"]``."""
    offline_id: str
    """DSRL's own id of the task."""
    horizon: int
    """Largest number of steps of an episode."""
    min_return: float
    """Least return of an episode in DSRL's log, which is normalised to 0."""
    max_return: float
    """Greatest return of an episode in DSRL's log, which is normalised to 1."""
    max_cost: float
    """Greatest cost of an episode in DSRL's log."""

    @property
    def cost_limits(self) -> tuple[float, ...]:
        """The papers' limits on the cost of an episode, the usual one first."""
        if self.family is Family.bullet:
            return COST_LIMIT, TIGHT_COST_LIMIT
        return (COST_LIMIT,)

    @property
    def constraint(self) -> str:
        """Description of the continuous label h of the task (see `suites.labels`)."""
        return next(text for part, text in _CONSTRAINTS[self.family] if part in self.name)


# By family: part of a task's name, and the description of h of tasks whose name has this part.
_CONSTRAINTS = {
    Family.navigation: (
        ("Circle1", "|x| minus the wall, m"),
        ("Circle2", "the greater of |x| and |y| minus the wall, m"),
        ("Goal1", "depth in a hazard, m"),
        ("", "the greatest depth in a hazard or minus the distance to what must not be touched, m"),
    ),
    Family.velocity: (("", "speed over the step minus the limit, m/s"),),
    Family.bullet: (
        ("Circle", "|x| minus the wall, m"),
        ("Run", "the greater of |y| minus the wall, m, and of speed minus the limit, m/s"),
    ),
    Family.metadrive: (
        ("", "the greatest of speed - 10, m/s; 5 - distance to the nearest car, m; 1 in a crash"),
    ),
}

# By family: the ids of the environment and of DSRL. MetaDrive's tasks have no other id than DSRL's.
_IDS = {
    Family.navigation: ("Safety{}Gymnasium-v0", "Offline{}Gymnasium-v0"),
    Family.velocity: ("Safety{}Gymnasium-v1", "Offline{}Gymnasium-v1"),
    Family.bullet: ("Safety{}-v0", "Offline{}-v0"),
    Family.metadrive: ("OfflineMetadrive-{}-v0", "OfflineMetadrive-{}-v0"),
}


def _tasks() -> dict[str, Task]:
    """Read tasks.csv, which has a row for each task with the numbers of DSRL's infos.py."""
    text = importlib.resources.files(__package__).joinpath("tasks.csv").read_text("utf-8")
    _, *rows = csv.reader(text.splitlines())
    tasks = {}
    for name, word, horizon, *numbers in rows:
        family = Family(word)
        env_id, offline_id = (one.format(name) for one in _IDS[family])
        tasks[name] = Task(name, family, env_id, offline_id, int(horizon), *map(float, numbers))
    return tasks


TASKS: Mapping[str, Task] = MappingProxyType(_tasks())
"""DSRL's name -> task, for 16 tasks of navigation, 5 of velocity, 8 of Bullet, 9 of MetaDrive."""


def find_task(name: str) -> Task:
    """Return the task with this name, environment id or DSRL id.

    Args:
        name: The name or id; a module in front of an id ("module:id") is ignored.

    Raises:
        ValueError: The name belongs to none of the 38 tasks.

    >>> find_task("safeshield.suites:SafetyBallRun-v0").name
    'BallRun'
    >>> find_task("OfflinePointGoal1Gymnasium-v0").horizon
    1000
    """
    wanted = name.rpartition(":")[2]
    for task in TASKS.values():
        if wanted in (task.name, task.env_id, task.offline_id):
            return task
    raise ValueError(
        f"name must be one of DSRL's 38 tasks or an id of theirs, got {name!r}; the names are "
        f"{', '.join(TASKS)}"
    )
