r"""`SafeSupportPolicy`, which explores with the actions that a shield accepts.

A proposal q(a | s) is restricted to the safe support {a: Q_h(s, a) <= -delta}:

    pi(a | s) = q(a | s) 1[Q_h(s, a) <= -delta] / Z(s),   Z(s) = P_{a ~ q}(Q_h(s, a) <= -delta)

Where actions are discrete and q is known, pi is computed and sampled. Otherwise pi is sampled by
rejection, which draws proposals until one is accepted.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from safeshield.nn.arrays import log_softmax
from safeshield.proposals.choices import draw_choices, every_choice
from safeshield.proposals.sources import LoggedBehaviour, Source, Uniform, UserPolicy
from safeshield.rollouts.policies import Memory
from safeshield.shield.critics import StateValue
from safeshield.shield.report import FilterReport
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.spaces.batches import Batch, batch_length, batch_of_one, finite, take
from safeshield.spaces.shapes import Scalars

PROPOSALS = ("uniform", "behaviour")
"""Names of proposals; any other proposal is a policy."""
_Array = npt.NDArray[Any]
_CHUNK = 1 << 16  # number of actions that are judged together when Z is estimated


class LogDensity(NamedTuple):
    """The log of a density, and its standard error."""

    value: Scalars | np.floating
    """(n,) or (): natural logarithm; minus infinity outside the safe support."""
    error: Scalars | np.floating
    """(n,) or (): standard error of `value`; 0 where it is exact."""


class _View(NamedTuple):
    """Observations of n states, in the forms that policies and the shield use."""

    observations: Batch
    """Batched as environments do. Policies may refuse NaN and infinity, so zeros replace them; the
    shield ignores the policy's action in such a state."""
    rows: _Array
    """(n, obs) unchanged observations, as rows."""
    states: StateValue

    def take(self, index: npt.NDArray[np.int64] | slice) -> _View:
        return _View(take(self.observations, index), self.rows[index], self.states.take(index))


class SafeSupportPolicy:
    """Draw actions from a proposal, restricted to the actions that the shield accepts.

    The policy is for exploration. It can be used as a policy (`collect`, `run_episodes`,
    `calibrate`: it acts for whole batches, and draws from their generators) and as a model of
    Stable-Baselines3 (``evaluate_policy``; `predict` draws from the policy's own generator).

    Where no proposal is accepted within `rounds`, or the observation is not readable, the shield's
    replacement of the last proposal is returned. `report.intervened` is then True, and the density
    does not describe the action. Where actions are discrete and none is acceptable, the action of
    lowest Q_h is returned with probability 1. Where a discrete proposal has no probability on
    acceptable actions, the uniform distribution over them is used.

    ``deterministic=True`` returns the most probable acceptable action where actions are discrete
    and the proposal has a density (the safest of equally probable ones). Otherwise it returns the
    middle of the box, the behaviour's action for zero noise, or the policy's deterministic action,
    or the shield's replacement of that action.

    Args:
        shield: A `Shield`, a path to its file, or an agent that has one. Its threshold says which
            actions are safe; its record, if any, says for which proposers.
        proposal: ``"uniform"`` over the action space; ``"behaviour"``, the log's behaviour, from
            the network that `ShieldTrainer` and `SafeFQL` store in the shield; or a policy that
            `as_batch_policy` takes. The policy is asked repeatedly for a random action
            (``deterministic=False``). A policy that always returns the same action has no
            advantage over a `ShieldedPolicy`.
        rounds: Maximal number of rounds of proposals, at least 1. Round k = 0, 1, ... draws 2^k
            proposals in each state that still has no action. From a policy, each round draws one
            in all states, because the policy may remember each call. 7 rounds are 127 proposals:
            where Z is 0.05, all of them fail in one state of 700.
        seed: Seed of `predict`'s generator; None for an unpredictable one. A policy that draws
            from a generator of its own (PyTorch's, in Stable-Baselines3) is seeded there.

    Raises:
        ValueError: `proposal` is an unknown name; it is "behaviour" and the shield has no such
            network; or `rounds` is below 1.
        TypeError: `proposal` is not a policy, or `shield` is none of the three.

    >>> import gymnasium, safeshield
    >>> import numpy as np
    >>> from safeshield import SafeFQL, SafeFQLConfig, collect
    >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
    >>> agent = SafeFQL(SafeFQLConfig(critic_hidden=(16,), flow_hidden=(16,))).fit(log, steps=30)
    >>> policy = SafeSupportPolicy(agent.shield().with_delta(0.05), "behaviour", seed=0)
    >>> downstream = np.array([[1.5, 0.0], [1.8, 1.0], [1.6, -1.0]], np.float32)
    >>> actions, _ = policy.predict(downstream)
    >>> bool((policy.shield.value(downstream, actions) <= -0.05).all())
    True
    """

    batched = True

    def __init__(
        self,
        shield: Shield | HasShield | str | os.PathLike[str],
        proposal: object = "uniform",
        *,
        rounds: int = 7,
        seed: int | None = None,
    ) -> None:
        self.shield = as_shield(shield)
        self._codec = self.shield.model.action_codec
        if type(rounds) is not int or rounds < 1:
            raise ValueError(f"rounds must be an integer of at least 1, got {rounds!r}")
        self.rounds = rounds
        self._source = _source_of(self.shield, proposal)
        self._rng = np.random.default_rng(seed)
        self._memory: Memory = None
        self._starts: npt.NDArray[np.bool_] = np.ones(0, dtype=np.bool_)
        self.report: FilterReport | None = None
        """The report on the last actions; `intervened` is True where the shield replaced the
        proposal. None where the last call failed."""

    def start_wave(self, num_envs: int) -> None:
        """Begin new episodes in `num_envs` environments and reset the proposal policy's memory."""
        self._memory, self._starts = None, np.ones(num_envs, dtype=np.bool_)
        if isinstance(self._source, UserPolicy):
            self._source.start_wave(num_envs)

    def __call__(self, observations: Batch, rng: np.random.Generator, /) -> _Array:
        """Return n actions for n observations, as a batch policy that draws from `rng`."""
        self.report = None
        count = batch_length(observations)
        if len(self._starts) != count:
            self.start_wave(count)
        view, _ = self._look(observations)
        actions, self._memory, self.report = self._act(
            view, self._memory, self._starts, rng, deterministic=False
        )
        self._starts = np.zeros(count, dtype=np.bool_)
        return actions

    def predict(
        self,
        observation: Batch,
        state: Memory = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[_Array, Memory]:
        """Return an action, or n actions for a batch, and the proposal policy's recurrent state.

        Args:
            observation: One observation, or a batch (see `Shield.value`).
            state: Recurrent state of the proposal policy, if it has one.
            episode_start: (n,) where a new episode begins.
            deterministic: See the class.

        Raises:
            ValueError: The observation has a wrong shape.
        """
        self.report = None
        view, single = self._look(observation)
        actions, state, report = self._act(
            view, state, episode_start, self._rng, deterministic=deterministic
        )
        self.report = report.row(0) if single else report
        return (actions[0] if single else actions), state

    def log_prob(
        self, observations: Batch, actions: Batch, *, samples: int = 1024
    ) -> Scalars | np.floating:
        """Return log pi(a | s), which is the `value` of `log_density`.

        `observations` and `actions` are one pair or a batch, and `samples` is the number of draws
        for the estimate.

        >>> import gymnasium, safeshield
        >>> from safeshield import ShieldConfig, ShieldTrainer, collect
        >>> log = collect(gymnasium.make("safeshield/Boat-v0"), "random", episodes=20, seed=0)
        >>> config = ShieldConfig(critic_hidden=(8,), behaviour_hidden=(8,), fallback_hidden=(8,))
        >>> shield = ShieldTrainer(config).fit(log, steps=30).shield()
        >>> policy = SafeSupportPolicy(shield, "uniform", seed=0)
        >>> downstream = np.array([1.5, 0.0], np.float32)
        >>> action, _ = policy.predict(downstream)
        >>> float(np.exp(policy.log_prob(downstream, action))) >= 0.25  # of [-1, 1]^2
        True
        """
        return self.log_density(observations, actions, samples=samples).value

    def log_density(
        self, observations: Batch, actions: Batch, *, samples: int = 1024
    ) -> LogDensity:
        """Return log pi(a | s) of actions, with its standard error: () or (n,).

        For discrete actions it is an exact log probability. For a Box it is the log density
        with respect to volume in units of the action space (a uniform density has the value minus
        the log of the box's volume),

            log pi(a | s) = log q(a | s) - log Z(s),   Z estimated as (k + 1/2) / (m + 1/2)

        from m = `samples` proposals of which k are accepted. The added halves remove the bias of
        first order from log Z. The remaining bias is far below the standard error
        sqrt((1 - Z) / (m Z)) as long as m Z is well above 1. Where m Z is smaller, the estimate
        only shows that Z is small. For the uniform proposal the same points are used in all states,
        so that the result is a function of s and a. The errors in different states are then not
        independent.

        The value is minus infinity where the shield does not accept the action. One exception: in
        a state where no discrete action is acceptable, the one that the shield executes has the
        value 0. In a state where no
        action of a Box is ever accepted, the shield's replacement has no density, and every action
        has the value minus infinity.

        Args:
            observations: One observation, or a batch (see `Shield.value`).
            actions: One action, or a batch.
            samples: Proposals in each state for the estimate of Z; without effect where actions
                are discrete, because all of them are weighed.

        Raises:
            TypeError: The proposal has no density: it is the behaviour of a Box (a flow, clipped to
                the box), or a policy without a method ``log_prob(observations, actions)`` that
                returns the log density (n,) of n actions in n states.
            ValueError: An array has a wrong shape, or `samples` is below 1.
        """
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        view, single = self._look(observations)
        action_rows, _ = self.shield.action_rows(actions)
        if len(action_rows) != len(view.rows):
            raise ValueError(f"got {len(view.rows)} observations and {len(action_rows)} actions")
        value = self._relative(view, action_rows)
        if value is None:
            raise self._without_density()
        error = np.zeros(len(value))
        if not self._codec.discrete:
            inside = np.flatnonzero(np.isfinite(value))
            log_z, error[inside] = self._log_z(view.take(inside), samples)
            value[inside] -= log_z
        return LogDensity(value[0], error[0]) if single else LogDensity(value, error)

    def relative_log_prob(self, observations: Batch, actions: Batch) -> Scalars | None:
        """Return log pi(a | s) (n,) up to a constant of the state; None without a density.

        For a Box this is log q(a | s) where the shield accepts the action, and minus infinity
        elsewhere. Z(s) is not estimated, because it is not needed to compare actions of the same
        state. For discrete actions this is `log_prob`.

        Args:
            observations: A batch.
            actions: A batch.

        Raises:
            ValueError: An array has a wrong shape.
        """
        return self._relative(self._look(observations)[0], self.shield.action_rows(actions)[0])

    # -- drawing --------------------------------------------------------------------------------

    def _look(self, observations: Batch) -> tuple[_View, bool]:
        """Return observations as a `_View`, and whether a single observation was given."""
        rows, single = self.shield.observation_rows(observations)
        batch = batch_of_one(observations) if single else observations
        return _View(finite(batch), rows, self.shield.states(rows)), single

    def _act(
        self,
        view: _View,
        memory: Memory,
        starts: npt.NDArray[np.bool_] | None,
        rng: np.random.Generator,
        *,
        deterministic: bool,
    ) -> tuple[_Array, Memory, FilterReport]:
        if isinstance(self._source, UserPolicy):
            self._source.remember(memory, starts)
        choices = self._choice_log_probs(view)
        if choices is not None:
            proposals = self._chosen(choices, view, rng, deterministic)
        elif deterministic:
            proposals = self._source.most_likely(view.observations, rng, view.states)
        else:
            proposals = self._accepted(view, rng)
        executed, report = self.shield.filter_rows(view.states, view.rows, proposals)
        if isinstance(self._source, UserPolicy):
            memory = self._source.memory
        return self.shield.points(executed), memory, report

    def _accepted(self, view: _View, rng: np.random.Generator) -> _Array:
        """Return the first accepted proposal (n, act), or the last one where none is accepted."""
        chosen = np.zeros((len(view.rows), self._codec.width), np.float32)
        left = np.arange(len(view.rows))
        for k in range(self.rounds):
            some = view.take(left)
            if isinstance(self._source, UserPolicy):
                # The policy acts once in all states, because it may remember each call.
                drawn = self._source.draw(view.observations, 1, rng)[left]
            else:
                drawn = self._source.draw(some.observations, 2**k, rng, some.states)
            accepted, _ = self.shield.acceptable(some.states, some.rows, drawn)
            found = accepted.any(axis=1)
            first = np.where(found, accepted.argmax(axis=1), -1)
            chosen[left] = drawn[np.arange(len(left)), first]
            # Nothing is ever accepted for an observation that is not readable.
            left = left[~found & self.shield.known(some.states, some.rows)]
            if not len(left):
                break
        return chosen

    def _chosen(
        self, log_probs: _Array, view: _View, rng: np.random.Generator, deterministic: bool
    ) -> _Array:
        if deterministic:
            every = every_choice(self._codec, len(view.rows))
            values = self.shield.acceptable(view.states, view.rows, every)[1]
            likely = log_probs >= log_probs.max(axis=1, keepdims=True)
            index = np.where(likely, values, np.inf).argmin(axis=1)
            return np.asarray(self._codec.choices[index])
        return draw_choices(self._codec, log_probs, 1, rng)[:, 0]

    # -- densities ------------------------------------------------------------------------------

    def _relative(self, view: _View, action_rows: _Array) -> _Array | None:
        """Return log pi (n,) of actions (n, act), for a Box up to log Z; None without a density."""
        if not self._codec.discrete:
            candidates = action_rows[:, None]
            log_q = self._source.log_prob(view.observations, candidates, view.states)
            if log_q is None:
                return None
            accepted, _ = self.shield.acceptable(view.states, view.rows, candidates)
            return np.where(accepted[:, 0], log_q[:, 0], -np.inf)
        log_probs = self._choice_log_probs(view)
        if log_probs is None:
            return None
        inside = np.asarray(self._codec.contains(action_rows))
        known = np.where(inside[:, None], action_rows, self._codec.low)
        index = self._codec.choice_index(known[:, None])
        return np.where(inside, np.take_along_axis(log_probs, index, axis=1)[:, 0], -np.inf)

    def _choice_log_probs(self, view: _View) -> _Array | None:
        """Return log pi (n, c) of all discrete actions; None for a Box, or without a density."""
        if not self._codec.discrete:
            return None
        every = every_choice(self._codec, len(view.rows))
        log_probs = self._source.log_prob(view.observations, every, view.states)
        if log_probs is None:
            return None
        mask, _ = self.shield.acceptable_choices(view.states, view.rows)
        masked = np.where(mask, log_probs, -np.inf)
        # Where the proposal has no probability on acceptable actions, use the uniform distribution.
        never = masked.max(axis=1, keepdims=True) == -np.inf
        return log_softmax(np.where(never & mask, 0.0, masked))

    def _log_z(self, view: _View, samples: int) -> tuple[_Array, _Array]:
        """Return the estimates of log Z (n,) and their standard errors."""
        at_once = max(1, _CHUNK // samples)
        parts = [slice(i, i + at_once) for i in range(0, len(view.rows), at_once)]
        hits = np.zeros(len(view.rows))
        for part in parts:
            hits[part] = self._hits(view.take(part), samples)
        # The error is not 0 where all were accepted, because further proposals might be rejected.
        error = np.sqrt((samples - hits + 0.5) / (samples + 1.0) / (hits + 0.5))
        return np.log((hits + 0.5) / (samples + 0.5)), error

    def _hits(self, view: _View, samples: int) -> _Array:
        """Return the number (n,) of accepted proposals among `samples` in each state."""
        rng = np.random.default_rng(0)
        if isinstance(self._source, Uniform):
            points = self._source.draw(take(view.observations, slice(1)), samples, rng)
            drawn = np.broadcast_to(points, (len(view.rows), *points.shape[1:]))
        else:
            drawn = self._source.draw(view.observations, samples, rng)
        hits: _Array = self.shield.acceptable(view.states, view.rows, drawn)[0].sum(axis=1)
        return hits

    def _without_density(self) -> TypeError:
        why = (
            "a policy without a method log_prob(observations, actions) -> (n,)"
            if isinstance(self._source, UserPolicy)
            else "the behaviour of a Box of actions, a flow whose actions are clipped to the box"
        )
        return TypeError(
            f"there is no density for {why}: use proposal='uniform', or a policy with one"
        )


def _source_of(shield: Shield, proposal: object) -> Source:
    if not isinstance(proposal, str):
        return UserPolicy(proposal, shield.action_space, judged=True)
    if proposal not in PROPOSALS:
        raise ValueError(f"proposal must be one of {list(PROPOSALS)} or a policy, got {proposal!r}")
    if proposal == "uniform":
        return Uniform(shield.action_space)
    if not shield.model.knows_behaviour:
        raise ValueError(
            "proposal='behaviour' needs a shield that has learned the log's behaviour, and this "
            "one has no such network: make it with ShieldTrainer or SafeFQL, or pass "
            "proposal='uniform' or a policy"
        )
    return LoggedBehaviour(shield)
