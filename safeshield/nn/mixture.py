r"""Mixtures of truncated normals on the box [-1, 1]^d. Their density is 0 outside the box.

    p(x) = sum_k w_k prod_j N(x_j; m_kj, s_kj) / (Phi((1 - m_kj) / s_kj) - Phi((-1 - m_kj) / s_kj))

A wide component approximates the uniform distribution, and a narrow one at the edge a bang-bang
action. Unlike the density of a squashed normal, the log density has no term log(1 - x^2), which
diverges at the edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safeshield.nn.arrays import log_softmax
from safeshield.nn.mlp import EnsembleMLP, Params

_LOW, _HIGH = -4.5, 1.5
"""Bounds of the log of a component's width, in half widths of the box."""
_EDGE = 1e-6


class Mixture(NamedTuple):
    """Parameters of n mixtures of k components in d dimensions."""

    log_weights: Tensor
    """(n, k) log weights of the components."""
    means: Tensor
    """(n, k, d) means before truncation, in (-1, 1)."""
    widths: Tensor
    """(n, k, d) standard deviations before truncation."""


def log_density(parts: Mixture, actions: Tensor) -> Tensor:
    """Return log p (n, c) of c actions in each of n states, per unit of the scaled box's volume.

    `parts` are the mixtures of the n states, and `actions` (n, c, d) lie in [-1, 1].

    >>> flat = Mixture(torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.full((1, 1, 1), 1e3))
    >>> log_density(flat, torch.zeros(1, 1, 1)).exp().round(decimals=3)
    tensor([[0.5000]])
    """
    means, widths = parts.means[:, None], parts.widths[:, None]
    z = (actions[:, :, None] - means) / widths
    low, high = _ends(means, widths)
    inside = (high - low).clamp(min=1e-12).log()
    each = (-0.5 * z.square() - widths.log() - 0.5 * math.log(2.0 * math.pi) - inside).sum(-1)
    return torch.logsumexp(parts.log_weights[:, None] + each, -1)


def draw_each(parts: Mixture, uniform: Tensor) -> Tensor:
    """Return one action of every component (n, k, d), differentiable in means and widths.

    Args:
        parts: Parameters of the mixtures.
        uniform: (n, k, d) in [0, 1), mapped through the inverse distribution function.
    """
    low, high = _ends(parts.means, parts.widths)
    level = (low + uniform * (high - low)).clamp(_EDGE, 1.0 - _EDGE)
    z = math.sqrt(2.0) * torch.erfinv(2.0 * level - 1.0)
    return (parts.means + parts.widths * z).clamp(-1.0, 1.0)


def _ends(means: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    ends = [torch.special.ndtr((end - means) / widths) for end in (-1.0, 1.0)]
    return ends[0], ends[1]


@dataclass(frozen=True)
class MixtureActor:
    """A stochastic policy network, as pure functions of (params, inputs).

    It is a softmax over choices for discrete actions and a `Mixture` over the scaled box otherwise.
    """

    inputs: int
    """Number of features of an observation."""
    choices: int
    """Number of discrete choices; 0 for a Box."""
    act: int
    """Number of entries of an action of a Box."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers."""
    components: int
    """Number of components of the mixture; without effect for discrete actions."""

    @property
    def network(self) -> EnsembleMLP:
        """Description of the network."""
        if self.choices:
            return EnsembleMLP(self.inputs, self.choices, self.hidden)
        return EnsembleMLP(self.inputs, self.components * (1 + 2 * self.act), self.hidden)

    def mixture(self, params: Params, observations: Tensor) -> Mixture:
        """Return the mixtures over [-1, 1]^act of n observations.

        `params` are the weights, and `observations` (n, features) are normalised.
        """
        count, wide = self.components, self.components * self.act
        out = self.network(params, observations)[0]
        logits, means, logs = torch.split(out, [count, wide, wide], -1)
        shape = (len(out), count, self.act)
        # The bounds are soft, because a hard clamp has no gradient outside its range.
        widths = _LOW + (_HIGH - _LOW) * torch.sigmoid(logs + 1.5)
        return Mixture(
            torch.log_softmax(logits, -1),
            torch.tanh(means).reshape(shape),
            widths.exp().reshape(shape),
        )

    def log_prob(self, params: Params, observations: Tensor, actions: Tensor) -> Tensor:
        """Return log pi (n, c) of all c choices, or of c given actions of a Box.

        `params` are the weights, `observations` (n, features) are normalised, and `actions` (n, c,
        act) lie in [-1, 1]; they are not used where actions are discrete.
        """
        if self.choices:
            return log_softmax(self.network(params, observations)[0])
        return log_density(self.mixture(params, observations), actions)
