"""Discrete actions by their place in `SpaceCodec.choices`: draws, logs of probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from safeshield.spaces.rows import SpaceCodec

Array = npt.NDArray[Any]


def normalised(log_weights: Array) -> Array:
    """Return log probabilities (n, c) from logs of weights; each row has one above 0."""
    shifted = log_weights - log_weights.max(axis=1, keepdims=True)
    total: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return total


def draw_choices(codec: SpaceCodec, log_probs: Array, each: int, rng: np.random.Generator) -> Array:
    """Return `each` choices (n, each, act) of every row of log probabilities (n, c)."""
    # The largest of log p + Gumbel noise is distributed as p.
    noise = rng.gumbel(size=(len(log_probs), each, log_probs.shape[1]))
    drawn: Array = codec.choices[(log_probs[:, None] + noise).argmax(axis=-1)]
    return drawn


def choice_index(codec: SpaceCodec, candidates: Array) -> Array:
    """Return the place (n, c) in `choices` of each discrete action (n, c, act)."""
    entries = np.moveaxis(np.rint(candidates - codec.low).astype(np.int64), -1, 0)
    index: Array = np.ravel_multi_index(tuple(entries), tuple(codec.categories))
    return index


def every_choice(codec: SpaceCodec, count: int) -> Array:
    """Return all c choices in each of `count` states, (count, c, act); a view."""
    return np.broadcast_to(codec.choices, (count, *codec.choices.shape))
