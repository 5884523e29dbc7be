"""FLRP: Flow-guided Latent Refiner Policies."""

from safeshield.algorithms.flrp.agent import FLRP, FLRPConfig

__all__ = ["FLRP", "FLRPConfig"]
