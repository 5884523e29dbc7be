r"""The losses of Safe-Support Q-learning, as pure functions of (networks, batch, noise).

Stage one trains twin critics. Q' is the mean, or the lower, of their slow copies:

    y = r + g (1 - terminated) a log E_{x ~ mu(.|s')} [ exp(Q'(s', x) / a) ]
    L = sum_i mean (Q_i(s, x) - y)^2

Stage two fits an actor, which acts without mu, to pi* = mu exp(Q / a) / Z:

    reverse   KL(pi || pi*)  = E_pi [ log pi - log mu - Q / a ] + log Z      needs mu's density
    forward   KL(pi* || pi)  = -E_mu [ exp((Q - V) / a) log pi ] + const.    needs draws of mu

Source: arXiv 2604.25379, of which only the abstract is known; derived in `values.soft`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from safeshield.nn.mixture import MixtureActor, draw_each, log_density
from safeshield.nn.mlp import EnsembleMLP, Networks, Params
from safeshield.values.soft import induced_log_policy, soft_value

Twins = Literal["mean", "min"]
CRITIC, ACTOR, CLONE = "critic", "actor", "behaviour"
"""Names of the networks, in memory and in files."""
_FLOOR = 10.0
"""Nats by which an action that mu never takes counts as less likely than the least likely other."""


class Support(NamedTuple):
    """mu's proposals in n states (see `SafeProposals`), as tensors on the device."""

    observations: Tensor
    """(n, features)."""
    candidates: Tensor
    """(n, m, act) in [-1, 1]; (n, 0, act) where actions are discrete."""
    log_mu: Tensor
    """(n, c) log probabilities of all choices; (n, m) log(1/m) for a Box."""


class Transitions(NamedTuple):
    """A batch of n steps, with mu's proposals before and after each."""

    here: Support
    """mu's proposals before the step."""
    actions: Tensor
    """(n, act) executed actions in [-1, 1]; or (n,) int64, the index of the choice."""
    rewards: Tensor
    """(n,)."""
    terminated: Tensor
    """(n,) bool; False where an episode was truncated."""
    after: Support
    """mu's proposals after the step."""


@dataclass(frozen=True)
class SoftCritics:
    """The twin networks of Q, the soft action value, as pure functions of (params, inputs)."""

    inputs: int
    """Features of an observation."""
    choices: int
    """Number of discrete choices, each of which is an output; 0: the action is an input."""
    act: int
    """Entries of an action."""
    hidden: tuple[int, ...]
    """Widths of the hidden layers. () is a linear map, which is a table for one-hot states."""
    offset: float
    """Mean of the discounted returns before learning, which is added to the network's output."""
    spread: float
    """Standard deviation of these returns, which is the unit of the network's output."""
    twins: Twins = "mean"
    """How the members' values are combined into one Q."""
    members: int = 2
    """Number of networks."""

    @property
    def network(self) -> EnsembleMLP:
        """Describe the networks."""
        if self.choices:
            return EnsembleMLP(self.inputs, self.choices, self.hidden, self.members)
        return EnsembleMLP(self.inputs + self.act, 1, self.hidden, self.members)

    def values(self, params: Params, observations: Tensor, actions: Tensor) -> Tensor:
        """Return the value Q_i(s, a) that each network gives, (members, n, c), in units of return.

        Where actions are discrete, the values are those of all c choices. Otherwise they are those
        of c given actions in each state.

        Args:
            params: Weights of the networks.
            observations: (n, features) inputs of the networks, normalised.
            actions: (n, c, act) actions in [-1, 1]. They are not used where actions are discrete.
        """
        if self.choices:
            raw = self.network(params, observations)
        else:
            count, each = actions.shape[:2]
            seen = observations[:, None].expand(count, each, observations.shape[-1])
            inputs = torch.cat([seen, actions], -1).reshape(count * each, -1)
            raw = self.network(params, inputs).reshape(self.members, count, each)
        return self.offset + self.spread * raw

    def one(self, params: Params, observations: Tensor, actions: Tensor) -> Tensor:
        """Return one value Q (n, c), the mean or the lowest of the networks' `values`.

        `params`, `observations` and `actions` are those of `values`; `twins` selects mean or least.
        """
        each = self.values(params, observations, actions)
        return each.mean(0) if self.twins == "mean" else each.amin(0)

    def proposed(self, params: Params, support: Support) -> Tensor:
        """Return Q (n, c) of mu's proposals in `support`, for the weights `params`."""
        return self.one(params, support.observations, support.candidates)


def critic_loss(
    critics: SoftCritics,
    networks: Networks,
    targets: Networks,
    batch: Transitions,
    *,
    temperature: float,
    discount: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of stage one and its metrics.

    The loss is the sum over the critics of the mean squared error of Q_i, in units of the spread.

    Args:
        critics: Description of the twin networks.
        networks: Weights that are trained, by network.
        targets: Slow copies of the weights, from which the target y is computed.
        batch: Logged or collected steps.
        temperature: Temperature a of the regularisation.
        discount: Discount g of the rewards.
    """
    with torch.no_grad():
        after = critics.proposed(targets[CRITIC], batch.after)
        value = soft_value(after, temperature, batch.after.log_mu)
        y = batch.rewards + discount * torch.where(batch.terminated, 0.0, value)
    here = batch.here.observations
    if critics.choices:
        q = critics.values(networks[CRITIC], here, here)
        q = q.gather(-1, batch.actions.expand(critics.members, -1)[..., None])[..., 0]
    else:
        q = critics.values(networks[CRITIC], here, batch.actions[:, None])[..., 0]
    loss = ((q - y) / critics.spread).square().mean(1).sum()
    return loss, {
        "critic/loss": loss.detach(),
        "critic/value": value.mean(),
        "critic/disagreement": (q.detach().amax(0) - q.detach().amin(0)).mean(),
    }


def clone_loss(
    actor: MixtureActor, params: Params, support: Support
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a clone of mu and its metrics.

    The loss is minus the mean log likelihood of mu's proposals, which is the cross-entropy to mu.

    Args:
        actor: Description of the clone.
        params: Its weights.
        support: Proposals of mu in n states.
    """
    log_pi = actor.log_prob(params, support.observations, support.candidates)
    loss = -_mean(support.log_mu.exp(), log_pi).mean()
    return loss, {"clone/cross_entropy": loss.detach()}


def forward_loss(
    actor: MixtureActor, params: Params, support: Support, log_target: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the forward loss of stage two and its metrics.

    The loss is KL(pi* || pi) up to a constant, computed as the weighted likelihood of mu's
    proposals.

    Args:
        actor: Description of the actor pi.
        params: Its weights.
        support: Proposals of mu in n states.
        log_target: (n, c) log pi* of these proposals, from `log_induced`.
    """
    log_pi = actor.log_prob(params, support.observations, support.candidates)
    loss = -_mean(log_target.exp(), log_pi).mean()
    return loss, {
        "actor/forward_loss": loss.detach(),
        "actor/effective_samples": (1.0 / log_target.exp().square().sum(-1)).mean(),
    }


def reverse_loss_choices(
    actor: MixtureActor, params: Params, support: Support, log_target: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the reverse loss of stage two for discrete actions, and its metrics.

    The loss is KL(pi || pi*), summed over all choices and averaged over the states. The arguments
    `actor`, `params`, `support` and `log_target` are those of `forward_loss`.
    """
    # A softmax cannot exclude the actions that mu never takes. They count as less likely than all
    # others.
    possible = log_target > -torch.inf
    least = torch.where(possible, log_target, torch.inf).amin(-1, keepdim=True)
    log_target = torch.where(possible, log_target, least - _FLOOR)
    log_pi = actor.log_prob(params, support.observations, support.candidates)
    loss = (log_pi.exp() * (log_pi - log_target)).sum(-1).mean()
    return loss, {"actor/reverse_kl": loss.detach()}


def actor_draws(
    actor: MixtureActor, params: Params, observations: Tensor, uniform: Tensor
) -> Tensor:
    """Return draws (n, k * s, act) of a mixture of k components, s draws of each component.

    Args:
        actor: The actor of a Box of actions.
        params: The actor's weights.
        observations: (n, features).
        uniform: (n, k * s, act) uniform noise in [0, 1).
    """
    count, total, act = uniform.shape
    parts = actor.mixture(params, observations)
    levels = uniform.reshape(count, actor.components, -1, act)
    drawn = [draw_each(parts, levels[:, :, i]) for i in range(levels.shape[2])]
    return torch.stack(drawn, 2).reshape(count, total, act)


def reverse_loss_box(
    actor: MixtureActor,
    params: Params,
    scaled_q: Callable[[Tensor], Tensor],
    observations: Tensor,
    uniform: Tensor,
    log_mu: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the reverse loss of stage two in a Box, and its metrics.

    The loss is E_pi [log pi - Q / a - log mu], whose gradient is that of KL(pi || pi*).

    Q and log pi are differentiated through the draws. mu may be any function and need not be
    differentiable. Its part of the gradient is therefore the likelihood-ratio estimate, with the
    mean of other draws in the same state as the baseline. The estimate has no bias, and a constant
    of the state cancels.

    Args:
        actor: The actor of a Box of actions.
        params: The actor's weights.
        scaled_q: Function from actions (n, c, act) in these states to Q / a, (n, c).
        observations: (n, features).
        uniform: (n, k * s, act) noise of the draws, s for each of k components; s is even.
        log_mu: (n, k * s) log mu of the `actor_draws` of this noise, up to a constant of the state.
            It is minus infinity for actions that mu never takes. The Q of such a draw is not used,
            and the draw counts as less likely than all others by more than any difference of Q.
    """
    parts = actor.mixture(params, observations)
    actions = actor_draws(actor, params, observations, uniform)
    each = actions.shape[1] // actor.components
    weights = (parts.log_weights.exp() / each).repeat_interleave(each, -1)
    log_pi = log_density(parts, actions)
    scaled = scaled_q(actions)
    inside = log_mu > -torch.inf
    with torch.no_grad():
        low = torch.where(inside, scaled, torch.inf).amin(-1, keepdim=True)
        least = torch.where(inside, log_mu, torch.inf).amin(-1, keepdim=True)
        none = ~inside.any(-1, keepdim=True)
        low, least = (torch.where(none, 0.0, bound) for bound in (low, least))
        # Q was never learned outside the support. The lowest Q of the draws inside is used there.
        gain = torch.where(inside, log_mu, least - _FLOOR + low - scaled)
        fixed = weights.detach()
        halves = (fixed * gain).reshape(-1, actor.components * each // 2, 2).sum(1)
        # The baseline of each half of the draws is the mean of the other half. The factor 2 is
        # there because the weights of a half sum to 1/2.
        advantage = gain - 2.0 * halves.flip(-1).repeat(1, actor.components * each // 2)
    pathwise = (weights * (log_pi - scaled)).sum(-1)
    ratio = (fixed * advantage * log_density(parts, actions.detach())).sum(-1)
    loss = (pathwise - ratio).mean()
    return loss, {
        "actor/outside_support": torch.where(inside, 0.0, fixed).sum(-1).mean(),
        "actor/entropy": -(fixed * log_pi.detach()).sum(-1).mean(),
    }


@torch.no_grad()
def log_induced(
    critics: SoftCritics, targets: Networks, support: Support, temperature: float
) -> Tensor:
    """Return log pi* (n, c) of mu's proposals."""
    q = critics.proposed(targets[CRITIC], support)
    return induced_log_policy(q, temperature, support.log_mu)


def _mean(weights: Tensor, values: Tensor) -> Tensor:
    """Return sum_i w_i x_i over the last axis, where a weight of 0 removes even an infinite x."""
    return torch.where(weights > 0, weights * values, 0.0).sum(-1)
