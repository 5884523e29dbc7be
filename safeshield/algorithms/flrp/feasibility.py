r"""Feasibility of states and actions, from safety values or from cost values.

`FromSafety` is the method of the paper. It uses V_h and Q_h, which are feasible where they are at
most -margin. `FromCost` is the ablation "without Hamilton-Jacobi" of FLRP's table 2. It uses the
expected discounted costs V_c and Q_c, each minus the 75th percentile of its values over the logged
transitions without a violation.

Both return numbers without units, so that the temperatures mean the same on every task. Values are
in standard deviations (of h over the log, or of the return of the cost), and advantages are in
units of one step's advantage.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from safeshield.data.dataset import OfflineDataset
from safeshield.training.config import CriticConfig
from safeshield.training.critics import RewardLog
from safeshield.training.log import LogTensors, logged_returns, scale_of_returns, some_rows
from safeshield.training.state import CriticLoss, Draw, TrainState, Update, critic_update
from safeshield.values.reward import RewardCritics
from safeshield.values.safety import SafetyCritics

COSTS = "costs"
LEVELS = ("cost_value_level", "cost_action_level")
"""Names of the percentiles of V_c and Q_c among the statistics of a training state."""
PERCENTILE = 0.75
_EXPECTILE = 0.9
"""Expectile of V_c, as in the papers: the weight on the actions of lower cost."""


class Judgement(NamedTuple):
    """Values of states and of actions in them, in standard deviations.

    A state or an action counts as feasible, that is, safe to be in or to take, where its value is
    at most minus the margin. The standard deviation is that of h, or of the cost's return.
    """

    value: Tensor
    """(batch,) values of the states."""
    action_value: Tensor
    """(batch,) values of the actions."""


class Feasibility(ABC):
    """A test of whether states and actions are feasible, by the critics of a training state."""

    @abstractmethod
    def judge(self, state: TrainState, observations: Tensor, actions: Tensor) -> Judgement:
        """Return the value of each state, and the value of one action in each state.

        Args:
            state: Training state, whose slow copies and statistics are used.
            observations: (batch, obs) normalised observations.
            actions: (batch, act) actions in [-1, 1].
        """

    @abstractmethod
    def steps(self, state: TrainState) -> float | Tensor:
        """Return one standard deviation in units of one step's advantage.

        `state` is the training state, whose statistics are used.
        """

    def excess(
        self, state: TrainState, observations: Tensor, actions: Tensor, margin: float | Tensor
    ) -> Tensor:
        """Return Q - max(V, -margin) of the actions, (batch,), in units of one step's advantage.

        It is at most 0 for every feasible action. In infeasible states it is the advantage.

        Args:
            state: Training state, whose slow copies and statistics are used.
            observations: (batch, obs) normalised observations.
            actions: (batch, act) actions in [-1, 1].
            margin: Distance from the boundary, in standard deviations.
        """
        value, worst = self.judge(state, observations, actions)
        return (worst - value.clamp(min=-margin)) * self.steps(state)


@dataclass(frozen=True)
class FromSafety(Feasibility):
    """The test of feasibility by V_h and Q_h, the safety values of a state and of an action."""

    critics: SafetyCritics
    """Description of the safety critics."""

    def judge(self, state: TrainState, observations: Tensor, actions: Tensor) -> Judgement:
        """Return V_h and Q_h in standard deviations of h (see `Feasibility.judge`).

        The arguments `state`, `observations` and `actions` are described there.
        """
        value = self.critics.value(state.targets, observations)
        worst = self.critics.advantages(state.targets, observations, actions).amax(0)
        scale = self.critics.scale
        return Judgement(value / scale.spread, (value + scale.step_rms * worst) / scale.spread)

    def steps(self, state: TrainState) -> float | Tensor:
        """Return the ratio of the two units of h; `state` is not used (see `Feasibility.steps`)."""
        return self.critics.scale.spread / self.critics.scale.step_rms


@dataclass(frozen=True)
class FromCost(Feasibility):
    """The test of feasibility by V_c and Q_c, the expected discounted costs, and their percentiles.

    `critics` learns the return of the negative cost.
    """

    critics: RewardCritics
    """Description of the critics of the cost."""

    def judge(self, state: TrainState, observations: Tensor, actions: Tensor) -> Judgement:
        """Return V_c and Q_c above their percentiles (see `Feasibility.judge`).

        The unit is the spread of the returns of the cost. The arguments `state`, `observations` and
        `actions` are described there.
        """
        value, action_value = self._costs(state, observations, actions)
        lowest, spread = [state.scales[name] for name in LEVELS], self.critics.spread
        return Judgement((value - lowest[0]) / spread, (action_value - lowest[1]) / spread)

    def steps(self, state: TrainState) -> float | Tensor:
        """Return the ratio of the two units of the cost in `state` (see `Feasibility.steps`)."""
        return self.critics.spread / state.scales["cost"]

    def _costs(
        self, state: TrainState, observations: Tensor, actions: Tensor
    ) -> tuple[Tensor, Tensor]:
        value = -self.critics.value(state.targets, observations)
        worst = -self.critics.advantages(state.targets, observations, actions).amin(0)
        return value, value + state.scales["cost"] * worst

    def level(self, log: LogTensors, state: TrainState, generator: torch.Generator) -> TrainState:
        """Return `state` with both percentiles over logged transitions without a violation.

        `log` is the log, and `generator` draws a sample of the transitions.
        """
        rows = some_rows((log.next_constraints <= 0) & (log.constraints <= 0), generator)
        with torch.no_grad():
            found = self._costs(state, log.observations[rows], log.actions[rows])
        levels = [torch.quantile(costs, PERCENTILE) for costs in found]
        return state._replace(scales={**state.scales, **dict(zip(LEVELS, levels, strict=True))})


def cost_units(dataset: OfflineDataset, discount: float) -> list[float]:
    """Return the offset and the unit of V_c, from the returns of the negative cost of a log.

    `dataset` is the log, and `discount` the discount factor of the costs.
    """
    paid = -(dataset.next_constraints > 0).astype(np.float64)
    return list(scale_of_returns(logged_returns(dataset, discount, paid)))


def cost_update(
    critics: RewardCritics, log: LogTensors, config: CriticConfig, total: int
) -> Callable[[int], Update]:
    """Return the function from the length of the targets' windows to the update of V_c and Q_c.

    They are trained by implicit Q-learning with an expectile towards low cost. The cost of a step
    is 1 where the next state violates (h > 0), and otherwise 0.

    Args:
        critics: Description of the critics of the cost.
        log: Log that is learned from.
        config: Settings of the critics.
        total: Total number of updates.
    """
    paid = replace(log, rewards=-(log.next_constraints > 0).to(log.rewards.dtype))
    costs = RewardLog(critics, paid, config.discount, _EXPECTILE, "cost")

    def update(steps: int) -> Update:
        def losses(state: TrainState, draw: Draw) -> CriticLoss:
            return costs.loss(state, draw.rows, steps)

        return critic_update(COSTS, losses, critics.names, critics.names[:1], config, total)

    return update
