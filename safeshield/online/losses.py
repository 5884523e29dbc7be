r"""Safe-Support Q-learning's losses: pure functions of (networks, batch, noise).

Stage one, the critics (twin; Q' is the mean, or the lower, of their slow copies):

    y = r + g (1 - terminated) a log E_{x ~ mu(.|s')} [ exp(Q'(s', x) / a) ]
    L = sum_i mean (Q_i(s, x) - y)^2

Stage two, an actor that stands alone, from pi* = mu exp(Q / a) / Z:

    reverse   KL(pi || pi*)  = E_pi [ log pi - log mu - Q / a ] + log Z      mu has a density
    forward   KL(pi* || pi)  = -E_mu [ exp((Q - V) / a) log pi ] + const.    draws of mu will do

Source: arXiv 2604.25379, of which we know the abstract alone; derived in `values.soft`.
"""

from __future__ import annotations

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
"""Nats by which what mu never does counts as less likely than the least likely thing it does."""


class Support(NamedTuple):
    """What mu proposes in n states (see `SafeProposals`), on the device."""

    observations: Tensor
    """(n, features)."""
    candidates: Tensor
    """(n, m, act) in [-1, 1]; (n, 0, act) where actions are discrete."""
    log_mu: Tensor
    """(n, c) of all choices, or (n, m) log(1/m)."""


class Transitions(NamedTuple):
    """A batch of steps."""

    here: Support
    actions: Tensor
    """(n, act) executed, in [-1, 1]; or (n,) int64, the place of the choice."""
    rewards: Tensor
    terminated: Tensor
    """(n,) bool; a truncated episode's is False."""
    after: Support


@dataclass(frozen=True)
class SoftCritics:
    """The twin networks of Q: pure functions of (params, inputs)."""

    inputs: int
    choices: int
    """Number of discrete choices, each an output; 0: the action is an input."""
    act: int
    hidden: tuple[int, ...]
    """() is a linear map: of one indicator for each state, a table."""
    offset: float
    """Mean of the discounted returns that learning began with: where Q starts."""
    spread: float
    """Their standard deviation: the unit of the network's output."""
    twins: Twins = "mean"
    """How the members make one Q."""
    members: int = 2

    @property
    def network(self) -> EnsembleMLP:
        """Describe the networks."""
        if self.choices:
            return EnsembleMLP(self.inputs, self.choices, self.hidden, self.members)
        return EnsembleMLP(self.inputs + self.act, 1, self.hidden, self.members)

    def values(self, params: Params, observations: Tensor, actions: Tensor) -> Tensor:
        """Return Q_i (members, n, c), units of return: of all choices, or of actions (n, c, act).

        Args:
            params: weights.
            observations: (n, features).
            actions: (n, c, act) in [-1, 1]; where actions are discrete all choices are valued.
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
        """Return Q (n, c): the mean, or the lowest, of the members' `values`."""
        each = self.values(params, observations, actions)
        return each.mean(0) if self.twins == "mean" else each.amin(0)

    def proposed(self, params: Params, support: Support) -> Tensor:
        """Return Q (n, c) of what mu proposes."""
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
    """Return the summed squared errors, in units of the spread, and what to log."""
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
    """Return minus the mean log likelihood of what mu proposes: the cross-entropy to mu."""
    log_pi = actor.log_prob(params, support.observations, support.candidates)
    loss = -_mean(support.log_mu.exp(), log_pi).mean()
    return loss, {"clone/cross_entropy": loss.detach()}


def forward_loss(
    actor: MixtureActor,
    params: Params,
    critics: SoftCritics,
    targets: Networks,
    support: Support,
    *,
    temperature: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return KL(pi* || pi) up to a constant: the weighted likelihood of what mu proposes."""
    log_target = _log_induced(critics, targets, support, temperature)
    log_pi = actor.log_prob(params, support.observations, support.candidates)
    loss = -_mean(log_target.exp(), log_pi).mean()
    return loss, {
        "actor/forward_loss": loss.detach(),
        "actor/effective_samples": (1.0 / log_target.exp().square().sum(-1)).mean(),
    }


def reverse_loss_choices(
    actor: MixtureActor,
    params: Params,
    critics: SoftCritics,
    targets: Networks,
    support: Support,
    *,
    temperature: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return KL(pi || pi*) of discrete actions, the sum over all of them."""
    log_target = _log_induced(critics, targets, support, temperature)
    # A softmax cannot exclude what mu never does; it counts as less likely than all else.
    possible = log_target > -torch.inf
    least = torch.where(possible, log_target, torch.inf).amin(-1, keepdim=True)
    log_target = torch.where(possible, log_target, least - _FLOOR)
    log_pi = actor.log_prob(params, support.observations, support.candidates)
    loss = (log_pi.exp() * (log_pi - log_target)).sum(-1).mean()
    return loss, {"actor/reverse_kl": loss.detach()}


def actor_draws(
    actor: MixtureActor, params: Params, observations: Tensor, uniform: Tensor
) -> Tensor:
    """Return draws (n, k * s, act) of a mixture of k components, s of each.

    Args:
        actor: of a Box.
        params: its weights.
        observations: (n, features).
        uniform: (n, k * s, act) in [0, 1).
    """
    count, total, act = uniform.shape
    parts = actor.mixture(params, observations)
    levels = uniform.reshape(count, actor.components, -1, act)
    drawn = [draw_each(parts, levels[:, :, i]) for i in range(levels.shape[2])]
    return torch.stack(drawn, 2).reshape(count, total, act)


def reverse_loss_box(
    actor: MixtureActor,
    params: Params,
    critics: SoftCritics,
    targets: Networks,
    observations: Tensor,
    uniform: Tensor,
    log_mu: Tensor,
    *,
    temperature: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return E_pi [log pi - Q / a - log mu], whose gradient is that of KL(pi || pi*).

    Q and log pi are differentiated through the draws. mu may be any function, which need not be
    differentiable, so its part of the gradient is that of the likelihood ratio, relative to the
    mean of other draws in the same state (no bias; a constant of the state cancels).

    Args:
        actor: of a Box.
        params: its weights.
        critics: the twin networks.
        targets: their slow copies.
        observations: (n, features).
        uniform: (n, k * s, act): where the draws come from, s of each of k components; s even.
        log_mu: (n, k * s) of `actor_draws` of these, up to a constant of the state. Minus infinity
            for what mu never does: the Q of such a draw is not used, and the draw counts as less
            likely than all others by more than any difference of Q.
        temperature: a.
    """
    parts = actor.mixture(params, observations)
    actions = actor_draws(actor, params, observations, uniform)
    each = actions.shape[1] // actor.components
    weights = (parts.log_weights.exp() / each).repeat_interleave(each, -1)
    log_pi = log_density(parts, actions)
    q = critics.one(targets[CRITIC], observations, actions)
    inside = log_mu > -torch.inf
    scaled = q / temperature
    with torch.no_grad():
        low = torch.where(inside, scaled, torch.inf).amin(-1, keepdim=True)
        least = torch.where(inside, log_mu, torch.inf).amin(-1, keepdim=True)
        none = ~inside.any(-1, keepdim=True)
        low, least = (torch.where(none, 0.0, bound) for bound in (low, least))
        # Outside, Q was never learned: the lowest Q of the draws inside takes its place.
        gain = torch.where(inside, log_mu, least - _FLOOR + low - scaled)
        fixed = weights.detach()
        halves = (fixed * gain).reshape(-1, actor.components * each // 2, 2).sum(1)
        # The baseline of each half of the draws is the other half's mean; 2, as a half weighs 1/2.
        advantage = gain - 2.0 * halves.flip(-1).repeat(1, actor.components * each // 2)
    pathwise = (weights * (log_pi - scaled)).sum(-1)
    ratio = (fixed * advantage * log_density(parts, actions.detach())).sum(-1)
    loss = (pathwise - ratio).mean()
    return loss, {
        "actor/outside_support": torch.where(inside, 0.0, fixed).sum(-1).mean(),
        "actor/entropy": -(fixed * log_pi.detach()).sum(-1).mean(),
    }


@torch.no_grad()
def _log_induced(
    critics: SoftCritics, targets: Networks, support: Support, temperature: float
) -> Tensor:
    """Return log pi* (n, c) of what mu proposes."""
    q = critics.proposed(targets[CRITIC], support)
    return induced_log_policy(q, temperature, support.log_mu)


def _mean(weights: Tensor, values: Tensor) -> Tensor:
    """Return sum_i w_i x_i over the last axis, where a weight of 0 takes out any x."""
    return torch.where(weights > 0, weights * values, 0.0).sum(-1)
