r"""Weights with which a policy imitates the good actions of a log.

    V_h(s) <= -margin:   min(exp(b_r A_r), 100)   where Q_h(s, a) <= -margin, else 0
    V_h(s) >  -margin:   min(exp(-b_h A_h), 150)

Here A_r = min_i (Q_r,i - V_r) / sigma_r and A_h = (Q_h - V_h) / sigma_h are in units of one step's
advantage, so that the temperatures mean the same on every task. The paper uses them without these
units.

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
"""Largest weights of a logged action in feasible and in other states, as in the official code."""


def imitation_weights(
    safety: SafetyCritics,
    reward: RewardCritics,
    networks: Networks,
    observations: Tensor,
    actions: Tensor,
    margin: float,
    *,
    reward_temperature: float,
    safety_temperature: float,
) -> Tensor:
    """Return the weight of each logged action, (batch,). The module docstring has the formula.

    Args:
        safety: description of the safety critics.
        reward: description of the reward critics.
        networks: weights of both.
        observations: (batch, obs) normalised.
        actions: (batch, act) in [-1, 1].
        margin: distance from the boundary at which an action counts as unsafe, in units of h.
        reward_temperature: b_r; with 0, all feasible actions have the same weight.
        safety_temperature: b_h; with 0, all actions in infeasible states have the same weight.
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
        name: name of the network in a training state.
        network: description of the velocity field.
        log: log to imitate.
        base: learning rate at the start.
        total: total number of updates.
        weigh: function from (state, rows) to the weights (batch,) of these logged actions; None
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
