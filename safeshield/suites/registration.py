"""How the ids of other packages are registered: made here, described there."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Collection, Iterable, Mapping

from gymnasium.envs import registration
from gymnasium.envs.registration import EnvSpec

from safeshield.suites.compat import LOCK, registry_kept, streams_with_files

_HERE = "safeshield.suites."


def specs_of(package: str, ids: Collection[str]) -> dict[str, EnvSpec]:
    """Import a package that registers environments, and return what it registers under `ids`.

    What is registered stays as it was. Whatever the import raises is raised.
    """
    with LOCK, registry_kept(ids) as seen, streams_with_files():
        importlib.import_module(package)
    return {one: spec for one, spec in seen.items() if not _is_ours(spec)}


def specs_if_installed(package: str, ids: Collection[str]) -> dict[str, EnvSpec]:
    """Return `specs_of`, or nothing where the package is absent or its import fails.

    Its environments then say what is wrong when they are made, and others are not kept from it.
    """
    if importlib.util.find_spec(package) is None:
        return {}
    try:
        return specs_of(package, ids)
    except Exception:
        return {}


def remember(known: dict[str, EnvSpec], found: Mapping[str, EnvSpec]) -> None:
    """Add specs; of two under one id the first stays, which is the package's own."""
    known.update({one: spec for one, spec in found.items() if one not in known})


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


def _is_ours(spec: EnvSpec | None) -> bool:
    return spec is not None and str(spec.entry_point).startswith(_HERE)
