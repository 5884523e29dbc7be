"""A shield whose critics are fitted to values that are known: it works, and needs no training."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch

from safeshield.nn.mlp import EnsembleMLP, like, tensors
from safeshield.nn.optim import adam, adam_init
from safeshield.shield import Shield
from safeshield.shield.critics import SafetyModel
from safeshield.spaces.scaling import Scaling
from safeshield.training.schedule import learning_rate
from safeshield.values.safety import SafetyCritics
from safeshield.values.units import FALLBACK, SafetyScale

Array = npt.NDArray[Any]
DT = 0.02
"""Time step of the boat in the tests of shields, seconds: an episode has 100 steps."""


def fitted_shield(
    space: gym.spaces.Box, states: Array, actions: Array, value: Array, q: Array, steps: int = 1500
) -> Shield:
    """Fit V to `value` (n,) and Q to `q` (n,) at `states` (n, obs), `actions` (n, act)."""
    gain = q - value
    widths = states.shape[1], actions.shape[1]
    unit = float(gain.std())
    scale = SafetyScale(float(value.mean()), float(value.std()), unit)
    critics = SafetyCritics(*widths, (48, 48), scale)
    box = gym.spaces.Box(-1.0, 1.0, (widths[1],))
    mean, spread = states.mean(0).astype("f4"), states.std(0).astype("f4")
    scaling = Scaling(mean, spread, box.low, box.high)
    seen = torch.tensor(scaling.observations(states))
    table = [torch.tensor(np.asarray(x, np.float32)) for x in (value, gain, actions)]
    generator = torch.Generator().manual_seed(0)
    networks = critics.init(generator)
    moments = adam_init(networks)
    for _ in range(steps):
        rows = torch.randint(len(seen), (256,), generator=generator)
        leaves = like(networks, [t.detach().requires_grad_() for t in tensors(networks)])
        goal, gains, tried = (x[rows] for x in table)
        guess = critics.value(leaves, seen[rows])
        advantage = critics.advantages(leaves, seen[rows], tried)
        loss = (guess - goal).square().mean() / 0.05**2
        loss = loss + (advantage - gains / unit).square().mean()
        gradients = list(
            torch.autograd.grad(loss, tensors(leaves), allow_unused=True, materialize_grads=True)
        )
        rate = learning_rate(5e-3, moments.updates, steps)
        networks, moments = adam(networks, gradients, moments, [rate] * len(gradients))
    fallback = EnsembleMLP(sum(widths), widths[1], (16,)).init(generator)
    arrays = {
        name: {key: tensor.detach().numpy() for key, tensor in params.items()}
        for name, params in {**networks, FALLBACK: fallback}.items()
    }
    return Shield(
        SafetyModel.of_networks(space, box, scaling, scale, arrays), trained_by="exact values"
    )
