"""The candidates among which a shield looks for a replacement of an action that it rejects.

The random numbers behind the candidates are drawn once, from a fixed seed. The executed action is
therefore a function of observation and proposed action, and a decision can be reproduced.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from safeshield.shield.critics import SafetyModel, StateValue
from safeshield.spaces.shapes import Actions, Candidates

_SEED = 20_260_315


@dataclass(frozen=True)
class CandidateSet:
    """The numbers of candidates of each kind that a shield considers as replacements."""

    fallback: int = 8
    """Number of actions of the fallback actor: one for noise z = 0, the others for drawn z."""
    around: int = 24
    """Number of points around the proposed action, at distances from 5% to 200% of the box's half
    width."""
    box: int = 32
    """Number of points spread over the whole action box; the centre and corners come first."""

    def __post_init__(self) -> None:
        if self.fallback < 1 or self.around < 0 or self.box < 0:
            raise ValueError(
                "fallback must be at least 1, around and box at least 0, got "
                f"{self.fallback}, {self.around}, {self.box}"
            )

    @property
    def total(self) -> int:
        """Number of candidates in each state."""
        return self.fallback + self.around + self.box

    def actions(self, model: SafetyModel, states: StateValue, proposals: Actions) -> Candidates:
        """Return the candidates (n, total, act) for n proposed actions, all inside the box.

        Where actions are discrete, the candidates are all actions, whatever the counts are.

        Args:
            model: Networks of the shield, with its fallback.
            states: Result of `SafetyModel.states` for the n states.
            proposals: (n, act) proposed actions, as rows.
        """
        if model.action_codec.discrete:
            choices = model.action_codec.choices
            return np.broadcast_to(choices, (len(proposals), *choices.shape))
        tables = self.tables(model)
        parts = [model.fallback(states, tables.noise)]
        if self.around:
            near = model.scaling.actions(proposals)[:, None, :] + tables.around
            parts.append(model.scaling.to_box(np.clip(near, -1.0, 1.0)))
        if self.box:
            points = model.scaling.to_box(tables.box)
            parts.append(np.broadcast_to(points, (len(proposals), *points.shape)))
        return np.concatenate(parts, axis=1)

    def tables(self, model: SafetyModel) -> Tables:
        """Return the fixed numbers behind the candidates in a Box of the actions of `model`."""
        return _tables(self, model.action_codec.width, model.noise_features)


@dataclass(frozen=True)
class Tables:
    """The fixed numbers from which the candidates in a Box are made."""

    candidates: CandidateSet
    """Numbers of candidates of each kind."""
    width: int
    """Number of entries of an action."""
    noise_width: int
    """Width of the noise of the fallback actor."""

    @cached_property
    def noise(self) -> npt.NDArray[np.float32]:
        """(fallback, noise_width) noise of the fallback's actions; the first row is 0."""
        rng = np.random.default_rng(_SEED)
        noise = rng.standard_normal((self.candidates.fallback, self.noise_width))
        noise[0] = 0.0
        return noise.astype(np.float32)

    @cached_property
    def around(self) -> npt.NDArray[np.float32]:
        """(around, act) differences from the proposed action, in half widths of the box."""
        count = self.candidates.around
        rng = np.random.default_rng(_SEED + 1)
        if self.width == 1:
            direction = np.where(np.arange(count) % 2 == 0, 1.0, -1.0)[:, None]
        elif self.width == 2:
            # Multiples of the golden angle cover the circle evenly for any count.
            angle = np.arange(count) * np.pi * (3.0 - np.sqrt(5.0))
            direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        else:
            direction = rng.standard_normal((count, self.width))
            direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
        radius = np.geomspace(0.05, 2.0, max(count, 1))[:count, None]
        return np.asarray(direction * radius, np.float32)

    @cached_property
    def box(self) -> npt.NDArray[np.float32]:
        """(box, act) points of the box, scaled to [-1, 1]."""
        count = self.candidates.box
        rng = np.random.default_rng(_SEED + 2)
        points = rng.uniform(-1.0, 1.0, (count, self.width))
        centre = np.zeros((1, self.width))
        corners = min(2**self.width, count // 2) if self.width < 16 else 0
        bits = (np.arange(corners)[:, None] >> np.arange(self.width)) & 1
        special = np.concatenate([centre, 2.0 * bits - 1.0])[:count]
        points[: len(special)] = special
        return points.astype(np.float32)


_CACHE: dict[tuple[CandidateSet, int, int], Tables] = {}


def _tables(candidates: CandidateSet, width: int, noise_width: int) -> Tables:
    key = (candidates, width, noise_width)
    if key not in _CACHE:
        _CACHE[key] = Tables(candidates, width, noise_width)
    return _CACHE[key]
