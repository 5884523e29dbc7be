"""Agents of the demonstration that ignore the constraint: straight to the goal, and PPO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from safeshield.envs.boat import GOAL, BoatVectorEnv
from safeshield.rollouts.infos import (
    TERMINAL_OBSERVATION,
    TIME_LIMIT,
    final_observations_key,
)
from safeshield.rollouts.policies import batch_policy
from safeshield.spaces.shapes import Actions, Observations

if TYPE_CHECKING:
    from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

Array = npt.NDArray[Any]


@batch_policy
def straight(observations: Observations, _: np.random.Generator) -> Actions:
    """Return actions (n, 2) from the positions `observations` (n, 2) straight towards the goal."""
    offset = GOAL - observations
    return np.asarray(offset / np.maximum(np.linalg.norm(offset, axis=-1, keepdims=True), 1e-9))


def train_ppo(path: str | Path, steps: int, seed: int, num_envs: int = 64) -> None:
    """Train Stable-Baselines3's PPO for the boat's reward alone, and write it to a zip file.

    The reward is normalised. PPO does not observe the constraint.

    Args:
        path: File to write.
        steps: Total number of environment steps.
        seed: Seed of weights, starts and noise.
        num_envs: Number of boats that are simulated together.
    """
    envs = VecNormalize(_BoatVecEnv(num_envs), norm_obs=False, gamma=0.99)
    model = PPO(
        "MlpPolicy",
        envs,
        n_steps=min(200, max(steps // num_envs, 2)),
        batch_size=1600,
        n_epochs=5,
        learning_rate=1e-3,
        gamma=0.99,
        gae_lambda=0.95,
        seed=seed,
        device="cpu",
    )
    model.learn(steps)
    model.save(path)


class _BoatVecEnv(VecEnv):
    """`BoatVectorEnv` with the interface of Stable-Baselines3's `VecEnv`."""

    def __init__(self, num_envs: int) -> None:
        self._boats = BoatVectorEnv(num_envs, autoreset_mode="SameStep")
        self._actions = np.zeros((num_envs, 2))
        super().__init__(
            num_envs, self._boats.single_observation_space, self._boats.single_action_space
        )

    def reset(self) -> Array:
        """Start new trips of all boats; only the first reset uses the seed."""
        observations, _ = self._boats.reset(seed=self._seeds[0])
        self._reset_seeds()
        return observations

    def step_async(self, actions: Array) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Array, Array, Array, list[dict[str, Any]]]:
        """Step all boats; a boat whose trip has ended starts a new trip at once."""
        observations, rewards, terminated, truncated, infos = self._boats.step(self._actions)
        over = terminated | truncated
        reports: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for i in np.flatnonzero(over):
            reports[i] = {
                TERMINAL_OBSERVATION: infos[final_observations_key(infos) or ""][i],
                TIME_LIMIT: bool(truncated[i] and not terminated[i]),
            }
        return observations, rewards.astype(np.float32), over, reports

    def close(self) -> None:
        """Do nothing, because no resources are held."""

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """Return an attribute once for each of the chosen boats."""
        value = getattr(self._boats, attr_name)
        return [value for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: object, indices: VecEnvIndices = None) -> None:
        """Raise NotImplementedError, because the boats share one task."""
        raise NotImplementedError("the boats share one task, which cannot be changed")

    def env_method(
        self,
        method_name: str,
        *method_args: object,
        indices: VecEnvIndices = None,
        **method_kwargs: object,
    ) -> list[Any]:
        """Raise NotImplementedError, because there are no single boats with methods to call."""
        raise NotImplementedError("there are no single boats whose methods could be called")

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Return False for each of the chosen boats."""
        return [False for _ in self._get_indices(indices)]

    def get_images(self) -> Sequence[Array | None]:
        """Return None for each boat, because nothing is rendered."""
        return [None] * self.num_envs
