"""The parametric policy: a softmax over choices, or a mixture of truncated normals on a Box."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safeshield.nn.mixture import Mixture, log_density, mixture, mixture_network
from safeshield.nn.mlp import EnsembleMLP, Params


@dataclass(frozen=True)
class Actor:
    """What a network of features makes of a state: pure functions of (params, inputs)."""

    inputs: int
    """Features of an observation."""
    choices: int
    """Number of discrete choices; 0 for a Box."""
    act: int
    """Entries of an action of a Box."""
    hidden: tuple[int, ...]
    components: int
    """Of the mixture; without effect where actions are discrete."""

    @property
    def network(self) -> EnsembleMLP:
        """Describe the network."""
        if self.choices:
            return EnsembleMLP(self.inputs, self.choices, self.hidden)
        return mixture_network(self.inputs, self.act, self.hidden, self.components)

    def mixture(self, params: Params, observations: Tensor) -> Mixture:
        """Return the mixtures over [-1, 1]^act of observations (n, features)."""
        return mixture(self.network, params, observations, self.act, self.components)

    def log_prob(self, params: Params, observations: Tensor, actions: Tensor) -> Tensor:
        """Return log pi (n, c): of all choices, or of actions (n, c, act) in [-1, 1] of a Box."""
        if self.choices:
            return torch.log_softmax(self.network(params, observations)[0], -1)
        return log_density(self.mixture(params, observations), actions)
