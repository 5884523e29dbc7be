r"""How far refinement moves a policy: the base-space divergence and what it bounds.

u_0 ~ N(0, I) becomes u_T = g(u_0), distributed as q_u in that state. Where g is one to one,

    D = KL(q_u || N) = E[ (||u_T||^2 - ||u_0||^2) / 2 - log |det dg/du_0| ]

and, pi_0 being the policy of the frozen prior and decoder (FLRP eq. 18 to 20),

    KL(pi || pi_0) <= D,     TV(pi, pi_0) <= min(sqrt(D / 2), sqrt(1 - exp(-D))),
    W_2(q_z, p) <= sqrt(2 D) L_f

for an L_f-Lipschitz flow f (Pinsker's bound, and that of Bretagnolle and Huber, 1979, which stays
below 1). Where g folds, D is larger than the formula says; `folds` counts the draws at which the
determinant is not positive. None among the draws is no proof that g is one to one. The expectation
is estimated from a number of draws, the same for all states; it comes with its standard error.
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

from safeshield.nn.latent_actor import LatentPolicy
from safeshield.nn.mlp import Networks

_Floats = npt.NDArray[np.float64]
_AT_ONCE = 32_768
"""Draws whose slopes are held in memory together."""


class BaseShift(NamedTuple):
    """The shift of each of n states, estimated from several draws of u_0."""

    divergence: _Floats
    """(n,) D in nats: the draws' mean, and 0 where chance puts that below 0."""
    folds: _Floats
    """(n,) share of the draws at which the map of u_0 to u_T folds, where the formula is too low. 0
    says that none of these draws showed a fold, not that the map is one to one."""
    standard_error: _Floats
    """(n,) of the draws' mean, in nats. All states share the draws, so errors do not cancel between
    states."""

    @property
    def total_variation(self) -> _Floats:
        """(n,) bound on TV(pi, pi_0), below 1 (eq. 19, 20), at the estimated D."""
        return _total_variation(self.divergence)


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
    draws: int | None = None
    """How many in each state; None, as the errors: an older file does not say."""
    median_error: float | None = None
    """Standard error of D where D is the median."""
    upper_decile_error: float | None = None
    """Standard error of D where D is the upper decile."""

    @classmethod
    def of(cls, shift: BaseShift, draws: int) -> ShiftSummary:
        """Summarise the shift of n states, from `draws` in each."""
        levels = np.quantile(shift.divergence, [0.5, 0.9])
        nearest = [int(np.abs(shift.divergence - level).argmin()) for level in levels]
        errors = shift.standard_error[nearest]
        return cls(
            states=len(shift.divergence),
            median=float(levels[0]),
            upper_decile=float(levels[1]),
            folds=float(shift.folds.mean()),
            draws=draws,
            median_error=float(errors[0]),
            upper_decile_error=float(errors[1]),
        )

    @property
    def bound(self) -> str:
        """What it means, in words."""
        variation = float(_total_variation(np.array(self.upper_decile)))
        middle, upper = (
            f"{level:.3g}" + ("" if error is None else f" (standard error {error:.2g})")
            for level, error in (
                (self.median, self.median_error),
                (self.upper_decile, self.upper_decile_error),
            )
        )
        drawn = "draws" if self.draws is None else f"{self.draws} draws, the same in every state"
        folded = (
            f"the map folds at {self.folds:.1%} of draws, where more is possible"
            if self.folds > 0
            else "none of these draws showed a fold, where more would be possible"
        )
        return (
            f"estimated from {drawn}: refinement moves the base distribution by a median of "
            f"{middle} nats; in nine of ten of {self.states} logged states by at most {upper}, so "
            f"that nothing is likelier by more than {variation:.2g} than under the unrefined "
            f"policy; {folded}"
        )


def _total_variation(divergence: _Floats) -> _Floats:
    pinsker, huber = np.sqrt(divergence / 2.0), np.sqrt(-np.expm1(-divergence))
    # The largest number below 1: where exp(-D) is lost in rounding, the bound still is below 1.
    return np.minimum(np.minimum(pinsker, huber), np.nextafter(1.0, 0.0))


def base_shift(
    policy: LatentPolicy, networks: Networks, observations: Tensor, noise: Tensor
) -> BaseShift:
    """Measure D in n states.

    Args:
        policy: whose experts to look at.
        networks: their weights.
        observations: (n, obs) normalised.
        noise: (draws, latent) standard normal, the same for all states; at least 2 draws.
    """
    count, draws = len(observations), len(noise)

    def refined(state: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        out = policy.refine(networks, state[None], base[None])[0]
        return out, out

    seen = observations.repeat_interleave(draws, 0)
    start = noise.repeat(count, 1)
    with torch.no_grad():
        slopes = vmap(jacrev(refined, argnums=1, has_aux=True), chunk_size=_AT_ONCE)
        slope, end = slopes(seen, start)
        sign, volume = torch.linalg.slogdet(slope)
        each = 0.5 * (end.square() - start.square()).sum(-1) - volume
        each = each.reshape(count, draws).double()
    return BaseShift(
        each.mean(1).clamp(min=0.0).cpu().numpy(),
        (sign <= 0).reshape(count, draws).double().mean(1).cpu().numpy(),
        (each.std(1, correction=min(1, draws - 1)) / math.sqrt(draws)).cpu().numpy(),
    )
