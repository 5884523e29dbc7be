"""Collect transitions inside a safe set and count proposals, executed actions and outcomes."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

from safeshield.online.replay import Replay, Step
from safeshield.online.safe_proposals import SafeBehaviour, SafeProposals
from safeshield.online.safe_sets import SafeSet, spaces_of
from safeshield.proposals.sources import log_density
from safeshield.rollouts.infos import EXECUTED, PROPOSED, TERMINAL_OBSERVATION, TIME_LIMIT, violates
from safeshield.spaces.batches import Batch, copied, finite, take
from safeshield.spaces.rows import SpaceCodec, flat_actions, flat_observations
from safeshield.training.log import returns_to_go

Array = npt.NDArray[Any]


class OutsideSafeSetWarning(UserWarning):
    """A behaviour proposes actions outside the safe set, which are counted and never executed."""


class UnguardedWarning(UserWarning):
    """No safe set is known, so that every proposal of a behaviour is executed or learned from."""


@dataclass
class Tally:
    """Counts since learning began, in steps and episodes of single environments."""

    steps: int = 0
    """Actions executed."""
    episodes: int = 0
    """Episodes that have ended."""
    proposed_outside: int = 0
    """Steps whose proposal lay outside the safe set, so that another action was executed."""
    support_outside: int = 0
    """States in which part of the behaviour's distribution, or of its draws, lies outside."""
    nothing_admitted: int = 0
    """Steps in states where a shield accepts no action and executed that of lowest Q_h."""
    replaced: int = 0
    """Steps in which a shield around the environment executed another action than the chosen one,
    because it judges differently from the safe set. The executed action is learned from."""
    unreadable: int = 0
    """Steps that were executed but not learned from, because an observation was not finite."""
    unsafe_steps: int = 0
    """Steps after which ``info["constraint"] > 0`` or ``info["cost"] > 0`` (or NaN there)."""
    unsafe_episodes: int = 0
    """Episodes with such a step. Each is counted as soon as the step happens."""
    labelled: bool = False
    """Whether any info carried "constraint" or "cost", without which no violation is counted."""


Choose = Callable[[Batch, SafeProposals, np.random.Generator], Array]
"""Function of observations and proposals that returns the proposed actions (n, act) to execute."""


class Collector:
    """Step environments with the actions of a behaviour that is restricted to a safe set.

    Args:
        venv: Vector environment of Stable-Baselines3.
        codec: Converts observations to rows.
        mu: The behaviour, restricted to the safe set; it may be exchanged between two steps.
        replay: Buffer that receives the transitions.
        samples: Draws of mu in each state, for a Box of actions.
        rng: Generator of all draws.
    """

    def __init__(
        self,
        venv: VecEnv,
        codec: SpaceCodec,
        mu: SafeBehaviour,
        replay: Replay,
        samples: int,
        rng: np.random.Generator,
    ) -> None:
        self.venv, self.mu, self.replay = venv, mu, replay
        self.choose: Choose | None = None
        """Chooses the executed action among mu's proposals; None: mu's own draw is executed."""
        self.tally = Tally()
        self.returns = deque[float](maxlen=100)
        """Sums of rewards of the last 100 episodes since `reset`."""
        self._codec, self._samples, self._rng = codec, samples, rng
        self._running = np.zeros(venv.num_envs)
        self._violated = np.zeros(venv.num_envs, dtype=np.bool_)
        self._history: list[tuple[Array, Array, Array]] | None = None
        self._observations: Batch = None
        self._proposals: SafeProposals | None = None
        self._warned: set[str] = set()

    def reset(self, *, record: bool) -> None:
        """Begin new episodes; with `record`, keep the rewards until `returns_to_go` is called."""
        self._observations = copied(self.venv.reset())
        self._violated[:], self._running[:] = False, 0.0
        self.returns.clear()
        self._history = [] if record else None
        self._proposals = self._propose(self._observations)

    def returns_to_go(self, discount: float) -> Array:
        """Return the discounted returns of the steps recorded since `reset`, and stop recording.

        The result has one return for each step. `discount` is the discount factor g.

        Raises:
            RuntimeError: Nothing was recorded.
        """
        if not self._history:
            raise RuntimeError("no step has been recorded since reset(record=True)")
        rewards, ends, terminated = (np.concatenate(p) for p in zip(*self._history, strict=True))
        self._history = None
        return returns_to_go(rewards, ends, terminated, discount, self.venv.num_envs)

    def _propose(self, observations: Batch) -> SafeProposals:
        return self.mu.propose(observations, self._samples, self._rng)

    def propose(self, observation: Batch, rng: np.random.Generator) -> Array:
        """Return mu's draws, restricted to the safe set, which act before anything is learned.

        Args:
            observation: One observation, or a batch.
            rng: Generator of the draws.

        Raises:
            ValueError: The observation has another shape, or holds NaN or infinity.
        """
        points, single = readable_batch(self._codec, observation)
        executed = self.mu.propose(points, self._samples, rng).executed
        actions = self.mu.codec.unflatten(executed)
        return np.asarray(actions[0]) if single else actions

    def check_density(self) -> None:
        """Raise ValueError early where the behaviour's density excludes all of its own draws."""
        behaviour = self.mu.behaviour
        # The probabilities of discrete choices are checked whenever they are read.
        if self._proposals is None or self.mu.codec.discrete:
            return
        seen = finite(self._observations)
        drawn = behaviour.draw(seen, self._samples, self._rng)
        told = log_density(behaviour, seen, np.asarray(drawn, np.float32))
        if told is not None and np.isneginf(told).all():
            raise ValueError(
                "the behaviour's log_prob is minus infinity for all of its own draws in the state "
                f"{take(self._observations, 0)}"
            )

    def step(self) -> tuple[Array, Array, list[dict[str, Any]]]:
        """Execute one action in every environment, and add the transitions to the replay.

        Returns:
            The rewards (n,), the ends of episodes (n,), and the infos.

        Raises:
            RuntimeError: `step` was called before `reset`.
            ValueError: A reward is not finite, or a label is not a number; or the shield around the
                environment received another action than the one that was sent.
            NoSafeActionError: Rules admit no action in a state.
        """
        here, before, codec = self._proposals, self._observations, self.mu.codec
        if here is None:
            raise RuntimeError("reset() the collector first")
        executed = here.executed
        if self.choose is not None:
            executed = self.choose(before, here, self._rng)
        self._count_proposals(here)
        points = codec.unflatten(executed)
        if isinstance(codec.space, gym.spaces.Box):
            points = np.clip(points.astype(codec.space.dtype), codec.space.low, codec.space.high)
        returned, rewards, dones, infos = self.venv.step(points)
        if not np.isfinite(rewards).all():
            raise ValueError(f"the environment returned a reward that is not finite: {rewards}")
        executed = self._told(executed, points, infos)
        truncated = np.array([bool(info.get(TIME_LIMIT, False)) for info in infos])
        terminated = dones & ~truncated
        reached = self._rows(returned)
        for i in np.flatnonzero(dones):
            reached[i] = self._rows(infos[i][TERMINAL_OBSERVATION])[0]
        self._observations = copied(returned)
        self._proposals = after = self._propose(self._observations)
        # The proposals in a terminal state are never read. Where an episode was cut off, the
        # behaviour is asked for proposals in its last state.
        cut = np.flatnonzero(dones & ~terminated)
        if len(cut):
            after = after.replaced(cut, self._propose(self._codec.batch(reached[cut])))
        self._count_outcomes(dones, infos)
        rows = self._rows(before)
        step = Step(
            rows, here.candidates, here.log_mu, executed, rewards,
            reached, after.candidates, after.log_mu, terminated,
        )  # fmt: skip
        good = np.isfinite(rows).all(1) & np.isfinite(reached).all(1)
        self.tally.unreadable += int((~good).sum())
        if good.any():
            self.replay.add(step if good.all() else step.take(np.flatnonzero(good)))
        if good.all():
            self._running += rewards
            if self._history is not None:
                self._history.append((rewards, dones, terminated))
        self.returns.extend(self._running[dones].tolist())
        self._running[dones] = 0.0
        return rewards, dones, infos

    def _rows(self, observations: Batch) -> Array:
        return np.array(self._codec.flatten(observations, "observation")[0], np.float32)

    def _told(self, executed: Array, sent: Array, infos: list[dict[str, Any]]) -> Array:
        """Return the actions that ran, as far as a shield around the environment reports them."""
        rows = np.array(executed)
        for i, info in enumerate(infos):
            told, given = info.get(EXECUTED), info.get(PROPOSED)
            if told is None:
                continue
            if given is not None and not _alike(given, sent[i]):
                raise ValueError(
                    f"the shield around the environment was given the action {given} where "
                    f"{sent[i]} was sent: a wrapper around the shield changes actions, so that "
                    "`safe` judges other actions than those that run; put the wrapper inside, "
                    "SafetyShield(wrapper(env), shield)"
                )
            if not _alike(told, sent[i]):
                self.tally.replaced += 1
                if self._first("replaced"):
                    warnings.warn(
                        f"the shield around the environment executed {told} where {sent[i]} was "
                        "chosen: it judges differently from `safe`. Such steps are counted "
                        "(tally.replaced), and the executed action is learned from; leave `safe` "
                        "out to choose by the environment's own shield",
                        OutsideSafeSetWarning,
                        stacklevel=4,
                    )
            rows[i] = np.ravel(told)
        return rows

    def _first(self, event: str) -> bool:
        """Return whether an event, of which the user is warned once, has not happened before."""
        known = event in self._warned
        self._warned.add(event)
        return not known

    def _count_proposals(self, here: SafeProposals) -> None:
        tally = self.tally
        tally.steps += len(here.executed)
        tally.nothing_admitted += int(here.no_safe_action.sum())
        outside = (here.mass_outside > 0) & ~here.no_safe_action
        tally.proposed_outside += int((here.outside & ~here.no_safe_action).sum())
        tally.support_outside += int(outside.sum())
        if outside.any() and self._first("outside"):
            at = int(outside.argmax())
            warnings.warn(
                f"the behaviour's support is not inside the safe set: {here.mass_outside[at]:.1%} "
                f"of it lies outside in the state {take(self._observations, at)}. Such actions are "
                "counted (tally.proposed_outside), never executed and never learned from; use "
                "SafeSupportPolicy(shield, policy) as the behaviour to avoid them",
                OutsideSafeSetWarning,
                stacklevel=4,
            )

    def _count_outcomes(self, dones: Array, infos: list[dict[str, Any]]) -> None:
        tally = self.tally
        for i, info in enumerate(infos):
            unsafe = violates(info)
            tally.labelled = tally.labelled or unsafe is not None
            if unsafe:
                tally.unsafe_steps += 1
                tally.unsafe_episodes += not self._violated[i]
                self._violated[i] = True
        tally.episodes += int(dones.sum())
        self._violated[dones] = False


def _alike(one: Any, other: Any) -> bool:  # noqa: ANN401 - actions
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return one.size == other.size and bool(np.allclose(one.ravel(), other.ravel(), 1e-5, 1e-6))


def readable_batch(codec: SpaceCodec, observation: Batch) -> tuple[Batch, bool]:
    """Return a batch of observations, and whether `observation` was a single one.

    `codec` is the converter of the observations.

    Raises:
        ValueError: The observation has another shape, is an empty batch, or is not finite.
    """
    rows, single = codec.flatten(observation, "observation")
    if not len(rows):
        raise ValueError("observation must hold at least one observation, got an empty batch")
    if not np.isfinite(rows).all():
        raise ValueError(f"observation must be finite, got {rows[~np.isfinite(rows).all(1)][0]}")
    return codec.batch(rows), single


def check_environment(venv: VecEnv, safe_set: SafeSet | None) -> None:
    """Check that actions can be judged in environments, and that the safe set fits their spaces.

    Args:
        venv: The environments.
        safe_set: Actions that may be executed; None for no check.

    Raises:
        TypeError: A space is not supported.
        ValueError: `VecNormalize` normalises the observations, by which actions are judged; the
            action space has no bounds; or the safe set is for other spaces.
    """
    flat_actions(venv.action_space)
    flat_observations(venv.observation_space)
    if safe_set is not None:
        safe_set.check_fits(spaces_of(venv), venv)
    check_playable(venv.action_space)
    normalised = unwrap_vec_normalize(venv)
    if normalised is not None and normalised.norm_obs:
        raise ValueError(
            "VecNormalize changes the observations by which actions are judged: pass "
            "norm_obs=False (the critics normalise their inputs themselves)"
        )


def check_playable(space: gym.Space[Any]) -> None:
    """Raise an error unless actions are discrete or from a bounded Box of floating-point numbers.

    Raises:
        TypeError: The Box holds integers, or the space is not supported.
        ValueError: The Box has no bounds.
    """
    played = flat_actions(space)
    if isinstance(space, gym.spaces.Box) and not np.issubdtype(space.dtype, np.floating):
        raise TypeError(
            f"a Box of actions must be of floating-point numbers, got {space!r}: an action would "
            "be rounded after it was judged; round in a wrapper of the environment, or make the "
            "space MultiDiscrete"
        )
    if not (np.isfinite(played.low).all() and np.isfinite(played.high).all()):
        raise ValueError(
            f"action_space must be bounded, got {space}; wrap the environment in RescaleAction"
        )


def as_venv(env: gym.Env[Any, Any] | VecEnv | None) -> VecEnv | None:
    """Return the environment `env` as a `VecEnv`; raise TypeError for any other object.

    None and a `VecEnv` are returned unchanged.
    """
    if env is None or isinstance(env, VecEnv):
        return env
    if not isinstance(env, gym.Env):
        raise TypeError(
            "env must be a Gymnasium environment or a VecEnv of Stable-Baselines3, got "
            f"{type(env).__name__}"
        )
    return DummyVecEnv([lambda: env])
