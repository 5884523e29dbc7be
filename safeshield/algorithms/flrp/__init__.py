"""FLRP: Flow-guided Latent Refiner Policies."""

from safeshield.algorithms.flrp.agent import FLRP
from safeshield.algorithms.flrp.config import FLRPConfig

__all__ = ["FLRP", "FLRPConfig"]
