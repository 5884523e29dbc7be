"""A cart on a track between two walls, which must brake in time to avoid them.

The state is (position, speed) in metres and metres per second. The action is the acceleration,
clipped to [-1, 1]. A step holds the acceleration u for dt seconds (zero-order hold, exact):

    p' = p + v dt + u dt^2 / 2,    v' = v + u dt,

and then clips p' to [-1.5, 1.5] and v' to [-2, 2]. The constraint is h = abs(p) - 1, in metres,
which is positive behind a wall. The reward is the speed before the step, so it is highest on the
way to the right wall. `safeshield.exact.double_integrator` has the exact safety value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from safeshield.envs.rendering import Canvas
from safeshield.envs.single import StateEnv
from safeshield.envs.task import Array, Frame, StateTask, positive
from safeshield.envs.vector import StateVectorEnv
from safeshield.spaces.shapes import Actions, Observations, Scalars

POSITION_LIMIT = 1.5
SPEED_LIMIT = 2.0
WALL = 1.0
MAX_ACCELERATION = 1.0
TIME_STEP = 0.05
MAX_EPISODE_STEPS = 200
STATE_LOW = np.array([-POSITION_LIMIT, -SPEED_LIMIT])
STATE_HIGH = np.array([POSITION_LIMIT, SPEED_LIMIT])


def next_state(state: Observations, action: Actions, *, dt: float = TIME_STEP) -> Observations:
    """Return the states (..., 2) after one step.

    `state` (..., 2) holds the states before it, and `action` (..., 1) the accelerations that are
    held for `dt` seconds.

    Example:
        >>> next_state(np.array([0.0, 1.0]), np.array([-1.0]), dt=1.0)
        array([0.5, 0. ])
    """
    state, action = np.asarray(state, dtype=np.float64), np.asarray(action, dtype=np.float64)
    acceleration = np.clip(action[..., 0], -MAX_ACCELERATION, MAX_ACCELERATION)
    position, speed = state[..., 0], state[..., 1]
    moved = np.stack(
        (position + speed * dt + acceleration * (0.5 * dt * dt), speed + acceleration * dt), axis=-1
    )
    clipped: Observations = np.clip(moved, STATE_LOW, STATE_HIGH)
    return clipped


def constraint(state: Observations) -> Scalars:
    """Return h (...) = abs(position) - 1 of the states `state` (..., 2), in metres.

    Example:
        >>> float(constraint(np.array([-1.25, 0.0])))
        0.25
    """
    return np.asarray(np.abs(np.asarray(state, dtype=np.float64)[..., 0]) - WALL)


def reward(state: Observations) -> Scalars:
    """Return the reward (...) of steps from `state` (..., 2): the speed in metres per second.

    Example:
        >>> float(reward(np.array([0.0, 2.0])))
        2.0
    """
    return np.array(np.asarray(state, dtype=np.float64)[..., 1])


@dataclass(frozen=True, eq=False)
class DoubleIntegratorTask(StateTask):
    """The cart's dynamics, constraint, reward and starts, for `StateEnv` and `StateVectorEnv`."""

    dt: float = TIME_STEP
    """Length of a step, seconds."""

    state_low = STATE_LOW
    state_high = STATE_HIGH
    action_size = 1
    max_episode_steps = MAX_EPISODE_STEPS
    render_fps = 20
    constraint_source = "DoubleIntegrator@1"

    def __post_init__(self) -> None:
        positive("dt", self.dt)

    def next_state(self, state: Array, action: Array) -> Array:
        """Return the states (..., 2) that follow `state` (..., 2) under `action` (..., 1)."""
        return next_state(state, action, dt=self.dt)

    def constraint(self, state: Array) -> Array:
        """Return h (...) of the states `state` (..., 2), in metres."""
        return constraint(state)

    def reward(self, state: Array) -> Array:
        """Return the reward (...) of steps from the states `state` (..., 2)."""
        return reward(state)

    def draw_start(self, generator: np.random.Generator) -> Array:
        """Return a start (2,) that `generator` draws.

        It is uniform between the walls and over all speeds of the box.
        """
        return generator.uniform((-WALL, -SPEED_LIMIT), (WALL, SPEED_LIMIT))

    def picture(self, trail: Sequence[Array]) -> Frame:
        """Return a picture (256, 720, 3) of track, walls, the cart and an arrow for its speed.

        The cart is drawn in the last state of `trail`.
        """
        position, speed = trail[-1]
        canvas = Canvas(low=(-1.8, -0.5), high=(1.8, 0.78), height=256, colour=(244, 244, 240))
        for side in (-1.0, 1.0):
            canvas.box((side * 1.4 - 0.4, -0.5), (side * 1.4 + 0.4, 0.78), (247, 219, 213))
            canvas.line((side, -0.12), (side, 0.6), 0.025, (188, 58, 44))
        canvas.line((-1.7, -0.15), (1.7, -0.15), 0.02, (120, 120, 124))
        for tick in np.arange(-1.5, 1.51, 0.25):
            canvas.line((tick, -0.16), (tick, -0.21), 0.008, (120, 120, 124))
        body = (200, 62, 48) if constraint(trail[-1]) > 0.0 else (66, 99, 170)
        canvas.box((position - 0.14, -0.06), (position + 0.14, 0.1), body)
        for wheel in (-0.08, 0.08):
            canvas.disc((position + wheel, -0.08), 0.045, (40, 40, 48))
        if abs(speed) > 0.02:
            tip, back = position + 0.14 * speed, -0.06 * np.sign(speed)
            canvas.line((position, 0.25), (tip, 0.25), 0.016, (52, 148, 92))
            for wing in (-0.05, 0.05):
                canvas.line((tip, 0.25), (tip + back, 0.25 + wing), 0.016, (52, 148, 92))
        return canvas.pixels()


class DoubleIntegratorEnv(StateEnv):
    """A single environment of the cart.

    The observation (2,) is the state: the position in metres and the speed in metres per second, as
    float32. The action (1,) is the acceleration in metres per second squared; the cart gets the
    nearest number in [-1, 1]. An episode never terminates.
    ``gymnasium.make("safeshield/DoubleIntegrator-v0")`` truncates it after 200 steps. Starts are
    uniform between the walls and over all speeds, so from some starts no control avoids the walls.

    Args:
        render_mode: "rgb_array" for pictures, or None.
        dt: Length of a step, seconds.

    Raises:
        ValueError: `dt` is not positive, or the render mode is unknown.

    Example:
        >>> env = DoubleIntegratorEnv()
        >>> observation, info = env.reset(options={"state": [1.25, 0.0]})
        >>> info
        {'cost': 1.0, 'constraint': 0.25}
    """

    metadata: dict[str, Any] = {**StateEnv.metadata, "render_fps": 20}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, dt: float = TIME_STEP) -> None:
        super().__init__(DoubleIntegratorTask(dt), render_mode)


class DoubleIntegratorVectorEnv(StateVectorEnv):
    """A vector environment of n carts, which one NumPy call steps together.

    Observations (n, 2) and actions (n, 1) are those of `DoubleIntegratorEnv`, one row for each
    cart. `StateVectorEnv` describes `reset`, `step` and the autoreset modes.

    Args:
        num_envs: Number n of carts.
        max_episode_steps: Number of steps after which an episode is truncated; None for no limit.
        autoreset_mode: "NextStep", "SameStep" or "Disabled"; by default Gymnasium's default.
        render_mode: "rgb_array" for pictures, or None.
        dt: Length of a step, seconds.

    Example:
        >>> envs = DoubleIntegratorVectorEnv(num_envs=3)
        >>> observations, infos = envs.reset(seed=0)
        >>> envs.step(np.zeros((3, 1)))[1].shape
        (3,)
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        max_episode_steps: int | None = MAX_EPISODE_STEPS,
        autoreset_mode: Any = None,  # noqa: ANN401 (an enum that Gymnasium 0.29 does not have)
        render_mode: str | None = None,
        dt: float = TIME_STEP,
    ) -> None:
        super().__init__(
            DoubleIntegratorTask(dt),
            num_envs,
            max_episode_steps=max_episode_steps,
            autoreset_mode=autoreset_mode,
            render_mode=render_mode,
        )
