"""The Lagrange multiplier of a learner under a cost limit, updated by dual ascent."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Multiplier:
    """The multiplier l of a limit d on the mean cost J of an episode.

    The learner's reward is ``(r - l c) / (1 + l)``, with the scale of Stooke et al. 2020,
    "Responsive Safety in RL by PID Lagrangian Methods". After each rollout in which episodes ended,
    the multiplier is updated::

        log l <- log l + rate * clip((J - d) / max(d, 1), -1, 1)

    This is the dual ascent of PPO-Lagrangian (Ray et al. 2019, "Benchmarking Safe Exploration in
    Deep RL") with a multiplicative step (exponentiated gradient, Kivinen and Warmuth 1997). The
    multiplier stays above 0 and adapts to the order of magnitude of the rewards, so that the same
    rate is usable for rewards in any unit.

    Raises:
        ValueError: A number is out of range.

    >>> price = Multiplier(limit=5.0)
    >>> price.updated(20.0).value > price.value > price.updated(1.0).value
    True
    """

    limit: float
    """d, the limit on the summed cost of an episode."""
    value: float = 1.0
    """l, in units of reward per unit of cost."""
    rate: float = 0.25
    """Greatest change of log l in an update."""
    least: float = 1e-3
    """Lower bound of l."""
    greatest: float = 1e4
    """Upper bound of l."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit) and self.limit >= 0.0):
            raise ValueError(
                f"a cost limit must be finite and at least 0, got {self.limit}; a learner without "
                "a limit has no multiplier"
            )
        if not (self.rate > 0.0 and 0.0 < self.least <= self.value <= self.greatest < math.inf):
            raise ValueError(
                "a multiplier needs rate > 0 and 0 < least <= value <= greatest, got rate "
                f"{self.rate}, least {self.least}, value {self.value}, greatest {self.greatest}"
            )

    def updated(self, mean_cost: float) -> Multiplier:
        """Return the multiplier after a rollout, whose episodes have the mean cost `mean_cost`."""
        error = (mean_cost - self.limit) / max(self.limit, 1.0)
        step = self.rate * min(max(error, -1.0), 1.0)
        value = min(max(self.value * math.exp(step), self.least), self.greatest)
        return dataclasses.replace(self, value=value)
