"""Wrappers that put a shield around an environment, report labels, or draw the shield's decisions.

`VecSafetyShield` and `worker_env`, which need Stable-Baselines3, are loaded on first use.
"""

from typing import TYPE_CHECKING

from safeshield.wrappers.certified_starts import CertifiedStarts
from safeshield.wrappers.converters import ConstraintFromFunction, CostFromFunction, CostFromStep
from safeshield.wrappers.overlay import ShieldOverlay
from safeshield.wrappers.safety_shield import SafetyShield
from safeshield.wrappers.vector import VectorSafetyShield

if TYPE_CHECKING:
    from safeshield.wrappers.sb3 import VecSafetyShield, worker_env

__all__ = [
    "CertifiedStarts",
    "ConstraintFromFunction",
    "CostFromFunction",
    "CostFromStep",
    "SafetyShield",
    "ShieldOverlay",
    "VecSafetyShield",
    "VectorSafetyShield",
    "worker_env",
]


def __getattr__(name: str) -> object:
    if name not in ("VecSafetyShield", "worker_env"):
        raise AttributeError(f"module 'safeshield.wrappers' has no attribute '{name}'")
    from safeshield.wrappers import sb3

    return getattr(sb3, name)
