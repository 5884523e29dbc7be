"""Discrete actions by their index in `SpaceCodec.choices`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from safeshield.spaces.rows import SpaceCodec

Array = npt.NDArray[Any]


def draw_choices(codec: SpaceCodec, log_probs: Array, each: int, rng: np.random.Generator) -> Array:
    """Return draws of discrete actions, (n, each, act), for n distributions.

    Args:
        codec: Converter of the actions.
        log_probs: (n, c) log probabilities of all c choices in n states.
        each: Number of draws in each state.
        rng: Generator of the draws.
    """
    # The largest of log p + Gumbel noise is distributed as p.
    noise = rng.gumbel(size=(len(log_probs), each, log_probs.shape[1]))
    drawn: Array = codec.choices[(log_probs[:, None] + noise).argmax(axis=-1)]
    return drawn


def every_choice(codec: SpaceCodec, count: int) -> Array:
    """Return all c choices in each of `count` states as a read-only view (count, c, act).

    `codec` is the converter of the discrete actions.
    """
    return np.broadcast_to(codec.choices, (count, *codec.choices.shape))
