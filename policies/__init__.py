"""Where a shield meets an agent."""

from safeshield.policies.shielded import ShieldedPolicy

__all__ = ["ShieldedPolicy"]
