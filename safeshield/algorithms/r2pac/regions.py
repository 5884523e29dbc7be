r"""Which states R2PAC calls unsafe, and by how much a chunk of actions is worse than the best.

`CostRegion`, the method (eq. 5, 10, 11): V_c(s) > l, with V_c the discounted number of violating
steps on the cheapest way on, learned with Q_c by implicit Q-learning that leans to low cost, and

- l the alpha-quantile of V_c over the log's states that do not violate themselves, read anew as V_c
  changes (over all states, as the paper has it, a log of which a third violates puts l so high that
  nothing but violations is unsafe);
- or l = kappa (1 - g^T) / ((1 - g) T), what a limit kappa on an episode of T steps is worth
  (eq. 42);
- or the lesser of the two: a log's worst tenth may cost more than anybody wants to pay.

`SafetyRegion`, the variant of appendix E.6: V_h(s) > -margin, and A_h in the place of A_c.

In both, a state of the log that violates, or lies within the margin of doing so, is unsafe whatever
a value says of it: there the answer is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from safeshield.nn.arrays import A, NetworksOf, Weights, concat, largest, smallest
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.training.log import LogTensors
from safeshield.training.state import TrainState
from safeshield.values.reward import RewardCritics
from safeshield.values.safety import SafetyCritics
from safeshield.values.units import PLAN

LEVEL, UNSAFE = "region_level", "region_unsafe"
"""Of l, and of which states the log's transitions reach that are unsafe (N,) uint8, among the
statistics of a training state."""
_POOL = 65_536
_Float = npt.NDArray[np.float32]
_Flags = npt.NDArray[np.bool_]
Arrays = Mapping[str, Weights]


class RegionReport(NamedTuple):
    """What a region came to over a log."""

    level: float
    """l, in discounted violating steps; for safety values -margin, in units of h."""
    unsafe_share: float
    """Of the log's states."""
    violating_share: float
    """Of the log's states that violate or lie within the margin."""


class Region(Protocol):
    """Tells unsafe states, and dangerous chunks, with the critics that a training state holds."""

    def unsafe(self, state: TrainState, observations: Tensor, constraints: Tensor) -> Tensor:
        """Whether states (n, obs) of the log, of known h (n,), are unsafe: (n,) bool."""

    def worse(self, networks: NetworksOf[A], observations: A, chunks: A) -> A:
        """Return how much worse chunks (n, h * act) are than the best, (n,); at most 0: none is.

        In units of one chunk's advantage.
        """

    def read_level(
        self, state: TrainState, log: LogTensors, generator: torch.Generator
    ) -> TrainState:
        """Read l off the log with the current critics."""

    def unsafe_of(
        self, weights: Arrays, observations: _Float, level: float
    ) -> npt.NDArray[np.bool_]:
        """Whether states (n, obs) of unknown h are unsafe, (n,), on NumPy arrays."""


@dataclass(frozen=True)
class CostRegion:
    """V_c > l; `critics` learns the return of minus the cost."""

    critics: RewardCritics
    margin: float
    """In units of h."""
    quantile: float | None
    """alpha; None: l is `most`."""
    most: float
    """What l is at most."""

    def value(self, networks: Networks, observations: Tensor) -> Tensor:
        """Return V_c, (n,), in discounted violating steps."""
        return -self.critics.possible(networks, observations)

    def unsafe(self, state: TrainState, observations: Tensor, constraints: Tensor) -> Tensor:
        """See `Region`."""
        too_much = self.value(state.targets, observations) > state.scales[LEVEL]
        return too_much | (constraints > -self.margin)

    def worse(self, networks: NetworksOf[A], observations: A, chunks: A) -> A:
        """See `Region`."""
        return -smallest(self.critics.advantages(networks, observations, chunks))

    def read_level(
        self, state: TrainState, log: LogTensors, generator: torch.Generator
    ) -> TrainState:
        """See `Region`."""
        if self.quantile is None:
            return state
        free = torch.nonzero(log.constraints <= -self.margin).flatten()
        size = min(_POOL, len(free))
        if not size:  # everything is unsafe, whatever the level
            return state
        picks = torch.randint(len(free), (size,), generator=generator, device=generator.device)
        rows = free[picks]
        with torch.no_grad():
            values = self.value(state.targets, log.observations[rows])
        level = torch.quantile(values, self.quantile).clamp(max=self.most)
        return state._replace(scales={**state.scales, LEVEL: level})

    def unsafe_of(
        self, weights: Arrays, observations: _Float, level: float
    ) -> npt.NDArray[np.bool_]:
        """See `Region`."""
        return np.asarray(-self.critics.value(weights, observations) > level)


@dataclass(frozen=True)
class SafetyRegion:
    """V_h > -margin."""

    critics: SafetyCritics
    plan: EnsembleMLP
    """A_h of chunks."""
    margin: float
    """In units of h."""

    def unsafe(self, state: TrainState, observations: Tensor, constraints: Tensor) -> Tensor:
        """See `Region`."""
        value = self.critics.value(state.targets, observations)
        return (value > -self.margin) | (constraints > -self.margin)

    def worse(self, networks: NetworksOf[A], observations: A, chunks: A) -> A:
        """See `Region`."""
        return largest(plan_advantages(self.plan, networks, observations, chunks))

    def read_level(
        self, state: TrainState, log: LogTensors, generator: torch.Generator
    ) -> TrainState:
        """See `Region`."""
        return state

    def unsafe_of(
        self, weights: Arrays, observations: _Float, level: float
    ) -> npt.NDArray[np.bool_]:
        """See `Region`."""
        return np.asarray(self.critics.value(weights, observations) > level)


def plan_advantages(plan: EnsembleMLP, networks: NetworksOf[A], observations: A, chunks: A) -> A:
    """Return A_h,i(s, a_{t:t+h}), (members, n), in steps' worth of h."""
    return plan(networks[PLAN], concat([observations, chunks]))[..., 0]


def horizon_level(cost_limit: float, steps: int, discount: float) -> float:
    """Return what a limit on an episode's violating steps is worth in discounted ones (eq. 42).

    >>> round(horizon_level(10.0, 200, 0.99), 3)
    4.33
    """
    return cost_limit * (1.0 - discount**steps) / ((1.0 - discount) * steps)


def reached_unsafe(region: Region, state: TrainState, log: LogTensors) -> Tensor:
    """Return which transitions of a log reach an unsafe state, (N,) uint8."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(log), _POOL):
            part = slice(start, start + _POOL)
            seen, h = log.next_observations[part], log.next_constraints[part]
            parts.append(region.unsafe(state, seen, h).to(torch.uint8))
    return torch.cat(parts)


def report_region(
    region: Region, state: TrainState, log: LogTensors, margin: float
) -> RegionReport:
    """Judge every state of the log."""
    unsafe = violating = 0.0
    with torch.no_grad():
        for start in range(0, len(log), _POOL):
            part = slice(start, start + _POOL)
            h = log.constraints[part]
            unsafe += float(region.unsafe(state, log.observations[part], h).sum())
            violating += float((h > -margin).sum())
    level = state.scales.get(LEVEL)
    return RegionReport(
        -margin if level is None else float(level) + 0.0, unsafe / len(log), violating / len(log)
    )
