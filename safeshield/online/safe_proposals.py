"""The proposals of a behaviour, restricted to a safe set."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.nn.arrays import log_softmax
from safeshield.online.safe_sets import LoggedRules, SafeRules, SafeSet, ShieldSet
from safeshield.proposals.choices import draw_choices, every_choice
from safeshield.proposals.sources import Behaviour, UserPolicy, log_density
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.spaces.batches import Batch, batch_length, finite, repeated, take
from safeshield.spaces.rows import SpaceCodec

Array = npt.NDArray[Any]


class SafeProposals(NamedTuple):
    """Proposals in n states of a behaviour mu that is restricted to the safe set."""

    candidates: Array
    """(n, m, act) rows of samples; (n, 0, act) where actions are discrete."""
    log_mu: Array
    """(n, c) log probabilities of all choices; (n, 0) in a Box, where samples weigh the same."""
    executed: Array
    """(n, act) one draw in each state, as rows, which may be executed."""
    outside: npt.NDArray[np.bool_]
    """(n,) whether mu's own draw lay outside the safe set, so that another draw replaced it."""
    mass_outside: Array
    """(n,) share of mu outside the safe set; exact for probabilities, else a share of m draws."""
    no_safe_action: npt.NDArray[np.bool_]
    """(n,) whether no action is admitted, so that the shield's least bad action is used."""

    def take(self, rows: Array) -> SafeProposals:
        """Return the proposals of the states with these indices `rows` (k,)."""
        return SafeProposals(*(part[rows] for part in self))

    def replaced(self, rows: Array, other: SafeProposals) -> SafeProposals:
        """Return a copy in which the states `rows` (k,) have the k proposals of `other`."""
        copy = SafeProposals(*(np.array(part) for part in self))
        for part, new in zip(copy, other, strict=True):
            part[rows] = new
        return copy


@dataclass(frozen=True, eq=False)
class SafeBehaviour:
    """A behaviour restricted to a safe set.

        mu_safe(a | s) = mu(a | s) 1[a admitted] / Z(s)

    Where mu gives no probability to admitted actions, the safe set's replacement is the only
    proposal.
    """

    behaviour: Behaviour
    """mu, the behaviour before it is restricted."""
    safe_set: SafeSet | None
    """The actions that may be executed; None: every action."""
    codec: SpaceCodec
    """Converts actions to rows."""

    def propose(self, observations: Batch, samples: int, rng: np.random.Generator) -> SafeProposals:
        """Draw actions from the behaviour and restrict them to the safe set.

        Args:
            observations: Batch of n observations.
            samples: Number m of draws in each state. It is not used where actions are discrete and
                the behaviour has a `log_prob`, from which the probabilities of all actions follow.
            rng: Generator of the draws.

        Returns:
            The proposals in the n states. In a Box, each draw that the safe set does not admit is
            replaced by a random one of the admitted draws of the same state.

        Raises:
            ValueError: The behaviour returns another shape, NaN, or values that are not
                probabilities.
            NoSafeActionError: `SafeRules` admit no action in a state, or an observation is not
                finite.
        """
        if isinstance(self.safe_set, SafeRules):
            # This comes first, because the behaviour may ask the same rules about the zeros below.
            self.safe_set.refuse_unreadable(observations)
        # Behaviours may refuse NaN and infinity, so zeros replace them. Safe sets get the
        # observations unchanged and admit nothing there.
        seen = finite(observations)
        if self.codec.discrete:
            return self._of_choices(observations, seen, samples, rng)
        return self._of_samples(observations, seen, samples, rng)

    def masked(self, observations: Batch, candidates: Array, log_prob: Array) -> Array:
        """Return `log_prob` with minus infinity for the actions that are not admitted.

        Args:
            observations: Batch of n observations.
            candidates: (n, c, act) actions.
            log_prob: (n, c) their log densities.
        """
        return np.where(self._admitted(observations, candidates), log_prob, -np.inf)

    def _admitted(self, observations: Batch, candidates: Array) -> npt.NDArray[np.bool_]:
        if self.safe_set is None:
            return np.ones(candidates.shape[:2], dtype=np.bool_)
        return self.safe_set.admits(observations, candidates)

    def _of_samples(
        self, observations: Batch, seen: Batch, samples: int, rng: np.random.Generator
    ) -> SafeProposals:
        drawn = self._drawn(seen, samples, rng)
        inside = self._admitted(observations, drawn)
        candidates, some = drawn.copy(), np.asarray(inside.any(axis=1))
        instead, no_safe_action = _instead(self.safe_set, observations, ~some, drawn[:, 0])
        candidates[~some] = instead[:, None]
        for i in np.flatnonzero(~inside.all(axis=1) & some):
            # Refused draws are replaced by random ones of the admitted draws.
            good, bad = np.flatnonzero(inside[i]), np.flatnonzero(~inside[i])
            candidates[i, bad] = drawn[i, rng.choice(good, len(bad))]
        empty, share = np.zeros((len(drawn), 0), np.float32), 1.0 - inside.mean(axis=1)
        return SafeProposals(
            candidates, empty, candidates[:, 0], ~inside[:, 0], share, no_safe_action
        )

    def _of_choices(
        self, observations: Batch, seen: Batch, samples: int, rng: np.random.Generator
    ) -> SafeProposals:
        every = every_choice(self.codec, batch_length(seen))
        log_mu = self._probabilities(seen, every, samples, rng)
        inside = self._admitted(observations, every)
        noise = rng.gumbel(size=log_mu.shape)
        proposed = (log_mu + noise).argmax(axis=1)
        outside = ~inside[np.arange(len(inside)), proposed]
        rows = self.codec.choices[proposed]
        masked, no_safe_action = _restricted(self.safe_set, observations, log_mu, inside, rows)
        executed = self.codec.choices[(masked + noise).argmax(axis=1)]
        mass = np.where(inside, 0.0, np.exp(log_mu)).sum(axis=1)
        return SafeProposals(
            every[:, :0], masked.astype(np.float32), executed, outside, mass, no_safe_action
        )

    def _probabilities(
        self, seen: Batch, every: Array, samples: int, rng: np.random.Generator
    ) -> Array:
        """Return log mu (n, c) of all choices, from its log_prob or from counts of its draws."""
        log_mu = log_density(self.behaviour, seen, every)
        if log_mu is None:
            drawn = self._drawn(seen, samples, rng)
            counts = np.zeros(every.shape[:2])
            np.add.at(counts, (np.arange(len(every))[:, None], self.codec.choice_index(drawn)), 1)
            with np.errstate(divide="ignore"):
                log_mu = np.log(counts / samples)
        total = np.exp(log_mu).sum(axis=1)
        if not np.allclose(total, 1.0, atol=1e-3):
            at = int(np.abs(np.nan_to_num(total, nan=np.inf) - 1.0).argmax())
            raise ValueError(
                "the behaviour's probabilities of all actions must sum to 1 in every state, got "
                f"{total[at]} in {take(seen, at)}: log_prob must be the log of a probability"
            )
        return log_mu

    def _drawn(self, seen: Batch, samples: int, rng: np.random.Generator) -> Array:
        drawn = np.asarray(self.behaviour.draw(seen, samples, rng))
        shape = (batch_length(seen), samples, self.codec.width)
        if drawn.shape != shape:
            raise ValueError(
                f"the behaviour must draw actions of shape {shape} (states, draws, entries), got "
                f"{drawn.shape}"
            )
        inside = np.asarray(self.codec.contains(drawn))
        if not inside.all():
            raise ValueError(
                f"the behaviour must draw actions of {self.codec.space}, got {drawn[~inside][0]}"
            )
        return drawn.astype(np.float32)


def admitted(safe_set: SafeSet | None, observations: Batch, rows: Array) -> Array:
    """Return actions (n, act) in which the safe set has replaced those that it refuses.

    Args:
        safe_set: Actions that may be executed; with None nothing is replaced.
        observations: Batch of n observations.
        rows: (n, act) proposed actions.
    """
    if safe_set is None:
        return rows
    refused = ~safe_set.admits(observations, rows[:, None])[:, 0]
    executed = rows.copy()
    executed[refused], _ = _instead(safe_set, observations, refused, rows)
    return executed


def _restricted(
    safe_set: SafeSet | None,
    observations: Batch,
    log_probs: Array,
    inside: npt.NDArray[np.bool_],
    rows: Array,
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return log probabilities (n, c) of choices restricted to those inside.

    Where no choice inside has a probability, the safe set's replacement of `rows` (n, act) gets
    probability 1. The second array (n,) says in which states no action is admitted.
    """
    masked = np.where(inside, log_probs, -np.inf)
    none = np.isneginf(masked.max(axis=1))
    instead, no_safe_action = _instead(safe_set, observations, none, rows)
    if safe_set is not None and len(instead):
        masked[none, safe_set.actions.choice_index(instead)] = 0.0
    return log_softmax(masked), no_safe_action


def _instead(
    safe_set: SafeSet | None, observations: Batch, none: npt.NDArray[np.bool_], rows: Array
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return the replacements of `rows` (n, act) in the states where `none` is True.

    The first array has one row for each such state. The second array (n,) says in which states no
    action is admitted.
    """
    no_safe_action = np.zeros(len(none), dtype=np.bool_)
    where = np.flatnonzero(none)
    if safe_set is None or not len(where):
        return rows[where], no_safe_action
    instead, safe = safe_set.replace(take(observations, where), rows[where])
    no_safe_action[where] = ~safe
    return instead, no_safe_action


class MaskedUniform:
    """The uniform distribution over the actions that rules, or a shield, admit.

    Discrete actions are drawn from the admitted choices. Actions of a Box are drawn by rejection.

    Args:
        safe: A `SafeRules`, or a shield, a path to its file or an agent that has one.
        rounds: Number of rounds of rejection; round k draws 2^k actions a state.
    """

    def __init__(
        self, safe: SafeRules | LoggedRules | Shield | HasShield | str, rounds: int = 8
    ) -> None:
        self.safe_set: SafeRules | LoggedRules | ShieldSet = (
            safe if isinstance(safe, SafeRules | LoggedRules) else ShieldSet(as_shield(safe))
        )
        self._codec = self.safe_set.actions
        self._rounds = rounds

    def of_a_log(self) -> MaskedUniform:
        """Return a copy for states of a log, where rules that admit no action raise no error."""
        own = self.safe_set
        return MaskedUniform(LoggedRules(own), self._rounds) if isinstance(own, SafeRules) else self

    def draw(self, observations: Batch, each: int, rng: np.random.Generator, /) -> Array:
        """Return `each` actions (n, each, act) in each of the n observations.

        They are admitted, or the safe set's replacement where no admitted action is found. `rng`
        generates the draws.
        """
        if self._codec.discrete:
            return draw_choices(self._codec, self._log_probs(observations), each, rng)
        chosen = self._rejected(repeated(observations, each), rng)
        return chosen.reshape(-1, each, self._codec.width)

    def log_prob(self, observations: Batch, candidates: Array, /) -> Array:
        """Return the log density (n, c) of candidates (n, c, act) in the n observations.

        For an admitted action it is 0 in a Box, where the density is not normalised, and minus the
        log of the number of admitted choices where actions are discrete. For any other action it is
        minus infinity.
        """
        if not self._codec.discrete:
            return np.where(self.safe_set.admits(observations, candidates), 0.0, -np.inf)
        log_probs = self._log_probs(observations)
        return np.take_along_axis(log_probs, self._codec.choice_index(candidates), axis=1)

    def _log_probs(self, observations: Batch) -> Array:
        """Return log probabilities (n, c) of all choices."""
        every = every_choice(self._codec, batch_length(observations))
        inside = self.safe_set.admits(observations, every)
        zeros = np.zeros(inside.shape)
        return _restricted(self.safe_set, observations, zeros, inside, every[:, 0])[0]

    def _rejected(self, observations: Batch, rng: np.random.Generator) -> Array:
        low, high = self._codec.low, self._codec.high
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


def as_behaviour(behaviour: object, action_space: gym.Space[Any]) -> Behaviour:
    """Return a `Behaviour` for a behaviour, for rules (uniform inside them), or for any policy.

    Args:
        behaviour: A `Behaviour`, `SafeRules`, or a policy in any form that `as_batch_policy` takes.
        action_space: Space of the actions of a policy.

    Raises:
        TypeError: `behaviour` is none of these.
    """
    if isinstance(behaviour, SafeRules):
        return MaskedUniform(behaviour)
    if not inspect.isclass(behaviour) and callable(getattr(behaviour, "draw", None)):
        return cast(Behaviour, behaviour)
    try:
        return UserPolicy(behaviour, action_space)
    except TypeError as error:
        raise TypeError(
            "behaviour must be a Behaviour (Tabular, MaskedUniform, FlowTeacher, ...), SafeRules, "
            f"or a policy: {error}"
        ) from error
