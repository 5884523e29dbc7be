r"""What tells an actor which states and actions are feasible: safety values, or plain cost values.

`FromSafety`, the method: V_h and Q_h, feasible where <= -margin. `FromCost`, the ablation "without
Hamilton-Jacobi" of FLRP's table 2: expected discounted costs V_c and Q_c, each minus the 75th
percentile of its own values over the logged transitions that violate nothing.

Both give numbers without units, so that temperatures mean the same on every task: values in
standard deviations (of h over the log; of the cost's return), advantages in one step's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from safeshield.data.dataset import OfflineDataset
from safeshield.spaces.scaling import Scaling
from safeshield.training.config import CriticConfig
from safeshield.training.critics import RewardLog
from safeshield.training.log import LogTensors, logged_returns, scale_of_returns
from safeshield.training.state import CriticLoss, Draw, TrainState, Update, critic_update
from safeshield.values.reward import COST_NETWORKS, RewardCritics
from safeshield.values.safety import SafetyCritics

COSTS = "costs"
LEVELS = ("cost_value_level", "cost_action_level")
"""Of V_c and Q_c, among the statistics of a training state."""
PERCENTILE = 0.75
_POOL = 65_536


class Judgement(NamedTuple):
    """Values of states and of actions in them, in standard deviations; at most 0: feasible."""

    value: Tensor
    """(batch,)"""
    action_value: Tensor
    """(batch,)"""


class Feasibility(Protocol):
    """Judges states and actions with the critics that a training state holds."""

    def judge(self, state: TrainState, observations: Tensor, actions: Tensor) -> Judgement:
        """Judge actions (batch, act) in states (batch, obs)."""

    def excess(
        self, state: TrainState, observations: Tensor, actions: Tensor, margin: float
    ) -> Tensor:
        """Return how much more dangerous than need be actions are, (batch,), in one step's worth.

        Q - max(V, -margin): at most 0 for every feasible action, and elsewhere the advantage.
        `margin` is in standard deviations.
        """


@dataclass(frozen=True)
class FromSafety:
    """V_h and Q_h."""

    critics: SafetyCritics

    def judge(self, state: TrainState, observations: Tensor, actions: Tensor) -> Judgement:
        """See `Feasibility`."""
        value = self.critics.value(state.targets, observations)
        worst = self.critics.advantages(state.targets, observations, actions).amax(0)
        scale = self.critics.scale
        return Judgement(value / scale.spread, (value + scale.step_rms * worst) / scale.spread)

    def excess(
        self, state: TrainState, observations: Tensor, actions: Tensor, margin: float
    ) -> Tensor:
        """See `Feasibility`."""
        scale = self.critics.scale
        value, worst = self.judge(state, observations, actions)
        return (worst - value.clamp(min=-margin)) * (scale.spread / scale.step_rms)


@dataclass(frozen=True)
class FromCost:
    """V_c and Q_c; `critics` learns the return of minus the cost."""

    critics: RewardCritics

    def judge(self, state: TrainState, observations: Tensor, actions: Tensor) -> Judgement:
        """See `Feasibility`."""
        value, action_value = self._costs(state, observations, actions)
        lowest, spread = [state.scales[name] for name in LEVELS], self.critics.spread
        return Judgement((value - lowest[0]) / spread, (action_value - lowest[1]) / spread)

    def excess(
        self, state: TrainState, observations: Tensor, actions: Tensor, margin: float
    ) -> Tensor:
        """See `Feasibility`."""
        value, worst = self.judge(state, observations, actions)
        return (worst - value.clamp(min=-margin)) * (self.critics.spread / state.scales["cost"])

    def _costs(
        self, state: TrainState, observations: Tensor, actions: Tensor
    ) -> tuple[Tensor, Tensor]:
        value = -self.critics.value(state.targets, observations)
        worst = -self.critics.advantages(state.targets, observations, actions).amin(0)
        return value, value + state.scales["cost"] * worst

    def level(self, state: TrainState, log: LogTensors, generator: torch.Generator) -> TrainState:
        """Read both percentiles off the log's transitions that violate nothing."""
        free = torch.nonzero((log.next_constraints <= 0) & (log.constraints <= 0)).flatten()
        picks = torch.randint(
            len(free), (min(_POOL, len(free)),), generator=generator, device=generator.device
        )
        rows = free[picks]
        with torch.no_grad():
            found = self._costs(state, log.observations[rows], log.actions[rows])
        levels = [torch.quantile(costs, PERCENTILE) for costs in found]
        return state._replace(scales={**state.scales, **dict(zip(LEVELS, levels, strict=True))})


def cost_critics(
    dataset: OfflineDataset, scaling: Scaling, hidden: tuple[int, ...], discount: float
) -> RewardCritics:
    """Describe V_c and Q_c in the units of a log: critics of the return of minus the cost."""
    paid = -(dataset.next_constraints > 0).astype(np.float64)
    scale = scale_of_returns(logged_returns(dataset, discount, paid))
    return RewardCritics(*scaling.widths, hidden, *scale, names=COST_NETWORKS)


@dataclass(eq=False)
class CostRun:
    """Learns V_c and Q_c by implicit Q-learning that leans to low cost, beside the other critics.

    A step's cost is 1 where the state that it leads to violates (h > 0), else 0.
    """

    critics: RewardCritics
    log: LogTensors
    config: CriticConfig
    total: int
    """Updates in all."""
    expectile: float = 0.9
    """Weight on the cheaper actions in V_c (the papers' choice)."""

    def __post_init__(self) -> None:
        log = self.log
        paid = replace(log, rewards=-(log.next_constraints > 0).to(log.rewards.dtype))
        self._costs = RewardLog(self.critics, paid, self.config.discount, "cost")

    def update(self, steps: int) -> Update:
        """Return one update of the cost critics, with windows of this length in the targets."""
        names, config = self.critics.names, self.config

        def losses(state: TrainState, draw: Draw) -> CriticLoss:
            return self._costs.loss(state, draw.rows, steps, self.expectile)

        return critic_update(
            COSTS,
            losses,
            names,
            names[:1],
            base=config.learning_rate,
            total=self.total,
            share=config.polyak,
        )
