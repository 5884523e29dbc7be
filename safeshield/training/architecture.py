"""Description of an agent without its weights: spaces, units and networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym

from safeshield.data.dataset import OfflineDataset
from safeshield.nn.mlp import EnsembleMLP
from safeshield.spaces.scaling import Scaling
from safeshield.training.state import Network
from safeshield.values.constraint import ConstraintSource, as_constraint

CRITICS = "critics"
"""Name of the phase of the critics, and of their group of Adam moments."""


class Interface(NamedTuple):
    """Spaces of an agent's observations and actions, their scaling, and the source of h."""

    observation_space: gym.Space[Any]
    """Space of one observation."""
    action_space: gym.Space[Any]
    """Space of one action."""
    scaling: Scaling
    """Units of observations and actions."""
    constraint: ConstraintSource | None = None
    """Source of h as a function of the observation; None where a network estimates h."""


def interface_of(dataset: OfflineDataset, scaling: Scaling) -> Interface:
    """Return the interface of an agent that learns from the log `dataset`.

    `scaling` is the scaling of its observations and actions.
    """
    source = as_constraint(dataset.constraint_source)
    return Interface(dataset.observation_space, dataset.action_space, scaling, source)


@dataclass(frozen=True)
class Architecture:
    """Spaces, units and networks of an agent. Algorithms that need more fields derive from it."""

    observation_space: gym.Space[Any]
    """Space of one observation."""
    action_space: gym.Space[Any]
    """Space of one action."""
    scaling: Scaling
    """Units of observations and actions."""
    constraint: ConstraintSource | None
    """Source of h as a function of the observation; None where a network estimates h."""
    networks: Mapping[str, EnsembleMLP]
    """Networks by name that are each trained separately."""

    @property
    def interface(self) -> Interface:
        """Spaces, scaling and source of h of the agent."""
        spaces = self.observation_space, self.action_space
        return Interface(*spaces, self.scaling, self.constraint)

    def critic_parts(self) -> Mapping[str, EnsembleMLP]:
        """Return the networks that are trained together and have slow copies, by name.

        Trained agents use the slow copies.
        """
        return {}

    def parts(self) -> Mapping[str, Network]:
        """Return all networks by name, in the order in which their weights are drawn."""
        return {**self.critic_parts(), **self.networks}

    def slow(self) -> tuple[str, ...]:
        """Return the names of the networks that have slow copies."""
        return tuple(self.critic_parts())

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the networks trained together, by the name of their Adam moments."""
        critics = {CRITICS: self.slow()} if self.slow() else {}
        return {**critics, **{name: (name,) for name in self.networks}}

    def scales(self) -> dict[str, float]:
        """Return the initial values of the running statistics that the updates read and write."""
        return {}

    def header(self) -> dict[str, Any]:
        """Return, as JSON values, what a file must store in addition to spaces and scaling."""
        return {}
