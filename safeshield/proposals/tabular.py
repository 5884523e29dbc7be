"""A behaviour that is a table of probabilities over discrete states and actions."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.proposals.choices import draw_choices
from safeshield.spaces.batches import Batch
from safeshield.spaces.rows import flat_actions

Array = npt.NDArray[Any]


class Tabular:
    """A table of probabilities over discrete states and actions.

    Args:
        table: (S, c) probabilities. Rows are in the order of the observation's integers, columns
            in the order of the actions' integers. Every row sums to 1.
        observation_space: A Discrete of S states.
        action_space: A discrete space of c choices.

    Raises:
        TypeError: A space is not discrete.
        ValueError: The table has another shape, or its rows are not probabilities.

    >>> two = gym.spaces.Discrete(2)
    >>> mu = Tabular([[0.5, 0.5], [1.0, 0.0]], two, two)
    >>> mu.draw(np.array([1, 1]), 3, np.random.default_rng(0)).ravel().tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """

    def __init__(
        self,
        table: npt.ArrayLike,
        observation_space: gym.spaces.Discrete,
        action_space: gym.Space[Any],
    ) -> None:
        self._choices = flat_actions(action_space)
        if not (isinstance(observation_space, gym.spaces.Discrete) and self._choices.discrete):
            raise TypeError(
                "a table needs a Discrete observation_space and discrete actions, got "
                f"{observation_space} and {action_space}"
            )
        values = np.asarray(table, np.float64)
        shape = (int(observation_space.n), len(self._choices.choices))
        if values.shape != shape:
            raise ValueError(f"table must have shape {shape} (states, actions), got {values.shape}")
        if not ((values >= 0).all() and np.allclose(values.sum(axis=1), 1.0, atol=1e-6)):
            row = int(np.argmin((values >= 0).all(1) & np.isclose(values.sum(1), 1.0, atol=1e-6)))
            raise ValueError(
                "table must hold probabilities, at least 0, that sum to 1 in every row; row "
                f"{row} is {values[row]}"
            )
        self.observation_space, self.action_space = observation_space, action_space
        self._start = int(observation_space.start)
        with np.errstate(divide="ignore"):
            self._log_table = np.log(values)

    def draw(self, observations: Batch, each: int, rng: np.random.Generator, /) -> Array:
        """Return draws (n, each, act) from the table's rows of the n states `observations`.

        `rng` generates the draws.
        """
        log_probs = self._log_table[self._index(observations)]
        return draw_choices(self._choices, log_probs, each, rng)

    def log_prob(self, observations: Batch, candidates: Array, /) -> Array:
        """Return the logs (n, c) of the table's entries.

        `observations` are n states, and `candidates` (n, c, act) are actions as rows.
        """
        rows = self._log_table[self._index(observations)]
        return np.take_along_axis(rows, self._choices.choice_index(candidates), axis=1)

    def _index(self, observations: Batch) -> Array:
        return np.asarray(observations, np.int64).reshape(-1) - self._start
