"""What may be executed: a shield's accepted set, or a few lines of rules."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import VecEnv

from safeshield.rollouts.copies import environment_id, environment_kwargs
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.spaces.batches import Batch, copied, readable, take
from safeshield.spaces.rows import SpaceCodec, flat_actions

Array = npt.NDArray[Any]
Spaces = tuple[gym.Space[Any], gym.Space[Any]]
"""Of observations and of actions."""
_CANDIDATES = 256


class NoSafeActionError(RuntimeError):
    """Rules admit no action in a state that an episode has reached, so nothing may be executed.

    It is also raised where none was found, and where an observation is not finite, so that no rule
    can be asked.
    """


class SafeSet(Protocol):
    """Which actions may be executed in a state."""

    actions: SpaceCodec

    def admits(self, observations: Batch, candidates: Array, /) -> npt.NDArray[np.bool_]:
        """Whether each of c actions (n, c, act) of n states may: (n, c)."""
        ...

    def replace(self, observations: Batch, rows: Array, /) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Return what is executed in place of actions (n, act), and whether it is admitted (n,)."""
        ...

    def check_fits(self, spaces: Spaces, venv: VecEnv | None = None) -> None:
        """Raise ValueError where the set is for other spaces than these of observations, actions.

        Args:
            spaces: both.
            venv: of which they are; a shield warns where its record is of another environment.
        """
        ...


class ShieldSet:
    """What a shield accepts: Q_h <= -delta, and what its support test admits."""

    def __init__(self, shield: Shield) -> None:
        self.shield = shield
        self.actions = shield.model.action_codec

    def check_fits(self, spaces: Spaces, venv: VecEnv | None = None) -> None:
        """Ask the shield."""
        name = "" if venv is None else environment_id(venv)
        self.shield.check_fits(*spaces, name, None if venv is None else environment_kwargs(venv))

    def admits(self, observations: Batch, candidates: Array, /) -> npt.NDArray[np.bool_]:
        """Ask the shield."""
        rows, _ = self.shield.observation_rows(observations)
        return self.shield.acceptable(self.shield.states(rows), rows, candidates)[0]

    def replace(self, observations: Batch, rows: Array, /) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Let the shield replace them; where nothing is acceptable, by its least bad action."""
        seen, _ = self.shield.observation_rows(observations)
        executed, report = self.shield.filter_rows(self.shield.states(seen), seen, rows)
        return executed, np.asarray(report.acceptable)


class SafeRules:
    """A safe set that is a function: it says which actions may be executed in a state.

    Its author must see to it that an admitted action leads only to states in which another action
    is admitted. Where none is admitted, learning stops with `NoSafeActionError`; likewise where an
    observation holds NaN or infinity, about which the function is not asked.

    Args:
        safe: ``safe(observation, action) -> bool``, of one observation and one action as the
            spaces' own members are: an array of a Box (of actions in float32), a whole number of a
            Discrete, a dict of a Dict; copies, which it may change. The same answer for the same
            two, always. True or False: a constraint h is ``h <= 0``.
        action_space: of the environment.

    Raises:
        TypeError: `safe` is no function; when asked, it answered neither True nor False.

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
        """Make rules of ``mask(observation) -> (c,)``, True (1) for what may be taken, else False.

        >>> rules = SafeRules.of_masks(lambda cell: [True, cell > 3], gym.spaces.Discrete(2))
        >>> rules.admits(np.array([0, 9]), np.array([[[1.0]], [[1.0]]])).ravel().tolist()
        [False, True]
        """
        played = flat_actions(action_space)
        if not played.discrete:
            raise TypeError(f"masks need discrete actions, got {action_space}")
        names = [point.tobytes() for point in played.unflatten(played.choices)]

        def safe(observation: Any, action: Any) -> bool:  # noqa: ANN401
            allowed = np.asarray(mask(observation))
            if allowed.shape != (len(names),):
                raise ValueError(f"the mask must have shape {(len(names),)}, got {allowed.shape}")
            entry = allowed[names.index(np.asarray(action).tobytes())]
            return _truth(bool(entry) if entry in (0, 1) else entry, "the mask's entries")

        return cls(safe, action_space)

    def admits(self, observations: Batch, candidates: Array, /) -> npt.NDArray[np.bool_]:
        """Ask the function about each pair; once for each pair of integers."""
        count, each = candidates.shape[:2]
        inside: npt.NDArray[np.bool_] = np.array(self.actions.contains(candidates))
        inside &= readable(observations)[:, None]
        points = self.actions.unflatten(candidates.reshape(count * each, -1))
        for i, j in zip(*np.nonzero(inside), strict=True):
            inside[i, j] = self._ask(take(observations, i), points[i * each + j])
        return inside

    def replace(self, observations: Batch, rows: Array, /) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Return the nearest admitted action of all choices, or of 256 points of the box.

        Raises:
            NoSafeActionError: none is admitted, as far as was tried; or the observation is not
                finite.
        """
        self.refuse_unreadable(observations)
        nearest, admitted = self.nearest(observations, rows)
        if not admitted.all():
            where = f"in the state {take(observations, int(admitted.argmin()))}"
            points = "actions" if self.actions.discrete else "points of the box"
            raise NoSafeActionError(
                f"the rules admit none of {len(self._tried)} {points} {where}: they must admit one "
                "in every state to which an admitted action may lead (in a Box one that can be "
                "found: give a behaviour that proposes what they admit where that is little)"
            )
        return nearest, admitted

    def check_fits(self, spaces: Spaces, venv: VecEnv | None = None) -> None:
        """Raise ValueError where the rules are for other actions."""
        if self.actions.space != spaces[1]:
            raise ValueError(
                f"the rules are for {self.actions.space}, the environment's actions are {spaces[1]}"
            )

    def refuse_unreadable(self, observations: Batch) -> None:
        """Raise NoSafeActionError where an observation is not finite."""
        good = readable(observations)
        if not good.all():
            raise NoSafeActionError(
                f"no rule can be asked in the state {take(observations, int(good.argmin()))}: it "
                "is not finite"
            )

    def nearest(self, observations: Batch, rows: Array, /) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Return the same, and False where none is admitted, with an action that means nothing."""
        tried = self._tried
        inside = self.admits(observations, np.broadcast_to(tried, (len(rows), *tried.shape)))
        distance = np.square(tried - rows[:, None]).sum(axis=-1)
        best = np.where(inside, distance, np.inf).argmin(axis=1)
        return tried[best], np.asarray(inside.any(axis=1))

    @cached_property
    def _tried(self) -> Array:
        """All choices; or points of the box, always the same."""
        if self.actions.discrete:
            return self.actions.choices
        low, high = self.actions.low, self.actions.high
        points = np.random.default_rng(0).uniform(low, high, (_CANDIDATES, len(low)))
        return points.astype(np.float32)

    def _ask(self, observation: Any, action: Any) -> bool:  # noqa: ANN401
        if not isinstance(observation, np.integer) or not self.actions.discrete:
            # Copies: a function that writes into its arguments must not change what is judged next.
            return _truth(self._safe(copied(observation), copied(action)), "safe(...)")
        key = int(observation), np.asarray(action).tobytes()
        if key not in self._known:
            self._known[key] = _truth(self._safe(int(observation), copied(action)), "safe(...)")
        return self._known[key]


class LoggedRules:
    """Rules for the states of a log, in which nothing is executed.

    Where they admit nothing, `replace` says so and raises no error.
    """

    def __init__(self, rules: SafeRules) -> None:
        self.actions, self.check_fits = rules.actions, rules.check_fits
        self.admits, self.replace = rules.admits, rules.nearest


def _truth(answer: object, what: str) -> bool:
    """Return an answer that is True or False; any other object would be true or false in Python."""
    if isinstance(answer, np.ndarray) and answer.dtype == np.bool_ and answer.ndim == 0:
        answer = answer[()]
    if not isinstance(answer, bool | np.bool_):
        raise TypeError(
            f"{what} must be True or False, got {answer!r:.60} ({type(answer).__name__}): of a "
            "constraint h return `h <= 0`"
        )
    return bool(answer)


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


def spaces_of(env: Any) -> Spaces:  # noqa: ANN401
    """Return the spaces of what has them: an environment, a log, an agent's networks."""
    return env.observation_space, env.action_space


def check_spaces(given: object, whose: str, spaces: Spaces) -> None:
    """Raise ValueError where what is given is for other spaces, as far as it tells."""
    for name, space in zip(("observation_space", "action_space"), spaces, strict=True):
        own = getattr(given, name, None)
        if isinstance(own, gym.Space) and own != space:
            raise ValueError(f"{whose} {name} is {own}, the environment's {space}")
