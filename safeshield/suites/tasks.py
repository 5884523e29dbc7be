"""The 38 tasks of DSRL: ids, lengths of episodes, reference returns, the papers' cost limits.

The numbers are those of DSRL 0.1.0 (Liu et al. 2024, "Datasets and Benchmarks for Offline Safe
Reinforcement Learning"). The package itself is not needed here.
"""

from __future__ import annotations

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

# Name: horizon, least return, greatest return and greatest cost, as in DSRL's infos.py.
_NAVIGATION = {
    "PointButton1": (1000, 0.008822109034937853, 41.19301568767707, 200.0),
    "PointButton2": (1000, 0.014114166087574098, 42.8985953616709, 250.0),
    "PointCircle1": (500, 20.067626953125, 61.72819519042969, 200.0),
    "PointCircle2": (500, 20.478347778320312, 54.02184295654297, 299.0),
    "PointGoal1": (1000, 0.01196012764197707, 30.071114857340543, 100.0),
    "PointGoal2": (1000, 0.002616959830266108, 27.717709787852737, 200.0),
    "PointPush1": (1000, 0.0014001545292344209, 16.518654299293367, 150.0),
    "PointPush2": (1000, 0.0012438183001730607, 14.691039145644403, 200.0),
    "CarButton1": (1000, 0.0028926206826067613, 44.420003345738984, 250.0),
    "CarButton2": (1000, 0.001767391717990563, 41.99513815522894, 300.0),
    "CarCircle1": (500, 8.037073135375977, 24.94155502319336, 250.0),
    "CarCircle2": (500, 5.113386154174805, 25.950098037719727, 398.0),
    "CarGoal1": (1000, 0.012232819540852091, 39.907809198384705, 120.0),
    "CarGoal2": (1000, 0.001032874531954775, 28.902897990056502, 200.0),
    "CarPush1": (1000, 0.013700173533941762, 16.304467598905237, 200.0),
    "CarPush2": (1000, 0.00029391133526335267, 15.141648491514314, 250.0),
}
_VELOCITY = {
    "AntVelocity": (1000, 6.1519012451171875, 2976.276611328125, 250.0),
    "HalfCheetahVelocity": (1000, 5.7509765625, 2806.93310546875, 250.0),
    "HopperVelocity": (1000, 37.05154800415039, 1911.396728515625, 250.0),
    "SwimmerVelocity": (1000, 0.07114458084106445, 238.95831298828125, 200.0),
    "Walker2dVelocity": (1000, 18.668498992919922, 3418.223876953125, 300.0),
}
_BULLET = {
    "BallRun": (100, 26.339754104614258, 1327.445556640625, 80.0),
    "BallCircle": (200, 0.38312244415283203, 881.46337890625, 80.0),
    "CarRun": (200, 204.28726196289062, 574.6533203125, 40.0),
    "CarCircle": (300, 3.484419822692871, 534.3060913085938, 100.0),
    "DroneRun": (200, 10.557029724121094, 682.8330078125, 140.0),
    "DroneCircle": (300, 207.794189453125, 996.38916015625, 100.0),
    "AntRun": (200, 0.001767391717990563, 955.4818725585938, 150.0),
    "AntCircle": (500, 0.0177031010389328, 460.7091979980469, 200.0),
}
_METADRIVE = {
    "easysparse": (1000, 20.094310760498047, 425.8006286621094, 82.42418670654297),
    "easymean": (1000, 22.142553329467773, 425.82440185546875, 82.38601684570312),
    "easydense": (1000, 19.71139144897461, 425.81732177734375, 80.36358642578125),
    "mediumsparse": (1000, 17.446578979492188, 269.80084228515625, 46.46459197998047),
    "mediummean": (1000, 17.032529830932617, 269.8221435546875, 46.46154022216797),
    "mediumdense": (1000, 15.102348327636719, 269.7813415527344, 46.45858383178711),
    "hardsparse": (1000, 17.247974395751953, 486.80523681640625, 85.010009765625),
    "hardmean": (1000, 19.387981414794922, 486.9967956542969, 84.33995056152344),
    "harddense": (1000, 15.386894226074219, 486.63616943359375, 84.76679229736328),
}


def _tasks() -> dict[str, Task]:
    # The id of the environment, DSRL's id, and the numbers, family by family.
    families = (
        (Family.navigation, "Safety{}Gymnasium-v0", "Offline{}Gymnasium-v0", _NAVIGATION),
        (Family.velocity, "Safety{}Gymnasium-v1", "Offline{}Gymnasium-v1", _VELOCITY),
        (Family.bullet, "Safety{}-v0", "Offline{}-v0", _BULLET),
        # These tasks have no other id than DSRL's.
        (Family.metadrive, "OfflineMetadrive-{}-v0", "OfflineMetadrive-{}-v0", _METADRIVE),
    )
    return {
        name: Task(name, family, env_id.format(name), offline_id.format(name), *numbers)
        for family, env_id, offline_id, table in families
        for name, numbers in table.items()
    }


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
