"""The field's tasks: Safety-Gymnasium, Bullet-Safety-Gym, DSRL, MetaDrive, under their own ids.

Importing this registers them with Gymnasium and loads no simulator. What is not installed is
registered all the same: making it says what is missing, and the commands.

``gymnasium.make("safeshield.suites:SafetyPointGoal1Gymnasium-v0")`` works anywhere, and so in
worker processes that know an id alone. After ``import safeshield.suites`` plain ids work too, in
workers as far as Gymnasium hands them an environment's spec or they are forked. Import it after
`safety_gymnasium`, `bullet_safety_gym` and `dsrl` where you import these yourself: the last one
to register an id has it.
"""

from __future__ import annotations

from safeshield.suites import bullet, dsrl, metadrive, safety_gymnasium
from safeshield.suites.packages import Suite
from safeshield.suites.tasks import TASKS, Family, Task, find_task

__all__ = ["TASKS", "Family", "Suite", "Task", "find_task", "register_envs"]


def register_envs() -> None:
    """Register every id; a second call changes nothing, unless another package came between."""
    safety_gymnasium.register_envs()
    bullet.register_envs()
    dsrl.register_envs()
    metadrive.register_metadrive()


register_envs()
