"""Ensembles of multilayer perceptrons as one batched computation on plain tensors.

A network is a frozen description; its weights are a dict of tensors that one passes. So an update
is a pure function of the weights, a file holds the same dict, and an ensemble of E members (or,
later, of S seeds) is one `baddbmm` a layer and no loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from safeshield.nn.forward import mlp_shapes

Params: TypeAlias = dict[str, Tensor]
"""The weights of one network: "0.weight" (members, in, out), "0.bias" (members, 1, out), ..."""
Networks: TypeAlias = dict[str, Params]
"""Networks by name."""


@dataclass(frozen=True)
class EnsembleMLP:
    """`members` ReLU perceptrons of one architecture.

    ReLU, not a smooth activation: distances and safety values have kinks, and in our trials
    a smooth network fitted them three times less exactly in the same number of updates.

    >>> net = EnsembleMLP(3, 1, hidden=(8, 8), members=2)
    >>> params = net.init(torch.Generator().manual_seed(0))
    >>> net(params, torch.zeros(5, 3)).shape
    torch.Size([2, 5, 1])
    """

    inputs: int
    outputs: int
    hidden: tuple[int, ...]
    members: int = 1

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight, by name, in the order of the layers."""
        return mlp_shapes(self.inputs, self.outputs, self.hidden, self.members)

    def init(self, generator: torch.Generator) -> Params:
        """Draw weights and biases uniformly in +-1/sqrt(fan in), PyTorch's own rule for layers.

        They are drawn on the generator's device.
        """
        params: Params = {}
        bound = 1.0
        for name, shape in self.shapes.items():
            if name.endswith("weight"):
                bound = 1.0 / math.sqrt(shape[1])
            uniform = torch.rand(shape, generator=generator, device=generator.device)
            params[name] = (2.0 * uniform - 1.0) * bound
        return params

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Map (batch, inputs), or (members, batch, inputs), to (members, batch, outputs)."""
        if x.dim() == 2:
            x = x.expand(self.members, *x.shape)
        last = len(self.hidden)
        for layer in range(last):
            x = torch.baddbmm(params[f"{layer}.bias"], x, params[f"{layer}.weight"]).relu()
        return torch.baddbmm(params[f"{last}.bias"], x, params[f"{last}.weight"])


def tensors(networks: Networks) -> list[Tensor]:
    """List every weight, in the order of the names given."""
    return [tensor for params in networks.values() for tensor in params.values()]


def like(networks: Networks, values: list[Tensor]) -> Networks:
    """Give `values`, in the order of `tensors`, the names that `networks` has."""
    rest = iter(values)
    return {name: {key: next(rest) for key in params} for name, params in networks.items()}
