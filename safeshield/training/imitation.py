r"""How much each logged action counts for a policy that imitates the good ones.

    V_h(s) <= -margin:   min(exp(b_r A_r), 100)   where Q_h(s, a) <= -margin, else 0
    V_h(s) >  -margin:   min(exp(-b_h A_h), 150)

with A_r = min_i (Q_r,i - V_r) / sigma_r and A_h = (Q_h - V_h) / sigma_h in units of one step's
advantage (the paper: raw), so that the temperatures mean the same on every task.

Source: FISOR (Zheng et al., ICLR 2024) and its official code, margin 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safeshield.nn.mlp import Networks
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
