"""Registration of the ids of other packages, whose environments this package makes."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from gymnasium.envs import registration
from gymnasium.envs.registration import EnvSpec, load_env_creator

from safeshield.spaces.generic import Env
from safeshield.suites.compat import LOCK, registry_kept, streams_with_files
from safeshield.suites.packages import Suite, broken, require

Maker = Callable[..., Env]
"""Function that makes an environment from an id and the arguments of `gymnasium.make`."""
_HERE = "safeshield.suites."


@dataclass
class Upstream:
    """The environments that another package registers, and the import of that package."""

    suite: Suite
    package: str
    """Name of the package's module."""
    ids: tuple[str, ...]
    """Ids that the package registers."""
    modules: tuple[str, ...]
    """Modules that must be imported before its environments can be made."""
    patch: Callable[[], AbstractContextManager[None]]
    """Makes the patch of `suites.compat` under which the modules can be imported."""
    specs: dict[str, EnvSpec] = field(default_factory=dict)
    """The package's own specs by id; the first spec of an id is kept."""
    loaded: bool = False
    """Whether `load` has succeeded."""

    def load_if_installed(self) -> None:
        """Import the package alone, without its other modules, and keep its specs.

        Where the package is absent or its import fails, this method does nothing. The error is
        raised when one of its environments is made, so that other environments are not affected.
        """
        if importlib.util.find_spec(self.package) is not None:
            with contextlib.suppress(Exception):
                self._import((self.package,), streams_with_files())

    def load(self, what: str) -> None:
        """Import all modules, unless they have been imported already.

        Args:
            what: name, for the error message, of what needs the package.

        Raises:
            gymnasium.error.DependencyNotInstalled: a package is missing or cannot be loaded.
        """
        if self.loaded:
            return
        require(what, self.suite)
        try:
            self._import(self.modules, self.patch())
        except Exception as error:
            raise broken(what, error, self.suite) from error
        self.loaded = True

    def class_of(self, env_id: str, what: str) -> tuple[Any, dict[str, Any]]:
        """Return the class and the arguments that the package has registered for an id.

        Raises:
            gymnasium.error.DependencyNotInstalled: a package is missing or cannot be loaded.
        """
        self.load(what)
        spec = self.specs[env_id]
        return load_env_creator(str(spec.entry_point)), dict(spec.kwargs)

    def _import(self, modules: Iterable[str], patch: AbstractContextManager[None]) -> None:
        with LOCK, registry_kept(self.ids) as seen, patch:
            for module in modules:
                importlib.import_module(module)
        own = {one: spec for one, spec in seen.items() if not _is_ours(spec)}
        self.specs = own | self.specs


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
