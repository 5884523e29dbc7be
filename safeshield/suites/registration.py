"""How the ids of other packages are registered: made here, described there."""

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
"""Takes an id and the arguments of `gymnasium.make`."""
_HERE = "safeshield.suites."


def import_if_installed(package: str, ids: Collection[str], known: dict[str, EnvSpec]) -> None:
    """Import a package that registers environments, and `remember` what it registers.

    Where it is absent or its import fails, its environments say so when they are made, and others
    are not kept from it.
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
    """Add a package's own specs; of two under one id the first one stays."""
    known.update(
        {one: spec for one, spec in seen.items() if one not in known and not _is_ours(spec)}
    )


def register(
    ids: Iterable[str], entry_point: str, steps: Mapping[str, int], upstream: Mapping[str, EnvSpec]
) -> None:
    """Register `ids` with Gymnasium, to be made by `entry_point` with ``env_id=id``.

    What another package has registered under an id is replaced; a second call changes nothing.

    Args:
        ids: what to register.
        entry_point: "module:function" of this package, so that a process which knows an
            environment's spec alone can make it.
        steps: length of an episode, where it is known here.
        upstream: what the package that the environments are of has registered.
    """
    for one in ids:
        if _is_ours(registration.registry.get(one)):
            continue
        registration.registry.pop(one, None)  # Gymnasium warns when it replaces one itself
        spec = upstream.get(one)
        registration.register(
            id=one,
            entry_point=entry_point,
            max_episode_steps=steps.get(one) if spec is None else spec.max_episode_steps,
            reward_threshold=None if spec is None else spec.reward_threshold,
            kwargs={"env_id": one},
        )


class Remade(Env):
    """An environment whose class is made here, which nothing can look up by its name.

    It is pickled, and copied, as the way to make it, like Gymnasium's `EzPickle`: what comes out is
    a new environment that has not been reset.
    """

    _made: tuple[Maker, str, dict[str, Any]] | None = None

    def __reduce__(self) -> tuple[Callable[..., Env], tuple[Any, ...]]:
        if self._made is None:
            raise TypeError(f"{self} was not made by its id: gymnasium.make(id) can be pickled")
        return _make_again, (*self._made, self.spec)


def remember_how(env: Env, make: Maker, env_id: str, kwargs: Mapping[str, Any]) -> Env:
    """Note how a `Remade` environment was made, and return it."""
    if isinstance(env, Remade):
        env._made = make, env_id, dict(kwargs)
    return env


def _make_again(make: Maker, env_id: str, kwargs: dict[str, Any], spec: EnvSpec | None) -> Env:
    env = make(env_id, **kwargs)
    env.spec = spec
    return env


def _is_ours(spec: EnvSpec | None) -> bool:
    return spec is not None and str(spec.entry_point).startswith(_HERE)
