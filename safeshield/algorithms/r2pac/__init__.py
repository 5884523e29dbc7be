"""R2PAC: Region-Based Reward Penalty over Action Chunks."""

from safeshield.algorithms.r2pac.agent import R2PAC
from safeshield.algorithms.r2pac.config import R2PACConfig

__all__ = ["R2PAC", "R2PACConfig"]
