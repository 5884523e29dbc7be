"""What may be executed: a shield's accepted set, or a few lines of rules."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.flat import Batch, FlatSpace, flat_actions, take
from safeshield.shield.shield import HasShield, Shield, as_shield

Array = npt.NDArray[Any]
_CANDIDATES = 256


class NoSafeActionError(RuntimeError):
    """Rules admit no action in a state that an episode has reached: nothing may be executed."""


class SafeSet(Protocol):
    """Which actions may be executed in a state."""

    actions: FlatSpace

    def admits(self, observations: Batch, candidates: Array, /) -> npt.NDArray[np.bool_]:
        """Whether each of c actions (n, c, act) of n states may: (n, c)."""
        ...

    def replace(self, observations: Batch, rows: Array, /) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Return what runs in place of actions (n, act), and whether it is admitted (n,)."""
        ...


class ShieldSet:
    """What a shield accepts: Q_h <= -delta, and what its support test admits."""

    def __init__(self, shield: Shield) -> None:
        self.shield = shield
        self.actions = shield.model.played

    def admits(self, observations: Batch, candidates: Array, /) -> npt.NDArray[np.bool_]:
        """Ask the shield."""
        rows, _ = self.shield.observation_rows(observations)
        return self.shield.admits(self.shield.states(rows), rows, candidates)[0]

    def replace(self, observations: Batch, rows: Array, /) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Let the shield replace them; where nothing is acceptable its least bad one runs."""
        seen, _ = self.shield.observation_rows(observations)
        executed, report = self.shield.judge(self.shield.states(seen), seen, rows)
        return executed, np.asarray(report.acceptable)


class SafeRules:
    """A shield's substitute of a few lines: a function that says what may be done.

    It promises what its author knows: an action that it admits must lead only to states in which
    it admits another one. Where it admits none, learning stops with `NoSafeActionError`.

    Args:
        safe: ``safe(observation, action) -> bool``, of one observation and one action; always the
            same answer for the same two.
        action_space: of the environment.

    >>> rules = SafeRules(lambda cell, move: not (cell == 36 and move == 1), gym.spaces.Discrete(4))
    >>> rules.admits(np.array([36]), rules.actions.choices[None]).tolist()
    [[True, False, True, True]]
    """

    def __init__(self, safe: Callable[[Any, Any], bool], action_space: gym.Space[Any]) -> None:
        if not callable(safe):
            raise TypeError(
                "safe must be a function safe(observation, action) -> bool, got "
                f"{type(safe).__name__}; for masks use SafeRules.of_masks"
            )
        self.actions = flat_actions(action_space)
        self._safe = safe
        self._known: dict[tuple[int, bytes], bool] = {}

    @classmethod
    def of_masks(
        cls, mask: Callable[[Any], npt.ArrayLike], action_space: gym.Space[Any]
    ) -> SafeRules:
        """Make rules of ``mask(observation) -> (c,)``, true for the choices that may be taken.

        >>> rules = SafeRules.of_masks(lambda cell: [True, cell > 3], gym.spaces.Discrete(2))
        >>> rules.admits(np.array([0, 9]), np.array([[[1.0]], [[1.0]]])).ravel().tolist()
        [False, True]
        """
        played = flat_actions(action_space)
        if not played.discrete:
            raise TypeError(f"masks need discrete actions, got {action_space}")
        names = [point.tobytes() for point in played.points(played.choices)]

        def safe(observation: Any, action: Any) -> bool:  # noqa: ANN401
            allowed = np.asarray(mask(observation))
            if allowed.shape != (len(names),):
                raise ValueError(f"the mask must have shape {(len(names),)}, got {allowed.shape}")
            return bool(allowed[names.index(np.asarray(action).tobytes())])

        return cls(safe, action_space)

    def admits(self, observations: Batch, candidates: Array, /) -> npt.NDArray[np.bool_]:
        """Ask the function about each pair; once for each pair of integers."""
        count, each = candidates.shape[:2]
        inside = np.asarray(self.actions.contains(candidates))
        points = self.actions.points(candidates.reshape(count * each, -1))
        for i, j in zip(*np.nonzero(inside), strict=True):
            inside[i, j] = self._ask(take(observations, i), points[i * each + j])
        return inside

    def replace(self, observations: Batch, rows: Array, /) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Return the nearest admitted action of all choices, or of 256 points of the box.

        Raises:
            NoSafeActionError: none is admitted.
        """
        if self.actions.discrete:
            tried = self.actions.choices
        else:
            rng = np.random.default_rng(0)
            low, high = self.actions.low, self.actions.high
            tried = rng.uniform(low, high, (_CANDIDATES, len(low))).astype(np.float32)
        candidates = np.broadcast_to(tried, (len(rows), *tried.shape))
        inside = self.admits(observations, candidates)
        if not inside.any(axis=1).all():
            at = int(inside.any(axis=1).argmin())
            raise NoSafeActionError(
                f"the rules admit none of {len(tried)} actions in the state "
                f"{take(observations, at)}: they must admit one in every state to which an "
                "admitted action may lead"
            )
        distance = np.square(tried - rows[:, None]).sum(axis=-1)
        best = np.where(inside, distance, np.inf).argmin(axis=1)
        return tried[best], np.ones(len(rows), dtype=np.bool_)

    def _ask(self, observation: Any, action: Any) -> bool:  # noqa: ANN401
        if not isinstance(observation, np.integer) or not self.actions.discrete:
            return bool(self._safe(observation, action))
        key = int(observation), np.asarray(action).tobytes()
        if key not in self._known:
            self._known[key] = bool(self._safe(int(observation), action))
        return self._known[key]


def as_safe_set(
    safe: SafeRules | Shield | HasShield | str | os.PathLike[str] | None, behaviour: object
) -> SafeSet | None:
    """Return the safe set that is given, else that of the behaviour, if it has one.

    Raises:
        TypeError: `safe` is something else.
    """
    if safe is None:
        # A `SafeSupportPolicy` knows its shield, `MaskedUniform` its set.
        own = getattr(behaviour, "safe_set", getattr(behaviour, "shield", None))
        if isinstance(behaviour, SafeRules):
            return behaviour
        if isinstance(own, SafeRules | ShieldSet):
            return own
        return ShieldSet(own) if isinstance(own, Shield) else None
    return safe if isinstance(safe, SafeRules) else ShieldSet(as_shield(safe))
