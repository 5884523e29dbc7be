"""Where a shield meets an environment."""

from safeshield.wrappers.safety_shield import SafetyShield

__all__ = ["SafetyShield"]
