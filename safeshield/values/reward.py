r"""Reward critics: implicit Q-learning (Kostrikov et al. 2022), as in SafeFQL.

    y = r + g (1 - terminated) V(s'),   Q_i regresses on y,
    V approaches the HIGHER values of min_i Q_i by an expectile (weight 0.9).

`allowed` restricts V to actions that an actor may take. Plain IQL values a state by the best
continuation in the log, even if this leads through an obstacle. An actor that must not enter the
obstacle then stays in front of it, because the values are high in the direction of the goal behind
it. Where the infeasible actions are left out of the expectile, V is the value of the best SAFE
continuation, which leads around the obstacle.

Like the safety critics, Q is learned in the form Q_i(s, a) = V(s) + sigma A_i(s, a). Where all
rewards have one sign, the choice of one action changes Q by a fraction of a percent, and an actor
needs exactly this difference. sigma is a running root mean square of y - V(s), so that the
advantages are of order one whatever the units of reward. An actor balances reward and safety on
this scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safeshield.nn.arrays import A, NetworksOf, concat
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.values.backup import RewardWindow
from safeshield.values.expectile import expectile_loss, mean_where

VALUE, ADVANTAGE = "reward_value", "reward_advantage"
COST_NETWORKS = ("cost_value", "cost_advantage")
"""Names of the same two networks where they learn the return of the negative cost."""


@dataclass(frozen=True)
class RewardBatch:
    """Transitions for the reward critics, with normalised observations and actions in [-1, 1]."""

    observations: Tensor
    """(batch, obs) observations before the steps."""
    actions: Tensor
    """(batch, act) actions."""
    next_observations: Tensor
    """(batch, obs) observations after the steps."""
    rewards: Tensor
    """(batch,) rewards of the steps."""
    terminated: Tensor
    """(batch,) bool, whether the episodes terminated after the steps."""
    window: RewardWindow
    """Coefficients of the many-step targets of V."""
    window_observations: Tensor
    """(batch, obs) observations of the states in which the windows end."""
    allowed: Tensor | None = None
    """(batch,) 1 where V is fitted to the action, else 0; None means all actions."""
    typical: Tensor | None = None
    """(batch,) 1 where the transition counts for the next sigma, else 0; None means all."""
    least: float | None = None
    """Lower bound to which the targets of A_i are clipped, in units of sigma. Among actions below
    it no difference is learned. None means no bound."""


@dataclass(frozen=True)
class RewardCritics:
    """The networks of V_r and Q_r, the expected discounted rewards, as pure functions.

    `networks` holds the weights of the two networks by name: the online weights or their slow
    copies.
    """

    observation: int
    """Number of features of an observation."""
    action: int
    """Number of features of an action."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers."""
    offset: float
    """Mean discounted return-to-go of the log, which is added to the output of V's network."""
    spread: float
    """Standard deviation of the return-to-go, which is the unit of the output of V's network."""
    members: int = 2
    """Number of members of the advantage."""
    names: tuple[str, str] = (VALUE, ADVANTAGE)
    """Names of the two networks, in memory and in files."""
    bounds: tuple[float, float] | None = None
    """Smallest and largest possible return, where they are known. Values inside targets are clipped
    to these bounds, so that errors cannot grow beyond them by bootstrapping."""

    def parts(self) -> dict[str, EnsembleMLP]:
        """Return the descriptions of the two networks by name."""
        value, advantage = self.names
        return {
            value: EnsembleMLP(self.observation, 1, self.hidden),
            advantage: EnsembleMLP(self.observation + self.action, 1, self.hidden, self.members),
        }

    def init(self, generator: torch.Generator) -> Networks:
        """Return randomly drawn weights of the two networks, by network.

        `generator` draws them, and determines their device.
        """
        return {name: part.init(generator) for name, part in self.parts().items()}

    def value(self, networks: NetworksOf[A], observations: A) -> A:
        """Return V_r(s), (batch,), as a discounted return.

        `networks` are the weights, and `observations` (batch, obs) are normalised.
        """
        name = self.names[0]
        raw = self.parts()[name](networks[name], observations)[0, :, 0]
        return self.offset + self.spread * raw

    def possible(self, networks: NetworksOf[A], observations: A) -> A:
        """Return V_r(s), (batch,), clipped to `bounds`, where they are known.

        `networks` and `observations` are those of `value`.
        """
        value = self.value(networks, observations)
        return value if self.bounds is None else value.clip(*self.bounds)

    def advantages(self, networks: NetworksOf[A], observations: A, actions: A) -> A:
        """Return how much better actions are than V_r, A_i(s, a) of each member, (members, batch).

        The unit is sigma, a running statistic of the advantages. `networks` are the weights,
        `observations` (batch, obs) are normalised, and `actions` (batch, act) lie in [-1, 1].
        """
        inputs = concat([observations, actions])
        name = self.names[1]
        return self.parts()[name](networks[name], inputs)[..., 0]

    def losses(
        self,
        networks: Networks,
        targets: Networks,
        batch: RewardBatch,
        sigma: Tensor,
        *,
        discount: float,
        expectile: float,
        one_step: bool,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the sum of the losses, the next sigma, and the metrics to log.

        Args:
            networks: Online weights, which receive the gradients.
            targets: Slow copies of the weights, which give all values inside targets.
            batch: Transitions and the coefficients of the many-step targets.
            sigma: () the unit of the advantages, in units of return.
            discount: g of the one-step backup of Q_r.
            expectile: Weight of targets above V, near 1.
            one_step: Whether V is fitted to Q_r of the slow copies instead of to the windows.

        Returns:
            The sum of the losses, the root mean square () of y - V(s), and the metrics by name.
        """
        with torch.no_grad():
            # States, next states and ends of windows in one pass: faster than three passes.
            observed = [batch.observations, batch.next_observations]
            if not one_step:
                observed.append(batch.window_observations)
            values = self.possible(targets, torch.cat(observed))
            here, after, *end = values.view(len(observed), -1).unbind()
            y = batch.rewards + discount * torch.where(batch.terminated, 0.0, after)
            if one_step:
                low = self.advantages(targets, batch.observations, batch.actions).amin(0)
                goal = here + sigma * low
            else:
                goal = batch.window.target(end[0])
            residual = y - here
            square = residual.square()
            unit = mean_where(square, batch.typical).sqrt()
            wanted = residual / sigma
            if batch.least is not None:
                wanted = wanted.clamp(min=batch.least)
        value = self.value(networks, batch.observations)
        advantage = self.advantages(networks, batch.observations, batch.actions)
        value_loss = expectile_loss((goal - value) / self.spread, expectile, batch.allowed)
        advantage_loss = (advantage - wanted).square().mean(1).sum()
        kind = self.names[0].removesuffix("_value")
        metrics = {
            f"{kind}/value_loss": value_loss.detach(),
            f"{kind}/advantage_loss": advantage_loss.detach(),
            f"{kind}/value": value.detach().mean(),
            f"{kind}/sigma": sigma,
        }
        return value_loss + advantage_loss, unit, metrics
