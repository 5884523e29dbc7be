"""Bullet-Safety-Gym's environments, under every id that the package registers.

Bullet-Safety-Gym's own `reset` ignores its seed, so that its runs cannot be repeated. The
environments made here follow the seed. ``render_mode`` is an argument of `gymnasium.make`, as for
other environments.
"""

from __future__ import annotations

import functools
import os
import sys
from contextlib import nullcontext
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.spaces.generic import Env
from safeshield.suites import compat
from safeshield.suites.packages import Suite
from safeshield.suites.registration import Remade, Upstream, register, remember_how

RENDER_MODES = ("human", "rgb_array")
METADATA = {"render_modes": list(RENDER_MODES), "render_fps": 30}

_FAR = 100.0
"""Height above the ground, metres, at which a body touches nothing."""

_TASKS = {
    "Ball": ("Reach", "Push", "Circle", "Run", "Gather"),
    "Car": ("Reach", "Push", "Circle", "Run", "Gather"),
    "Ant": ("Reach", "Circle", "Run", "Gather"),
    "Drone": ("Reach", "Circle", "Run", "Gather"),
}
IDS = tuple(f"Safety{robot}{task}-v0" for robot, tasks in _TASKS.items() for task in tasks)
UPSTREAM = Upstream(
    Suite.bullet,
    "bullet_safety_gym",
    IDS,
    ("bullet_safety_gym.envs.builder",),
    compat.streams_with_files,
)


def register_envs() -> None:
    """Register Bullet-Safety-Gym's ids; without the package, making one raises an error."""
    UPSTREAM.load_if_installed()
    register(IDS, f"{__name__}:make", {}, UPSTREAM.specs)


def make(env_id: str, **kwargs: Any) -> Env:  # noqa: ANN401 - the environment's own
    """Return the environment of the id `env_id`, without Gymnasium's outer wrappers.

    `kwargs` are arguments of the environment.

    Raises:
        gymnasium.error.DependencyNotInstalled: A package is missing or cannot be loaded.
        ValueError: The render mode is unknown, or needs a display where there is none.
    """
    base, defaults = UPSTREAM.class_of(env_id, env_id)
    return remember_how(construct(base, **{**defaults, **kwargs}), make, env_id, kwargs)


vars(make).update(metadata=METADATA)


def construct(base: Any, **kwargs: Any) -> Env:  # noqa: ANN401 - the environment's own
    """Return an environment of the class `base` of Bullet-Safety-Gym, with the arguments `kwargs`.

    It follows seeds and render modes.
    """
    with compat.LOCK, compat.streams_with_files():
        env: Env = _mended(base)(**kwargs)
    return env


@functools.cache
def _mended(base: Any) -> Any:  # noqa: ANN401 - a class of theirs
    return type(base.__name__, (_Seeded, base), {"__doc__": base.__doc__})


class _Seeded(Remade):
    """A Bullet environment that follows the seed of `reset`.

    After ``reset(seed=n)`` the environment behaves like a new one whose random draws follow n.
    Bullet-Safety-Gym draws from NumPy's and Python's global generators. From the first seed on, the
    environment has random streams of its own, which replace the global ones while it draws. Without
    a seed, `reset` is that of Bullet-Safety-Gym, in which the motors keep the commands of the last
    step and thereby change the start.
    """

    metadata = METADATA
    bc: Any
    agent: Any
    input_parameters: dict[str, Any]
    stored_state_id: int

    def __init__(self, *args: Any, render_mode: str | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        if render_mode not in (None, *RENDER_MODES):
            raise ValueError(
                f"render_mode must be None or one of {RENDER_MODES}, got {render_mode!r}"
            )
        if render_mode == "human" and not _has_display():
            raise ValueError(
                "render_mode 'human' opens a window, and there is no display here (DISPLAY is not "
                "set): use 'rgb_array', which needs none"
            )
        super().__init__(*args, **kwargs)
        self.render_mode = render_mode
        self._draws: compat.Draws | None = None
        self._draws_in_steps = self.input_parameters["task"] not in ("RunTask", "CircleTask")
        if render_mode == "human":
            super().render("human")  # type: ignore[call-arg]
        self._new_state: int = self.bc.saveState()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        gym.Env.reset(self, seed=seed)
        if seed is not None:
            self._draws = compat.Draws(seed)
            self._make_new()
        with self._draws.in_place() if self._draws is not None else nullcontext():
            return super().reset(seed=seed, options=options)

    def _make_new(self) -> None:
        """Restore the state that the simulation had before the first reset."""
        if self.stored_state_id < 0:
            return
        bullet = self.bc
        body = self.agent.body_id
        # A saved state does not include the motors' commands, and a contact that exists when the
        # state is restored keeps its impulse. So the motors are stopped and the agent is lifted off
        # the ground first.
        for joint in range(bullet.getNumJoints(body)):
            bullet.setJointMotorControl2(
                body, joint, bullet.VELOCITY_CONTROL, targetVelocity=0.0, force=0.0
            )
        bullet.resetBasePositionAndOrientation(body, (0.0, 0.0, _FAR), (0.0, 0.0, 0.0, 1.0))
        bullet.performCollisionDetection()
        bullet.restoreState(self._new_state)
        bullet.removeState(self.stored_state_id)
        self.stored_state_id = -1  # as in a new environment, whose first reset saves a state

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:  # noqa: ANN401
        if self._draws is None or not self._draws_in_steps:
            return super().step(action)
        with self._draws.in_place():
            return super().step(action)

    def render(self) -> npt.NDArray[np.uint8] | None:
        if self.render_mode is None:
            raise ValueError(
                "render() needs a render mode: gymnasium.make(id, render_mode='rgb_array')"
            )
        if self.render_mode == "human":
            return None  # the window shows every step without a call of render
        picture: Any = super().render("rgb_array")  # type: ignore[call-arg]
        return np.asarray(picture, dtype=np.uint8)


def _has_display() -> bool:
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY"))
