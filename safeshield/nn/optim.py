"""Adam and Polyak averaging as pure functions of tensors.

`torch.optim` changes its parameters in place. The functions here return new tensors, so that an
update is one function of its inputs that can be compiled, replayed or run for many seeds. The
results of `adam` equal those of `torch.optim.Adam`, which a test checks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from safeshield.nn.mlp import Networks, like, tensors


class AdamState(NamedTuple):
    """Running moments of the gradient, and the number of updates so far as a () tensor."""

    mean: Networks
    """Running mean of the gradient, by network and weight."""
    square: Networks
    """Running mean of the squared gradient, by network and weight."""
    updates: Tensor
    """() number of updates so far."""


def adam_init(networks: Networks) -> AdamState:
    """Return zero moments for `networks`."""
    first = tensors(networks)[0]
    zeros = [[torch.zeros_like(t) for t in tensors(networks)] for _ in range(2)]
    count = torch.zeros((), device=first.device)
    return AdamState(like(networks, zeros[0]), like(networks, zeros[1]), count)


def adam(
    networks: Networks,
    gradients: list[Tensor],
    state: AdamState,
    rates: list[Tensor],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> tuple[Networks, AdamState]:
    """Return the weights and moments after one step of Adam (Kingma and Ba 2015, algorithm 1).

    Args:
        networks: Weights before the step.
        gradients: Gradients, one for each of `tensors(networks)`.
        state: Moments before the step.
        rates: Learning rates, () tensors, one for each of the gradients.
        betas: Decay rates of the two moments.
        epsilon: Number added to the root of the second moment.
    """
    count = state.updates + 1
    mean = torch._foreach_lerp(tensors(state.mean), gradients, 1.0 - betas[0])
    square = torch._foreach_mul(tensors(state.square), betas[1])
    square = torch._foreach_addcmul(square, gradients, gradients, 1.0 - betas[1])
    correction = torch.sqrt(1.0 - betas[1] ** count)
    root = torch._foreach_div(torch._foreach_sqrt(square), correction)
    direction = torch._foreach_div(mean, torch._foreach_add(root, epsilon))
    unbias = 1.0 / (1.0 - betas[0] ** count)
    step = torch._foreach_mul(direction, [rate * unbias for rate in rates])
    updated = torch._foreach_sub(tensors(networks), step)
    return like(networks, list(updated)), AdamState(
        like(networks, list(mean)), like(networks, list(square)), count
    )


def polyak(targets: Networks, networks: Networks, rate: float) -> Networks:
    """Return ``targets + rate * (networks - targets)`` for the networks that `targets` names."""
    online = tensors({name: networks[name] for name in targets})
    return like(targets, list(torch._foreach_lerp(tensors(targets), online, rate)))
