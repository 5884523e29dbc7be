"""How a shield replaces an action that it rejects: a strategy, passed to `with_replacement`.

All strategies of this module keep these rules:

- An accepted action never reaches them. An action outside the box, which is the range between the
  lowest and the highest action of the action space, is first clipped into it. The clipped action is
  executed where it is acceptable.
- They return actions inside the box, with their Q_h.
- Where none of a strategy's own actions is acceptable, it also considers the candidates of the
  default strategy. So each strategy finds an acceptable action wherever the default does.
- Where nothing is acceptable, the action with the lowest Q_h of all that were considered is
  executed, and the report says so (`acceptable` is False).

A new strategy is one class with a method `choose` (see `Replacement`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from safeshield.rollouts.policies import as_batch_policy, default_name
from safeshield.shield.backup import BackupController
from safeshield.shield.candidates import CandidateSet
from safeshield.shield.critics import SafetyModel, StateValue
from safeshield.spaces.rows import SpaceCodec
from safeshield.spaces.shapes import Actions, Candidates, Flags, Judged, Scalars

if TYPE_CHECKING:
    from safeshield.support import SupportTest

MAX_STEPS, MAX_SAMPLES = 1000, 4096
# Shortest step of a descent, in half widths of the box. Rounding errors dominate shorter steps.
SHORTEST = 1e-3
# Factor on the step's length according to the linear model, so that the step crosses the threshold.
BEYOND = 1.1
# Number of candidates of a state that are judged at once.
_BLOCK = 8
# Number of candidates of all states below which blocks would cost more than they save.
_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Rejected:
    """n rejected actions, with the data that a strategy needs to replace them.

    Observations and actions are rows of `spaces.rows`.

    Attributes:
        model: Critics and fallback.
        states: The critics' results for the n states.
        rows: (n, obs) the raw observations.
        wanted: (n, act) float32, the proposed action, clipped into the box. It is the fallback's
            action where the proposed one is not usable or the observation is not readable.
        known: (n,) whether `wanted` is the proposed action.
        seen: (n,) whether the observation is readable.
        limit: (n,) the number that Q_h must not exceed.
        low: (act,) the lowest float32 numbers inside the box.
        high: (act,) the highest float32 numbers inside the box.
    """

    model: SafetyModel
    states: StateValue
    rows: npt.NDArray[Any]
    wanted: npt.NDArray[np.float32]
    known: npt.NDArray[np.bool_]
    seen: npt.NDArray[np.bool_]
    limit: npt.NDArray[np.float64]
    low: npt.NDArray[np.float32]
    high: npt.NDArray[np.float32]

    @classmethod
    def of(
        cls,
        model: SafetyModel,
        states: StateValue,
        rows: npt.NDArray[Any],
        proposals: Actions,
        known: Flags,
        readable: Flags,
        limit: npt.NDArray[np.float64],
        box: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]],
    ) -> Rejected:
        """Return the description of n rejected proposals.

        Args:
            model: Critics and fallback.
            states: The critics' results for the n states.
            rows: (n, obs) the raw observations.
            proposals: (n, act) the proposed actions, unchanged.
            known: (n,) whether the proposed action is finite and the observation readable.
            readable: (n,) whether the observation is readable.
            limit: (n,) the number that Q_h must not exceed.
            box: Result of `float32_box` for the actions.
        """
        codec, (low, high) = model.action_codec, box
        wanted = np.clip(proposals, codec.low, codec.high)
        if codec.discrete:
            known = known & codec.contains(wanted)
        if not known.all():
            # Without a usable proposal or a readable state, stay near the fallback's action.
            wanted = np.where(known[:, None], wanted, model.fallback_alone(states))
        wanted = np.clip(wanted.astype(np.float32), low, high)
        return cls(model, states, rows, wanted, known, readable, limit, low, high)

    def values(self, candidates: Candidates) -> Judged:
        """Return Q_h (n, c) of candidates (n, c, act); infinity where the networks overflow."""
        return nan_rejected(self.model.candidate_values(self.states, candidates))

    def inside(self, candidates: Candidates) -> tuple[Candidates, Flags]:
        """Return candidates (n, c, act) as executable actions, and whether each was usable (n, c).

        Candidates are clipped into the box. `wanted` takes the place of a candidate that is NaN,
        infinite, or none of the discrete actions.
        """
        played = self.model.action_codec
        usable = np.isfinite(candidates).all(axis=-1)
        if played.discrete:
            usable = played.contains(candidates)
        candidates = np.where(usable[..., None], candidates, self.wanted[:, None])
        return np.clip(candidates, self.low, self.high).astype(np.float32), usable

    def take(self, index: npt.NDArray[np.intp]) -> Rejected:
        """Return the rejected actions with the indices `index` (k,), with their data."""
        return Rejected(
            self.model,
            self.states.take(index),
            self.rows[index],
            self.wanted[index],
            self.known[index],
            self.seen[index],
            self.limit[index],
            self.low,
            self.high,
        )


class Replacement(Protocol):
    """A strategy for replacing actions. A new strategy is a class with the method `choose`.

    The shield checks what the `choose` of a new strategy returns. It clips actions into the bounds
    of the Box, and executes `Rejected.wanted` in place of an action that is NaN, infinite, or none
    of the discrete actions. It then computes Q_h of these actions itself; the values that the
    strategy returned are not used.

    If the strategy does not work for every action space, give it a method ``check_actions(codec)``
    that raises a TypeError where the actions of this `SpaceCodec` do not suit it. The method is
    called when a shield is made with the strategy.
    """

    def choose(self, rejected: Rejected, /) -> tuple[Actions, Scalars]:
        """Return an action to execute in place of each rejected one.

        Args:
            rejected: The n rejected actions, with the data that are needed to replace them.

        Returns:
            The actions (n, act) in the units of the action space, and their Q_h (n,).
        """
        ...


def float32_box(codec: SpaceCodec) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the lowest and the highest float32 numbers inside the box of actions, (act,) each.

    Replacements are float32, and the float32 next to a float64 bound may lie outside it.

    Args:
        codec: Converter of the actions; its `low` and `high` are the bounds of the box.
    """
    return float32_range(codec.low, codec.high)


def float32_range(
    low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the lowest and the highest float32 numbers in the ranges from `low` to `high`."""
    least, most = low.astype(np.float32), high.astype(np.float32)
    return (
        np.where(least < low, np.nextafter(least, np.float32(np.inf)), least),
        np.where(most > high, np.nextafter(most, np.float32(-np.inf)), most),
    )


def nearest_acceptable(
    candidates: Candidates, values: Judged, limit: npt.NDArray[np.float64]
) -> npt.NDArray[np.intp]:
    """Return the index (n,) of the acceptable candidate that is nearest to the first candidate.

    Where no candidate is acceptable, return the index of the one with the lowest Q_h.

    Args:
        candidates: (n, c, features) scaled to [-1, 1].
        values: (n, c) Q_h of the candidates.
        limit: (n,) the number that Q_h must not exceed.
    """
    distance = np.square(candidates - candidates[:, :1]).sum(axis=-1)
    good = values <= limit[:, None]
    distance = np.where(good, distance, np.inf)
    # Several candidates may be equally near, as discrete actions are: take the lowest Q_h of them.
    nearest = np.where(distance <= distance.min(axis=1)[:, None], values, np.inf).argmin(axis=1)
    best: npt.NDArray[np.intp] = np.where(good.any(axis=1), nearest, values.argmin(axis=1))
    return best


@dataclass(frozen=True)
class NearestAcceptable:
    """The default strategy: execute the acceptable candidate nearest to the proposed action.

    In a Box, the distance between two actions is measured after each entry has been scaled to
    [-1, 1]. Where actions are discrete, the strategy takes the acceptable action that differs from
    the proposed one in the fewest entries, and of several such actions the one of lowest Q_h.

    Use it if nothing speaks for another strategy: it needs no gradient, no agent and no good
    fallback, and changes the proposed action little. Its actions lie just inside the threshold, so
    calibrate the shield. With more than a few action dimensions the candidates lie far apart, and
    `ProjectedGradient` changes the action less.

    Args:
        candidates: The candidates that are considered.
    """

    candidates: CandidateSet = field(default_factory=CandidateSet)

    def choose(self, rejected: Rejected, /) -> tuple[Actions, Scalars]:
        """Return the nearest acceptable candidates (n, act) for `rejected`, and their Q_h (n,)."""
        model, wanted = rejected.model, rejected.wanted
        found = self.candidates.actions(model, rejected.states, wanted)
        candidates = np.concatenate([wanted[:, None, :], found], axis=1)
        candidates = np.clip(candidates, rejected.low, rejected.high)
        scaled = model.scaling.actions(candidates)
        values = _values_until_acceptable(rejected, scaled)
        best = nearest_acceptable(scaled, values, rejected.limit)
        return _pick(candidates, values, best)


@dataclass(frozen=True)
class NearestSupported:
    """`NearestAcceptable` for a shield with a support test; `Shield.with_support` uses it.

    It also considers samples of the log's behaviour, and prefers candidates that pass the test: see
    `SupportTest.choose`.

    Args:
        support: The support test.
        candidates: The other candidates that are considered.
    """

    support: SupportTest
    candidates: CandidateSet

    def choose(self, rejected: Rejected, /) -> tuple[Actions, Scalars]:
        """Return the nearest acceptable and supported candidates (n, act) and their Q_h (n,).

        `rejected` holds the n rejected actions. Where no candidate passes both tests, see
        `SupportTest.choose`.
        """
        model, states, wanted = rejected.model, rejected.states, rejected.wanted
        near = self.candidates.actions(model, states, wanted)
        drawn = self.support.proposals(model, states)
        candidates = np.concatenate([wanted[:, None, :], near, drawn], axis=1)
        candidates = np.clip(candidates, rejected.low, rejected.high)
        values = rejected.values(candidates)
        scaled = model.scaling.actions(candidates)
        distance = np.square(scaled - scaled[:, :1]).sum(axis=-1)
        good = values <= rejected.limit[:, None]
        best = self.support.choose(model, states, candidates, values, distance, good)
        return _pick(candidates, values, best)


@dataclass(frozen=True)
class FallbackPolicy:
    """Execute the action of the shield's fallback actor for noise z = 0.

    Where actions are discrete, that is the action of lowest Q_h.

    Use it where safety matters most and the fallback is good. The fallback leads away from the
    threshold, so the shield intervenes less often but changes actions more, and errors of the
    critics matter less. (On the boat at the uncalibrated delta 0, with the fallback of
    `ShieldTrainer`, 53 of 600 episodes violated instead of the default's 101, and 21 instead of 69,
    at some cost in return: `benchmarks/replacement.py`.) The fallback of `SafeFQL` is its
    reward-seeking actor, which a strict threshold seldom accepts. The strategy then does the same
    as the default.

    Args:
        candidates: The candidates for states in which the fallback's action is not acceptable.
    """

    candidates: CandidateSet = field(default_factory=CandidateSet)

    def choose(self, rejected: Rejected, /) -> tuple[Actions, Scalars]:
        """Return the fallback's actions (n, act) for `rejected`, and their Q_h (n,).

        Where the clipped proposal is acceptable, it is returned instead. Where neither is, the
        result is the candidate that `NearestAcceptable` would return, if that has the lower Q_h.
        """
        own = rejected.model.fallback_alone(rejected.states)
        options, _ = rejected.inside(np.stack([rejected.wanted, own], axis=1))
        picked = _first_acceptable(rejected, options, rejected.values(options))
        return _or_nearest(self.candidates, rejected, *picked)


@dataclass(frozen=True)
class CommittedFallback:
    """Execute the fallback actor's action for noise z = 0, whether or not it is acceptable.

    The other strategies compare candidates anew in each state. Where two ways out are equally good,
    their choice may change from step to step, and the system goes neither way until it is too late.
    The fallback is one continuous function of the state, so the system stays on the way out that
    it has begun. (An agent that knows the boat's dynamics goes to such places: behind the default
    it violated in up to 27 of 500 episodes, behind this strategy in none: `benchmarks/values.py`.)

    The fallback must have been trained to be safe, as that of `ShieldTrainer` is; the fallback of
    `SafeFQL` seeks reward. Where actions are discrete, the action of lowest Q_h is executed.

    An exception to the rules of this module: no other candidate is considered where the fallback's
    action is not acceptable.
    """

    def choose(self, rejected: Rejected, /) -> tuple[Actions, Scalars]:
        """Return the fallback's actions (n, act) for `rejected`, and their Q_h (n,).

        Where the clipped proposal is acceptable, it is returned instead.
        """
        own = rejected.model.fallback_alone(rejected.states)
        options, _ = rejected.inside(np.stack([rejected.wanted, own], axis=1))
        values = rejected.values(options)
        return _pick(options, values, (values[:, 0] > rejected.limit).astype(np.intp))


@dataclass(frozen=True)
class ProjectedGradient:
    r"""Descend along the gradient of Q_h from the proposed action to the first acceptable action.

    This needs a Box of actions. Each step is

        u <- clip(u - t g / |g|, -1, 1),    g = dQ_h/du without entries that point out of the box,
        t = 1.1 (Q_h(u) + delta) / |g|,     at least 0.001, at most `step_size`

    with u the action in half widths of the box. The critics are piecewise linear in the action, so
    this t just crosses the threshold if Q_h is linear along the step. A step that does not lower
    Q_h is undone, and the next step is at most half as long, so Q_h never rises along the descent.

    Use it with many action dimensions (from about six), where it changes actions much less than the
    default does, and for batches, where it costs less. For a single environment it takes longer,
    because the passes run one after another. As with the default, its actions lie just inside the
    threshold, so calibrate the shield.
    Source: the closed-form correction of a safety layer (Dalal et al. 2018, arXiv 1801.08757, eq.
    5). Here it is repeated, and uses a value instead of one step's linear model.

    Args:
        steps: Largest number of steps; each step is one forward and one backward pass through the
            critics.
        step_size: Longest step, in half widths of the box.
        candidates: The candidates for states in which the descent finds no acceptable action.
    """

    steps: int = 8
    step_size: float = 0.25
    candidates: CandidateSet = field(default_factory=CandidateSet)

    def __post_init__(self) -> None:
        if type(self.steps) is not int or not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps must be an integer in [1, {MAX_STEPS}], got {self.steps!r}")
        if not SHORTEST <= self.step_size <= 1e6:
            raise ValueError(
                f"step_size must be at least {SHORTEST} half widths of the box (and at most 1e6), "
                f"got {self.step_size!r}"
            )

    def check_actions(self, codec: SpaceCodec) -> None:
        """Raise TypeError where the actions of `codec` are discrete."""
        if codec.discrete:
            raise TypeError(
                f"ProjectedGradient needs actions of a Box, got {codec.space}: there is no gradient"
                " between discrete actions; use NearestAcceptable(), which weighs all of them"
            )

    def choose(self, rejected: Rejected, /) -> tuple[Actions, Scalars]:
        """Return the last actions (n, act) of the descents for `rejected`, and their Q_h (n,).

        Where that action is not acceptable, the result is the candidate that `NearestAcceptable`
        would return, if that has the lower Q_h.
        """
        return _or_nearest(self.candidates, rejected, *self.walk(rejected))

    def walk(self, rejected: Rejected) -> tuple[Actions, Scalars]:
        """Return the last actions (n, act) of the descents for `rejected`, and their Q_h (n,).

        These actions may be unacceptable.
        """
        model, limit = rejected.model, rejected.limit
        actions = np.clip(rejected.wanted, rejected.low, rejected.high)
        values, slopes = _slopes(model, rejected.states, actions)
        reach = np.full(len(actions), self.step_size)
        for _ in range(self.steps):
            going = np.flatnonzero((values > limit) & (reach >= SHORTEST))
            if not len(going):
                break
            scaled, slope = model.scaling.actions(actions[going]), slopes[going]
            edge = 1.0 - 1e-6
            outward = (scaled <= -edge) & (slope > 0) | (scaled >= edge) & (slope < 0)
            slope = np.where(outward, 0.0, slope)
            steep = np.linalg.norm(slope, axis=1)
            # This is False for NaN too. Without a slope the descent stops.
            moving = steep > 0
            reach[going[~moving]] = 0.0
            going, scaled, slope, steep = (x[moving] for x in (going, scaled, slope, steep))
            if not len(going):
                break
            gap = (values[going] - limit[going]) / steep
            length = np.clip(BEYOND * gap, SHORTEST, reach[going])
            target = np.clip(scaled - (length / steep)[:, None] * slope, -1.0, 1.0)
            tried = np.clip(model.scaling.to_box(target), rejected.low, rejected.high)
            tried_values, tried_slopes = _slopes(model, rejected.states.take(going), tried)
            lower = tried_values < values[going]
            down = going[lower]
            actions[down], values[down] = tried[lower], tried_values[lower]
            slopes[down] = tried_slopes[lower]
            reach[going] = np.where(lower, self.step_size, length / 2.0)
        return actions, values


@dataclass(frozen=True)
class OwnSamples:
    """Execute the first acceptable one of several actions sampled from the agent's own policy.

    The executed action is then a sample of the agent's policy, restricted to acceptable actions.
    Use it for exploration, and for agents whose action entries depend on each other in ways that a
    distance does not measure. The agent must be stochastic, with enough variance: an agent that is
    sure of an unsafe action has no acceptable samples. The samples differ from call to call, so
    decisions cannot be reproduced. Where the observation is not readable, the agent is not called.
    A shield that holds an agent cannot be saved.

    Args:
        policy: The agent. It may have Stable-Baselines3's ``predict``, which is called with
            ``deterministic=False``. Recurrent agents then sample as at an episode's start, and all
            samples of an agent trained with `use_sde` are alike, because it holds its noise. Or it
            is another policy that `safeshield.rollouts.policies.as_batch_policy` takes. The agent
            gets the observations that the shield gets: of a Dict only the shield's entries.
        count: Number of samples for each rejected action; all are drawn in one call.
        candidates: The candidates for states in which no sample is acceptable.
        seed: Seed of the noise that batch policies get; ``predict`` uses the agent's own generator.

    Raises:
        ValueError: The policy keeps a memory (`start_wave`), or `count` is out of range.
    """

    policy: object
    count: int = 16
    candidates: CandidateSet = field(default_factory=CandidateSet)
    seed: int = 0

    def __post_init__(self) -> None:
        if type(self.count) is not int or not 1 <= self.count <= MAX_SAMPLES:
            raise ValueError(f"count must be an integer in [1, {MAX_SAMPLES}], got {self.count!r}")
        if callable(getattr(self.policy, "start_wave", None)):
            raise ValueError(
                f"policy must have no memory, but {type(self.policy).__name__} has start_wave: "
                "asking it for samples would disturb its episodes; pass the agent itself"
            )
        object.__setattr__(self, "_rng", np.random.default_rng(self.seed))

    def __deepcopy__(self, memo: dict[int, object]) -> OwnSamples:
        # The agent may learn on, and a copy of it would not. (Gymnasium copies specs.)
        return self

    def check_actions(self, codec: SpaceCodec) -> None:
        """Raise TypeError or ValueError where the policy does not fit the actions of `codec`."""
        as_batch_policy(self.policy, codec.space, deterministic=False)

    def choose(self, rejected: Rejected, /) -> tuple[Actions, Scalars]:
        """Return the first acceptable samples (n, act) for `rejected`, and their Q_h (n,).

        Where the clipped proposal is acceptable, it is returned instead. Where neither it nor a
        sample is, the result is the candidate that `NearestAcceptable` would return, if that has
        the lower Q_h.
        """
        drawn, usable = rejected.inside(self._draw(rejected))
        options = np.concatenate([rejected.wanted[:, None], drawn], axis=1)
        # The clipped proposal is the first option. Where `wanted` is the fallback's action instead,
        # it is not used.
        usable = np.concatenate([rejected.known[:, None], usable], axis=1)
        values = np.where(usable, rejected.values(options), np.float32(np.inf))
        picked = _first_acceptable(rejected, options, values)
        return _or_nearest(self.candidates, rejected, *picked)

    def _draw(self, rejected: Rejected) -> Candidates:
        """Return samples (n, count, act), NaN where the observation is not readable."""
        model = rejected.model
        shape = (len(rejected.rows), self.count, model.action_codec.width)
        draws = np.full(shape, np.nan)
        seen = rejected.seen
        if not seen.any():
            return draws
        rows = np.repeat(rejected.rows[seen], self.count, axis=0)
        # The policy is made anew, because it keeps the memory of recurrent agents between calls.
        policy = as_batch_policy(self.policy, model.action_space, deterministic=False)
        rng: np.random.Generator = self.__dict__["_rng"]
        points = np.asarray(policy(model.observation_codec.batch(rows), rng))
        actions, single = model.action_codec.flatten(points, "a draw of the policy of OwnSamples")
        if single or len(actions) != len(rows):
            raise ValueError(
                f"the policy of OwnSamples must return {len(rows)} actions for {len(rows)} "
                f"observations, got shape {points.shape}; see rollouts.policies.as_batch_policy"
            )
        draws[seen] = actions.reshape(-1, *shape[1:])
        return draws


BUILT_IN = (
    NearestAcceptable,
    FallbackPolicy,
    CommittedFallback,
    BackupController,
    ProjectedGradient,
    OwnSamples,
)
_NAMES = ", ".join(f"{kind.__name__}(...)" for kind in BUILT_IN)


def check_replacement(replacement: object, codec: SpaceCodec) -> None:
    """Raise unless an object is a strategy that can replace actions of this space.

    A strategy that does not fit every space has a method ``check_actions(codec)`` that raises.

    Args:
        replacement: The object to check.
        codec: Converter of the shield's actions.

    Raises:
        TypeError: The object is no strategy, or does not work in this space; the message names
            strategies that do.
    """
    if isinstance(replacement, type) or not callable(getattr(replacement, "choose", None)):
        got = replacement.__name__ if isinstance(replacement, type) else type(replacement).__name__
        raise TypeError(
            f"replacement must be one of {_NAMES}, or an object with their method choose, got {got}"
        )
    check_actions = getattr(replacement, "check_actions", None)
    if callable(check_actions):
        check_actions(codec)


def replace_actions(replacement: Replacement, rejected: Rejected) -> tuple[Actions, Scalars]:
    """Return a strategy's actions (n, act), all of which can be executed, and their Q_h (n,).

    Args:
        replacement: The strategy. The results of a strategy that is not of this module are checked
            as described in `Replacement`.
        rejected: The n rejected actions, with the data that are needed to replace them.

    Raises:
        ValueError: A user's strategy returned actions of another shape.
    """
    actions, values = replacement.choose(rejected)
    if isinstance(replacement, (*BUILT_IN, NearestSupported)):
        return actions, values
    actions = np.asarray(actions)
    if actions.shape != rejected.wanted.shape:
        raise ValueError(
            f"{type(replacement).__name__}.choose must return actions of shape "
            f"{rejected.wanted.shape}, got {actions.shape}"
        )
    options, _ = rejected.inside(actions[:, None])
    return options[:, 0], rejected.values(options)[:, 0]


def settings_of(replacement: object) -> dict[str, Any]:
    """Return the settings of a strategy of this module, by their names.

    The function of a `BackupController` is not one of them, because its name stands for it.
    """
    compared = (entry.name for entry in fields(cast(Any, replacement)) if entry.compare)
    return {name: getattr(replacement, name) for name in compared}


def describe(replacement: Replacement) -> str:
    """Return the text by which a record names the strategy `replacement`, "" for the default.

    >>> describe(ProjectedGradient(steps=4))
    'ProjectedGradient(steps=4, step_size=0.25)'
    """
    name = type(replacement).__name__
    if not isinstance(replacement, BUILT_IN):
        return name
    values = settings_of(replacement)
    if values.get("candidates") == CandidateSet():
        del values["candidates"]
    if isinstance(replacement, NearestAcceptable) and not values:
        return ""
    if isinstance(replacement, OwnSamples) and not isinstance(replacement.policy, str):
        values["policy"] = default_name(replacement.policy)
    return f"{name}({', '.join(f'{key}={value}' for key, value in values.items())})"


def _values_until_acceptable(rejected: Rejected, scaled: Candidates) -> Judged:
    """Return Q_h (n, c) of the candidates on which the choice of `nearest_acceptable` depends.

    The candidates of each state are judged in blocks of increasing distance, until all that are as
    near as the nearest acceptable one are judged. In each block the first member of the critic
    rules out what it finds unacceptable, because Q_h is the largest value of the members. Where no
    candidate is acceptable, the other members judge those that may have the lowest Q_h.

    Args:
        rejected: The n rejected actions.
        scaled: (n, c, features) candidates, scaled to [-1, 1].

    Returns:
        Q_h (n, c), infinity for candidates that cannot be chosen.
    """
    model, limit = rejected.model, rejected.limit
    count, total, _ = scaled.shape
    if count * total <= _AT_ONCE:
        return nan_rejected(model.scaled_values(rejected.states, scaled))
    several = model.members > 1
    first, others = (slice(0, 1), slice(1, None)) if several else (slice(None), slice(None))

    def judged(at: npt.NDArray[np.intp], which: npt.NDArray[np.intp], members: slice) -> Judged:
        """Return the members' values (k, b) of candidates `which` (k, b) in states `at` (k,)."""
        part = rejected.states.take(at)
        return nan_rejected(model.scaled_values(part, scaled[at[:, None], which], members))

    def raised(at: npt.NDArray[np.intp], which: npt.NDArray[np.intp], low: Scalars) -> Scalars:
        """Return Q_h (k,) of candidates `which` (k,) in states `at` (k,), from a lower bound."""
        return np.maximum(low, judged(at, which[:, None], others)[:, 0]) if len(at) else low

    distance = np.square(scaled - scaled[:, :1]).sum(axis=-1)
    order = distance.argsort(axis=1, kind="stable")
    ordered = np.take_along_axis(distance, order, axis=1)
    # Lower bounds of Q_h, and Q_h where it is known.
    bounds = np.full((count, total), np.inf, scaled.dtype)
    values = bounds.copy()
    reach = np.full(count, np.inf)
    rows, start = np.arange(count), 0
    while len(rows) and start < total:
        which = order[rows, start : start + _BLOCK]
        low = judged(rows, which, first)
        bounds[rows[:, None], which] = low
        at, column = np.nonzero(low <= limit[rows, None])
        if several:
            low[at, column] = raised(rows[at], which[at, column], low[at, column])
            values[rows[at], which[at, column]] = low[at, column]
        else:
            values[rows[:, None], which] = low
        good = low <= limit[rows, None]
        far = np.where(good, ordered[rows, start : start + _BLOCK], np.inf).min(axis=1)
        reach[rows] = np.minimum(reach[rows], far)
        start += _BLOCK
        if start < total:
            rows = rows[ordered[rows, start] <= reach[rows]]
    # Where nothing is acceptable, the candidate with the lowest Q_h is needed.
    none = np.flatnonzero(np.isinf(reach))
    if several and len(none):
        low, known = bounds[none], values[none]
        best = low.argmin(axis=1)
        each = np.arange(len(none))
        known[each, best] = raised(none, best, low[each, best])
        at, which = np.nonzero(np.isinf(known) & (low <= known.min(axis=1)[:, None]))
        known[at, which] = raised(none[at], which, low[at, which])
        values[none] = known
    return values


def nan_rejected(values: Scalars) -> Scalars:
    """Return Q_h with infinity in place of NaN, so that no comparison accepts it."""
    return np.where(np.isnan(values), np.float32(np.inf), values)


def _slopes(
    model: SafetyModel, states: StateValue, actions: Actions
) -> tuple[Scalars, npt.NDArray[np.float32]]:
    values, slopes = model.action_gradients(states, actions)
    return nan_rejected(values), slopes


def _pick(
    candidates: Candidates, values: Judged, best: npt.NDArray[np.intp]
) -> tuple[Actions, Scalars]:
    each = np.arange(len(best))
    return candidates[each, best], values[each, best]


def _first_acceptable(
    rejected: Rejected, options: Candidates, values: Judged
) -> tuple[Actions, Scalars]:
    """Return the first acceptable of options (n, c, act), or else the one of lowest Q_h."""
    good = values <= rejected.limit[:, None]
    best = np.where(good.any(axis=1), good.argmax(axis=1), values.argmin(axis=1))
    return _pick(options, values, best)


def _or_nearest(
    candidates: CandidateSet, rejected: Rejected, actions: Actions, values: Scalars
) -> tuple[Actions, Scalars]:
    """Consider the default's candidates where actions (n, act) of values (n,) are unacceptable."""
    missing = np.flatnonzero(~(values <= rejected.limit))
    if not len(missing):
        return actions, values
    others, other_values = NearestAcceptable(candidates).choose(rejected.take(missing))
    lower = other_values < values[missing]
    actions, values = actions.copy(), values.copy()
    actions[missing[lower]], values[missing[lower]] = others[lower], other_values[lower]
    return actions, values
