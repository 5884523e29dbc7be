r"""Conditional RealNVP flows: exact densities and exact inverses (Dinh et al. 2017).

    base u ~ N(0, I)   <->   latent z = f(u; c),      log p(z | c) = log N(u) + log |det du/dz|

(FLRP eq. 2, 3.) The coupling layers are zuko's; here they become what the other networks are: a
frozen description, and weights in a dict of tensors that one passes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from zuko.flows import RealNVP

from safeshield.nn.coupling_forward import coupling_shapes
from safeshield.nn.mlp import Params


class _BothWays(nn.Module):
    """zuko's transform goes from latent to base; this calls it either way, with its weights."""

    def __init__(self, flow: RealNVP) -> None:
        super().__init__()
        self.transforms = flow.transform.transforms
        self._lazy = flow.transform

    def forward(self, x: Tensor, context: Tensor, to_latent: bool) -> tuple[Tensor, Tensor]:
        transform: Any = self._lazy(context)
        return (transform.inv if to_latent else transform).call_and_ladj(x)  # type: ignore[no-any-return]


@lru_cache(maxsize=64)
def _module(features: int, context: int, transforms: int, hidden: tuple[int, ...]) -> _BothWays:
    """Return the layers; whoever calls them brings the weights."""
    return _BothWays(RealNVP(features, context, transforms=transforms, hidden_features=hidden))


@dataclass(frozen=True)
class CouplingFlow:
    """A RealNVP flow of `features` >= 2 entries, conditioned on `context` features.

    >>> flow = CouplingFlow(2, 3, hidden=(8,))
    >>> params = flow.init(torch.Generator().manual_seed(0))
    >>> base, context = torch.zeros(5, 2), torch.zeros(5, 3)
    >>> latent, _ = flow.to_latent(params, base, context)
    >>> torch.allclose(flow.to_base(params, latent, context)[0], base, atol=1e-6)
    True
    """

    features: int
    context: int
    hidden: tuple[int, ...]
    transforms: int = 4
    """Coupling layers; each leaves every other entry as it is."""

    def __post_init__(self) -> None:
        if self.features < 2:
            raise ValueError(f"a coupling flow needs at least 2 features, got {self.features}")

    @property
    def _layers(self) -> _BothWays:
        return _module(self.features, self.context, self.transforms, self.hidden)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight, by zuko's name for it."""
        return coupling_shapes(self.features, self.context, self.hidden, self.transforms)

    def init(self, generator: torch.Generator) -> Params:
        """Draw all weights uniformly in +-1/sqrt(fan in); the last layers' a tenth of it.

        So the flow starts near the identity, where both directions are well-conditioned.
        """
        params: Params = {}
        bound, last = 1.0, 2 * len(self.hidden)
        for name, shape in self.shapes.items():
            if name.endswith("weight"):
                bound = 1.0 / math.sqrt(shape[1])
            size = bound * (0.1 if f".hyper.{last}." in name else 1.0)
            uniform = torch.rand(shape, generator=generator, device=generator.device)
            params[name] = (2.0 * uniform - 1.0) * size
        return params

    def to_latent(self, params: Params, base: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return z = f(u; c), (batch, features), and log |det dz/du|, (batch,)."""
        return self._call(params, base, context, True)

    def to_base(self, params: Params, latent: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return u with f(u; c) = z, (batch, features), and log |det du/dz|, (batch,)."""
        return self._call(params, latent, context, False)

    def log_prob(self, params: Params, latent: Tensor, context: Tensor) -> Tensor:
        """Return log p(z | c), (batch,), in nats (eq. 2)."""
        base, volume = self.to_base(params, latent, context)
        return normal_log_prob(base) + volume

    def _call(
        self, params: Params, x: Tensor, context: Tensor, to_latent: bool
    ) -> tuple[Tensor, Tensor]:
        layers = self._layers
        masks = {name: mask.to(x.device) for name, mask in layers.named_buffers()}
        out: tuple[Tensor, Tensor] = functional_call(
            layers, {**params, **masks}, (x, context, to_latent)
        )
        return out


def normal_log_prob(x: Tensor) -> Tensor:
    """Return the log density of N(0, I) at x (..., features), in nats: (...)."""
    return -0.5 * (x.square() + math.log(2.0 * math.pi)).sum(-1)
