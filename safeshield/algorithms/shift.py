r"""How far refinement moves a policy: the base-space divergence and what it bounds.

u_0 ~ N(0, I) becomes u_T = g(u_0), distributed as q_u in that state. Where g is one to one,

    D = KL(q_u || N) = E[ (||u_T||^2 - ||u_0||^2) / 2 - log |det dg/du_0| ]

and, pi_0 being the policy of the frozen prior and decoder (FLRP eq. 18 to 20),

    KL(pi || pi_0) <= D,     TV(pi, pi_0) <= sqrt(D / 2),     W_2(q_z, p) <= sqrt(2 D) L_f

for an L_f-Lipschitz flow f. Where g folds (its determinant changes sign) D is larger than the
formula says; `folds` counts the draws at which the determinant is not positive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from safeshield.algorithms.latent_policy import LatentPolicy
from safeshield.nn.mlp import Networks

_Floats = npt.NDArray[np.float64]


class BaseShift(NamedTuple):
    """The shift of each of n states, from several draws of u_0."""

    divergence: _Floats
    """(n,) D in nats; at least 0 up to the noise of the draws."""
    folds: _Floats
    """(n,) share of the draws at which the map of u_0 to u_T folds: 0 where D is exact."""

    @property
    def total_variation(self) -> _Floats:
        """(n,) bound on TV(pi, pi_0), at most 1 (eq. 19, 20)."""
        return np.minimum(np.sqrt(np.maximum(self.divergence, 0.0) / 2.0), 1.0)


@dataclass(frozen=True)
class ShiftSummary:
    """The shift over states of a log, as an agent's file keeps it."""

    states: int
    """How many states it was read at."""
    median: float
    """Of D, in nats."""
    upper_decile: float
    """The value of D that nine of ten states stay below."""
    folds: float
    """Share of draws at which the map folds."""

    @classmethod
    def of(cls, shift: BaseShift) -> ShiftSummary:
        """Summarise the shift of n states."""
        middle, upper = np.quantile(shift.divergence, [0.5, 0.9])
        return cls(len(shift.divergence), float(middle), float(upper), float(shift.folds.mean()))

    @property
    def bound(self) -> str:
        """What it means, in words."""
        variation = min(math.sqrt(max(self.upper_decile, 0.0) / 2.0), 1.0)
        folded = f"; the map folds at {self.folds:.1%} of draws, where more is possible"
        return (
            f"refinement moves the base distribution by a median of {self.median:.3g} nats; in "
            f"nine of ten of {self.states} logged states by at most {self.upper_decile:.3g}, so "
            f"that nothing is likelier by more than {variation:.2g} than under the unrefined policy"
            + (folded if self.folds > 0 else "")
        )


def base_shift(
    policy: LatentPolicy, networks: Networks, observations: Tensor, noise: Tensor
) -> BaseShift:
    """Measure D in n states.

    Args:
        policy: whose experts to look at.
        networks: their weights.
        observations: (n, obs) normalised.
        noise: (draws, latent) standard normal, the same for all states.
    """
    count, draws = len(observations), len(noise)

    def refined(state: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        out = policy.refine(networks, state[None], base[None])[0]
        return out, out

    seen = observations.repeat_interleave(draws, 0)
    start = noise.repeat(count, 1)
    with torch.no_grad():
        slope, end = vmap(jacrev(refined, argnums=1, has_aux=True))(seen, start)
        sign, volume = torch.linalg.slogdet(slope)
        each = 0.5 * (end.square() - start.square()).sum(-1) - volume
    return BaseShift(
        each.reshape(count, draws).mean(1).double().cpu().numpy(),
        (sign <= 0).reshape(count, draws).double().mean(1).cpu().numpy(),
    )
