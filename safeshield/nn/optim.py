"""Adam and Polyak averaging as pure functions of tensors.

`torch.optim` changes its parameters in place. The functions here return new tensors, so that an
update is one function of its inputs that can be compiled, replayed or run for many seeds. The
results of `adam`, which runs torch's fused kernel on copies, equal those of `torch.optim.Adam`. A
test checks this.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam as functional_adam

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
    # torch's fused kernel writes into its arguments, so it gets copies. It reads the memory of all
    # of them in one order, whatever their strides are.
    values, mean, square = (
        [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors(of)]
        for of in (networks, state.mean, state.square)
    )
    gradients = [gradient.contiguous() for gradient in gradients]
    count = state.updates + 1
    steps = list(state.updates.expand(len(values)).clone().unbind())
    for rate in {id(rate): rate for rate in rates}.values():
        own = [i for i, other in enumerate(rates) if other is rate]
        functional_adam(
            [values[i] for i in own],
            [gradients[i] for i in own],
            [mean[i] for i in own],
            [square[i] for i in own],
            [],
            [steps[i] for i in own],
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=rate,
            weight_decay=0.0,
            eps=epsilon,
            maximize=False,
        )
    return like(networks, values), AdamState(like(networks, mean), like(networks, square), count)


def polyak(targets: Networks, networks: Networks, rate: float) -> Networks:
    """Return ``targets + rate * (networks - targets)`` for the networks that `targets` names."""
    online = tensors({name: networks[name] for name in targets})
    return like(targets, list(torch._foreach_lerp(tensors(targets), online, rate)))
