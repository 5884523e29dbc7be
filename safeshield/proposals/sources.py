"""Behaviour policies mu: who collects, and inside whose support is learned.

A behaviour draws as many actions as one likes in many states at once, and may know their density.
All of it is NumPy: observations as environments batch them, actions as rows of `spaces.rows`.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol, cast, runtime_checkable

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.nn.forward import forward_layers
from safeshield.online.safe_sets import LoggedRules, SafeRules, ShieldSet
from safeshield.proposals.choices import choice_index, draw_choices, normalised
from safeshield.rollouts.policies import as_batch_policy, checked_log_prob, executable_actions
from safeshield.shield.critics import StateValue
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.spaces.batches import Batch, batch_length, repeated, take
from safeshield.spaces.rows import flat_actions

Array = npt.NDArray[Any]
_WHOSE = "the behaviour's"


@runtime_checkable
class Behaviour(Protocol):
    """A policy without memory that can be asked for many actions in the same states."""

    def draw(self, observations: Batch, each: int, rng: np.random.Generator, /) -> Array:
        """Return `each` independent actions of each of n states, as rows (n, each, act)."""
        ...

    def log_prob(self, observations: Batch, candidates: Array, /) -> Array | None:
        """Return log mu (n, c) of c actions (n, c, act) in each state; None without a density.

        Where actions are discrete a probability; in a Box up to a constant of the state, which is
        all that learning asks. Minus infinity for what mu never does.
        """
        ...


class Tabular:
    """A table of probabilities over discrete states and actions.

    Args:
        table: (S, c) rows in the order of the observation's integers, columns in that of the
            actions'; at least 0, every row sums to 1.
        observation_space: a Discrete of S states.
        action_space: discrete, of c choices.

    Raises:
        ValueError: another shape, or rows that are no probabilities.

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
        """Return draws of the states' rows."""
        log_probs = self._log_table[self._index(observations)]
        return draw_choices(self._choices, log_probs, each, rng)

    def log_prob(self, observations: Batch, candidates: Array, /) -> Array:
        """Return the table's entries."""
        rows = self._log_table[self._index(observations)]
        return np.take_along_axis(rows, choice_index(self._choices, candidates), axis=1)

    def _index(self, observations: Batch) -> Array:
        return np.asarray(observations, np.int64).reshape(-1) - self._start


class MaskedUniform:
    """Uniform over what rules, or a shield, admit.

    Discrete: over the admitted choices. A Box: by rejection from the uniform one.

    Args:
        safe: a `SafeRules`, or a shield, a path to its file or an agent that has one.
        rounds: how often a Box is tried before giving up; 2^k actions a state in round k.
    """

    def __init__(
        self, safe: SafeRules | LoggedRules | Shield | HasShield | str, rounds: int = 8
    ) -> None:
        self.safe_set: SafeRules | LoggedRules | ShieldSet = (
            safe if isinstance(safe, SafeRules | LoggedRules) else ShieldSet(as_shield(safe))
        )
        self._played = self.safe_set.actions
        self._rounds = rounds

    def of_a_log(self) -> MaskedUniform:
        """Return the same that rules do not stop: for states of a log, in which nothing runs."""
        own = self.safe_set
        return MaskedUniform(LoggedRules(own), self._rounds) if isinstance(own, SafeRules) else self

    def draw(self, observations: Batch, each: int, rng: np.random.Generator, /) -> Array:
        """Return admitted actions; where none is found, what the safe set puts in their place."""
        if self._played.discrete:
            count = batch_length(observations)
            every = np.broadcast_to(self._played.choices, (count, *self._played.choices.shape))
            return draw_choices(self._played, self.log_prob(observations, every), each, rng)
        return self._rejected(repeated(observations, each), rng).reshape(
            -1, each, self._played.width
        )

    def log_prob(self, observations: Batch, candidates: Array, /) -> Array:
        """Return 0 (a Box) or minus the log of their number where admitted."""
        inside = self.safe_set.admits(observations, candidates)
        if not self._played.discrete:
            return np.where(inside, 0.0, -np.inf)
        every = np.broadcast_to(
            self._played.choices, (len(candidates), *self._played.choices.shape)
        )
        number = self.safe_set.admits(observations, every).sum(axis=1, keepdims=True)
        log_prob = np.where(inside, -np.log(np.maximum(number, 1)), -np.inf)
        lost = np.flatnonzero(number == 0)
        if len(lost):
            # As the safe set has it: a shield's least bad action stands alone.
            first = np.repeat(self._played.choices[:1], len(lost), axis=0)
            instead, _ = self.safe_set.replace(take(observations, lost), first)
            same = (candidates[lost] == instead[:, None]).all(axis=-1)
            log_prob[lost] = np.where(same, 0.0, -np.inf)
        return log_prob

    def _rejected(self, observations: Batch, rng: np.random.Generator) -> Array:
        low, high = self._played.low, self._played.high
        chosen = rng.uniform(low, high, (batch_length(observations), len(low))).astype(np.float32)
        left = np.flatnonzero(~self.safe_set.admits(observations, chosen[:, None])[:, 0])
        for k in range(1, self._rounds):
            if not len(left):
                return chosen
            drawn = rng.uniform(low, high, (len(left), 2**k, len(low))).astype(np.float32)
            inside = self.safe_set.admits(take(observations, left), drawn)
            found = inside.any(axis=1)
            chosen[left[found]] = drawn[found, inside[found].argmax(axis=1)]
            left = left[~found]
        if len(left):
            chosen[left], _ = self.safe_set.replace(take(observations, left), chosen[left])
        return chosen


class PolicyBehaviour:
    """A user's policy as a behaviour: a `SafeSupportPolicy`, a function, a model of SB3.

    Anything that `as_batch_policy` takes, asked for its random actions. It must act in each state
    by itself: the same state comes many times in one batch. Its density is its method
    ``log_prob(observations, actions) -> (n,)``, or, known up to a constant of the state,
    ``relative_log_prob``, where it has one.
    """

    def __init__(self, policy: Any, action_space: gym.Space[Any]) -> None:  # noqa: ANN401
        self._played = flat_actions(action_space)
        self._acting = as_batch_policy(policy, action_space, deterministic=False)
        relative = getattr(policy, "relative_log_prob", None)
        self._log_prob = relative if callable(relative) else getattr(policy, "log_prob", None)

    def draw(self, observations: Batch, each: int, rng: np.random.Generator, /) -> Array:
        """Ask it `each` times about each state, all at once."""
        count = batch_length(observations)
        asked = repeated(observations, each)
        actions = executable_actions(self._acting(asked, rng), self._played.space, count * each)
        rows, _ = self._played.flatten(actions, "the behaviour's actions")
        return rows.astype(np.float32).reshape(count, each, self._played.width)

    def log_prob(self, observations: Batch, candidates: Array, /) -> Array | None:
        """Return what the policy itself says.

        Raises:
            ValueError: another shape, NaN, or infinite.
        """
        if not callable(self._log_prob):
            return None
        count, each, width = candidates.shape
        actions = self._played.unflatten(candidates.reshape(-1, width))
        told = self._log_prob(repeated(observations, each), actions)
        if told is None:
            return None
        return checked_log_prob(told, (count * each,), _WHOSE).reshape(count, each)


def log_density(behaviour: Behaviour, observations: Batch, candidates: Array) -> Array | None:
    """Return a behaviour's log_prob (n, c), looked at; None without one.

    Raises:
        ValueError: another shape, NaN, or infinite.
    """
    told = behaviour.log_prob(observations, candidates)
    return None if told is None else checked_log_prob(told, candidates.shape[:2], _WHOSE)


class FlowTeacher:
    """What the log does, by the flow (a Box) or classifier that a shield or agent carries.

    What it draws is not cut down to what the shield accepts (`SafeSupportPolicy(shield,
    "behaviour")` is); a learner does so, by this shield where it knows no other.

    Args:
        shield: a `Shield` that knows the behaviour, a path, or an agent such as `SafeFQL`.

    Raises:
        ValueError: the shield has learned no behaviour.
    """

    def __init__(self, shield: Shield | HasShield | str) -> None:
        self.shield = as_shield(shield)
        self._model = self.shield.model
        if not self._model.knows_behaviour:
            raise ValueError(
                "shield has not learned what the log does: make it with ShieldTrainer or SafeFQL"
            )

    def draw(self, observations: Batch, each: int, rng: np.random.Generator, /) -> Array:
        """Carry noise along the flow; or draw from the classifier."""
        states = self._states(observations)
        if self._model.action_codec.discrete:
            return draw_choices(self._model.action_codec, self._log_probs(states), each, rng)
        shape = (len(states.value), each, self._model.behaviour_noise_features)
        return self._model.behaviour(states, rng.standard_normal(shape).astype(np.float32))

    def log_prob(self, observations: Batch, candidates: Array, /) -> Array | None:
        """Return the classifier's log probabilities; a clipped flow has no density."""
        played = self._model.action_codec
        if not played.discrete:
            return None
        log_probs = self._log_probs(self._states(observations))
        return np.take_along_axis(log_probs, choice_index(played, candidates), axis=1)

    def _states(self, observations: Batch) -> StateValue:
        return self.shield.states(self.shield.observation_rows(observations)[0])

    def _log_probs(self, states: StateValue) -> Array:
        logits = forward_layers(self._model.behaviour_layers, states.inputs)[0].astype(np.float64)
        return normalised(logits)


def as_behaviour(behaviour: object, action_space: gym.Space[Any]) -> Behaviour:
    """Return a behaviour from one, from rules (uniform inside), or from any policy.

    Raises:
        TypeError: none of them.
    """
    if isinstance(behaviour, SafeRules):
        return MaskedUniform(behaviour)
    if not inspect.isclass(behaviour) and callable(getattr(behaviour, "draw", None)):
        return cast(Behaviour, behaviour)
    try:
        return PolicyBehaviour(behaviour, action_space)
    except TypeError as error:
        raise TypeError(
            "behaviour must be a Behaviour (Tabular, MaskedUniform, FlowTeacher, ...), SafeRules, "
            f"or a policy: {error}"
        ) from error
