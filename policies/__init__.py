"""Policies, callbacks and replay buffers that combine a shield with an agent.

The names that need Stable-Baselines3 are loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING

from safeshield.policies.safe_support import SafeSupportPolicy
from safeshield.policies.shielded import ShieldedPolicy

if TYPE_CHECKING:
    from safeshield.policies.callback import ShieldCallback
    from safeshield.policies.replay_buffer import ShieldedDictReplayBuffer, ShieldedReplayBuffer

__all__ = [
    "SafeSupportPolicy",
    "ShieldCallback",
    "ShieldedDictReplayBuffer",
    "ShieldedPolicy",
    "ShieldedReplayBuffer",
]

_HOMES = {
    "ShieldCallback": "callback",
    "ShieldedDictReplayBuffer": "replay_buffer",
    "ShieldedReplayBuffer": "replay_buffer",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'safeshield.policies' has no attribute '{name}'")
    return getattr(importlib.import_module(f"safeshield.policies.{_HOMES[name]}"), name)
