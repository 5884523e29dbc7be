"""The policy of the logged trips, a mixture of sensible and reckless helmsmen."""

from __future__ import annotations

import numpy as np

from safeshield.envs.boat import GOAL, ROCK_CENTRES, ROCK_RADII
from safeshield.spaces.shapes import Actions, Observations

WANDERER, STRAIGHT, CAUTIOUS, RECKLESS = range(4)
_CORRECTION = 1.0 / 32.0  # probability, at each step, of a new course and a new course error
_KEEP_CLEAR = 0.35  # distance from a rock, metres, at which a cautious helmsman starts to turn away


class Helmsmen:
    """A batch policy that draws one kind of helmsman and one steering error level for each trip.

    Course errors and the wanderer's course are held for 32 steps (0.16 s) on average, because a
    person does not correct the course 200 times a second. The kinds of helmsmen are:

    - wanderer: steers a random course;
    - straight: steers towards the goal, even through a rock;
    - cautious: steers towards the goal and passes the rocks on a side that is drawn for the trip;
    - reckless: steers at one of the rocks.
    """

    batched = True

    def __init__(self) -> None:
        self.start_wave(0)

    def start_wave(self, num_envs: int) -> None:
        """Draw new helmsmen for `num_envs` boats at the first step of the following trips."""
        self._kind = np.zeros(0, dtype=np.int64)

    def _board(self, count: int, rng: np.random.Generator) -> None:
        self._kind = rng.integers(0, 4, count)
        self._unsteady = rng.choice([0.1, 0.5, 1.0, 2.0], count)
        self._course = rng.uniform(0.0, 2.0 * np.pi, count)
        self._error = rng.normal(0.0, 1.0, count)
        self._side = rng.choice([-1.0, 1.0], count)
        self._rock = ROCK_CENTRES[rng.integers(0, len(ROCK_CENTRES), count)]

    def __call__(self, observations: Observations, rng: np.random.Generator, /) -> Actions:
        """Return the actions (n, 2) at positions (n, 2)."""
        count = len(observations)
        if len(self._kind) != count:
            self._board(count, rng)
        turn = rng.random(count) < _CORRECTION
        self._course = np.where(turn, rng.uniform(0.0, 2.0 * np.pi, count), self._course)
        self._error = np.where(turn, rng.normal(0.0, 1.0, count), self._error)
        goal = _unit(GOAL - observations)
        courses = np.stack(
            [
                np.stack([np.cos(self._course), np.sin(self._course)], -1),
                goal,
                _unit(goal + self._away(observations)),
                _unit(self._rock - observations),
            ]
        )
        chosen = courses[self._kind, np.arange(count)]
        error = np.where(self._kind == WANDERER, 0.0, self._error * self._unsteady)
        angle = np.arctan2(chosen[:, 1], chosen[:, 0]) + error
        strength = rng.uniform(0.3, 1.0, (count, 1))
        return np.stack([np.cos(angle), np.sin(angle)], -1) * strength

    def _away(self, observations: Observations) -> Observations:
        push = np.zeros_like(observations, dtype=np.float64)
        for centre, radius in zip(ROCK_CENTRES, ROCK_RADII, strict=True):
            offset = observations - centre
            distance = np.linalg.norm(offset, axis=-1, keepdims=True)
            near = np.clip((radius + _KEEP_CLEAR - distance) / _KEEP_CLEAR, 0.0, 1.0)
            along = np.stack([-offset[:, 1], offset[:, 0]], -1) * self._side[:, None]
            push += 3.0 * near * (offset + along) / np.maximum(distance, 1e-9)
        return push


def _unit(vectors: Observations) -> Observations:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-9))
