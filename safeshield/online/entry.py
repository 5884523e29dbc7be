"""What Safe-Support Q-learning is given, looked at: environments, spaces, callbacks."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

from safeshield.spaces.batches import Batch
from safeshield.spaces.rows import SpaceCodec, flat_actions


def readable_batch(seen: SpaceCodec, observation: Batch) -> tuple[Batch, bool]:
    """Return a batch of observations, and whether it was one."""
    rows, single = seen.flatten(observation, "observation")
    if not len(rows):
        raise ValueError("observation must hold at least one, got an empty batch")
    if not np.isfinite(rows).all():
        raise ValueError(f"observation must be finite, got {rows[~np.isfinite(rows).all(1)][0]}")
    return seen.batch(rows), single


def refuse_normalised(venv: VecEnv) -> None:
    """Raise ValueError where observations are hidden from whoever judges actions by them."""
    normalised = unwrap_vec_normalize(venv)
    if normalised is not None and normalised.norm_obs:
        raise ValueError(
            "VecNormalize hides the observations from whoever judges actions by them: pass "
            "norm_obs=False (the critics normalise what they see)"
        )


def check_spaces(
    given: object, whose: str, observation_space: gym.Space[Any], action_space: gym.Space[Any]
) -> None:
    """Raise ValueError where what is given is for other spaces, as far as it tells."""
    for name, space in (("observation_space", observation_space), ("action_space", action_space)):
        own = getattr(given, name, None)
        if isinstance(own, gym.Space) and own != space:
            raise ValueError(f"{whose} {name} is {own}, the environment's {space}")


def check_playable(space: gym.Space[Any]) -> None:
    """Raise unless actions are discrete, or of a bounded Box of floating-point numbers."""
    played = flat_actions(space)
    if isinstance(space, gym.spaces.Box) and not np.issubdtype(space.dtype, np.floating):
        raise TypeError(
            f"a Box of actions must be of floating-point numbers, got {space!r}: what is judged "
            "would be rounded before it runs; round in a wrapper of the environment, or make it "
            "MultiDiscrete"
        )
    if not (np.isfinite(played.low).all() and np.isfinite(played.high).all()):
        raise ValueError(
            f"action_space must be bounded, got {space}; wrap the environment in RescaleAction"
        )


def as_venv(env: gym.Env[Any, Any] | VecEnv | None) -> VecEnv | None:
    """Return an environment as a `VecEnv` of one; raise TypeError for what is none."""
    if env is None or isinstance(env, VecEnv):
        return env
    if not isinstance(env, gym.Env):
        raise TypeError(
            "env must be a Gymnasium environment or a VecEnv of Stable-Baselines3, got "
            f"{type(env).__name__}"
        )
    return DummyVecEnv([lambda: env])


def as_callback(callback: Any) -> BaseCallback:  # noqa: ANN401
    """Return what Stable-Baselines3 makes of a callback, a list, a function or None."""
    if isinstance(callback, BaseCallback):
        return callback
    if isinstance(callback, list):
        return CallbackList(callback)
    return CallbackList([]) if callback is None else ConvertCallback(callback)
