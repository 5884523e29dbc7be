r"""Conditional RealNVP flows: exact densities and exact inverses (Dinh et al. 2017).

    base u ~ N(0, I)   <->   latent z = f(u; c),      log p(z | c) = log N(u) + log |det du/dz|

(FLRP eq. 2, 3.) Layer i keeps the entries a, with index % 2 == i % 2, and transforms the others, b:

    towards the base:   b <- exp(l) b + m,    towards the latent:   b <- (b - m) exp(-l)
    m, r = hyper(a, c),   l = r / (1 + |r / ln 0.001|)

The weights have the same names and shapes as in the RealNVP of the package zuko. The tests compare
the two.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safeshield.nn.arrays import A, ParamsOf, concat, derived, exp, interleaved, transposed
from safeshield.nn.mlp import Params, Shapes, drawn, run

if TYPE_CHECKING:
    import torch

_LEAST = math.log(1e-3)
"""Bound on the log scales of one layer."""


@dataclass(frozen=True)
class CouplingFlow:
    """A RealNVP flow of `features` >= 2 entries, conditioned on `context` features.

    >>> import torch
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
    """Number of coupling layers; each leaves every other entry unchanged."""

    def __post_init__(self) -> None:
        if self.features < 2:
            raise ValueError(f"a coupling flow needs at least 2 features, got {self.features}")

    @property
    def shapes(self) -> Shapes:
        """Shape of every weight, (out, in) or (out,), by its name in zuko.

        >>> CouplingFlow(3, 2, (8,), 1).shapes["transforms.0.hyper.0.weight"]
        (8, 4)
        """
        shapes: Shapes = {}
        for i in range(self.transforms):
            kept = len(range(i % 2, self.features, 2))
            widths = (kept + self.context, *self.hidden, 2 * (self.features - kept))
            for j, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
                shapes[f"transforms.{i}.hyper.{2 * j}.weight"] = (fan_out, fan_in)
                shapes[f"transforms.{i}.hyper.{2 * j}.bias"] = (fan_out,)
        return shapes

    def init(self, generator: torch.Generator) -> Params:
        """Return randomly drawn weights, uniform in +-1/sqrt(fan in).

        Those of last layers are drawn in a tenth of that range. The flow then starts near the
        identity, where both directions are well-conditioned. `generator` draws the weights.
        """
        last = f".hyper.{2 * len(self.hidden)}."
        return drawn(self.shapes, generator, lambda name: 0.1 if last in name else 1.0)

    def to_latent(self, params: ParamsOf[A], base: A, context: A) -> tuple[A, A]:
        """Return z = f(u; c), (batch, features), and log |det dz/du|, (batch,).

        `params` are the weights, `base` is u (batch, features), and `context` is c (batch,
        context).
        """
        halves, volumes = [base[:, 0::2], base[:, 1::2]], []
        for i, stack in reversed(list(enumerate(hyper_layers(params)))):
            shift, log_scale = _hyper(stack, halves[i % 2], context)
            halves[1 - i % 2] = (halves[1 - i % 2] - shift) * exp(-log_scale)
            volumes.append(log_scale.sum(-1))
        return interleaved(*halves), -sum(volumes[1:], volumes[0])

    def to_base(self, params: ParamsOf[A], latent: A, context: A) -> tuple[A, A]:
        """Return u with f(u; c) = z, (batch, features), and log |det du/dz|, (batch,).

        `params` are the weights, `latent` is z (batch, features), and `context` is c (batch,
        context).
        """
        halves, volumes = [latent[:, 0::2], latent[:, 1::2]], []
        for i, stack in enumerate(hyper_layers(params)):
            shift, log_scale = _hyper(stack, halves[i % 2], context)
            halves[1 - i % 2] = halves[1 - i % 2] * exp(log_scale) + shift
            volumes.append(log_scale.sum(-1))
        return interleaved(*halves), sum(volumes[1:], volumes[0])

    def log_prob(self, params: ParamsOf[A], latent: A, context: A) -> A:
        """Return log p(z | c), (batch,), in nats (eq. 2).

        The arguments `params`, `latent` and `context` are those of `to_base`.
        """
        base, volume = self.to_base(params, latent, context)
        return normal_log_prob(base) + volume


@derived
def hyper_layers(params: ParamsOf[A]) -> list[list[tuple[A, A]]]:
    """Return the layers of each coupling layer's network, in the form that `nn.mlp.run` accepts.

    `params` are the weights of all networks.
    """
    stacks: dict[int, list[tuple[A, A]]] = {}
    places = (name.split(".") for name in params if name.endswith("weight"))
    for transform, layer in sorted((int(place[1]), int(place[3])) for place in places):
        start = f"transforms.{transform}.hyper.{layer}"
        weight, bias = transposed(params[f"{start}.weight"]), params[f"{start}.bias"]
        stacks.setdefault(transform, []).append((weight[None], bias[None, None]))
    return list(stacks.values())


def _hyper(stack: list[tuple[A, A]], kept: A, context: A) -> tuple[A, A]:
    out = run(stack, concat([kept, context]))[0]
    # Each transformed entry has two adjacent outputs: its shift and its raw log scale.
    shift, raw = out[:, 0::2], out[:, 1::2]
    return shift, raw / (1.0 + abs(raw / _LEAST))


def normal_log_prob(x: A) -> A:
    """Return the log density of N(0, I) at x (..., features), in nats: (...)."""
    out: A = -0.5 * (x * x + math.log(2.0 * math.pi)).sum(-1)
    return out
