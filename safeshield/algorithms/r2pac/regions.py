r"""R2PAC's unsafe region of states, and how much worse a chunk of actions is than the best one.

`CostRegion` is the method of the paper (eq. 5, 10, 11). A state is unsafe where V_c(s) > l. V_c is
the discounted number of violating steps of the cheapest continuation, learned together with Q_c by
implicit Q-learning with an expectile towards low cost. The level l is one of these:

- the alpha-quantile of V_c over the logged states that do not violate themselves, computed again as
  V_c changes. (The paper takes the quantile over all states. For a log with a third of violating
  states this makes l so high that only violations are unsafe.)
- l = kappa (1 - g^T) / ((1 - g) T), the discounted equivalent of a limit of kappa violating steps
  in an episode of T steps (eq. 42);
- the smaller of the two, because even the worst tenth of a log may cost more than the limit.

`SafetyRegion` is the variant of appendix E.6. A state is unsafe where V_h(s) > -margin, and A_h
replaces A_c.

In both, a logged state that violates, or lies within the margin of a violation, is unsafe
independently of the learned values, because its h is known. With `trust_labels=False` the learned
values alone decide, and the quantile is that of all states, as in the paper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from safeshield.nn.arrays import A, Float, NetworksOf, Weights, concat, largest, smallest
from safeshield.nn.mlp import EnsembleMLP
from safeshield.nn.plan_actor import PLAN
from safeshield.training.log import POOL, LogTensors, ScaledRows, some_rows
from safeshield.training.state import TrainState
from safeshield.values.reward import RewardCritics
from safeshield.values.safety import SafetyCritics

LEVEL, UNSAFE = "region_level", "region_unsafe"
"""Names among the statistics of a training state: of l, (), and of whether the next state of each
transition is unsafe, (N,) uint8."""
Arrays = Mapping[str, Weights]


class RegionReport(NamedTuple):
    """Level and size of an unsafe region over a log."""

    level: float
    """Level l, in discounted violating steps; for safety values -margin, in units of h."""
    unsafe_share: float
    """Share of the log's states that are unsafe."""
    violating_share: float
    """Share of the log's states that violate or lie within the margin of a violation."""


@dataclass(frozen=True)
class Region(ABC):
    """Test for unsafe states and dangerous chunks, with the critics of a training state.

    The states that the test calls unsafe are the region that R2PAC's plans avoid.
    """

    margin: float
    """Distance from the constraint at which a state counts as violating, in units of h."""
    trust_labels: bool
    """Whether a logged state that violates is unsafe whatever its value is."""

    @abstractmethod
    def value(self, networks: NetworksOf[A], observations: A) -> A:
        """Return V_c (n,) in discounted violating steps, or V_h (n,) in units of h.

        `networks` are the weights, and `observations` (n, obs) are normalised.
        """

    @abstractmethod
    def worse(self, networks: NetworksOf[A], observations: A, chunks: A) -> A:
        """Return how much worse chunks (n, h * act) are than the best one, (n,).

        The unit is one chunk's advantage. At most 0 means that the chunk is not worse. `networks`
        are the weights, and `observations` (n, obs) are normalised.
        """

    def unsafe(self, state: TrainState, observations: Tensor, constraints: Tensor) -> Tensor:
        """Return whether states of the log, whose h is known, are unsafe, (n,) bool.

        Args:
            state: Training state, whose slow copies and level are used.
            observations: (n, obs) normalised observations.
            constraints: (n,) h of the states.
        """
        level = state.scales.get(LEVEL, -self.margin)
        too_much = self.value(state.targets, observations) > level
        return too_much | (constraints > -self.margin) if self.trust_labels else too_much

    def read_level(
        self, state: TrainState, log: LogTensors, generator: torch.Generator
    ) -> TrainState:
        """Return `state` with the level l that its critics give over the log.

        `log` is the log, and `generator` draws a sample of its states.
        """
        return state

    def unsafe_of(
        self, weights: Arrays, observations: Float, level: float
    ) -> npt.NDArray[np.bool_]:
        """Return whether states with unknown h are unsafe, (n,) bool, on NumPy arrays.

        Args:
            weights: Weights by network.
            observations: (n, obs) normalised observations.
            level: Level of the region.
        """
        return np.asarray(self.value(weights, observations) > level)


@dataclass(frozen=True)
class CostRegion(Region):
    """The region of states in which the expected discounted cost V_c is above a level l.

    `critics` learns the return of the negative cost.
    """

    critics: RewardCritics
    """Description of the critics of the cost."""
    quantile: float | None
    """Quantile alpha; None means that l is `most`."""
    most: float
    """Upper bound of l, in discounted violating steps."""

    def value(self, networks: NetworksOf[A], observations: A) -> A:
        """Return V_c, (n,), in discounted violating steps.

        `networks` are the weights, and `observations` (n, obs) are normalised.
        """
        return -self.critics.possible(networks, observations)

    def worse(self, networks: NetworksOf[A], observations: A, chunks: A) -> A:
        """Return the cost advantage of the chunks, (n,) (see `Region.worse`).

        The arguments `networks`, `observations` and `chunks` are described there.
        """
        return -smallest(self.critics.advantages(networks, observations, chunks))

    def read_level(
        self, state: TrainState, log: LogTensors, generator: torch.Generator
    ) -> TrainState:
        """Return `state` with l, the quantile of V_c over states of `log` that do not violate.

        With trust_labels=False it is the quantile over all states. The level is at most `most`.
        `generator` draws a sample of the states.
        """
        if self.quantile is None:
            return state
        counted = log.constraints <= -self.margin
        rows = some_rows(counted if self.trust_labels else torch.ones_like(counted), generator)
        if not len(rows):  # All states violate, so the level has no effect.
            return state
        with torch.no_grad():
            values = self.value(state.targets, log.observations[rows])
        level = torch.quantile(values, self.quantile).clamp(max=self.most)
        return state._replace(scales={**state.scales, LEVEL: level})


@dataclass(frozen=True)
class SafetyRegion(Region):
    """The region of states whose safety value V_h is above -margin."""

    critics: SafetyCritics
    """Description of the safety critics."""
    plan: EnsembleMLP
    """Network of A_h of chunks."""

    def value(self, networks: NetworksOf[A], observations: A) -> A:
        """Return V_h, (n,), in units of h.

        `networks` are the weights, and `observations` (n, obs) are normalised.
        """
        return self.critics.value(networks, observations)

    def worse(self, networks: NetworksOf[A], observations: A, chunks: A) -> A:
        """Return the larger A_h of the chunks, (n,) (see `Region.worse`).

        The arguments `networks`, `observations` and `chunks` are described there.
        """
        return largest(plan_advantages(self.plan, networks, observations, chunks))


def plan_advantages(plan: EnsembleMLP, networks: NetworksOf[A], observations: A, chunks: A) -> A:
    """Return how much worse chunks are than the best, A_h,i(s, a_{t:t+h}), (members, n).

    The unit is the change of h in one step.

    Args:
        plan: Description of the critic of chunks.
        networks: Weights by network.
        observations: (n, obs) normalised observations.
        chunks: (n, h * act) chunks in [-1, 1].
    """
    return plan(networks[PLAN], concat([observations, chunks]))[..., 0]


def horizon_level(cost_limit: float, steps: int, discount: float) -> float:
    """Return the level for V_c that equals a limit on an episode's violating steps (eq. 42).

    Args:
        cost_limit: Limit on the number of violating steps of an episode.
        steps: Number of steps of an episode.
        discount: Discount factor.

    >>> round(horizon_level(10.0, 200, 0.99), 3)
    4.33
    """
    return cost_limit * (1.0 - discount**steps) / ((1.0 - discount) * steps)


def proposition_1(
    lowest: float, highest: float, steps: int, discount: float, level: A | float
) -> A | float:
    r"""Return the bound of proposition 1 on the penalty, C_bar = C / (1 - g) of eq. 9 and 12.

        C = (r_max - r_min) (1 - g^T) / ((1 - g) l)

    With this penalty, a path whose discounted number of unsafe steps reaches l is worth less than
    any path of T steps that enters no unsafe state. The proof leaves out the rewards after the
    entry, and so supposes that no reward is negative (eq. 23). Where r_min is negative, the bound
    holds for the rewards r - r_min, which adds -r_min / (1 - g) to C_bar.

    Args:
        lowest: Lowest reward r_min of one step.
        highest: Highest reward r_max of one step.
        steps: Number T of steps of an episode.
        discount: Discount factor g.
        level: Level l of the region, above 0, in discounted violating steps.

    >>> proposition_1(0.0, 1.0, steps=1, discount=0.5, level=2.0)
    1.0
    """
    rest = 1.0 - discount
    most = (highest - lowest) * (1.0 - discount**steps) / rest
    return (most / level - min(lowest, 0.0)) / rest


def reached_unsafe(region: Region, state: TrainState, log: LogTensors) -> Tensor:
    """Return whether each transition of a log leads to an unsafe state, (N,) uint8.

    `region` is the test, and `state` the training state whose critics it uses.
    """
    parts = _unsafe_states(region, state, log.next_observations, log.next_constraints)
    return torch.cat([part.to(torch.uint8) for part in parts])


@torch.no_grad()
def _unsafe_states(
    region: Region, state: TrainState, observations: Tensor | ScaledRows, constraints: Tensor
) -> list[Tensor]:
    """Return whether states of the log are unsafe, in parts."""
    parts = [slice(start, start + POOL) for start in range(0, len(constraints), POOL)]
    return [region.unsafe(state, observations[part], constraints[part]) for part in parts]


def report_region(
    region: Region, state: TrainState, log: LogTensors, margin: float
) -> RegionReport:
    """Return the level of a region and the shares of the log's states that are unsafe.

    Args:
        region: Test for unsafe states.
        state: Training state, whose critics the test uses.
        log: The log.
        margin: Distance from the constraint at which a state counts as violating, in units of h.
    """
    parts = _unsafe_states(region, state, log.observations, log.constraints)
    unsafe = sum(float(part.sum()) for part in parts)
    violating = float((log.constraints > -margin).sum())
    level = state.scales.get(LEVEL)
    return RegionReport(
        -margin if level is None else float(level) + 0.0, unsafe / len(log), violating / len(log)
    )
