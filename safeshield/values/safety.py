r"""Safety critics: Hamilton-Jacobi values of a logged constraint.

    V_h(s) = min over policies of the max over time of h,      V_h <= 0: some policy stays safe
    Q_h(s, a) = the same from the NEXT state on, after taking a first;  V_h = max(h, min_a Q_h)

(FLRP eq. 7 to 9, R2PAC eq. 43, SafeFQL; the form of the papers' released codes.) SafeFQL, FLRP and
R2PAC's feasibility variant share these critics. There are three networks, whose inputs are
normalised observations and actions in [-1, 1]:

    constraint   h^(s)     regression on the labels
    excess       e(s)      V_h(s) = h^(s) + max(e(s), 0), never below the constraint
    advantage    A_i(s, a), i = 1, 2:   Q_h(s, a) = V_h(s) + sigma max_i A_i(s, a)

The differences from the papers, with their reasons:

- Q_h is learned as V plus a scaled advantage. In a step of dt seconds the action changes Q_h by
  O(dt), while V itself is O(1). A single network for both has to resolve a small difference within
  a large value, and as dt shrinks it loses the ORDER of the actions, on which a shield depends
  (Tallec et al. 2019). Here sigma is the root mean square of h(s') - h(s) over the log, that is the
  typical change of h in one step, so that A is of order one for every dt. A_i regresses on
  (y - V_h(s)) / sigma, where y and V_h come from the same slowly moving copy of the networks.
- Q_h leaves h(s) out: y = (1 - g) h(s') + g max(h(s'), V(s')), where the papers' text has
  max(h(s), h(s')). Where h(s) <= 0 the sign is the same, so the same actions are safe. Where
  h(s) > 0, the papers' maximum makes returning and standing still equally bad. A policy that has
  been pushed into the unsafe region would then stay there, because filters, gates and FISOR's
  weights all order actions by Q_h. (FISOR's released code also has h(s') alone, because a log's
  cost of step t belongs to the state after it.) V keeps h(s) as its lower bound.
- V is trained first on many-step backups along the log, and may be trained on several steps
  instead of one to the end (`backup_steps`). Each one-step backup passes through the network once
  more. It thereby smooths the ridges where going left and going right are equally bad, dozens of
  times in succession, and the value there becomes too low: the network calls states in front of an
  obstacle safe. A window of n steps is smoothed n times less often. It follows the log's actions
  inside the window and therefore errs towards "unsafe". The expectile, which is taken over the
  logged windows, removes most of this error. In a strongly random environment the expectile over
  windows would mistake luck for skill, so training should end on one step there, as in the papers.
- h^ is a network of its own, so that a value can never be below the constraint. At the states of
  the log h is known. Where h is continuous, the targets use it there in place of h^, because the
  errors of h^, though small, are as large as the change of h in one step. Binary labels jump.
  For these the targets use h^, so that the sum V stays smooth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
    """The networks of V_h and Q_h, as pure functions of (networks, inputs).

    `networks` holds the weights of the three networks by name: the online weights or their slow
    copies.
    """

    observation: int
    """Number of features of an observation."""
    action: int
    """Number of features of an action."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers."""
    scale: SafetyScale
    """Units of h."""
    continuous: bool = True
    """Whether the labels are samples of a continuous function of the state."""
    discount: float = 0.99
    """g of the safety backup."""
    members: int = 2
    """Number of members of the advantage."""
    margin: float | None = None
    """Margin that was measured on the log, in units of h (`calibration.margin`); None where it was
    not measured."""

    def parts(self) -> dict[str, EnsembleMLP]:
        """Return the descriptions of the three networks by name."""
        return {
            CONSTRAINT: EnsembleMLP(self.observation, 1, self.hidden),
            EXCESS: EnsembleMLP(self.observation, 1, self.hidden),
            ADVANTAGE: EnsembleMLP(self.observation + self.action, 1, self.hidden, self.members),
        }

    def init(self, generator: torch.Generator) -> Networks:
        """Return randomly drawn weights of the three networks, by network.

        `generator` draws them, and determines their device.
        """
        return {name: part.init(generator) for name, part in self.parts().items()}

    def constraint(self, networks: NetworksOf[A], observations: A) -> A:
        """Return h^(s), the estimate of the constraint, (batch,), in units of h.

        `networks` are the weights, and `observations` (batch, obs) are normalised.
        """
        return self.scale.offset + self.scale.spread * self._raw(CONSTRAINT, networks, observations)

    def excess(self, networks: NetworksOf[A], observations: A) -> A:
        """Return e(s), whose positive part is V_h(s) - h(s), (batch,), in units of h.

        `networks` are the weights, and `observations` (batch, obs) are normalised.
        """
        return self.scale.excess * self._raw(EXCESS, networks, observations)

    def value(self, networks: NetworksOf[A], observations: A) -> A:
        """Return V_h(s), (batch,), in units of h, at most 0 where some policy stays safe.

        `networks` are the weights, and `observations` (batch, obs) are normalised.
        """
        raw = [self._raw(name, networks, observations) for name in VALUE_NETWORKS]
        return state_value(self.scale, *raw)

    def _raw(self, name: str, networks: NetworksOf[A], observations: A) -> A:
        out: A = self.parts()[name](networks[name], observations)[0, :, 0]
        return out

    def advantages(self, networks: NetworksOf[A], observations: A, actions: A) -> A:
        """Return the safety advantages A_i(s, a) of actions, (members, batch).

        A_i estimates (Q_h(s, a) - V_h(s)) / sigma, where sigma is the typical change of h in one
        step. A larger advantage means a more dangerous action. `networks` are the weights,
        `observations` (batch, obs) are normalised, and `actions` (batch, act) lie in [-1, 1].
        """
        inputs = concat([observations, actions])
        return self.parts()[ADVANTAGE](networks[ADVANTAGE], inputs)[..., 0]

    def action_value(self, networks: NetworksOf[A], observations: A, actions: A) -> A:
        """Return Q_h(s, a), (batch,), from the next state on, in units of h.

        The result uses the largest of the advantages A_i. The arguments `networks`, `observations`
        and `actions` are those of `advantages`.
        """
        worst = largest(self.advantages(networks, observations, actions))
        return action_value(self.scale, self.value(networks, observations), worst)

    def log_value(self, networks: Networks, observations: Tensor, constraints: Tensor) -> Tensor:
        """Return V_h (batch,) at states of the log, where h is known, in units of h.

        `networks` are the weights, `observations` (batch, obs) are normalised, and `constraints`
        (batch,) are the labels h of the states.
        """
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
        """Return the sum of the three networks' losses, and the metrics to log.

        Args:
            networks: Online weights, which receive the gradients.
            targets: Slow copies of the weights, which give all values inside targets.
            batch: Transitions and the coefficients of the many-step targets.
            expectile: Weight of targets below V (FLRP eq. 8), near 1.
            one_step: Whether V is fitted to Q_h of the slow copies (FLRP eq. 8) instead of to the
                windows.

        With the actions mu(s) of a backup controller (`SafetyBatch.escape`), V is the value of
        this controller, V_mu(s) = max(h(s), Q_mu(s, mu(s))): it is fitted to the window where the
        log follows the controller, which is a window of mu itself, and to max(h(s), Q_h(s, mu(s)))
        elsewhere. There is no minimum over actions, so the targets differ only by the noise of the
        dynamics and by the errors of the networks. An expectile of 0.5 gives their mean, and one
        below 0.5 leans to the higher values, which is cautious.
        """
        with torch.no_grad():
            # States, next states and ends of windows in one pass: faster than three passes.
            observed = [batch.observations, batch.next_observations]
            labelled = [batch.constraints, batch.next_constraints]
            if not one_step:
                observed.append(batch.window_observations)
                labelled.append(batch.window_constraints)
            values = self.log_value(targets, torch.cat(observed), torch.cat(labelled))
            here, after, *end = values.view(len(observed), -1).unbind()
            step = SafetyBackup.one_step(batch.next_constraints, batch.terminated, self.discount)
            if one_step or batch.escape is not None:
                played = batch.actions if batch.escape is None else batch.escape.actions
                worst = self.advantages(targets, batch.observations, played).amax(0)
                goal = torch.maximum(here + self.scale.step_rms * worst, batch.constraints)
                if batch.extra is not None:
                    goal = torch.maximum(goal, batch.extra)
            if not one_step:
                along = batch.window.target(end[0])
                logged = batch.escape and batch.escape.logged
                goal = along if logged is None else torch.where(logged, along, goal)
            residual = (step.target(after) - here) / self.scale.step_rms
        # h^ is fitted at both ends of each step, because terminal states occur only as s'.
        constraint = self.constraint(
            networks, torch.cat([batch.observations, batch.next_observations])
        )
        labels = torch.cat([batch.constraints, batch.next_constraints])
        base = batch.constraints if self.continuous else constraint[: len(goal)].detach()
        # The excess is not bounded below by 0 here, since that would stop its gradient where V = h.
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


class EscapeBatch(NamedTuple):
    """What a backup controller mu does in states of the log (`training.escape`)."""

    actions: Tensor
    """(batch, act) mu(s), in [-1, 1]."""
    logged: Tensor
    """(batch,) bool, whether the logged action is mu(s). The window then follows the log as long as
    its actions are those of mu."""


@dataclass(frozen=True)
class SafetyBatch:
    """Transitions for the safety critics, with normalised observations and actions in [-1, 1]."""

    observations: Tensor
    """(batch, obs) observations before the steps."""
    actions: Tensor
    """(batch, act) actions."""
    next_observations: Tensor
    """(batch, obs) observations after the steps."""
    constraints: Tensor
    """(batch,) h of the states before the steps."""
    next_constraints: Tensor
    """(batch,) h of the states after the steps."""
    terminated: Tensor
    """(batch,) bool, whether the episodes terminated after the steps."""
    window: SafetyWindow
    """Coefficients of the many-step targets of V."""
    window_observations: Tensor
    """(batch, obs) observations of the states in which the windows end."""
    window_constraints: Tensor
    """(batch,) h of the states in which the windows end."""
    extra: Tensor | None = None
    """(batch,) a further constraint of the transition itself, in units of h. It is part of the
    windows and of the targets of V. The target of Q_h leaves out the extra constraint of its own
    action. A caller can evaluate that constraint exactly, and its jumps would hide the order of
    the actions in the regression."""
    escape: EscapeBatch | None = None
    """What a backup controller does in the states before the steps; None where V is the value of
    the log's best actions."""
