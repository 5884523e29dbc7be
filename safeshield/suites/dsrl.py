"""DSRL's ids of Safety-Gymnasium and Bullet tasks, such as ``OfflinePointGoal1Gymnasium-v0``.

The environments are DSRL's own, with `get_dataset(h5path=...)`, `set_target_cost` and
`get_normalized_score`. Nothing is downloaded unless `get_dataset` is called without a file.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import gymnasium as gym

from safeshield.rollouts.workers import environment_variables
from safeshield.spaces.generic import Env
from safeshield.suites import bullet, compat, safety_gymnasium
from safeshield.suites.packages import Suite, broken, require
from safeshield.suites.registration import register, remember_how
from safeshield.suites.tasks import TASKS, Family

PACKAGE = "dsrl"
_BULLET = {task.offline_id: task for task in TASKS.values() if task.family is Family.bullet}
_FIVE_VALUES = {
    task.offline_id: task
    for task in TASKS.values()
    if task.family in (Family.navigation, Family.velocity)
}
_NATIVE = {safety_gymnasium.native_id(one): task for one, task in _FIVE_VALUES.items()}
_ALL = {**_BULLET, **_FIVE_VALUES, **_NATIVE}


def register_envs() -> None:
    """Register DSRL's ids; where a package is absent, making one raises an error."""
    steps = {one: task.horizon for one, task in _ALL.items()}
    register(_BULLET, f"{__name__}:make_bullet", steps, {})
    register(_FIVE_VALUES, f"{__name__}:make_safety_gymnasium", steps, {})
    register(_NATIVE, f"{__name__}:make_safety_gymnasium", steps, {})


def make_bullet(env_id: str, render_mode: str | None = None, **kwargs: Any) -> Env:  # noqa: ANN401
    """Return DSRL's environment of a Bullet task.

    `env_id` is DSRL's id of the task. `render_mode` and `kwargs` are arguments of the environment.

    Raises:
        gymnasium.error.DependencyNotInstalled: A package is missing or cannot be loaded.
    """
    bullet.UPSTREAM.load(env_id)
    base, defaults = _class_of(env_id, "offline_bullet_safety_gym")
    given = {**kwargs, "render_mode": render_mode}
    return remember_how(bullet.construct(base, **{**defaults, **given}), make_bullet, env_id, given)


def make_safety_gymnasium(
    env_id: str,
    render_mode: str | None = None,
    **kwargs: Any,  # noqa: ANN401 - the environment's own
) -> Env:
    """Return DSRL's environment of a Safety-Gymnasium task.

    A step returns five values where the name ends in "Gymnasium", and six otherwise. `env_id` is
    DSRL's id of the task. `render_mode` and `kwargs` are arguments of the environment.

    Raises:
        gymnasium.error.DependencyNotInstalled: A package is missing or cannot be loaded.
    """
    safety_gymnasium.UPSTREAM.load(env_id)
    base, defaults = _class_of(env_id, "offline_safety_gymnasium")
    kind = safety_gymnasium.mended(base, five_values=env_id in _FIVE_VALUES)
    env: Any = kind(**{**defaults, **kwargs})
    # DSRL's classes take no render mode; their base classes read it from these attributes.
    if hasattr(env, "render_parameters"):
        env.render_parameters.mode = render_mode
    else:
        env.render_mode = render_mode
    given = {**kwargs, "render_mode": render_mode}
    return remember_how(env, make_safety_gymnasium, env_id, given)


vars(make_bullet).update(metadata=bullet.METADATA)
vars(make_safety_gymnasium).update(metadata=safety_gymnasium.METADATA)


def _class_of(env_id: str, part: str) -> tuple[Any, dict[str, Any]]:
    """Return DSRL's class of an environment, and the arguments that describe its log."""
    require(env_id, Suite.dsrl)
    try:
        environments, infos = _modules(part)
    except OSError as error:
        raise gym.error.DependencyNotInstalled(
            f"{env_id} cannot be loaded: dsrl makes a folder for downloads when it is imported "
            f"({error}); name one that can be written in the environment variable DSRL_DATASET_DIR"
        ) from error
    except Exception as error:
        raise broken(env_id, error, Suite.dsrl) from error
    name = _ALL[env_id].name
    known = {
        "dataset_url": infos.DATASET_URLS,
        "max_episode_reward": infos.MAX_EPISODE_REWARD,
        "min_episode_reward": infos.MIN_EPISODE_REWARD,
        "max_episode_cost": infos.MAX_EPISODE_COST,
        "min_episode_cost": infos.MIN_EPISODE_COST,
    }
    return getattr(environments, f"Offline{name}Env"), {
        key: table[name] for key, table in known.items()
    }


@functools.cache
def _modules(part: str) -> tuple[ModuleType, ModuleType]:
    # On import dsrl registers its environments, and it prints a warning where the old package gym,
    # which its MetaDrive tasks need, is absent.
    with (
        compat.LOCK,
        compat.registry_kept(_ALL),
        environment_variables({"DSRL_SUPPRESS_IMPORT_ERROR": "1"}),
    ):
        environments = importlib.import_module(f"{PACKAGE}.{part}.gym_envs")
        return environments, importlib.import_module(f"{PACKAGE}.infos")
