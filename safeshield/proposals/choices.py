"""Discrete actions by their index in `SpaceCodec.choices`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from safeshield.spaces.rows import SpaceCodec

Array = npt.NDArray[Any]


def draw_choices(codec: SpaceCodec, log_probs: Array, each: int, rng: np.random.Generator) -> Array:
    """Draw `each` choices (n, each, act) for every row of log probabilities (n, c)."""
    # The largest of log p + Gumbel noise is distributed as p.
    noise = rng.gumbel(size=(len(log_probs), each, log_probs.shape[1]))
    drawn: Array = codec.choices[(log_probs[:, None] + noise).argmax(axis=-1)]
    return drawn


def every_choice(codec: SpaceCodec, count: int) -> Array:
    """Return all c choices in each of `count` states as a read-only view (count, c, act)."""
    return np.broadcast_to(codec.choices, (count, *codec.choices.shape))
