"""Environments whose exact safety value is known, as single and as vector environments.

Importing this package registers the environments with Gymnasium without loading their modules.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from safeshield.envs.registration import register_envs
from safeshield.values.constraint import register_constraint

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from safeshield.envs.boat import BoatEnv, BoatVectorEnv
    from safeshield.envs.double_integrator import DoubleIntegratorEnv, DoubleIntegratorVectorEnv

__all__ = [
    "BoatEnv",
    "BoatVectorEnv",
    "DoubleIntegratorEnv",
    "DoubleIntegratorVectorEnv",
    "register_envs",
]

_HOME = {
    "BoatEnv": "boat",
    "BoatVectorEnv": "boat",
    "DoubleIntegratorEnv": "double_integrator",
    "DoubleIntegratorVectorEnv": "double_integrator",
}

register_envs()


@register_constraint("Boat@1")
def _boat(observations: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    from safeshield.envs.boat import constraint

    return constraint(observations)


@register_constraint("DoubleIntegrator@1")
def _double_integrator(observations: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    from safeshield.envs.double_integrator import constraint

    return constraint(observations)


@register_constraint("PendulumSpeed@1")
def _pendulum_speed(observations: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return abs(observations[:, 2]) - 6.0  # rad/s, of Gymnasium's Pendulum-v1


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
