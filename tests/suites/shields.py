"""Shields of any environment with rows of numbers, for tests of what stands around them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch

from safeshield.nn.mlp import EnsembleMLP
from safeshield.shield import Shield
from safeshield.shield.critics import SafetyModel
from safeshield.spaces.scaling import Scaling
from safeshield.values.safety import SafetyCritics
from safeshield.values.units import FALLBACK, SafetyScale


def untrained_shield(env: gym.Env[Any, Any]) -> Shield:
    """Return a shield whose critics have learned nothing: it accepts and replaces at random."""
    observations, actions = env.observation_space, env.action_space
    assert isinstance(observations, gym.spaces.Box)
    assert isinstance(actions, gym.spaces.Box)
    widths = observations.shape[0], actions.shape[0]
    scale = SafetyScale(0.0, 1.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    networks = SafetyCritics(*widths, (16, 16), scale).init(generator)
    networks[FALLBACK] = EnsembleMLP(sum(widths), widths[1], (16,)).init(generator)
    arrays = {
        name: {key: tensor.detach().numpy() for key, tensor in params.items()}
        for name, params in networks.items()
    }
    zeros, ones = np.zeros(widths[0], "f4"), np.ones(widths[0], "f4")
    scaling = Scaling(zeros, ones, actions.low.astype("f4"), actions.high.astype("f4"))
    return Shield(
        SafetyModel.of_networks(observations, actions, scaling, scale, arrays), trained_by="nobody"
    )
