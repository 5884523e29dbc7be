"""What a log and a configuration fix of an agent besides its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym

from safeshield.nn.mlp import EnsembleMLP
from safeshield.spaces.scaling import Scaling
from safeshield.training.state import Network

CRITICS = "critics"
"""Name of the phase, and of the moments, of the networks that are trained together."""


class Interface(NamedTuple):
    """What an agent sees and does, and how networks see it."""

    observation_space: gym.Space[Any]
    """Space of one observation."""
    action_space: gym.Space[Any]
    """Space of one action."""
    scaling: Scaling
    """Units of observations and actions."""


@dataclass(frozen=True)
class Architecture:
    """Spaces, units and networks. Algorithms fill it, or extend it where they keep more."""

    observation_space: gym.Space[Any]
    """Space of one observation."""
    action_space: gym.Space[Any]
    """Space of one action."""
    scaling: Scaling
    """Units of observations and actions."""
    networks: Mapping[str, EnsembleMLP]
    """Networks by name, each of which is trained by itself."""

    @property
    def interface(self) -> Interface:
        """What an agent sees and does."""
        return Interface(self.observation_space, self.action_space, self.scaling)

    def critic_parts(self) -> Mapping[str, EnsembleMLP]:
        """Describe the networks that are trained together, and of which a slow copy goes along.

        Agents act by the copies.
        """
        return {}

    def parts(self) -> Mapping[str, Network]:
        """Describe every network, in the order in which weights are drawn."""
        return {**self.critic_parts(), **self.networks}

    def slow(self) -> tuple[str, ...]:
        """Name the networks of which a slow copy goes along."""
        return tuple(self.critic_parts())

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Return which networks are trained together, by the name of their moments."""
        critics = {CRITICS: self.slow()} if self.slow() else {}
        return {**critics, **{name: (name,) for name in self.networks}}

    def scales(self) -> dict[str, float]:
        """Return the running statistics that updates read and write, and where they begin."""
        return {}

    def header(self) -> dict[str, Any]:
        """Return what a file must hold beside spaces and scaling, as JSON."""
        return {}
