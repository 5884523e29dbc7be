"""Registration of the ids of other packages, whose environments this package makes."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from gymnasium.envs import registration
from gymnasium.envs.registration import EnvSpec

from safeshield.spaces.generic import Env
from safeshield.suites.compat import LOCK, registry_kept, streams_with_files

Maker = Callable[..., Env]
"""Function that makes an environment from an id and the arguments of `gymnasium.make`."""
_HERE = "safeshield.suites."


def import_if_installed(package: str, ids: Collection[str], known: dict[str, EnvSpec]) -> None:
    """Import a package that registers environments, and add its specs to `known`.

    Where the package is absent or its import fails, this function does nothing. The error is raised
    when one of its environments is made, so that other environments are not affected.

    Args:
        package: Name of the package to import.
        ids: Ids that the package registers and this package will make. After the import they are
            registered in Gymnasium as before it.
        known: Specs by id, which this function extends by the specs that the import registered. An
            id that it holds already keeps its spec.
    """
    if importlib.util.find_spec(package) is None:
        return
    try:
        with LOCK, registry_kept(ids) as seen, streams_with_files():
            importlib.import_module(package)
    except Exception:
        return
    remember(known, seen)


def remember(known: dict[str, EnvSpec], seen: Mapping[str, EnvSpec]) -> None:
    """Add the specs in `seen` to `known`, both by id.

    An id that `known` holds already keeps its spec. Specs that this package registered are left
    out.
    """
    known.update(
        {one: spec for one, spec in seen.items() if one not in known and not _is_ours(spec)}
    )


def register(
    ids: Iterable[str], entry_point: str, steps: Mapping[str, int], upstream: Mapping[str, EnvSpec]
) -> None:
    """Register `ids` with Gymnasium, so that `entry_point` makes them with ``env_id=id``.

    Registrations of these ids by other packages are replaced. A second call changes nothing.

    Args:
        ids: Ids to register.
        entry_point: "module:function" of this package. It is a string, so that a process which
            receives nothing but an environment's spec can make the environment.
        steps: Largest number of steps of an episode by id, where it is known here.
        upstream: Specs that the environments' own package has registered, by id.
    """
    for one in ids:
        if _is_ours(registration.registry.get(one)):
            continue
        registration.registry.pop(one, None)  # Gymnasium would warn of a replacement
        spec = upstream.get(one)
        registration.register(
            id=one,
            entry_point=entry_point,
            max_episode_steps=steps.get(one) if spec is None else spec.max_episode_steps,
            reward_threshold=None if spec is None else spec.reward_threshold,
            kwargs={"env_id": one},
        )


class Remade(Env):
    """Base class of environments whose own class is created at run time.

    Such a class cannot be imported by name, so the usual pickling of its objects fails. A `Remade`
    environment is pickled and copied by the arguments with which it was made, which `remember_how`
    stores, like Gymnasium's `EzPickle`. The result is a new environment that has not been reset.
    """

    _made: tuple[Maker, str, dict[str, Any]] | None = None

    def __reduce__(self) -> tuple[Callable[..., Env], tuple[Any, ...]]:
        if self._made is None:
            raise TypeError(
                f"{self} must be made by gymnasium.make(id) to be pickled or copied, and it was not"
            )
        return _make_again, (*self._made, self.spec)


def remember_how(env: Env, make: Maker, env_id: str, kwargs: Mapping[str, Any]) -> Env:
    """Store how a `Remade` environment was made, and return the environment.

    Args:
        env: The environment. One of another class is returned unchanged.
        make: Function that made it.
        env_id: First argument of `make`.
        kwargs: Keyword arguments of `make`.
    """
    if isinstance(env, Remade):
        env._made = make, env_id, dict(kwargs)
    return env


def _make_again(make: Maker, env_id: str, kwargs: dict[str, Any], spec: EnvSpec | None) -> Env:
    env = make(env_id, **kwargs)
    env.spec = spec
    return env


def _is_ours(spec: EnvSpec | None) -> bool:
    return spec is not None and str(spec.entry_point).startswith(_HERE)
