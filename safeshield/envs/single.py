"""The single environment of a `StateTask`."""

from __future__ import annotations

from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.error import ResetNeeded

from safeshield.envs.task import Array, Frame, StateTask, checked_render_mode
from safeshield.spaces.generic import Env

TRAIL_LENGTH = 1000


class StateEnv(Env):
    """A single environment that keeps its state in float64 and observes it in float32.

    An episode never terminates, and the environment has no time limit of its own (`gymnasium.make`
    adds one). At reset and at every step ``info["constraint"]`` is h of the state just reached, and
    ``info["cost"]`` is 1.0 where this h is positive, else 0.0.

    ``reset(options={"state": s})`` starts the episode in the state s.

    Args:
        task: Dynamics, constraint, reward and starts.
        render_mode: "rgb_array" for pictures, or None.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012

    def __init__(self, task: StateTask, render_mode: str | None = None) -> None:
        self.task = task
        self.constraint_source = task.constraint_source
        self.render_mode = checked_render_mode(render_mode)
        self.observation_space: spaces.Box = task.observation_space()
        self.action_space: spaces.Box = task.action_space()
        self._state: Array | None = None
        self._trail: deque[Array] = deque(maxlen=TRAIL_LENGTH)

    @property
    def state(self) -> Array:
        """Copy of the state (n,), float64."""
        return self._current().copy()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Start an episode in ``options["state"]`` if that is given, else in a random state.

        `seed` seeds the random starts. The result is the observation and the info of the start.
        """
        super().reset(seed=seed)
        if options is not None and "state" in options:
            state = self.task.checked_state(options["state"])
            if state.ndim != 1:
                raise ValueError(
                    f"options['state'] must have shape ({state.shape[-1]},), got {state.shape}"
                )
        else:
            state = self.task.draw_start(self.np_random)
        self._trail.clear()
        return self._arrive(state)

    def step(
        self, action: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Take one step by `action` and return Gymnasium's five values.

        The reward is of the state before the step, the info of the state reached.
        """
        state = self._current()
        checked = self.task.checked_action(action, (self.task.action_size,))
        reward = float(self.task.reward(state))
        observation, info = self._arrive(self.task.next_state(state, checked))
        return observation, reward, False, False, info

    def render(self) -> Frame | None:
        """Return a picture (height, width, 3), or None without a render mode."""
        if self.render_mode is None:
            gym.logger.warn('render() does nothing without render_mode="rgb_array"')
            return None
        self._current()
        return self.task.picture(self._trail)

    def _arrive(self, state: Array) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        self._state = state
        if self.render_mode is not None:
            self._trail.append(state)
        constraint = float(self.task.constraint(state))
        info = {"cost": float(constraint > 0.0), "constraint": constraint}
        return state.astype(np.float32), info

    def _current(self) -> Array:
        if self._state is None:
            raise ResetNeeded("call reset() before step(), render() or reading the state")
        return self._state
