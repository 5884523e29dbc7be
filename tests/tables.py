"""A shield over discrete states and actions whose Q_h is a table, exactly: no training."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.shield import Shield
from safeshield.shield.critics import SafetyModel
from safeshield.spaces.rows import SpaceCodec
from safeshield.spaces.scaling import Scaling
from safeshield.values.units import ADVANTAGE, BEHAVIOUR, CONSTRAINT, EXCESS, SafetyScale

Array = npt.NDArray[Any]


def table_shield(
    q: Array, actions: gym.Space[Any] | None = None, behaviour: Array | None = None
) -> Shield:
    """Make a shield with Q_h = `q` (states, choices) and V_h its row's minimum.

    Args:
        q: Columns in the order of `spaces.rows.choices`.
        actions: Discrete by default.
        behaviour: (states, choices) probabilities of a classifier, if there is to be one.
    """
    q = np.asarray(q, np.float32)
    count = q.shape[0]
    seen = SpaceCodec(gym.spaces.Discrete(count))
    played = SpaceCodec(actions if actions is not None else gym.spaces.Discrete(q.shape[1]))
    scaling = Scaling(
        np.zeros(1, np.float32),
        np.ones(1, np.float32),
        played.low.astype(np.float32),
        played.high.astype(np.float32),
        seen.categories,
        played.categories,
    )
    # Indicators of states and of choices; a hidden unit for each pair is 1 where all are met.
    states, choices = np.eye(count), scaling.actions(played.choices)
    pairs = np.concatenate([np.repeat(states, len(choices), 0), np.tile(choices, (count, 1))], 1)
    value = q.min(axis=1)
    networks = {
        CONSTRAINT: _network(states, 0.0, value[:, None]),
        EXCESS: _network(states, 0.0, np.zeros((count, 1))),
        ADVANTAGE: _network(pairs, -float(played.width), (q - value[:, None]).reshape(-1, 1)),
    }
    if behaviour is not None:
        logits = np.log(np.maximum(behaviour, 1e-30))
        networks[BEHAVIOUR] = _network(states, 0.0, logits)
    model = SafetyModel.of_networks(
        seen.space, played.space, scaling, SafetyScale(0.0, 1.0, 1.0), networks
    )
    return Shield(model, trained_by="a table")


def _network(indicators: Array, shift: float, outputs: Array) -> dict[str, npt.NDArray[np.float32]]:
    """relu(indicators x + shift) picks one hidden unit; its row of `outputs` is the answer."""
    weights = {
        "0.weight": indicators.T[None],
        "0.bias": np.full((1, 1, len(indicators)), shift),
        "1.weight": outputs[None],
        "1.bias": np.zeros((1, 1, outputs.shape[1])),
    }
    return {name: array.astype(np.float32) for name, array in weights.items()}
