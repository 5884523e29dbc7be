r"""Change of a policy by refinement: the divergence in the base space and the bounds it gives.

Refinement maps u_0 ~ N(0, I) to u_T = g(u_0), whose distribution in a state is q_u. Where g is one
to one,

    D = KL(q_u || N) = E[ (||u_T||^2 - ||u_0||^2) / 2 - log |det dg/du_0| ]

With pi_0 the policy of the frozen prior and decoder (FLRP eq. 18 to 20),

    KL(pi || pi_0) <= D,     TV(pi, pi_0) <= min(sqrt(D / 2), sqrt(1 - exp(-D))),
    W_2(q_z, p) <= sqrt(2 D) L_f

for an L_f-Lipschitz flow f. The bounds on TV are Pinsker's and that of Bretagnolle and Huber
(1979), which stays below 1. Where g folds, that is where it is not one to one, D is larger than the
formula gives. `folds` counts the samples at which the determinant is not positive. If there are
none, this does not prove that g is one to one. The expectation is estimated from samples that are
the same for all states, and is reported with its standard error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from safeshield.nn.latent_actor import LatentPolicy
from safeshield.nn.mlp import Networks

_Floats = npt.NDArray[np.float64]
_AT_ONCE = 32_768
"""Number of samples whose Jacobians are held in memory together."""


class BaseShift(NamedTuple):
    """Change of the policy in each of n states, estimated from several samples of u_0."""

    divergence: _Floats
    """(n,) estimate of D in nats: the mean over the samples, or 0 where that is negative. It is
    infinite where the determinant is 0 at a sample, because refinement then puts the base
    distribution onto fewer dimensions."""
    folds: _Floats
    """(n,) share of the samples at which the map from u_0 to u_T folds, so that the formula is too
    low. 0 means that none of these samples showed a fold, not that the map is one to one."""
    standard_error: _Floats
    """(n,) standard error of the mean over the samples, in nats, infinite where D is. All states
    share the samples, so the errors do not cancel in a mean over states."""

    @property
    def total_variation(self) -> _Floats:
        """(n,) bound on TV(pi, pi_0) at the estimated D, which is below 1 (eq. 19, 20)."""
        return _total_variation(self.divergence)


@dataclass(frozen=True)
class ShiftSummary:
    """Summary of the change over states of a log, which an agent's file stores."""

    states: int
    """Number of states."""
    median: float
    """Median of D over the states, in nats."""
    upper_decile: float
    """The 0.9-quantile of D over the states, in nats."""
    folds: float
    """Share of the samples at which the map folds."""
    draws: int | None = None
    """Number of samples in each state. None, as for the errors below, where an older file lacks
    it."""
    median_error: float | None = None
    """Standard error of D in the state whose D is nearest to the median, in nats."""
    upper_decile_error: float | None = None
    """Standard error of D in the state whose D is nearest to the 0.9-quantile, in nats."""

    @classmethod
    def of(cls, shift: BaseShift, draws: int) -> ShiftSummary:
        """Return a summary of the change `shift` in n states.

        `draws` is the number of samples in each state from which it was estimated.
        """
        found = shift.divergence
        # Between two values there is no number if one of them is infinite.
        finite = bool(np.isfinite(found).all())
        levels = np.quantile(found, [0.5, 0.9], method="linear" if finite else "higher")
        with np.errstate(invalid="ignore"):
            away = [np.where(found == level, 0.0, np.abs(found - level)) for level in levels]
        errors = shift.standard_error[[int(one.argmin()) for one in away]]
        return cls(
            states=len(shift.divergence),
            median=float(levels[0]),
            upper_decile=float(levels[1]),
            folds=float(shift.folds.mean()),
            draws=draws,
            median_error=float(errors[0]),
            upper_decile_error=float(errors[1]),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values, with "inf" for an infinite number, which JSON lacks."""
        fields = dataclasses.asdict(self)
        return {name: "inf" if value == math.inf else value for name, value in fields.items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ShiftSummary:
        """Return the summary that `to_json` wrote."""
        read: dict[str, Any] = {n: math.inf if one == "inf" else one for n, one in fields.items()}
        return cls(**read)

    @property
    def bound(self) -> str:
        """Meaning of the summary, in words."""
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
            f"the map folds at {self.folds:.1%} of draws, so the true numbers may be larger"
            if self.folds > 0
            else "none of these draws showed a fold, with which the true numbers could be larger"
        )
        return (
            f"estimated from {drawn}: refinement moves the base distribution by a median of "
            f"{middle} nats; in nine of ten of {self.states} logged states by at most {upper}, so "
            f"that it raises the probability of any set of actions by at most {variation:.2g}; "
            f"{folded}"
        )


def _total_variation(divergence: _Floats) -> _Floats:
    pinsker, huber = np.sqrt(divergence / 2.0), np.sqrt(-np.expm1(-divergence))
    # The bound is below 1 for every D. Where exp(-D) rounds to 0, the largest number below 1 is
    # returned.
    return np.minimum(np.minimum(pinsker, huber), np.nextafter(1.0, 0.0))


def base_shift(
    policy: LatentPolicy, networks: Networks, observations: Tensor, noise: Tensor
) -> BaseShift:
    """Return an estimate of D in n states, with its standard errors.

    Args:
        policy: Policy whose refinement is measured.
        networks: Weights of its networks.
        observations: (n, obs) normalised.
        noise: (draws, latent) standard normal samples for all states; at least 2.
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
        error = each.std(1, correction=min(1, draws - 1)) / math.sqrt(draws)
    return BaseShift(
        each.mean(1).clamp(min=0.0).cpu().numpy(),
        (sign <= 0).reshape(count, draws).double().mean(1).cpu().numpy(),
        error.nan_to_num(nan=math.inf, posinf=math.inf).cpu().numpy(),
    )
