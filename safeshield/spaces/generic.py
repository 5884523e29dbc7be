"""Gymnasium's classes with their type parameters filled in, for annotations and as base classes.

At run time the names are the plain classes, because these take no type parameters in some versions
of Gymnasium.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium as gym

BEFORE_1_0 = int(gym.__version__.split(".")[0]) < 1
"""Whether the installed Gymnasium is older than 1.0, that is 0.29."""

if TYPE_CHECKING:
    Env = gym.Env[Any, Any]
    Wrapper = gym.Wrapper[Any, Any, Any, Any]
    VectorEnv = gym.vector.VectorEnv[Any, Any, Any]
    VectorWrapper = gym.vector.VectorWrapper[Any, Any, Any, Any, Any]
    SyncVectorEnv = gym.vector.SyncVectorEnv[Any, Any]
else:
    Env = gym.Env
    Wrapper = gym.Wrapper
    VectorEnv = gym.vector.VectorEnv
    VectorWrapper = gym.vector.VectorEnvWrapper if BEFORE_1_0 else gym.vector.VectorWrapper
    SyncVectorEnv = gym.vector.SyncVectorEnv
