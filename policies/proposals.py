"""Where `SafeSupportPolicy` takes its proposals from, and what is known of their densities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from safeshield.nn.forward import forward_layers
from safeshield.rollouts.policies import as_batch_policy, checked_log_prob
from safeshield.shield.critics import StateValue
from safeshield.shield.shield import Shield
from safeshield.spaces.batches import Batch, batch_length, copied, repeated

Memory = tuple[npt.NDArray[Any], ...] | None
"""A recurrent state, as Stable-Baselines3's ``predict`` takes and returns it."""
_Array = npt.NDArray[Any]


class Proposal(Protocol):
    """A way to propose actions, as rows of `spaces.rows`, in n states.

    A state comes twice: as the critics see it, and as the environment returned it.
    """

    fresh: bool
    """Whether it proposes as often as one likes, in some of the states alone. Else it gives one
    action for all of them, and may remember that it was asked."""

    def draw(
        self, states: StateValue, observations: Batch, each: int, rng: np.random.Generator
    ) -> _Array:
        """Return `each` proposals a state, independent of each other: (n, each, act)."""
        ...

    def best(self, states: StateValue, observations: Batch, rng: np.random.Generator) -> _Array:
        """Return the proposals (n, act) of ``deterministic=True``."""
        ...

    def log_prob(
        self, states: StateValue, observations: Batch, candidates: _Array
    ) -> _Array | None:
        """Return the log density (n, c) of c actions a state (n, c, act); None without a density.

        Where actions are discrete their probability, else per unit of volume of the action box.
        """
        ...


class Uniform:
    """The whole action space, everywhere alike."""

    fresh = True

    def __init__(self, shield: Shield) -> None:
        self._played = shield.model.action_codec
        if self._played.discrete:
            self._log_size = np.log(len(self._played.choices))
        else:
            self._log_size = np.log(self._played.high - self._played.low).sum()

    def draw(
        self, states: StateValue, observations: Batch, each: int, rng: np.random.Generator
    ) -> _Array:
        """Return points of the box."""
        low, high = self._played.low, self._played.high
        points = rng.uniform(low, high, (len(states.value), each, self._played.width))
        return points.astype(np.float32)

    def best(self, states: StateValue, observations: Batch, rng: np.random.Generator) -> _Array:
        """Return the middle of the box."""
        middle = 0.5 * (self._played.low + self._played.high)
        return np.tile(middle.astype(np.float32), (len(states.value), 1))

    def log_prob(self, states: StateValue, observations: Batch, candidates: _Array) -> _Array:
        """Return minus the log of the box's volume, or of the number of choices."""
        return np.full(candidates.shape[:2], -self._log_size)


class Behaviour:
    """What the log does in a state: the shield's "behaviour" network, or FLRP's generative model.

    For a Box of actions a flow: noise z ~ N(0, I) is carried along the velocity field, x <- x +
    v(s, x, i/K) / K for i = 0 .. K - 1, and clipped to the box, so that points of its boundary
    have a probability of their own and there is no density. Where actions are discrete, a
    classifier.

    Source: flow matching as in SafeFQL (arXiv 2603.15136); `nn.flow`.
    """

    fresh = True

    def __init__(self, shield: Shield) -> None:
        self._model = model = shield.model
        if not model.knows_behaviour:
            raise ValueError(
                "proposal='behaviour' needs a shield that has learned what the log does, and this "
                "one has no such network: make it with ShieldTrainer or SafeFQL, or pass "
                "proposal='uniform' or a policy"
            )

    def draw(
        self, states: StateValue, observations: Batch, each: int, rng: np.random.Generator
    ) -> _Array:
        """Return what the flow makes of noise."""
        width = self._model.behaviour_noise_features
        return self.carry(states, rng.standard_normal((len(states.value), each, width)))

    def best(self, states: StateValue, observations: Batch, rng: np.random.Generator) -> _Array:
        """Return what the flow makes of z = 0."""
        shape = (len(states.value), 1, self._model.behaviour_noise_features)
        return self.carry(states, np.zeros(shape))[:, 0]

    def log_prob(
        self, states: StateValue, observations: Batch, candidates: _Array
    ) -> _Array | None:
        """Return the classifier's log probabilities."""
        played = self._model.action_codec
        if not played.discrete:
            return None
        logits = forward_layers(self._model.behaviour_layers, states.inputs)[0].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        entries = np.moveaxis((candidates - played.low).astype(np.int64), -1, 0)
        index = np.ravel_multi_index(tuple(entries), tuple(played.categories))
        return np.take_along_axis(log_probs, index, axis=1)

    def carry(self, states: StateValue, noise: _Array) -> _Array:
        """Return what the flow makes of noise (n, each, z)."""
        return self._model.behaviour(states, noise.astype(np.float32))


class Asked:
    """A user's policy, of any kind that `as_batch_policy` takes; it need not act alike twice.

    Its recurrent state, where ``predict`` takes and returns one, is the same whenever it is asked
    in a state, so that it tells what was seen and not how often it was asked.
    """

    fresh = False

    def __init__(self, shield: Shield, policy: Any) -> None:  # noqa: ANN401
        self._shield = shield
        self._policy = policy
        self._acting = as_batch_policy(policy, shield.action_space, deterministic=False)
        own = callable(getattr(policy, "act_batch", None)) or getattr(policy, "batched", False)
        self._predicts = not own and callable(getattr(policy, "predict", None))
        self.see(None, None)

    def see(self, memory: Memory, starts: npt.NDArray[np.bool_] | None) -> None:
        """Begin new states, with what the policy remembers of the ones before."""
        self._before, self._starts = memory, starts
        self.memory = memory

    def start_wave(self, num_envs: int) -> None:
        """Begin new episodes."""
        start = getattr(self._acting, "start_wave", None)
        if callable(start):
            start(num_envs)

    def draw(
        self, states: StateValue, observations: Batch, each: int, rng: np.random.Generator
    ) -> _Array:
        """Return one answer for each state, whatever `each`."""
        return self._ask(observations, rng, deterministic=False)[:, None]

    def best(self, states: StateValue, observations: Batch, rng: np.random.Generator) -> _Array:
        """Return its deterministic answers, where it knows the difference."""
        return self._ask(observations, rng, deterministic=True)

    def log_prob(
        self, states: StateValue, observations: Batch, candidates: _Array
    ) -> _Array | None:
        """Return what the policy's own ``log_prob(observations, actions)`` says."""
        log_prob = getattr(self._policy, "log_prob", None)
        if not callable(log_prob):
            return None
        count, each, width = candidates.shape
        actions = self._shield.points(candidates.reshape(-1, width))
        told = log_prob(repeated(observations, each), actions)
        return checked_log_prob(told, (count * each,), "the policy's").reshape(count, each)

    def _ask(self, observations: Batch, rng: np.random.Generator, *, deterministic: bool) -> _Array:
        # It is asked more than once about the same states, and may write into what it is given.
        observations = copied(observations)
        if self._predicts:
            actions, self.memory = self._policy.predict(
                observations,
                state=self._before,
                episode_start=self._starts,
                deterministic=deterministic,
            )
        else:
            actions = self._acting(observations, rng)
        rows, _ = self._shield.action_rows(np.asarray(actions))
        if len(rows) != batch_length(observations):
            raise ValueError(
                f"the policy returned {len(rows)} actions for {batch_length(observations)} "
                "observations; one that takes a whole batch needs batched = True (batch_policy)"
            )
        return rows if self._shield.model.action_codec.discrete else rows.astype(np.float32)


def batch_of_one(observation: Batch) -> Batch:
    """Return a single observation as a batch."""
    if isinstance(observation, Mapping):
        return {key: batch_of_one(part) for key, part in observation.items()}
    return np.asarray(observation)[None]
