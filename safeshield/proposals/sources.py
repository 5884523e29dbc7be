"""Sources of proposals: the whole action space, the log's behaviour, or a user's policy.

A source draws any number of actions in many states at once, and may know their density.
Observations are batched as environments do, and actions are NumPy rows (`spaces.rows`).
"""

from __future__ import annotations

import os
from typing import Any, Protocol, cast, runtime_checkable

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.nn.actor import Classifier
from safeshield.nn.arrays import log_softmax
from safeshield.proposals.choices import draw_choices
from safeshield.rollouts.policies import (
    Memory,
    PredictPolicy,
    as_batch_policy,
    checked_log_prob,
    executable_actions,
    start_wave,
)
from safeshield.shield.critics import StateValue
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.spaces.batches import Batch, batch_length, repeated
from safeshield.spaces.rows import flat_actions

Array = npt.NDArray[Any]
Rng = np.random.Generator
Seen = StateValue | None
"""The shield's values of some states; None where they have not been computed."""
_WHOSE = "the behaviour's"


@runtime_checkable
class Behaviour(Protocol):
    """A policy without memory that can draw many actions in the same states."""

    def draw(self, observations: Batch, each: int, rng: Rng, /) -> Array:
        """Return `each` independent actions of each of n states, as rows (n, each, act).

        `observations` is a batch of n observations, and `rng` generates the draws.
        """
        ...

    def log_prob(self, observations: Batch, candidates: Array, /) -> Array | None:
        """Return log mu (n, c) of c actions in each of n states; None without a density.

        Where actions are discrete this is the log of a probability. In a Box it is known up to a
        constant of the state, which suffices for learning. It is minus infinity for actions that mu
        never takes.

        Args:
            observations: Batch of n observations.
            candidates: (n, c, act) actions, as rows.
        """
        ...


def log_density(behaviour: Behaviour, observations: Batch, candidates: Array) -> Array | None:
    """Return the checked log_prob (n, c) of a behaviour; None where it has none.

    Args:
        behaviour: The behaviour.
        observations: Batch of n observations.
        candidates: (n, c, act) actions, as rows.

    Raises:
        ValueError: The result has another shape, or holds NaN or plus infinity.
    """
    told = behaviour.log_prob(observations, candidates)
    return None if told is None else checked_log_prob(told, candidates.shape[:2], _WHOSE)


class Source(Protocol):
    """A `Behaviour` with a density per unit of volume and a proposal that needs no noise.

    `states` holds the shield's values of the states, where they have been computed already. Only
    a source that uses the shield's networks reads it.
    """

    def draw(self, observations: Batch, each: int, rng: Rng, /, states: Seen = None) -> Array:
        """Return `each` proposals of each of n states, as rows (n, each, act).

        Args:
            observations: Batch of n observations.
            each: Number of proposals in each state.
            rng: Generator of the draws.
            states: The shield's values of the states, where they have been computed.
        """
        ...

    def most_likely(self, observations: Batch, rng: Rng, /, states: Seen = None) -> Array:
        """Return the proposals (n, act) of ``deterministic=True``.

        The arguments `observations`, `rng` and `states` are those of `draw`.
        """
        ...

    def log_prob(
        self, observations: Batch, candidates: Array, /, states: Seen = None
    ) -> Array | None:
        """Return log densities (n, c) of c actions in each of n states; None without a density.

        `candidates` (n, c, act) are the actions. `observations` and `states` are those of `draw`.
        """
        ...


class Uniform:
    """Uniform distribution over the whole of `action_space`, the same in every state."""

    def __init__(self, action_space: gym.Space[Any]) -> None:
        self._codec = flat_actions(action_space)
        if self._codec.discrete:
            self._log_size = np.log(len(self._codec.choices))
        else:
            self._log_size = np.log(self._codec.high - self._codec.low).sum()

    def draw(self, observations: Batch, each: int, rng: Rng, /, states: Seen = None) -> Array:
        """Return points of the box, or choices, as rows (n, each, act).

        The arguments `observations`, `each`, `rng` and `states` are those of `Source.draw`.
        """
        count = batch_length(observations)
        if self._codec.discrete:
            log_probs = np.full((count, len(self._codec.choices)), -self._log_size)
            return draw_choices(self._codec, log_probs, each, rng)
        shape = (count, each, self._codec.width)
        return rng.uniform(self._codec.low, self._codec.high, shape).astype(np.float32)

    def most_likely(self, observations: Batch, rng: Rng, /, states: Seen = None) -> Array:
        """Return the middle of the box, (n, act), rounded down where actions are discrete.

        The arguments `observations`, `rng` and `states` are those of `Source.draw`.
        """
        middle = 0.5 * (self._codec.low + self._codec.high)
        middle = np.floor(middle) if self._codec.discrete else middle
        return np.tile(middle.astype(np.float32), (batch_length(observations), 1))

    def log_prob(self, observations: Batch, candidates: Array, /, states: Seen = None) -> Array:
        """Return minus the log of the box's volume, or of the number of choices: (n, c).

        The arguments `observations`, `candidates` and `states` are those of `Source.log_prob`.
        """
        return np.full(candidates.shape[:2], -self._log_size)


class LoggedBehaviour:
    """The log's behaviour, from a network of a shield or agent; also called `FlowTeacher`.

    For a Box of actions this is FLRP's generative model, or a flow: noise z ~ N(0, I) is carried
    along the velocity field, x <- x + v(s, x, i/K) / K for i = 0 .. K - 1, and clipped to the box.
    Points on the boundary of the box therefore have positive probability, and there is no density.
    Where actions are discrete the network is a classifier.

    The draws are not restricted to the actions that the shield accepts, unlike those of
    `SafeSupportPolicy(shield, "behaviour")`. `SafeSupportQLearning` restricts them by this shield,
    unless it is given another safe set.

    Source: flow matching as in SafeFQL (arXiv 2603.15136); `nn.flow`.

    Args:
        shield: A `Shield` with a network of the behaviour, a path to its file, or an agent such as
            `SafeFQL`.

    Raises:
        ValueError: The shield has no network of the behaviour.
    """

    def __init__(self, shield: Shield | HasShield | str | os.PathLike[str]) -> None:
        self.shield = as_shield(shield)
        self._model = self.shield.model
        if not self._model.knows_behaviour:
            raise ValueError(
                "shield has not learned the log's behaviour: make it with ShieldTrainer or SafeFQL"
            )

    def draw(self, observations: Batch, each: int, rng: Rng, /, states: Seen = None) -> Array:
        """Return draws (n, each, act) of the flow or of the classifier.

        The arguments `observations`, `each`, `rng` and `states` are those of `Source.draw`.
        """
        states = self._states(observations) if states is None else states
        if self._model.action_codec.discrete:
            return draw_choices(self._model.action_codec, self._log_probs(states), each, rng)
        shape = (len(states.value), each, self._model.behaviour_noise_features)
        return self._model.behaviour(states, rng.standard_normal(shape).astype(np.float32))

    def most_likely(self, observations: Batch, rng: Rng, /, states: Seen = None) -> Array:
        """Return the flow's action for z = 0, or the classifier's likeliest choice: (n, act).

        The arguments `observations`, `rng` and `states` are those of `Source.draw`.
        """
        states = self._states(observations) if states is None else states
        if self._model.action_codec.discrete:
            chosen: Array = self._model.action_codec.choices[self._log_probs(states).argmax(1)]
            return chosen
        shape = (len(states.value), 1, self._model.behaviour_noise_features)
        return self._model.behaviour(states, np.zeros(shape, np.float32))[:, 0]

    def log_prob(
        self, observations: Batch, candidates: Array, /, states: Seen = None
    ) -> Array | None:
        """Return the classifier's log probabilities (n, c); None for a flow.

        The arguments `observations`, `candidates` and `states` are those of `Source.log_prob`.
        """
        codec = self._model.action_codec
        if not codec.discrete:
            return None
        log_probs = self._log_probs(self._states(observations) if states is None else states)
        return np.take_along_axis(log_probs, codec.choice_index(candidates), axis=1)

    def _states(self, observations: Batch) -> StateValue:
        return self.shield.states(self.shield.observation_rows(observations)[0])

    def _log_probs(self, states: StateValue) -> Array:
        classifier = cast(Classifier, self._model.behaviour_actor)
        logits = classifier.logits(self._model.networks, states.inputs)
        return log_softmax(logits.astype(np.float64))


FlowTeacher = LoggedBehaviour
"""The former name of `LoggedBehaviour`."""


class UserPolicy:
    """A user's policy: a `SafeSupportPolicy`, a function, or a model of Stable-Baselines3.

    The policy may be anything that `as_batch_policy` takes. It is asked for random actions. The
    same state occurs many times in one batch, and the policy may act differently each time.

    Args:
        policy: The policy.
        action_space: The environment's action space.
        judged: Whether a shield judges every proposal. If so, actions outside the box are passed to
            the shield, and the density must be per unit of volume: the policy's own ``log_prob(
            observations, actions) -> (n,)``. Otherwise actions are clipped to the box as
            Stable-Baselines3 does, and a method ``relative_log_prob``, which is known up to a
            constant of the state, is preferred.

    Raises:
        TypeError: `policy` is not a policy.
    """

    def __init__(
        self,
        policy: Any,  # noqa: ANN401
        action_space: gym.Space[Any],
        *,
        judged: bool = False,
    ) -> None:
        self._codec = flat_actions(action_space)
        self._acting = as_batch_policy(policy, action_space, deterministic=False)
        self._judged = judged
        relative = None if judged else getattr(policy, "relative_log_prob", None)
        self._log_prob = relative if callable(relative) else getattr(policy, "log_prob", None)
        self.remember(None, None)

    def remember(self, memory: Memory, starts: npt.NDArray[np.bool_] | None) -> None:
        """Set the recurrent state with which the policy acts in the next states.

        The policy gets the same recurrent state every time it acts in these states, so that the
        recurrent state depends on the observations and not on the number of calls. The attribute
        `memory` then holds the recurrent state that the last call returned.

        Args:
            memory: Recurrent state; None at the start.
            starts: (n,) whether an episode begins; None where none does.
        """
        self._before, self._starts = memory, starts
        self.memory = memory

    def start_wave(self, num_envs: int) -> None:
        """Tell the policy that new episodes begin in `num_envs` environments."""
        start_wave(self._acting, num_envs)

    def draw(self, observations: Batch, each: int, rng: Rng, /, states: Seen = None) -> Array:
        """Return `each` actions of the policy in each state, from one call: (n, each, act).

        The arguments `observations`, `rng` and `states` are those of `Source.draw`.
        """
        # The policy gets copies, because it may change them and later gets the same states again.
        rows = self._ask(repeated(observations, each), rng, deterministic=False)
        return rows.reshape(-1, each, self._codec.width)

    def most_likely(self, observations: Batch, rng: Rng, /, states: Seen = None) -> Array:
        """Return the policy's deterministic actions (n, act), if it has a deterministic mode.

        The arguments `observations`, `rng` and `states` are those of `Source.draw`.
        """
        return self._ask(repeated(observations, 1), rng, deterministic=True)

    def log_prob(
        self, observations: Batch, candidates: Array, /, states: Seen = None
    ) -> Array | None:
        """Return the policy's own log densities (n, c); None where it has none.

        The arguments `observations`, `candidates` and `states` are those of `Source.log_prob`.

        Raises:
            ValueError: The result has another shape, or holds NaN or plus infinity.
        """
        if not callable(self._log_prob):
            return None
        count, each, width = candidates.shape
        actions = self._codec.unflatten(candidates.reshape(-1, width))
        told = self._log_prob(repeated(observations, each), actions)
        if told is None:
            return None
        whose = "the policy's" if self._judged else _WHOSE
        return checked_log_prob(told, (count * each,), whose).reshape(count, each)

    def _ask(self, observations: Batch, rng: Rng, *, deterministic: bool) -> Array:
        count = batch_length(observations)
        if isinstance(self._acting, PredictPolicy):
            # Without a recurrent state, every state counts as the beginning of an episode.
            starts = self._starts if self._judged else np.ones(count, dtype=np.bool_)
            actions, self.memory = self._acting.predict(
                observations, self._before, starts, deterministic=deterministic
            )
        else:
            actions = np.asarray(self._acting(observations, rng))
        if not self._judged:
            actions = executable_actions(actions, self._codec.space, count)
        rows, _ = self._codec.flatten(actions, "action")
        if len(rows) != count:
            raise ValueError(
                f"the policy returned {len(rows)} actions for {count} "
                "observations; a policy that takes a whole batch needs batched = True "
                "(batch_policy)"
            )
        return rows if self._codec.discrete else rows.astype(np.float32)
