"""One shield for one environment: detects nested shields, and blocks calls that bypass one.

If one shield wrapped another, the inner one would judge the actions that the outer one executes,
and infos can report only one shield.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safeshield.rollouts.infos import INTERVENED
from safeshield.shield.shield import Shield

_PAST = ("reset", "step")


def shielding_layer(env: object) -> object | None:
    """Return the first layer of the environment `env` that holds a `Shield`, None if there is none.

    The environments inside a vector environment are searched too.
    """
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
    """Return whether a `Shield` has already filtered the actions of `policy`.

    This is so for a `ShieldedPolicy`.
    """
    # The fields are tested because this module must not import the policies. An adversary holds a
    # shield too, but has no report.
    fields = getattr(policy, "__dict__", {})
    return isinstance(fields.get("shield"), Shield) and "report" in fields


def refuse_shielded(env: object, instead: str) -> None:
    """Raise ValueError if a layer of `env` in this process holds a shield.

    `instead` is the end of the message, which says what to do.
    """
    layer = shielding_layer(env)
    if layer is not None:
        raise _shielded_already(type(layer).__name__, instead)


def refuse_shielded_infos(infos: Mapping[str, Any], instead: str) -> None:
    """Raise ValueError if `infos` report a shield, for example one in another process.

    `instead` is the end of the message, which says what to do.
    """
    if INTERVENED in infos:
        raise _shielded_already(f"its infos have {INTERVENED!r}", instead)


def refuse_past_shield(name: str, instead: str) -> None:
    """Raise ValueError if the method `name` would step environments past the shield.

    `instead` is the end of the message, which says what to do.
    """
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
