"""Wrappers that put a shield around an environment, report labels, or draw the shield's decisions.

`VecSafetyShield` and `worker_env`, which need Stable-Baselines3, and `ParallelSafetyShield`, which
needs PettingZoo, are loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from safeshield.wrappers.certified_starts import CertifiedStarts
from safeshield.wrappers.converters import ConstraintFromFunction, CostFromFunction, CostFromStep
from safeshield.wrappers.overlay import ShieldOverlay
from safeshield.wrappers.safety_shield import SafetyShield
from safeshield.wrappers.vector import VectorSafetyShield

if TYPE_CHECKING:
    from safeshield.wrappers.parallel import ParallelSafetyShield as ParallelSafetyShield
    from safeshield.wrappers.sb3 import VecSafetyShield as VecSafetyShield
    from safeshield.wrappers.sb3 import worker_env as worker_env

# Without the names of `_LATER`: ``import *`` would load them, and fail without their packages.
__all__ = [
    "CertifiedStarts",
    "ConstraintFromFunction",
    "CostFromFunction",
    "CostFromStep",
    "SafetyShield",
    "ShieldOverlay",
    "VectorSafetyShield",
]

_LATER = {
    "ParallelSafetyShield": "parallel",
    "VecSafetyShield": "sb3",
    "worker_env": "sb3",
}


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module 'safeshield.wrappers' has no attribute '{name}'")
    return getattr(import_module(f"safeshield.wrappers.{_LATER[name]}"), name)
