r"""Reward critics: implicit Q-learning (Kostrikov et al. 2022), as in SafeFQL.

    y = r + g (1 - terminated) V(s'),   Q_i regresses on y,
    V leans to the HIGHER values of min_i Q_i by an expectile (weight 0.9).

`allowed` keeps V to actions that an actor may take. Plain IQL values a state by the log's best way
on, through an obstacle if need be; an actor that must not enter then presses against it from
outside, held there by a value that promises the goal behind. With the infeasible actions left out
of the expectile, V is the value of the best SAFE way on, and leads around.

Learned, as the safety critics are, as Q_i(s, a) = V(s) + sigma A_i(s, a): where all rewards have
one sign, what one action adds is a fraction of a percent of Q, and that fraction is all an actor
needs. sigma is a running root mean square of y - V(s), so the advantages are of order one whatever
the units of reward: that is the scale by which an actor balances reward and safety.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safeshield.nn.arrays import A, NetworksOf, concat
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.values.backup import RewardWindow
from safeshield.values.expectile import expectile_loss

VALUE, ADVANTAGE = "reward_value", "reward_advantage"
COST_NETWORKS = ("cost_value", "cost_advantage")
"""Names of the same two networks where they learn the return of minus the cost."""


@dataclass(frozen=True)
class RewardBatch:
    """Transitions for the reward critics; observations normalised, actions in [-1, 1]."""

    observations: Tensor
    actions: Tensor
    next_observations: Tensor
    rewards: Tensor
    terminated: Tensor
    window: RewardWindow
    """The many-step targets of V."""
    window_observations: Tensor
    """(batch, obs) of the states in which the windows end."""


@dataclass(frozen=True)
class RewardCritics:
    """The networks of V_r and Q_r: pure functions of (networks, inputs)."""

    observation: int
    action: int
    hidden: tuple[int, ...]
    offset: float
    """Mean discounted return-to-go of the log: where V starts."""
    spread: float
    """Its standard deviation: the unit of V's network."""
    members: int = 2
    names: tuple[str, str] = (VALUE, ADVANTAGE)
    """Of the two networks, in memory and in files."""
    bounds: tuple[float, float] | None = None
    """What a return can be at least and at most, where that is known: values inside targets are cut
    to it, so that no error can feed itself beyond."""

    def parts(self) -> dict[str, EnsembleMLP]:
        """Describe the two networks."""
        value, advantage = self.names
        return {
            value: EnsembleMLP(self.observation, 1, self.hidden),
            advantage: EnsembleMLP(self.observation + self.action, 1, self.hidden, self.members),
        }

    def init(self, generator: torch.Generator) -> Networks:
        """Draw all weights."""
        return {name: part.init(generator) for name, part in self.parts().items()}

    def value(self, networks: NetworksOf[A], observations: A) -> A:
        """Return V_r(s), (batch,), discounted return."""
        name = self.names[0]
        raw = self.parts()[name](networks[name], observations)[0, :, 0]
        return self.offset + self.spread * raw

    def possible(self, networks: NetworksOf[A], observations: A) -> A:
        """Return `value`, cut to what a return can be."""
        value = self.value(networks, observations)
        return value if self.bounds is None else value.clip(*self.bounds)

    def advantages(self, networks: NetworksOf[A], observations: A, actions: A) -> A:
        """Return A_i(s, a), (members, batch), in units of sigma."""
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
        allowed: Tensor | None = None,
        typical: Tensor | None = None,
        least: float | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the summed losses, the root mean square of y - V(s) as sigma, and what to log.

        Args:
            networks: online weights; gradients flow into these.
            targets: their slow copies: all values inside targets come from here.
            batch: transitions and the many-step targets' coefficients.
            sigma: () the unit of the advantages.
            discount: g of the one-step backup of Q_r.
            expectile: weight on targets above V, near 1.
            one_step: fit V to Q_r of the slow copies instead of to the windows.
            allowed: (batch,) 1 where the action may count for V, 0 where not; all by default.
            typical: (batch,) 1 where the transition counts for the next sigma; all by default.
            least: what a target of A_i is cut to from below, in units of sigma: how much worse than
                that an action is, is not learned. None: nothing is cut.
        """
        with torch.no_grad():
            here = self.possible(targets, batch.observations)
            after = self.possible(targets, batch.next_observations)
            y = batch.rewards + discount * torch.where(batch.terminated, 0.0, after)
            if one_step:
                low = self.advantages(targets, batch.observations, batch.actions).amin(0)
                goal = here + sigma * low
            else:
                end = self.possible(targets, batch.window_observations)
                goal = batch.window.target(end)
            residual = y - here
            square = residual.square()
            if typical is None:
                unit = square.mean().sqrt()
            else:
                unit = ((square * typical).sum() / typical.sum().clamp(min=1.0)).sqrt()
            wanted = residual / sigma
            if least is not None:
                wanted = wanted.clamp(min=least)
        value = self.value(networks, batch.observations)
        advantage = self.advantages(networks, batch.observations, batch.actions)
        value_loss = expectile_loss((goal - value) / self.spread, expectile, allowed)
        advantage_loss = (advantage - wanted).square().mean(1).sum()
        kind = self.names[0].removesuffix("_value")
        metrics = {
            f"{kind}/value_loss": value_loss.detach(),
            f"{kind}/advantage_loss": advantage_loss.detach(),
            f"{kind}/value": value.detach().mean(),
            f"{kind}/sigma": sigma,
        }
        return value_loss + advantage_loss, unit, metrics
