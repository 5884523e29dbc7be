r"""Weights with which a policy imitates the good actions of a log.

    V_h(s) <= -margin:   min(exp(b_r A_r), 100)   where Q_h(s, a) <= -margin, else 0
    V_h(s) >  -margin:   min(exp(-b_h A_h), 150)

Here A_r = min_i (Q_r,i - V_r) / sigma_r and A_h = (Q_h - V_h) / sigma_h are in units of one step's
advantage, so that the inverse temperatures b_r and b_h mean the same on every task. The paper uses
them without these units.

Source: FISOR (Zheng et al., ICLR 2024) and its official code, which has the margin 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from safeshield.nn.flow import flow_matching_loss
from safeshield.nn.mlp import EnsembleMLP, Networks
from safeshield.training.log import LogTensors
from safeshield.training.state import Draw, Loss, Metrics, TrainState, Update, falling
from safeshield.values.reward import RewardCritics
from safeshield.values.safety import SafetyCritics

REWARD_LIMIT, SAFETY_LIMIT = 100.0, 150.0
"""Largest weights of a logged action in feasible and in other states, as in the official code, and
of FLRP's actions (its table 5)."""


def imitation_weights(
    safety: SafetyCritics,
    reward: RewardCritics,
    networks: Networks,
    observations: Tensor,
    actions: Tensor,
    margin: float | Tensor,
    *,
    reward_temperature: float,
    safety_temperature: float,
) -> Tensor:
    """Return the weight of each logged action, (batch,). The module docstring has the formula.

    In a feasible state, one with V_h <= -margin, an action with Q_h > -margin has the weight 0.

    Args:
        safety: Description of the safety critics.
        reward: Description of the reward critics.
        networks: Weights of both.
        observations: (batch, obs) observations, normalised.
        actions: (batch, act) logged actions, in [-1, 1].
        margin: Number that -V_h of a feasible state and -Q_h of a safe action must reach, in units
            of h. (The setting `margin` of an algorithm is in standard deviations of h.)
        reward_temperature: Inverse temperature b_r. With 0, all safe actions in feasible states
            have the same weight.
        safety_temperature: Inverse temperature b_h. With 0, all actions in infeasible states have
            the same weight.
    """
    value = safety.value(networks, observations)
    danger = safety.advantages(networks, observations, actions).amax(0)
    gain = reward.advantages(networks, observations, actions).amin(0)
    good = (reward_temperature * gain).exp().clamp(max=REWARD_LIMIT)
    safe = (-safety_temperature * danger).exp().clamp(max=SAFETY_LIMIT)
    passes = (value + safety.scale.step_rms * danger <= -margin).float()
    return torch.where(value <= -margin, good * passes, safe)


def flow_update(
    name: str,
    network: EnsembleMLP,
    log: LogTensors,
    base: float,
    total: int,
    weigh: Callable[[TrainState, Tensor], Tensor] | None = None,
) -> Update:
    """Return the update that fits a flow to the log's behaviour by flow matching (`nn.flow`).

    Args:
        name: Name of the network in a training state.
        network: Description of the velocity field.
        log: Log to imitate.
        base: Learning rate at the start.
        total: Total number of updates.
        weigh: Function from (state, rows) to the weights (batch,) of these logged actions; None
            means equal weights.
    """

    def matching(state: TrainState, draw: Draw) -> Loss:
        observations, actions = log.observations[draw.rows], log.actions[draw.rows]
        weights = None if weigh is None else weigh(state, draw.rows)

        def loss(networks: Networks) -> tuple[Tensor, Metrics]:
            value = flow_matching_loss(
                network, networks[name], observations, actions, draw.noise, draw.time, weights
            )
            metrics = {f"{name}/flow_matching_loss": value.detach()}
            if weights is not None:
                metrics[f"{name}/mean_weight"] = weights.mean()
            return value, metrics

        return loss

    return falling(name, matching, base, total)
