r"""How much each logged action counts for a policy that imitates the good ones.

    V_h(s) <= -margin:   min(exp(b_r A_r), 100)   where Q_h(s, a) <= -margin, else 0
    V_h(s) >  -margin:   min(exp(-b_h A_h), 150)

with A_r = min_i (Q_r,i - V_r) / sigma_r and A_h = (Q_h - V_h) / sigma_h in units of one step's
advantage (the paper: raw), so that the temperatures mean the same on every task.

Source: FISOR (Zheng et al., ICLR 2024) and its official code, margin 0.
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
"""Largest weights of a logged action, as in the official code."""


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
    """Return how much each logged action counts, (batch,); the formula stands at the file's head.

    Args:
        safety: what the safety critics are.
        reward: what the reward critics are.
        networks: their weights.
        observations: (batch, obs) normalised.
        actions: (batch, act) in [-1, 1].
        margin: of the gate, in units of h.
        reward_temperature: b_r; 0: all feasible actions alike.
        safety_temperature: b_h.
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
    """Return the update that fits the log's behaviour by flow matching (`nn.flow`).

    Args:
        name: of the network in a training state.
        network: the velocity field.
        log: what to imitate.
        base: learning rate at the start.
        total: updates in all.
        weigh: from (state, rows) to how much these logged actions count, (batch,); all alike by
            default.
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
