"""Benchmark tasks of Safety-Gymnasium, Bullet-Safety-Gym, DSRL and MetaDrive under their own ids.

Importing this package registers the tasks with Gymnasium, and the functions of the observation that
compute their constraints, and loads no simulator. Tasks of packages that are not installed are
registered too. Making such a task raises an error that names the missing packages and the commands
that install them.

``gymnasium.make("safeshield.suites:SafetyPointGoal1Gymnasium-v0")`` works everywhere, also in
worker processes that receive nothing but an id. After ``import safeshield.suites`` plain ids work
too. In worker processes plain ids work where Gymnasium passes on the environment's spec or where
the process was forked. A program that imports `safety_gymnasium`, `bullet_safety_gym` or `dsrl`
itself must import this package after them, because the last registration of an id counts.
"""

from __future__ import annotations

import safeshield.suites.logged  # noqa: F401 - registers the constraints
from safeshield.suites import bullet, dsrl, metadrive, safety_gymnasium
from safeshield.suites.packages import Suite
from safeshield.suites.tasks import TASKS, Family, Task, find_task

__all__ = ["TASKS", "Family", "Suite", "Task", "find_task", "register_envs"]


def register_envs() -> None:
    """Register every id.

    A second call changes nothing, unless another package has replaced a registration meanwhile.
    """
    safety_gymnasium.register_envs()
    bullet.register_envs()
    dsrl.register_envs()
    metadrive.register_metadrive()


register_envs()
