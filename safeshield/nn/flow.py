"""Flow matching: a velocity field that carries noise to the logged actions.

    x_t = (1 - t) z + t a,   z ~ N(0, I),  t ~ U(0, 1):   E || v(s, x_t, t) - (a - z) ||^2 -> min
    sample: x_0 = z,  x <- x + v(s, x, i/K) / K  for i = 0 .. K - 1

Source: SafeFQL (arXiv 2603.15136), after Flow Q-Learning (Park et al. 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

from safeshield.nn.mlp import EnsembleMLP, Params


def velocity_network(observation: int, action: int, hidden: tuple[int, ...]) -> EnsembleMLP:
    """Describe v(s, x, t): inputs (s, x, t), output the velocity of the action."""
    return EnsembleMLP(observation + action + 1, action, hidden)


def flow_matching_loss(
    network: EnsembleMLP,
    params: Params,
    observations: Tensor,
    actions: Tensor,
    noise: Tensor,
    time: Tensor,
    weights: Tensor | None = None,
) -> Tensor:
    """Return the flow matching error, summed over the action's entries, averaged over the batch.

    Args:
        network: made by `velocity_network`.
        params: its weights.
        observations: (batch, obs).
        actions: (batch, act) logged, in [-1, 1].
        noise: (batch, act) z, standard normal.
        time: (batch, 1) t, uniform in [0, 1].
        weights: (batch,) how much each action counts; all alike by default.
    """
    point = torch.lerp(noise, actions, time)
    velocity = network(params, torch.cat([observations, point, time], -1))[0]
    error = (velocity - (actions - noise)).square().sum(-1)
    return (error if weights is None else weights * error).mean()


def euler_sample(
    network: EnsembleMLP, params: Params, observations: Tensor, noise: Tensor, steps: int
) -> Tensor:
    """Carry noise (batch, act) along the field in `steps` Euler steps; clipped to [-1, 1]."""
    x = noise
    for i in range(steps):
        time = torch.full_like(x[:, :1], i / steps)
        x = x + network(params, torch.cat([observations, x, time], -1))[0] / steps
    return x.clamp(-1.0, 1.0)
