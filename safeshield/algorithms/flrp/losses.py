r"""Losses and training of FLRP's generative model and experts.

The loss of the generative model (eq. 11 to 13) is, with z ~ q(z | s, a) and means over the batch,

    w_e (-log pi(a | s, z) + kl_weight (log q(z | s, a) - log p(z | s)))
    + shape_weight w_s ||u||^2 / latent,                       f(u; s) = z
    + entropy_weight max(entropy_floor latent + log q(z | s, a), 0)

    w_e = sigmoid(-Q_h / T_q) sigmoid(-V_h / T_v)
    w_s = min(exp(b_r A_r), 100) 1{Q_h <= -margin}

The loss of the experts (eq. 14 to 17) is, with u_0 ~ N(0, I), a the decoded action of u_T and a'
the logged action,

    reward_weight w_s ||a - a'||  +  safety_weight w_h softplus(E_h(s, a))
    + shared_weight (||u_T||^2 + ||u_T - u_0||^2)

    E_h = (Q_h - max(V_h, -margin)) / sigma_h,    w_h = min(exp(b_h E_h), 150), without a gradient

A_r = min_i (Q_r,i - V_r) / sigma_r and E_h are in units of one step's advantage. The weights w_e,
w_s and w_h are divided by their means over the batch. The paper's E_h is the advantage Q_h - V_h.
Because V_h is the value of the best action, that advantage is positive for nearly every action even
far from danger, and the safety expert would act on it everywhere. The E_h used here equals the
advantage in infeasible states. In feasible states it is positive for infeasible actions only, so
that the reward expert decides among the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safeshield.algorithms.flrp.config import FLRPConfig
from safeshield.algorithms.flrp.feasibility import (
    COSTS,
    LEVELS,
    Feasibility,
    FromCost,
    FromSafety,
    cost_update,
)
from safeshield.algorithms.flrp.shift import ShiftSummary, base_shift
from safeshield.nn.latent_actor import LatentPolicy
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.training.architecture import CRITICS
from safeshield.training.config import CriticConfig
from safeshield.training.critics import CriticArchitecture, CriticsRun
from safeshield.training.imitation import REWARD_LIMIT, SAFETY_LIMIT
from safeshield.training.run import Run
from safeshield.training.schedule import phase_steps
from safeshield.training.state import (
    Draw,
    Loss,
    Metrics,
    Network,
    Phase,
    TrainState,
    Update,
    together,
)
from safeshield.values.reward import RewardCritics

_REPORTED = 32
"""Number of states, and of samples in each, for which the divergence is logged."""
GENERATIVE, REFINERS = "generative", "refiners"


@dataclass(frozen=True)
class LatentArchitecture(CriticArchitecture):
    """Critics and the latent policy, with measurements of the trained policy."""

    policy: LatentPolicy
    costs: RewardCritics | None = None
    """Cost critics, where they replace the safety values as the test of feasibility."""
    shift: ShiftSummary | None = None
    """Change of the policy by the trained experts over the log's states; None before training."""
    trained_steps: int | None = None
    """Number T of refinement steps in training; None where an older file lacks it."""

    def _cost_parts(self) -> Mapping[str, EnsembleMLP]:
        return {} if self.costs is None else self.costs.parts()

    def parts(self) -> Mapping[str, Network]:
        """Return all networks by name: critics, critics of the cost, and the policy's networks.

        See `Architecture`.
        """
        return {**self.critic_parts(), **self._cost_parts(), **self.policy.parts()}

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the networks trained together (see `Architecture`)."""
        groups = {
            CRITICS: tuple(self.critic_parts()),
            COSTS: tuple(self._cost_parts()),
            GENERATIVE: tuple(self.policy.generative),
            REFINERS: tuple(self.policy.refining),
        }
        return {name: group for name, group in groups.items() if group}

    def slow(self) -> tuple[str, ...]:
        """Return the names of the critics, which have slow copies (see `Architecture`)."""
        return (*super().slow(), *self._cost_parts())

    def scales(self) -> dict[str, float]:
        """Return the initial values of the running statistics by name (see `Architecture`)."""
        costs = self.costs
        more = {} if costs is None else {"cost": costs.spread, **dict.fromkeys(LEVELS, 0.0)}
        return {**super().scales(), **more}

    def header(self) -> dict[str, Any]:
        """Return what a file stores about critics, costs and shift, as JSON (`Architecture`)."""
        costs, shift = self.costs, self.shift
        return {
            **super().header(),
            "cost_scale": None if costs is None else [costs.offset, costs.spread],
            "shift": None if shift is None else shift.to_json(),
            "trained_refine_steps": self.trained_steps,
        }


def generative_loss(
    policy: LatentPolicy,
    config: FLRPConfig,
    networks: Networks,
    observations: Tensor,
    actions: Tensor,
    noise: Tensor,
    elbo_weights: Tensor,
    shape_weights: Tensor,
) -> tuple[Tensor, Metrics]:
    """Return the loss of the generative model, eq. 13, and what to log.

    Args:
        policy: Description of the model.
        config: Weights of the terms; the module docstring has the formula.
        networks: Weights, including those of prior, posterior and decoder.
        observations: (batch, obs) normalised.
        actions: (batch, act) logged, in [-1, 1].
        noise: (batch, latent) standard normal.
        elbo_weights: (batch,) w_e, of mean 1.
        shape_weights: (batch,) w_s, of mean 1 (or all 0).
    """
    latent, log_q = policy.encode(networks, observations, actions, noise)
    base, log_p = policy.to_base(networks, observations, latent)
    fit = policy.log_likelihood(actions, policy.decode(networks, observations, latent))
    divergence = log_q - log_p
    energy = base.square().mean(-1)
    floor = config.entropy_floor * policy.spec.latent
    missing = (floor + log_q.mean()).relu()
    elbo = (elbo_weights * (config.kl_weight * divergence - fit)).mean()
    shape = (shape_weights * energy).mean()
    loss = elbo + config.shape_weight * shape + config.entropy_weight * missing
    return loss, {
        "flow/negative_elbo": elbo.detach(),
        "flow/log_likelihood": fit.detach().mean(),
        "flow/divergence": divergence.detach().mean(),
        "flow/posterior_entropy": -log_q.detach().mean(),
        "flow/base_energy": energy.detach().mean(),
    }


def refiner_loss(
    policy: LatentPolicy,
    config: FLRPConfig,
    feasibility: Feasibility,
    margin: float | Tensor,
    networks: Networks,
    state: TrainState,
    observations: Tensor,
    actions: Tensor,
    noise: Tensor,
    reward_weights: Tensor,
) -> tuple[Tensor, Metrics]:
    """Return the loss of the experts, eq. 17, and what to log.

    Args:
        policy: Description of the experts and the generative model.
        config: Weights of the terms; the module docstring has the formula.
        feasibility: Evaluation of the refined actions.
        margin: Distance from the boundary at which an action counts as unsafe, in standard
            deviations.
        networks: Weights of the experts, which get the gradient, and of the frozen networks.
        state: Training state with the critics.
        observations: (batch, obs) normalised.
        actions: (batch, act) logged, in [-1, 1].
        noise: (batch, latent) u_0, standard normal.
        reward_weights: (batch,) w_s, of mean 1 (or all 0).
    """
    refined = policy.refine(networks, observations, noise)
    latent = policy.to_latent(networks, observations, refined)
    action = policy.decode(networks, observations, latent)
    danger = feasibility.excess(state, observations, action, margin)
    pressing = _of_mean_one(
        (config.safety_temperature * danger.detach()).exp().clamp(max=SAFETY_LIMIT)
    )
    safety = (pressing * torch.nn.functional.softplus(danger)).mean()
    # The norm is not differentiable at 0. With the small constant its gradient there is 0.
    distance = ((action - actions).square().sum(-1) + 1e-12).sqrt()
    reward = (reward_weights * distance).mean()
    energy, way = refined.square().sum(-1), (refined - noise).square().sum(-1)
    shared = (energy + way).mean()
    loss = (
        config.reward_weight * reward
        + config.safety_weight * safety
        + config.shared_weight * shared
    )
    return loss, {
        "refiner/distance_to_good_actions": reward.detach(),
        "refiner/danger_steps": danger.detach().mean(),
        "refiner/base_energy": 0.5 * energy.detach().mean(),
        "refiner/way": way.detach().mean(),
    }


def _of_mean_one(weights: Tensor) -> Tensor:
    return weights / weights.mean().clamp(min=1e-6)


@dataclass(eq=False)
class FLRPRun(Run[LatentArchitecture, FLRPConfig]):
    """FLRP's training in three phases: the critics, the generative model, then the experts."""

    def __post_init__(self) -> None:
        config, model = self.config, self.model
        shares: tuple[float, ...] = config.phase_shares
        if not config.refine_steps:
            shares = shares[:2]  # The generative model gets the updates of the experts.
        critics, self._flow_steps, *rest = phase_steps(self.steps, shares)
        self._refiner_steps = sum(rest)
        if config.phases == "joint":
            critics = self._flow_steps = self.steps
            self._refiner_steps = self.steps if config.refine_steps else 0
        self._feasibility: Feasibility = FromSafety(model.critics.safety)
        critic_config: CriticConfig = config
        if model.costs is not None:
            # In this ablation the policy must not depend on the safety values.
            critic_config = replace(config, safe_reward_value=False)
            self._feasibility = FromCost(model.costs)
        self._critics = CriticsRun(model.critics, self.log, critic_config, critics)

    def initial(self, generator: torch.Generator) -> TrainState:
        """Return the state before the first update."""
        state = super().initial(generator)
        return state if self.model.costs is not None else self._critics.prepared(state)

    def _margin(self, state: TrainState) -> float | Tensor:
        """Return the margin of the policy's losses, in standard deviations of h."""
        if self.model.costs is not None:
            return 0.0  # The percentiles of the costs are used without a margin.
        return self._critics.gate(state) / self.model.critics.safety.scale.spread

    def phases(self) -> list[Phase]:
        """Return the phases of training in order: critics, generative model, experts."""
        size, policy, flow_steps = self.config.batch_size, self.model.policy, self._flow_steps
        fit = self.falling(GENERATIVE, self._generative, flow_steps, tuple(policy.generative))
        generative = Phase(GENERATIVE, flow_steps, fit, size)
        refiners = []
        if self._refiner_steps:
            names, report = tuple(policy.refining), self._report_shift
            refine = self.falling(REFINERS, self._refine, self._refiner_steps, names)
            refiners = [Phase(REFINERS, self._refiner_steps, refine, size, report=report)]
        judge, costs = self._feasibility, None
        if isinstance(judge, FromCost):
            costs = cost_update(judge.critics, self.log, self.config, self._critics.total)
        if self.config.phases == "joint":
            return self._joint(costs, [generative, *refiners])
        if isinstance(judge, FromCost):
            # The critics do not change from here on, so the percentiles are computed only once.
            level = partial(judge.level, self.log)
            generative = replace(generative, refresh=level, refresh_every=flow_steps)
        else:
            measure = self._critics.measure
            generative = replace(generative, refresh=measure, refresh_every=flow_steps)
        return [*self._critics.phases(beside=costs), generative, *refiners]

    def _joint(self, costs: Callable[[int], Update] | None, others: list[Phase]) -> list[Phase]:
        """Return the critics' phases, whose updates contain those of `others` (algorithm 1).

        `costs` is the update of the cost critics for a length of the reward windows, if any.
        """
        judge, last = self._feasibility, others[-1]

        def beside(reward_steps: int) -> Update:
            more = [] if costs is None else [costs(reward_steps)]
            return together(*more, *(phase.update for phase in others))

        def refresh(state: TrainState, generator: torch.Generator) -> TrainState:
            state = self._critics.safety.refresh(state, generator)
            return judge.level(self.log, state, generator) if isinstance(judge, FromCost) else state

        phases = self._critics.phases("joint", beside)
        return [replace(phase, refresh=refresh, report=last.report) for phase in phases]

    def _good(self, state: TrainState, observations: Tensor, actions: Tensor, q: Tensor) -> Tensor:
        """Return the weights w_s (batch,) of actions whose Q_h is q (batch,)."""
        gain = self.model.critics.reward.advantages(state.targets, observations, actions).amin(0)
        raised = (self.config.reward_temperature * gain).exp().clamp(max=REWARD_LIMIT)
        return _of_mean_one(raised * (q <= -self._margin(state)))

    def _generative(self, state: TrainState, draw: Draw) -> Loss:
        config, policy = self.config, self.model.policy
        observations, actions = self.log.observations[draw.rows], self.log.actions[draw.rows]
        with torch.no_grad():
            value, q = self._feasibility.judge(state, observations, actions)
            safe = torch.sigmoid(-q / config.action_temperature)
            elbo = _of_mean_one(safe * torch.sigmoid(-value / config.state_temperature))
            shape = self._good(state, observations, actions, q)
        return lambda networks: generative_loss(
            policy, config, networks, observations, actions, draw.noise, elbo, shape
        )

    def _refine(self, state: TrainState, draw: Draw) -> Loss:
        policy, judge, margin = self.model.policy, self._feasibility, self._margin(state)
        observations, actions = self.log.observations[draw.rows], self.log.actions[draw.rows]
        with torch.no_grad():
            _, q = judge.judge(state, observations, actions)
            good = self._good(state, observations, actions, q)
        return lambda networks: refiner_loss(
            policy,
            self.config,
            judge,
            margin,
            networks,
            state,
            observations,
            actions,
            draw.noise,
            good,
        )

    def _report_shift(self, state: TrainState, draw: Draw) -> Metrics:
        """Return metrics of the base-space divergence (eq. 18) in states of the batch."""
        seen = self.log.observations[draw.rows[:_REPORTED]]
        policy, noise = self.model.policy, draw.noise[:_REPORTED]
        shift = base_shift(policy, state.networks, seen, noise)
        return {
            "refiner/base_divergence": torch.tensor(shift.divergence.mean()),
            "refiner/folds": torch.tensor(shift.folds.mean()),
        }
