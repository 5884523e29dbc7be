"""One shield for one environment: detects nested shields, and blocks calls that bypass one.

Two shields in a row would each judge what the other proposes, and infos can report one only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safeshield.rollouts.infos import INTERVENED
from safeshield.shield.shield import Shield

_PAST = ("reset", "step")


def shielding_layer(env: object) -> object | None:
    """Return the wrapper that holds a `Shield`, in an environment or in those of a vector."""
    layers: list[object] = [env]
    while layers:
        layer = layers.pop()
        fields = getattr(layer, "__dict__", {})
        if isinstance(fields.get("shield"), Shield):
            return layer
        layers += [fields[name] for name in ("env", "venv") if name in fields]
        layers += list(fields.get("envs", ()))
    return None


def is_shielded_policy(policy: object) -> bool:
    """Whether what a policy returns has passed a `Shield` already, as `ShieldedPolicy`'s has."""
    # By its fields: policies are above this. An adversary has a shield too, but tells no verdict.
    fields = getattr(policy, "__dict__", {})
    return isinstance(fields.get("shield"), Shield) and "report" in fields


def refuse_shielded(env: object, instead: str) -> None:
    """Raise ValueError if there is a shield inside that can be seen from here."""
    layer = shielding_layer(env)
    if layer is not None:
        raise _shielded_already(type(layer).__name__, instead)


def refuse_shielded_infos(infos: Mapping[str, Any], instead: str) -> None:
    """Raise ValueError if infos report a shield, such as one in another process."""
    if INTERVENED in infos:
        raise _shielded_already(f"its infos have {INTERVENED!r}", instead)


def refuse_past_shield(name: str, instead: str) -> None:
    """Raise ValueError for a name by which environments would be stepped past the shield."""
    if name in _PAST:
        raise ValueError(
            f"{name!r} of the environments themselves would go past the shield, which would then "
            f"judge the next action in a state that is gone: {instead}"
        )


def _shielded_already(how: str, instead: str) -> ValueError:
    return ValueError(
        f"the environment is shielded already ({how}), and infos can tell of one shield only: "
        f"{instead}"
    )
