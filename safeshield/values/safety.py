r"""Safety critics: Hamilton-Jacobi values of a logged constraint.

    V_h(s) = min over policies of the max over time of h,      V_h <= 0: some policy stays safe
    Q_h(s, a) = the same from the NEXT state on, after taking a first;  V_h = max(h, min_a Q_h)

(FLRP eq. 7 to 9, R2PAC eq. 43, SafeFQL; the form of the papers' released codes.) All shared by
SafeFQL, FLRP and R2PAC's feasibility variant. Three networks, all fed normalised observations and
actions in [-1, 1]:

    constraint   h^(s)     regression on the labels
    excess       e(s)      V_h(s) = h^(s) + max(e(s), 0), never below the constraint
    advantage    A_i(s, a), i = 1, 2:   Q_h(s, a) = V_h(s) + sigma max_i A_i(s, a)

What differs from the papers, and why:

- Q_h is learned as V plus a scaled advantage. In a step of dt seconds an action moves Q_h by
  O(dt), V by O(1): one network for both has to see the difference behind the rest, and the ORDER of
  the actions, all that a shield lives from, drowns as dt shrinks (Tallec et al. 2019). Here sigma
  is the root mean square of h(s') - h(s) over the log, one step's worth of h, so that A is of
  order one at every time step. A_i regresses on (y - V_h(s)) / sigma with y and V_h from the same
  slowly moving copy of the networks.
- Q_h leaves h(s) out: y = (1 - g) h(s') + g max(h(s'), V(s')), where the papers' text has
  max(h(s), h(s')). Where h(s) <= 0 the sign is the same, so the same actions are safe. Outside,
  that maximum makes going back and standing still equally bad, and whoever has been pushed out
  stays there: a filter, a gate, FISOR's weights, all order actions by Q_h. (FISOR's released code
  has h(s') alone too: a log's cost of step t belongs to the state after it.) V keeps its floor.
- V starts from many-step backups along the log and may end on several steps instead of one
  (`backup_steps`). Each one-step backup goes through the network once more, which rounds off the
  ridges where going left and going right are equally bad, some dozens of times in a row; the value
  there comes out too low: "safe" in front of an obstacle. A window of n steps rounds n times less.
  It follows the log's actions inside the window, so it errs towards "unsafe"; the expectile, taken
  over the logged windows, takes most of that back. In a strongly random environment it would
  mistake luck for skill: end on one step there, the papers' form.
- h^ is a network of its own, so that a value can never be below the constraint. At the log's own
  states h is known: where it is continuous, the targets use it there in place of h^, whose errors,
  though small, are as large as what one step changes. Binary labels jump; there h^ stays, so that
  the sum V stays smooth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safeshield.nn.arrays import A, NetworksOf, concat, largest
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.values.backup import SafetyBackup, SafetyWindow
from safeshield.values.expectile import expectile_loss
from safeshield.values.units import (
    ADVANTAGE,
    CONSTRAINT,
    EXCESS,
    SafetyScale,
    action_value,
    state_value,
)

VALUE_NETWORKS = (CONSTRAINT, EXCESS)


@dataclass(frozen=True)
class SafetyCritics:
    """The networks of V_h and Q_h: pure functions of (networks, inputs).

    `networks` is anything that holds the three names: the online weights, or their slow copies.
    """

    observation: int
    action: int
    hidden: tuple[int, ...]
    scale: SafetyScale
    continuous: bool = True
    """Whether the labels are samples of a continuous function of the state."""
    discount: float = 0.99
    """g of the safety backup."""
    members: int = 2

    def parts(self) -> dict[str, EnsembleMLP]:
        """Describe the three networks."""
        return {
            CONSTRAINT: EnsembleMLP(self.observation, 1, self.hidden),
            EXCESS: EnsembleMLP(self.observation, 1, self.hidden),
            ADVANTAGE: EnsembleMLP(self.observation + self.action, 1, self.hidden, self.members),
        }

    def init(self, generator: torch.Generator) -> Networks:
        """Draw all weights."""
        return {name: part.init(generator) for name, part in self.parts().items()}

    def constraint(self, networks: NetworksOf[A], observations: A) -> A:
        """Return h^(s), (batch,), in units of h."""
        raw = self.parts()[CONSTRAINT](networks[CONSTRAINT], observations)[0, :, 0]
        return self.scale.offset + self.scale.spread * raw

    def excess(self, networks: NetworksOf[A], observations: A) -> A:
        """Return e(s), (batch,), in units of h."""
        raw = self.parts()[EXCESS](networks[EXCESS], observations)[0, :, 0]
        return self.scale.excess * raw

    def value(self, networks: NetworksOf[A], observations: A) -> A:
        """Return V_h(s), (batch,), in units of h; at most 0 where some policy stays safe."""
        constraint, excess = (
            self.parts()[name](networks[name], observations)[0, :, 0] for name in VALUE_NETWORKS
        )
        return state_value(self.scale, constraint, excess)

    def advantages(self, networks: NetworksOf[A], observations: A, actions: A) -> A:
        """Return A_i(s, a), (members, batch), in steps' worth of h (sigma)."""
        inputs = concat([observations, actions])
        return self.parts()[ADVANTAGE](networks[ADVANTAGE], inputs)[..., 0]

    def action_value(self, networks: NetworksOf[A], observations: A, actions: A) -> A:
        """Return Q_h(s, a), (batch,), in units of h, of states s' on: the larger of the two."""
        worst = largest(self.advantages(networks, observations, actions))
        return action_value(self.scale, self.value(networks, observations), worst)

    def log_value(self, networks: Networks, observations: Tensor, constraints: Tensor) -> Tensor:
        """Return V_h at states of the log, where h is known."""
        if self.continuous:
            return constraints + self.excess(networks, observations).relu()
        return torch.maximum(self.value(networks, observations), constraints)

    def losses(
        self,
        networks: Networks,
        targets: Networks,
        batch: SafetyBatch,
        *,
        expectile: float,
        one_step: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the three networks' losses, and what to log.

        Args:
            networks: online weights; gradients flow into these.
            targets: their slow copies: all values inside targets come from here.
            batch: transitions and the many-step targets' coefficients.
            expectile: weight on targets below V (FLRP eq. 8), near 1.
            one_step: fit V to Q_h of the slow copies (FLRP eq. 8) instead of to the windows.
        """
        with torch.no_grad():
            here = self.log_value(targets, batch.observations, batch.constraints)
            after = self.log_value(targets, batch.next_observations, batch.next_constraints)
            step = SafetyBackup.one_step(batch.next_constraints, batch.terminated, self.discount)
            if one_step:
                worst = self.advantages(targets, batch.observations, batch.actions).amax(0)
                goal = torch.maximum(here + self.scale.step_rms * worst, batch.constraints)
                if batch.extra is not None:
                    goal = torch.maximum(goal, batch.extra)
            else:
                end = self.log_value(targets, batch.window_observations, batch.window_constraints)
                goal = batch.window.target(end)
            residual = (step.target(after) - here) / self.scale.step_rms
        # Both ends of each step, because terminal states occur only as s'.
        constraint = self.constraint(
            networks, torch.cat([batch.observations, batch.next_observations])
        )
        labels = torch.cat([batch.constraints, batch.next_constraints])
        base = batch.constraints if self.continuous else constraint[: len(goal)].detach()
        # Without the floor, which would cut the gradient where the value is not above h.
        value = base + self.excess(networks, batch.observations)
        advantage = self.advantages(networks, batch.observations, batch.actions)
        constraint_loss = ((constraint - labels) / self.scale.spread).square().mean()
        value_loss = expectile_loss((value - goal) / self.scale.step_rms, expectile)
        advantage_loss = (advantage - residual).square().mean(1).sum()
        metrics = {
            "safety/constraint_loss": constraint_loss.detach(),
            "safety/value_loss": value_loss.detach(),
            "safety/advantage_loss": advantage_loss.detach(),
            "safety/value": value.detach().mean(),
            "safety/unsafe_share": (here > 0).float().mean(),
        }
        return constraint_loss + value_loss + advantage_loss, metrics


@dataclass(frozen=True)
class SafetyBatch:
    """Transitions for the safety critics; observations normalised, actions in [-1, 1]."""

    observations: Tensor
    actions: Tensor
    next_observations: Tensor
    constraints: Tensor
    next_constraints: Tensor
    terminated: Tensor
    window: SafetyWindow
    """The many-step targets of V."""
    window_observations: Tensor
    """(batch, obs) of the states in which the windows end."""
    window_constraints: Tensor
    extra: Tensor | None = None
    """One more constraint, of the transition itself, in units of h: part of the windows, and of
    what V is fitted to. Q_h is fitted without its own action's: whoever uses it can judge that
    action exactly, and a jump would drown the order of the actions in the regression."""
