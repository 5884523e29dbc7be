"""A boat in a river with two rocks, whose current is faster than the boat's engine.

The state is (x, y) in metres, clipped to [-3, 2] x [-2, 2]. Only the direction of the action
counts: the action is rescaled to unit length u (a zero action stays zero), and

    x' = u1 + current - 0.5 y^2,    y' = u2,    Euler steps of dt = 0.005 s, 400 an episode.

With the current 2.0 the boat cannot return upstream where abs(y) < sqrt(2). Upstream of each rock
there are therefore states from which no control avoids the rock. The constraint is
h = max over rocks of radius - distance, in metres, which is positive inside a rock. The reward is
minus the distance to the goal of the state before the step.

Source: the boat navigation task of SafeFQL (arXiv 2603.15136), with the numbers of its official
code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from safeshield.envs.rendering import Canvas
from safeshield.envs.single import StateEnv
from safeshield.envs.task import Array, Frame, StateTask, positive
from safeshield.envs.vector import StateVectorEnv
from safeshield.spaces.shapes import Actions, Observations, Scalars

STATE_LOW = np.array([-3.0, -2.0])
STATE_HIGH = np.array([2.0, 2.0])
ROCK_CENTRES = np.array([[-0.5, 0.5], [-1.0, -1.2]])
ROCK_RADII = np.array([0.4, 0.5])
GOAL = np.array([1.5, 0.0])
CURRENT = 2.0
TIME_STEP = 0.005
MAX_EPISODE_STEPS = 400


def direction(action: Actions) -> Actions:
    """Return the actions `action` (..., 2) rescaled to unit length. Zero actions stay zero.

    Example:
        >>> direction(np.array([[0.3, 0.4], [0.0, 0.0]]))
        array([[0.6, 0.8],
               [0. , 0. ]])
    """
    action = np.asarray(action, dtype=np.float64)
    # The action is first divided by its largest entry, because the squares of tiny and huge numbers
    # would leave the range of floats.
    largest = np.max(np.abs(action), axis=-1, keepdims=True)
    scaled = action / np.where(largest > 0.0, largest, 1.0)
    # np.linalg.norm is not used, because a sum over an axis may round differently in a batch.
    length = np.sqrt(scaled[..., :1] * scaled[..., :1] + scaled[..., 1:] * scaled[..., 1:])
    return np.asarray(scaled / np.where(length > 0.0, length, 1.0))


def next_state(
    state: Observations, action: Actions, *, current: float = CURRENT, dt: float = TIME_STEP
) -> Observations:
    """Return the states (..., 2) one step of `dt` seconds later.

    `state` (..., 2) holds the states before it, `action` (..., 2) the actions, which are rescaled
    to unit length, and `current` is the speed of the river at y = 0.

    Example:
        >>> next_state(np.array([0.0, 0.0]), np.array([0.0, -1.0]))
        array([ 0.01 , -0.005])
    """
    return steer(state, direction(action), current=current, dt=dt)


def steer(
    state: Observations, unit: Actions, *, current: float = CURRENT, dt: float = TIME_STEP
) -> Observations:
    """Return the states (..., 2) one step later, for directions `unit` (..., 2) of unit length.

    The arguments `state`, `current` and `dt` are those of `next_state`.
    """
    state = np.asarray(state, dtype=np.float64)
    x, y = state[..., 0], state[..., 1]
    drift = current - 0.5 * (y * y)
    # Each axis is clipped by itself, because bounds that broadcast along the last axis are slow.
    return np.stack(
        (
            np.clip(x + dt * (unit[..., 0] + drift), STATE_LOW[0], STATE_HIGH[0]),
            np.clip(y + dt * unit[..., 1], STATE_LOW[1], STATE_HIGH[1]),
        ),
        axis=-1,
    )


def constraint(state: Observations) -> Scalars:
    """Return h (...) of states `state` (..., 2), in metres: the largest radius minus distance.

    The distance is that to the centre of a rock.

    Example:
        >>> float(constraint(np.array([-0.5, 0.5])))
        0.4
    """
    # The rocks lie along a new first axis, because NumPy is slow where a short axis is the last.
    state = np.asarray(state, dtype=np.float64)
    x, y, radius = _rocks(state.ndim)
    across, along = state[..., 0] - x, state[..., 1] - y
    across *= across
    along *= along
    across += along
    first, second = radius - np.sqrt(across)
    return np.asarray(np.maximum(first, second))


@cache
def _rocks(ndim: int) -> tuple[Array, Array, Array]:
    """Return x, y and radius of the rocks, (2, 1, ...), for states with `ndim` axes."""
    shape = (len(ROCK_RADII),) + (1,) * (ndim - 1)
    columns = (*ROCK_CENTRES.T, ROCK_RADII)
    x, y, radius = (column.reshape(shape) for column in columns)
    return x, y, radius


def reward(state: Observations) -> Scalars:
    """Return the reward (...) of `state` (..., 2): minus the distance to the goal, in metres.

    Example:
        >>> float(reward(np.array([1.5, 2.0])))
        -2.0
    """
    return np.asarray(-_distance(state, GOAL))


def _distance(state: Observations, point: Array) -> Scalars:
    state = np.asarray(state, dtype=np.float64)
    across, along = state[..., 0] - point[0], state[..., 1] - point[1]
    return np.asarray(np.sqrt(across * across + along * along))


@dataclass(frozen=True, eq=False)
class BoatTask(StateTask):
    """The boat's dynamics, constraint, reward and starts, for `StateEnv` and `StateVectorEnv`."""

    current: float = CURRENT
    """Speed of the river at y = 0, metres per second."""
    dt: float = TIME_STEP
    """Length of a step, seconds."""

    state_low = STATE_LOW
    state_high = STATE_HIGH
    action_size = 2
    max_episode_steps = MAX_EPISODE_STEPS
    render_fps = 50
    constraint_source = "Boat@1"

    def __post_init__(self) -> None:
        positive("dt", self.dt)
        if not np.isfinite(self.current):
            raise ValueError(f"current must be a finite speed, got {self.current!r}")

    def next_state(self, state: Array, action: Array) -> Array:
        """Return the states (..., 2) that follow `state` (..., 2) under `action` (..., 2)."""
        return next_state(state, action, current=self.current, dt=self.dt)

    def constraint(self, state: Array) -> Array:
        """Return h (...) of the states `state` (..., 2), in metres."""
        return constraint(state)

    def reward(self, state: Array) -> Array:
        """Return the reward (...) of steps from the states `state` (..., 2)."""
        return reward(state)

    def draw_start(self, generator: np.random.Generator) -> Array:
        """Return a start (2,) that `generator` draws uniformly from the box of states."""
        return generator.uniform(STATE_LOW, STATE_HIGH)

    def picture(self, trail: Sequence[Array]) -> Frame:
        """Return a picture (512, 640, 3) of water, rocks, goal, the boat and its trail."""
        canvas = Canvas(low=(-3.0, -2.0), high=(2.0, 2.0), height=512, colour=(206, 229, 242))
        for y in np.linspace(-1.75, 1.75, 15):
            speed = self.current - 0.5 * y * y
            for x in np.linspace(-2.75, 1.75, 10):
                canvas.line((x, y), (x + 0.12 * speed, y), 0.012, (172, 207, 228))
        for (x, y), radius in zip(ROCK_CENTRES, ROCK_RADII, strict=True):
            canvas.disc((x, y), radius, (94, 88, 84))
            canvas.disc((x, y), radius - 0.03, (139, 130, 123))
        canvas.disc(GOAL, 0.12, (52, 148, 92))
        canvas.disc(GOAL, 0.08, (235, 250, 240))
        canvas.disc(GOAL, 0.04, (52, 148, 92))
        canvas.path(trail, 0.025, (66, 99, 170))
        hull = (200, 62, 48) if constraint(trail[-1]) > 0.0 else (232, 150, 40)
        canvas.disc(trail[-1], 0.075, (40, 40, 48))
        canvas.disc(trail[-1], 0.055, hull)
        return canvas.pixels()


class BoatEnv(StateEnv):
    """A single environment of the boat.

    The observation (2,) is the state (x, y) in metres, as float32. The action (2,) is the direction
    in which the engine drives the boat; its length does not matter, except that a zero action
    stops the engine. Actions outside [-1, 1] are not clipped, since clipping would change their
    direction. An episode never terminates. ``gymnasium.make("safeshield/Boat-v0")`` truncates it
    after 400 steps.

    Args:
        render_mode: "rgb_array" for pictures, or None.
        current: Speed of the river at y = 0, metres per second.
        dt: Length of a step, seconds.

    Raises:
        ValueError: `dt` is not positive, `current` is not finite, or the render mode is unknown.

    Example:
        >>> env = BoatEnv()
        >>> observation, info = env.reset(options={"state": [-0.5, 0.5]})
        >>> info
        {'cost': 1.0, 'constraint': 0.4}
    """

    def __init__(
        self,
        render_mode: str | None = None,
        current: float = CURRENT,
        dt: float = TIME_STEP,
    ) -> None:
        super().__init__(BoatTask(current, dt), render_mode)


class BoatVectorEnv(StateVectorEnv):
    """A vector environment of n boats, which one NumPy call steps together.

    Observations (n, 2) and actions (n, 2) are those of `BoatEnv`, one row for each boat.
    `StateVectorEnv` describes `reset`, `step` and the autoreset modes.

    Args:
        num_envs: Number n of boats.
        max_episode_steps: Number of steps after which an episode is truncated; None for no limit.
        autoreset_mode: "NextStep", "SameStep" or "Disabled"; by default Gymnasium's default.
        render_mode: "rgb_array" for pictures, or None.
        current: Speed of the river at y = 0, metres per second.
        dt: Length of a step, seconds.

    Example:
        >>> envs = BoatVectorEnv(num_envs=3)
        >>> observations, infos = envs.reset(options={"state": [0.0, 0.0]})
        >>> envs.step(np.tile([[0.0, 1.0]], (3, 1)))[0].shape
        (3, 2)
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        max_episode_steps: int | None = MAX_EPISODE_STEPS,
        autoreset_mode: Any = None,  # noqa: ANN401 (an enum that Gymnasium 0.29 does not have)
        render_mode: str | None = None,
        current: float = CURRENT,
        dt: float = TIME_STEP,
    ) -> None:
        super().__init__(
            BoatTask(current, dt),
            num_envs,
            max_episode_steps=max_episode_steps,
            autoreset_mode=autoreset_mode,
            render_mode=render_mode,
        )
