"""A pendulum with a speed limit, in a module that worker processes import in no time."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.wrappers import ConstraintFromFunction


def over_the_limit(observation: npt.NDArray[np.float32]) -> float:
    """How much faster than 1 rad/s it swings."""
    return abs(float(observation[2])) - 1.0


def pendulum(steps: int = 25) -> gym.Env[Any, Any]:
    """One that `gymnasium.make` can rebuild."""
    env = gym.make("Pendulum-v1", max_episode_steps=steps)
    return ConstraintFromFunction(env, over_the_limit)
