"""Sets of actions that may be executed: a shield's accepted actions, or rules in Python."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import VecEnv

from safeshield.rollouts.copies import Identity
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.spaces.batches import Batch, copied, readable, take
from safeshield.spaces.rows import SpaceCodec, flat_actions

Array = npt.NDArray[Any]
Spaces = tuple[gym.Space[Any], gym.Space[Any]]
"""The spaces of observations and of actions."""
_CANDIDATES = 256


class NoSafeActionError(RuntimeError):
    """Rules admit no action in a state that an episode has reached, so nothing may be executed.

    It is also raised where the search in a Box found no admitted action, and where an observation
    is not finite, so that the rules cannot be evaluated.
    """


class SafeSet(Protocol):
    """The actions that may be executed in each state."""

    actions: SpaceCodec
    """Converts actions to rows."""

    def admits(self, observations: Batch, candidates: Array, /) -> npt.NDArray[np.bool_]:
        """Return (n, c) whether each of c actions in each of n states may be executed.

        `observations` is a batch of n observations, and `candidates` (n, c, act) are actions as
        rows.
        """
        ...

    def replace(self, observations: Batch, rows: Array, /) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Return replacements of n actions, (n, act), and whether each of them is admitted, (n,).

        `observations` is a batch of n observations, and `rows` (n, act) are the actions to replace.
        """
        ...

    def check_fits(self, spaces: Spaces, venv: VecEnv | None = None) -> None:
        """Raise ValueError where the set is for other spaces than the given ones.

        Args:
            spaces: The spaces of observations and of actions.
            venv: The environments that have these spaces; a shield warns where its record is of
                another environment.
        """
        ...


class ShieldSet:
    """The actions that a shield accepts: Q_h <= -delta, and the support test passes."""

    def __init__(self, shield: Shield) -> None:
        self.shield = shield
        self.actions = shield.model.action_codec

    def check_fits(self, spaces: Spaces, venv: VecEnv | None = None) -> None:
        """Raise ValueError where `spaces` are not the shield's; warn of another environment `venv`.

        See `Shield.check_fits`.
        """
        self.shield.check_fits(*spaces, None if venv is None else Identity.of(venv))

    def admits(self, observations: Batch, candidates: Array, /) -> npt.NDArray[np.bool_]:
        """Return (n, c) which actions the shield accepts.

        `observations` is a batch of n observations, and `candidates` (n, c, act) are actions as
        rows.
        """
        rows, _ = self.shield.observation_rows(observations)
        return self.shield.acceptable(self.shield.states(rows), rows, candidates)[0]

    def replace(self, observations: Batch, rows: Array, /) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Return the shield's replacements (n, act), and whether each is acceptable, (n,).

        Where none is acceptable, the replacement is the candidate of lowest Q_h. `observations` is
        a batch of n observations, and `rows` (n, act) are the actions to replace.
        """
        seen, _ = self.shield.observation_rows(observations)
        executed, report = self.shield.filter_rows(self.shield.states(seen), seen, rows)
        return executed, np.asarray(report.acceptable)


class SafeRules:
    """A safe set that is defined by a function, which says whether an action may be executed.

    The author of the function must make sure that an admitted action leads only to states in which
    another action is admitted. Where no action is admitted, learning stops with
    `NoSafeActionError`. It also stops where an observation holds NaN or infinity, for which the
    function is not called.

    Args:
        safe: ``safe(observation, action) -> bool``, a function of one observation and one action.
            Both are members of their spaces: an array for a Box (float32 for actions), an integer
            for a Discrete, a dict for a Dict. The function gets copies, which it may change. It
            must always return the same answer, True or False, for the same two arguments. For a
            constraint h return ``h <= 0``.
        action_space: The environment's action space.

    Raises:
        TypeError: `safe` is not a function, or it returned neither True nor False.

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
        """Return rules made from ``mask(observation) -> (c,)``, True (1) for each admitted action.

        `action_space` is the environment's action space, which must be discrete.

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
        """Return (n, c) which actions the function admits.

        The function is called for each pair, and only once for each pair of integers.
        `observations` is a batch of n observations, and `candidates` (n, c, act) are actions as
        rows.
        """
        count, each = candidates.shape[:2]
        inside: npt.NDArray[np.bool_] = np.array(self.actions.contains(candidates))
        inside &= readable(observations)[:, None]
        points = self.actions.unflatten(candidates.reshape(count * each, -1))
        for i, j in zip(*np.nonzero(inside), strict=True):
            inside[i, j] = self._ask(take(observations, i), points[i * each + j])
        return inside

    def replace(self, observations: Batch, rows: Array, /) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Return the nearest admitted actions (n, act), and True for each, (n,).

        They are found among all choices, or among 256 points of the box. `observations` is a batch
        of n observations, and `rows` (n, act) are the actions to replace.

        Raises:
            NoSafeActionError: None of the actions that were tried is admitted, or the observation
                is not finite.
        """
        self.refuse_unreadable(observations)
        nearest, admitted = self.nearest(observations, rows)
        if not admitted.all():
            where = f"in the state {take(observations, int(admitted.argmin()))}"
            points = "actions" if self.actions.discrete else "points of the box"
            raise NoSafeActionError(
                f"the rules admit none of {len(self._tried)} {points} {where}: they must admit an "
                "action in every state to which an admitted action may lead (where they admit only "
                "a small part of a Box, give a behaviour that proposes admitted actions)"
            )
        return nearest, admitted

    def check_fits(self, spaces: Spaces, venv: VecEnv | None = None) -> None:
        """Raise ValueError where the rules are for other actions than those of `spaces`.

        `venv` is not used.
        """
        if self.actions.space != spaces[1]:
            raise ValueError(
                f"the rules are for {self.actions.space}, the environment's actions are {spaces[1]}"
            )

    def refuse_unreadable(self, observations: Batch) -> None:
        """Raise NoSafeActionError where one of the `observations` is not finite."""
        good = readable(observations)
        if not good.all():
            raise NoSafeActionError(
                "the rules cannot be evaluated in the state "
                f"{take(observations, int(good.argmin()))}: it is not finite"
            )

    def nearest(self, observations: Batch, rows: Array, /) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Return the nearest admitted actions (n, act), and (n,) False where none is admitted.

        Where none is admitted, the returned action has no meaning. `observations` is a batch of n
        observations, and `rows` (n, act) are the actions to replace.
        """
        tried = self._tried
        inside = self.admits(observations, np.broadcast_to(tried, (len(rows), *tried.shape)))
        distance = np.square(tried - rows[:, None]).sum(axis=-1)
        best = np.where(inside, distance, np.inf).argmin(axis=1)
        return tried[best], np.asarray(inside.any(axis=1))

    @cached_property
    def _tried(self) -> Array:
        """All choices, or a fixed set of points of the box."""
        if self.actions.discrete:
            return self.actions.choices
        low, high = self.actions.low, self.actions.high
        points = np.random.default_rng(0).uniform(low, high, (_CANDIDATES, len(low)))
        return points.astype(np.float32)

    def _ask(self, observation: Any, action: Any) -> bool:  # noqa: ANN401
        if not isinstance(observation, np.integer) or not self.actions.discrete:
            # The function gets copies, so that it cannot change the arguments of later calls.
            return _truth(self._safe(copied(observation), copied(action)), "safe(...)")
        key = int(observation), np.asarray(action).tobytes()
        if key not in self._known:
            self._known[key] = _truth(self._safe(int(observation), copied(action)), "safe(...)")
        return self._known[key]


class LoggedRules:
    """Rules for the states of a log, in which no action is executed.

    Where the rules admit no action, `replace` returns False and raises no error.
    """

    def __init__(self, rules: SafeRules) -> None:
        self.actions, self.check_fits = rules.actions, rules.check_fits
        self.admits, self.replace = rules.admits, rules.nearest


def _truth(answer: object, what: str) -> bool:
    """Return an answer that is True or False; raise TypeError for any other object."""
    if isinstance(answer, np.ndarray) and answer.dtype == np.bool_ and answer.ndim == 0:
        answer = answer[()]
    if not isinstance(answer, bool | np.bool_):
        raise TypeError(
            f"{what} must be True or False, got {answer!r:.60} ({type(answer).__name__}): for a "
            "constraint h return `h <= 0`"
        )
    return bool(answer)


def as_safe_set(
    safe: SafeRules | Shield | HasShield | str | os.PathLike[str] | None, behaviour: object
) -> SafeSet | None:
    """Return the given safe set, or else that of the behaviour, or None where it has none.

    Raises:
        TypeError: `safe` is neither rules nor a shield.
    """
    if safe is None:
        # A `SafeSupportPolicy` has a shield, and a `MaskedUniform` has a safe set.
        own = getattr(behaviour, "safe_set", getattr(behaviour, "shield", None))
        if isinstance(behaviour, SafeRules):
            return behaviour
        if isinstance(own, SafeRules | ShieldSet):
            return own
        return ShieldSet(own) if isinstance(own, Shield) else None
    return safe if isinstance(safe, SafeRules) else ShieldSet(as_shield(safe))


def spaces_of(env: Any) -> Spaces:  # noqa: ANN401
    """Return the spaces of observations and actions of `env`: an environment, a log or a model."""
    return env.observation_space, env.action_space


def check_spaces(given: object, whose: str, spaces: Spaces) -> None:
    """Raise ValueError where the spaces of an object, if it has any, are not the given ones.

    Args:
        given: The object.
        whose: Name of the object in the message.
        spaces: The spaces of observations and of actions that it must have.
    """
    for name, space in zip(("observation_space", "action_space"), spaces, strict=True):
        own = getattr(given, name, None)
        if isinstance(own, gym.Space) and own != space:
            raise ValueError(f"{whose} {name} is {own}, the environment's {space}")
