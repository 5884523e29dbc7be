"""Agents of the demonstration that ignore the constraint: straight to the goal, and PPO."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from safeshield.demo.settings import ENVIRONMENT
from safeshield.envs.boat import GOAL
from safeshield.rollouts.policies import batch_policy
from safeshield.spaces.shapes import Actions, Observations


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
    boats = DummyVecEnv([lambda: gym.make(ENVIRONMENT)] * num_envs)
    envs = VecNormalize(boats, norm_obs=False, gamma=0.99)
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
