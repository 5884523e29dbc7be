"""The base class of tasks, which define an environment by pure functions of arrays of states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

Array: TypeAlias = npt.NDArray[np.float64]
Frame: TypeAlias = npt.NDArray[np.uint8]


class StateTask(ABC):
    """A task whose observation is its state, defined for single states and for batches.

    The functions of states take arrays with any number of leading axes. The single and the vector
    environment call the same functions, so their results agree to the last bit.
    """

    state_low: Array
    """(n,) lowest state."""
    state_high: Array
    """(n,) highest state."""
    action_size: int
    """Number of entries of an action."""
    max_episode_steps: int
    """Number of steps after which `gymnasium.make` truncates an episode."""
    render_fps: int
    """Number of pictures per second of a video."""
    constraint_source: str | None = None
    """Name under which the constraint is registered as a function of the observation."""

    @abstractmethod
    def next_state(self, state: Array, action: Array) -> Array:
        """Return the states (..., n) that follow `state` (..., n) under `action` (..., m)."""

    @abstractmethod
    def constraint(self, state: Array) -> Array:
        """Return h (...) of states `state` (..., n), positive where the state is a violation."""

    @abstractmethod
    def reward(self, state: Array) -> Array:
        """Return the reward (...) of a step from the states `state` (..., n)."""

    @abstractmethod
    def draw_start(self, generator: np.random.Generator) -> Array:
        """Return one random start state (n,) that `generator` draws."""

    @abstractmethod
    def picture(self, trail: Sequence[Array]) -> Frame:
        """Return a picture of the last state of `trail` and of the states before it."""

    def observation_space(self) -> spaces.Box:
        """Return the box of states, as float32."""
        low, high = self.state_low.astype(np.float32), self.state_high.astype(np.float32)
        return spaces.Box(low, high, dtype=np.float32)

    def action_space(self) -> spaces.Box:
        """Return the box of actions, as float32."""
        return spaces.Box(-1.0, 1.0, (self.action_size,), np.float32)

    def checked_state(self, state: object) -> Array:
        """Return `state` (..., n) in float64, after a check.

        Raises:
            ValueError: The states have a wrong last axis, are not finite or lie outside the box.
        """
        array = np.array(state, dtype=np.float64)
        size = self.state_low.size
        if array.ndim == 0 or array.shape[-1] != size:
            raise ValueError(
                f"options['state'] must have {size} entries on its last axis, got {array.shape}"
            )
        inside = np.isfinite(array) & (array >= self.state_low) & (array <= self.state_high)
        if not inside.all():
            bad = array[~inside.all(axis=-1)] if array.ndim > 1 else array
            raise ValueError(
                f"options['state'] must be finite and inside the box {self.state_low.tolist()} to "
                f"{self.state_high.tolist()}, got {bad.tolist()}; clip it to the observation space"
            )
        return array

    def checked_action(self, action: object, shape: tuple[int, ...]) -> Array:
        """Return `action` in float64, after a check that it has the shape `shape`.

        Raises:
            ValueError: The actions have another shape or are not finite.
        """
        array = np.asarray(action, dtype=np.float64)
        if array.shape != shape:
            raise ValueError(f"action must have shape {shape}, got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(
                f"action must be finite, got {array.tolist()}; "
                "look for a division by zero or a diverged policy where it was computed"
            )
        return array


def finite_states(states: object, columns: str) -> Array:
    """Return states (..., 2) as float64.

    Args:
        states: states, with two numbers on the last axis.
        columns: names of the two numbers, for the error message.

    Raises:
        ValueError: the shape is another, or a number is not finite.
    """
    array = np.asarray(states, dtype=np.float64)
    if array.ndim == 0 or array.shape[-1] != 2 or not np.isfinite(array).all():
        raise ValueError(
            f"states must be finite and have {columns} on the last axis, got shape {array.shape}"
        )
    return array


def positive(name: str, value: float) -> float:
    """Return `value` as a float, after a check. `name` is its name in the message.

    Raises:
        ValueError: The value is not a positive, finite number.
    """
    number = float(value)
    if not (np.isfinite(number) and number > 0.0):
        raise ValueError(f"{name} must be a positive, finite number, got {value!r}")
    return number


def checked_render_mode(render_mode: str | None) -> str | None:
    """Return `render_mode`, after a check.

    Raises:
        ValueError: The mode is neither None nor "rgb_array".
    """
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f'render_mode must be None or "rgb_array", got {render_mode!r}')
    return render_mode
