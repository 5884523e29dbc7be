r"""What whole episodes of a log show of a shield, without an environment.

Each method gives every episode of a held-out log one number, and makes one statement about the
episodes that are drawn like them. Let n episodes count, and let b = 1 - confidence.

- *Detection.* A violating episode that starts safely enters the violation at state T. Its score is
  S = max over t <= T - k of Q_h(s_t, a_t), minus infinity where T < k. The threshold is the j-th
  lowest score, with j the largest number for which P(Bin(n, alpha) <= j - 1) <= b. If more than a
  share alpha of new episodes scored below the threshold, at most j - 1 of the n would lie at or
  below the alpha-quantile of the scores, which has probability at most b.
- *Shadow.* A: the agent violates without the shield. B: the shield would have stepped in. From the
  same start and with the same randomness, the episode with the shield is the same up to the first
  intervention. So it violates with probability at most P(A or B), which has the bound of Clopper
  and Pearson.
- *Spliced.* Each logged episode goes on in a simulator from the first step in which the shield
  would have stepped in, once (`splicing`). It is then an episode with the shield, if the simulator
  behaves as the plant does, and its violations have the same bound.
- *Trial.* The episodes were recorded with the shield on; their violations have the same bound.
- *Residuals.* R = max over the steps of (max(h(s'), V_h(s')) - Q_h(s, a))+, the j-th highest of n
  episodes, with the rank of detection.

Scores are those of EPISODES, because the steps of an episode depend on each other. With the rank
floor(alpha (n + 1)) of `calibration.support`, the share is right only on average over logs: given
one log it is missed in 40 to 50% of cases. With the rank used here it is missed with probability at
most b.
"""

from __future__ import annotations

import datetime
import hashlib
import platform
import re
import warnings
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from safeshield.calibration.binomial import (
    check_probability,
    episodes_needed,
    upper_bound,
    violations_allowed,
)
from safeshield.calibration.splicing import Restore, Splicer
from safeshield.calibration.support import check_held_out
from safeshield.calibration.walk import CalibrationError
from safeshield.data.dataset import OfflineDataset
from safeshield.files.schema import whole
from safeshield.rollouts.policies import PredictPolicy, as_batch_policy, default_name
from safeshield.shield.backup import BackupController
from safeshield.shield.log_record import (
    ABORTED,
    DETECTION,
    METHODS,
    RESIDUALS,
    SHADOW,
    SPLICED,
    STEPLESS,
    TRIAL,
    VALUES_ALONE,
    Assumption,
    CurvePoint,
    LogAttempt,
    LogRecord,
    Method,
)
from safeshield.shield.replacement import CommittedFallback, describe
from safeshield.shield.shield import UncalibratedShieldWarning
from safeshield.spaces.shapes import Flags

if TYPE_CHECKING:
    from safeshield.shield.critics import StateValue
    from safeshield.shield.shield import Shield

Scores = npt.NDArray[np.float64]
N = TypeVar("N", np.bool_, np.float64)
_BLOCK = 8192
_MOST_POINTS = 64
_LOGGER = "the agent that made the log"
_FILE = re.compile(r"\(([^()]+\.(?:safetensors|zip|json))\)")
"""An agent's file in the name that the command line gives the agent."""
_TOLERANCE = 1e-3
"""Share of an action's range by which an answer may differ from the logged action."""


class Ranked(NamedTuple):
    """The order statistic of scores that a new score stays on one side of."""

    threshold: float
    """The j-th lowest score."""
    rank: int
    """j, counted from 1."""


def rank_of(episodes: int, alpha: float, confidence: float) -> int:
    """Return the largest j with P(Bin(n, alpha) <= j - 1) <= 1 - confidence, at least 1.

    Args:
        episodes: Number n of episodes.
        alpha: Share of new episodes that may score below the j-th lowest of the n scores.
        confidence: 1 - b.

    Raises:
        ValueError: There is no such j; the message has the number of episodes needed.

    >>> rank_of(29, 0.1, 0.95), rank_of(100, 0.1, 0.95)
    (1, 5)
    """
    # P(Bin(n, alpha) <= k) <= b holds exactly where the bound of k violations is at most alpha.
    rank = 0 if episodes < 1 else violations_allowed(episodes, alpha, confidence) + 1
    if rank < 1:
        raise ValueError(
            f"{episodes} episodes cannot set a threshold for alpha {alpha:g} with confidence "
            f"{confidence:g}: at least {episodes_needed(alpha, confidence)} are needed"
        )
    return rank


def lowest_allowed(scores: Scores, alpha: float, confidence: float) -> Ranked:
    """Return the threshold below which at most the share `alpha` of new scores lies.

    Args:
        scores: (n,) independent scores of episodes; minus infinity for an episode that no threshold
            can catch.
        alpha: The share.
        confidence: 1 - b, over the draw of the scores.

    Raises:
        ValueError: There are too few scores.

    >>> lowest_allowed(np.arange(100.0), 0.1, 0.95)
    Ranked(threshold=4.0, rank=5)
    """
    rank = rank_of(len(scores), alpha, confidence)
    return Ranked(float(np.sort(scores)[rank - 1]), rank)


def calibrate_from_log(
    shield: Shield,
    held_out: OfflineDataset,
    method: str = DETECTION,
    *,
    confidence: float = 0.95,
    alpha: float | None = None,
    lead: int | None = None,
    epsilon: float | None = None,
    policy: object = None,
    policy_name: str | None = None,
    deterministic: bool | None = None,
    horizon: int | None = None,
    simulator: object = None,
    restore: Restore | None = None,
    seed: int | None = None,
) -> LogRecord:
    """Return a record of what held-out episodes show of a shield.

    ====================  =======================================  ================================
    method                log                                      result
    ====================  =======================================  ================================
    ``"detection"``       episodes of any policies                 a delta, and the share of
                                                                   violating episodes that it warns
                                                                   of in time
    ``"shadow"``          episodes of the agent, WITHOUT the       a bound on the rate of agent and
                          shield or in shadow mode                 shield together
    ``"spliced"``         as for shadow, and a simulator that      a bound on the same rate, if the
                          restores the full state                  simulator is right
    ``"trial"``           episodes of the agent, recorded with     a bound on the same rate, the
                          the shield ON at its delta               tight one
    ``"residuals"``       episodes of any policies                 a bound on how far values rise in
                                                                   one step beyond Q_h
    ====================  =======================================  ================================

    Args:
        shield: The shield. For shadow, spliced and trial its delta, replacement and support test
            must have been fixed without a look at these episodes.
        held_out: Whole episodes that are independent of each other, none of which is in the
            training log. The labels say where h > 0; a cost above 0 is a violation as well.
        method: One of the five.
        confidence: 1 - b, over the draw of the episodes.
        alpha: Share of new episodes for which the threshold may fail, 0.1 by default; for detection
            and residuals.
        lead: Number k >= 1 of steps before the entry at which the alarm must have been raised, 1 by
            default; for detection.
        epsilon: Rate that the bound must not exceed; for shadow, spliced and trial. None accepts
            any bound.
        policy: The agent that made the log, or its name; for shadow, spliced and trial. Spliced
            needs the agent itself, without a memory of the episode. For shadow and spliced with
            ``deterministic=True`` its actions are compared with the logged ones.
        policy_name: Name of the agent in the record, where `policy` is not a name.
        deterministic: The `deterministic` with which the agent acted; for shadow, spliced and
            trial. Spliced needs it of an agent with a method ``predict``.
        horizon: Number of steps of a whole episode that does not terminate; by default that of the
            longest episode. A truncated episode that is shorter was cut in the middle. Not for
            detection.
        simulator: Environment whose full state can be restored; for spliced.
        restore: Function ``(simulator, observation, episode, step)`` that sets a simulator that was
            just reset to the full state of a step of an episode of `held_out`, and returns the
            observation there. By default ``simulator.reset(options={"state": observation})``, as
            the environments of this package take it. For spliced.
        seed: Seed of the continuations, 0 by default; for spliced.

    Raises:
        TypeError: `held_out` is no `OfflineDataset`, `policy` is neither an agent nor a name (or,
            for spliced, no agent), `simulator` is no environment, or another argument is of a wrong
            type.
        ValueError: An argument is out of range or belongs to another method; an episode is in the
            training log, or twice in the log; there are too few episodes (the message has the
            number needed); the log is of another agent, or was recorded with the shield on where it
            must be off; these episodes have chosen the delta that they would test; the agent has a
            memory, or the simulator is not where the log was (spliced).
        CalibrationError: The bound exceeds `epsilon`, or too many episodes enter the violation
            before the lead.
        LookupError: The shield needs several constraints whose functions are not registered.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r:.60}")
    chosen: Method = method
    remembers = shield.sensors is not None and any(shield.sensors.falls_back)
    if method not in VALUES_ALONE and remembers:
        raise ValueError(
            f"method={method!r} judges each step of a log by itself, but this shield also falls "
            "back on what it remembers of earlier observations: leave the checks out by "
            "with_sensors(None), or let them warn"
        )
    check_held_out(shield.model, held_out)
    check_probability("confidence", confidence)
    ranked = chosen in VALUES_ALONE
    _refuse(alpha is not None and not ranked, "alpha", alpha, "detection and residuals", chosen)
    _refuse(lead is not None and chosen != DETECTION, "lead", lead, "detection", chosen)
    rates = "shadow, spliced and trial"
    _refuse(epsilon is not None and ranked, "epsilon", epsilon, rates, chosen)
    _refuse(policy is not None and ranked, "policy", policy, rates, chosen)
    _refuse(deterministic is not None and ranked, "deterministic", deterministic, rates, chosen)
    cuts = "shadow, spliced, trial and residuals"
    _refuse(horizon is not None and chosen == DETECTION, "horizon", horizon, cuts, chosen)
    for name, value in (("simulator", simulator), ("restore", restore), ("seed", seed)):
        _refuse(value is not None and chosen != SPLICED, name, value, "spliced", chosen)
    if deterministic is not None and not isinstance(deterministic, bool):
        raise TypeError(
            f"deterministic must be True, False or None (not known), got {deterministic!r:.60}"
        )
    alpha = (0.1 if alpha is None else alpha) if ranked else None
    lead = whole("lead", 1 if lead is None else lead, least=1) if chosen == DETECTION else None
    for name, share in (("alpha", alpha), ("epsilon", epsilon)):
        if share is not None:
            check_probability(name, share)
    aborted = _from_flights(held_out, ABORTED)
    if aborted and horizon is None and chosen != DETECTION:
        raise ValueError(
            f"horizon must be given, because {aborted} recorded episodes were cut before their "
            "end, so that their lengths do not show it: pass the number of steps of a whole "
            "episode that does not terminate"
        )
    longest = int(held_out.episode_lengths.max())
    horizon = longest if horizon is None else whole("horizon", horizon, least=longest)
    hashes = held_out.episode_hashes
    _refuse_common(shield, held_out)
    digest = hashlib.sha256(np.sort(hashes).tobytes()).hexdigest()
    splicer = None
    if chosen == SPLICED:
        seed = whole("seed", 0 if seed is None else seed, least=0)
        splicer = Splicer(shield, held_out, simulator, restore, policy, deterministic, seed)
    agent = _agent_name(held_out, policy, policy_name)
    assumptions = [
        _held_out_assumption(shield),
        _INDEPENDENT,
        *_about_agent(shield, held_out, chosen, policy, agent, deterministic),
        *([] if splicer is None else _about_simulator(splicer)),
    ]
    name = "" if splicer is None else splicer.name
    fixed = None if ranked else shield.delta
    earlier = shield.ledger.about(hashes)
    if not ranked:
        _refuse_own_choice(earlier, shield.delta)
    by = "" if ranked else agent
    asked = LogAttempt(
        chosen, fixed, alpha, lead, 1.0 - confidence, None, digest, by,
        simulator=name, seed=seed, shield=shield.digest, outcomes=_outcomes(held_out, horizon),
    )  # fmt: skip
    # A shield that is tried until it passes was tried each time, whatever the episodes.
    known = [*earlier, *(one for one in shield.ledger.attempts if asked.repeats(one))]
    others = [one for one in dict.fromkeys(known) if not asked.same_question(one)]
    repeats = [one for one in others if asked.repeats(one)]
    spent = sum(one.level for one in others) + asked.level
    if spent >= 1.0:
        about = "about this shield and agent" if repeats else "about some of these episodes"
        raise ValueError(
            f"{len(others)} statements {about}, at levels that sum to {spent - asked.level:.3g}, "
            "leave no confidence for another: "
            + (
                "ask for a higher confidence, such as 0.99, from the first attempt on"
                if repeats
                else "use fresh episodes"
            )
        )
    judge = _Judge(shield, held_out, horizon)
    assumptions.append(_about_labels(judge))
    record = LogRecord(
        method=chosen,
        delta=fixed,
        confidence=confidence,
        spent=spent,
        tries=len(others) + 1,
        episodes=0,
        events=0,
        bound=1.0,
        held_out=held_out.num_episodes,
        violating=int(judge.violating.sum()),
        cut=int(judge.cut.sum()),
        horizon=horizon,
        agent=agent,
        deterministic=deterministic,
        replacement=describe(shield.replacement),
        digest=digest,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={
            "python": platform.python_version(),
            **{one: version(one) for one in ("safeshield", "numpy")},
        },
        assumptions=tuple(assumptions),
        alpha=alpha,
        lead=lead,
        epsilon=epsilon,
        repeats=len(repeats),
        failed=sum(not one.passed for one in repeats),
        simulator=name,
        seed=seed,
        environment=_environment(held_out),
        stepless=_from_flights(held_out, STEPLESS),
    )
    try:
        if chosen == DETECTION:
            found = judge.detection(record)
        elif chosen == RESIDUALS:
            found = judge.residuals(record)
        else:
            found = judge.rate(record, splicer)
    except CalibrationError:
        # The error says what these episodes show, so they have been looked at.
        shield.ledger = shield.ledger.with_attempt(asked, hashes)
        raise
    picked = found.threshold if chosen == RESIDUALS else found.delta
    passed = epsilon is None or found.bound <= epsilon
    asked = replace(asked, chosen=picked if ranked else None, passed=passed)
    shield.ledger = shield.ledger.with_attempt(asked, hashes)
    if epsilon is not None and not passed:
        raise CalibrationError(
            f"the rate is not shown to be at most {epsilon:g}: {found.events} of {found.episodes} "
            f"episodes count against it, and the bound is {found.bound:.4g} with confidence "
            f"{confidence:g}. {_what_helps(found)}"
        )
    return found


class _Judge:
    """Scores of the episodes of a log by a shield."""

    def __init__(self, shield: Shield, log: OfflineDataset, horizon: int) -> None:
        self.shield = shield
        self.log = log
        starts = log.episode_starts
        last = starts + log.episode_lengths - 1
        reached = (log.next_constraints > 0) | (log.costs > 0)
        self.unsafe_start: Flags = log.constraints[starts] > 0
        # The place of the first step that reaches a violation; the length where none does.
        steps = np.arange(len(log)) - np.repeat(starts, log.episode_lengths)
        first = np.where(reached, steps, len(log))
        self.entry = np.minimum.reduceat(first, starts) + 1
        self.violating: Flags = (self.entry <= log.episode_lengths) | self.unsafe_start
        self.cut: Flags = log.truncated[last] & (log.episode_lengths < horizon)
        self._steps = steps

    def detection(self, record: LogRecord) -> LogRecord:
        """Return the record of detection."""
        alpha, lead = record.alpha or 0.0, record.lead or 1
        counts = self.violating & ~self.unsafe_start
        total = int(counts.sum()) + record.stepless
        if total < episodes_needed(alpha, record.confidence):
            raise ValueError(
                f"held_out has {total} violating episodes with a safe start, among "
                f"{len(counts)}, which cannot set a threshold for alpha {alpha:g} with confidence "
                f"{record.confidence:g}: at least {episodes_needed(alpha, record.confidence)} are "
                "needed; hold out more episodes, or ask for a larger alpha"
            )
        values = self._action_values()
        in_time = self._steps <= np.repeat(self.entry, self.log.episode_lengths) - lead
        scores = self._highest(np.where(in_time, values, -np.inf))
        missed = np.append(scores[counts], np.full(record.stepless, -np.inf))
        threshold, rank = lowest_allowed(missed, alpha, record.confidence)
        if not np.isfinite(threshold):
            early = int(np.isneginf(missed).sum())
            raise CalibrationError(
                f"{early} of {total} violating episodes enter the violation less than {lead} "
                f"steps after their start, or have no readable state before; at most {rank - 1} "
                f"may for alpha {alpha:g}: ask for a shorter lead or a larger alpha"
            )
        quiet = self._highest(values)[~self.violating]
        # The values of a state differ by rounding between a batch and a single step, and the shield
        # accepts an action whose Q_h equals its threshold.
        delta = max(self.shield.model.scale.rounding - threshold, 0.0)
        return replace(
            record,
            delta=delta,
            episodes=total,
            events=int((missed < threshold).sum()),
            cut=int((self.cut & counts).sum()) + record.stepless,
            bound=alpha,
            threshold=threshold,
            curve=_curve(missed, quiet, threshold),
        )

    def residuals(self, record: LogRecord) -> LogRecord:
        """Return the record of residuals."""
        alpha = record.alpha or 0.0
        values = self._action_values()
        after = self._state_values(self.log.next_observations, self.log.next_constraints)
        with np.errstate(invalid="ignore"):
            rises = np.maximum(self.log.next_constraints, after) - values
        # Infinity minus infinity is no number: nothing is known of such a step.
        scores = self._highest(np.where(np.isnan(rises), np.inf, np.maximum(rises, 0.0)))
        scores[self.cut] = np.inf
        scores = np.append(scores, np.full(record.stepless, np.inf))
        ranked = lowest_allowed(-scores, alpha, record.confidence)
        if not np.isfinite(ranked.threshold):
            raise CalibrationError(
                f"{int(np.isinf(scores).sum())} of {len(scores)} episodes were cut, or have states "
                f"that are not readable, and at most {ranked.rank - 1} may for alpha {alpha:g}: "
                "hold out more whole episodes"
            )
        return replace(
            record,
            episodes=len(scores),
            events=int((scores > -ranked.threshold).sum()),
            cut=int(self.cut.sum()) + record.stepless,
            bound=alpha,
            threshold=0.0 - ranked.threshold,
        )

    def rate(self, record: LogRecord, splicer: Splicer | None = None) -> LogRecord:
        """Return the record of a shadow, a trial, or of episodes that a `splicer` continues."""
        starts = self.log.episode_starts
        kept = self._state_values(self.log.observations, self.log.constraints, starts)
        kept_starts: Flags = kept <= self.shield.threshold
        total = int(kept_starts.sum()) + record.stepless
        needed = 1 if record.epsilon is None else episodes_needed(record.epsilon, record.confidence)
        if total < needed:
            goal = "show a rate"
            if record.epsilon is not None:
                goal += f" of at most {record.epsilon:g} with confidence {record.confidence:g}"
            raise ValueError(
                f"{total} of {len(starts) + record.stepless} held-out episodes start with V_h <= "
                f"{self.shield.threshold:.4g}, which cannot {goal}: at least {needed} are needed, "
                "without one that counts against it"
            )
        violating, cut = self.violating, self.cut
        continued = 0
        if record.method == SHADOW:
            violating = violating | self._highest(~self._judged()[0])
        elif splicer is not None:
            violating, cut, continued = self._spliced(splicer, kept_starts, record.horizon)
        else:
            self._refuse_unshielded()
        count = int((violating | cut)[kept_starts].sum()) + record.stepless
        return replace(
            record,
            episodes=total,
            events=count,
            bound=upper_bound(total, count, record.confidence),
            cut=int((cut & kept_starts).sum()) + record.stepless,
            continued=continued,
        )

    def _spliced(self, splicer: Splicer, kept: Flags, horizon: int) -> tuple[Flags, Flags, int]:
        """Return which episodes (E,) violate and which are cut, and the number of continuations.

        Those that are `kept` go on in the simulator from the first rejected action, unless they
        violated before.
        """
        rejected = np.where(self._judged()[0], len(self.log), self._steps)
        first = np.minimum.reduceat(rejected, self.log.episode_starts)
        # The state in which the action of step t is taken is the t-th after the start.
        goes_on = kept & (first < len(self.log)) & (first < self.entry) & ~self.unsafe_start
        violating, cut = self.violating.copy(), self.cut.copy()
        for episode in np.flatnonzero(goes_on):
            step = int(first[episode])
            violating[episode], cut[episode] = splicer.play(int(episode), step, horizon - step)
        return violating, cut, int(goes_on.sum())

    # -- values of the log's rows ------------------------------------------------------------------

    def _highest(self, steps: npt.NDArray[N]) -> npt.NDArray[N]:
        """Return the highest of the values (N,) of the steps of each episode, (E,)."""
        highest: npt.NDArray[N] = np.maximum.reduceat(steps, self.log.episode_starts)
        return highest

    def _states(self, rows: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]) -> StateValue:
        source = self.shield.model.constraint
        given = source is not None and not source.available and len(source.names) == 1
        return self.shield.states(rows, labels if given else None)

    def blocks(self, count: int) -> list[slice]:
        return [slice(first, first + _BLOCK) for first in range(0, count, _BLOCK)]

    def _state_values(
        self,
        rows: npt.NDArray[np.float32],
        labels: npt.NDArray[np.float32],
        index: npt.NDArray[np.int64] | None = None,
    ) -> Scores:
        if index is not None:
            rows, labels = rows[index], labels[index]
        found = [
            self.shield.state_values(self._states(rows[part], labels[part]), rows[part])
            for part in self.blocks(len(rows))
        ]
        return np.concatenate(found).astype(np.float64)

    def _judged(self) -> tuple[Flags, Scores]:
        """Return whether the shield accepts the logged action of each step, and its Q_h: (N,)."""
        log, accepted, values = self.log, [], []
        for part in self.blocks(len(log)):
            rows = log.observations[part]
            states = self._states(rows, log.constraints[part])
            good, q = self.shield.acceptable(states, rows, log.actions[part][:, None])
            known = self.shield.known(states, rows) & ~np.isnan(q[:, 0])
            accepted.append(good[:, 0])
            values.append(np.where(known, q[:, 0], np.inf))
        return np.concatenate(accepted), np.concatenate(values).astype(np.float64)

    def _action_values(self) -> Scores:
        """Return Q_h (N,) of the logged actions; infinity where the shield would not know it.

        The shield rejects the action in such a step, so infinity counts as an alarm.
        """
        return self._judged()[1]

    def _refuse_unshielded(self) -> None:
        """Raise ValueError where the log's actions are not what this shield would have executed.

        A `CommittedFallback` or a `BackupController` answers a rejected action by one that depends
        on the state alone, so a logged action that the shield rejects must be that one. The choice
        of other strategies depends on the proposed action, which the log does not hold.
        """
        if not isinstance(self.shield.replacement, CommittedFallback | BackupController):
            return
        log = self.log
        # Values differ by rounding between a batch and a single step.
        slack = 10.0 * self.shield.model.scale.rounding
        near = self.shield.with_delta(max(self.shield.delta - slack, 0.0))
        rejected = np.flatnonzero(~_Judge(near, log, int(log.episode_lengths.max()))._judged()[0])
        other = 0
        for part in self.blocks(len(rejected)):
            at = rejected[part]
            states = self._states(log.observations[at], log.constraints[at])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UncalibratedShieldWarning)
                answers, _ = near.filter_rows(states, log.observations[at], log.actions[at])
            other += int(_differ(log, answers, log.actions[at]).sum())
        if other:
            raise ValueError(
                f"held_out must be recorded with this shield on at delta {self.shield.delta:.4g}, "
                f"but in {other} of {len(log)} steps an action was executed that this shield "
                "replaces by another one: record the trial with this shield, or use method "
                "'shadow' for episodes without it"
            )


def _differ(
    log: OfflineDataset, actions: npt.NDArray[np.generic], logged: npt.NDArray[np.generic]
) -> Flags:
    """Return whether `actions` (n, act), clipped, are others than the `logged` ones, (n,)."""
    codec = log.flat_actions
    spread = 1.0 if codec.discrete else codec.high - codec.low
    far = np.abs(np.clip(actions, codec.low, codec.high) - logged) > _TOLERANCE * spread
    differ: Flags = far.any(axis=1)
    return differ


def _curve(scores: Scores, quiet: Scores, threshold: float) -> tuple[CurvePoint, ...]:
    """Return what an alarm at each of up to 64 thresholds misses, and its false alarms.

    Args:
        scores: (n,) S of the violating episodes.
        quiet: (m,) highest Q_h of the others.
        threshold: A threshold that must be among them.
    """
    finite = np.unique(scores[np.isfinite(scores)])
    picked = finite[np.linspace(0, len(finite) - 1, min(len(finite), _MOST_POINTS)).astype(int)]
    return tuple(
        CurvePoint(float(one), int((scores < one).sum()), int((quiet >= one).sum()))
        for one in np.unique(np.append(picked, threshold))
    )


# -- what is refused ----------------------------------------------------------------------------


def _refuse(wrong: bool, name: str, value: object, methods: str, method: str) -> None:
    if wrong:
        raise ValueError(
            f"{name}={value!s:.60} goes with {methods}, got method={method!r}: leave it out"
        )


def _refuse_common(shield: Shield, held_out: OfflineDataset) -> None:
    """Raise ValueError where an episode was trained on, or occurs twice in the log."""
    hashes = held_out.episode_hashes
    if shield.training_episodes is not None:
        common = np.flatnonzero(np.isin(hashes, shield.training_episodes))
        if len(common):
            raise ValueError(
                f"held_out must share no episode with the training log, but {len(common)} of "
                f"{len(hashes)} episodes are in both, the first is episode {common[0]}: split the "
                "log before training, train, held_out = log.split(0.8, seed=0)"
            )
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"held_out must hold each episode once, but {int((counts - 1).sum())} are repeated, "
            f"first episode {int(first[counts > 1].min())}: they are no independent evidence; "
            "select each once"
        )


def _refuse_own_choice(earlier: list[LogAttempt], delta: float) -> None:
    if any(one.chosen == delta for one in earlier):
        raise ValueError(
            f"delta {delta:.4g} was chosen by some of these episodes (see shield.ledger), so they "
            "cannot test it: test it on fresh episodes"
        )


# -- the agent and the assumptions ----------------------------------------------------------------


_INDEPENDENT = Assumption(
    "independent episodes",
    "The episodes are whole, independent of each other, and drawn like those to which the "
    "statement is applied: the same starts, the same environment, the same horizon.",
    False,
)


def _held_out_assumption(shield: Shield) -> Assumption:
    if shield.training_episodes is None:
        return Assumption(
            "held out",
            "No episode of the log was trained on. The shield's file does not hold the hashes of "
            "its training episodes, so this could not be checked.",
            False,
        )
    return Assumption(
        "held out",
        f"No episode of the log was trained on: none of the shield's "
        f"{len(shield.training_episodes)} training episodes is among them, by 64-bit hashes.",
        True,
    )


def _agent_name(held_out: OfflineDataset, policy: object, policy_name: str | None) -> str:
    """Return the name of the log's agent, after a comparison with what the log says of it."""
    if policy_name is not None and (policy is None or isinstance(policy, str)):
        raise ValueError(f"policy_name={policy_name!r} needs policy, the agent itself")
    for what, given in (("policy", policy), ("policy_name", policy_name)):
        if given == "":
            raise ValueError(f"{what} must name the agent that made the log, got ''")
    if policy_name is not None and not isinstance(policy_name, str):
        raise TypeError(f"policy_name must be a text, got {policy_name!r:.60}")
    if policy is not None and not isinstance(policy, str):
        as_batch_policy(policy, held_out.action_space)  # Raises where it is none.
    told = {one.get("collected_by") for one in _sources(held_out)}
    named = sorted(one for one in told if isinstance(one, str))
    if policy is None:
        return named[0] if len(named) == len(told) == 1 else _LOGGER
    name = policy_name or default_name(policy)
    others = [one for one in named if one != name]
    # A name such as "SafeFQL, seed 0 (agent.safetensors)" is of a file, as `collect` writes it.
    file = _FILE.search(name)
    if file is not None:
        others = [one for one in others if one != file[1] and _FILE.search(f"({one})")]
    if others and (isinstance(policy, str) or policy_name is not None):
        raise ValueError(
            f"policy must be the agent that made the log, got {name!r}, but the log was collected "
            f"by {others[0]!r}: pass a log of that agent"
        )
    return name


def _sources(held_out: OfflineDataset) -> list[dict[str, Any]]:
    """Return the provenance of each log that `held_out` was joined from."""

    def inside(told: dict[str, Any]) -> list[dict[str, Any]]:
        parts = told.get("parts")
        if not isinstance(parts, list | tuple):
            return [told]
        shared = {name: value for name, value in told.items() if name != "parts"}
        found = [inside({**shared, **part}) for part in parts if isinstance(part, dict)]
        return [one for part in found for one in part] or [shared]

    return inside(dict(held_out.provenance or {}))


def _from_flights(held_out: OfflineDataset, name: str) -> int:
    """Return a number of episodes, `STEPLESS` or `ABORTED`, over all flights of the log."""
    flights = [one.get("flight") for one in _sources(held_out)]
    counts = [one.get(name, 0) for one in flights if isinstance(one, dict)]
    return sum(whole(f"flight: {name}", count, least=0) for count in counts)


def _environment(held_out: OfflineDataset) -> str:
    """Return the name of the environment that the log tells, "" where it tells none.

    Raises:
        ValueError: The log was joined from logs of several environments.
    """
    told = sorted({str(one["environment"]) for one in _sources(held_out) if one.get("environment")})
    if len(told) > 1:
        raise ValueError(
            f"held_out must be of one environment, but it was joined from logs of {told}: pass the "
            "log of one of them"
        )
    return told[0] if told else ""


def _outcomes(held_out: OfflineDataset, horizon: int) -> str:
    """Return a digest of what decides how the episodes count, besides the shield."""
    found = hashlib.sha256(str(horizon).encode())
    for array in (
        held_out.costs, held_out.constraints, held_out.next_constraints, held_out.terminated,
        held_out.truncated,
    ):  # fmt: skip
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _about_labels(judge: _Judge) -> Assumption:
    """Return the assumption about the labels, after a comparison with the shield's function of h.

    Raises:
        ValueError: The labels of some steps contradict the function.
    """
    shield, log = judge.shield, judge.log
    source = shield.model.constraint
    known = source is not None and source.available
    if source is None or not known or not (shield.record is None or shield.record.sees_the_state):
        return Assumption("labels", "The labels of the log say which states violate.", False)
    near, violates = shield.model.scale.agreement, (log.next_constraints > 0) | (log.costs > 0)
    parts = [
        shield.states(log.next_observations[part], None).constraint
        for part in judge.blocks(len(log))
    ]
    h = np.concatenate([part for part in parts if part is not None])
    wrong = np.where(violates, h < -near, h > near)
    if wrong.any():
        at = int(wrong.argmax())
        says = "violates" if violates[at] else "is safe"
        raise ValueError(
            f"held_out has labels that contradict the shield's constraint '{source.name}' in "
            f"{int(wrong.sum())} of {len(log)} steps: the state that row {at} reaches {says} by "
            f"the log, and h is {h[at]:.4g} there; label the log by "
            f"log.with_constraint('{source.name}') if the function is right"
        )
    return Assumption(
        "labels",
        f"The labels of the log say which states violate. The constraint '{source.name}' agrees.",
        True,
    )


def _about_agent(
    shield: Shield,
    held_out: OfflineDataset,
    method: Method,
    policy: object,
    agent: str,
    deterministic: bool | None,
) -> list[Assumption]:
    """Return the assumptions about the agent, after the checks that the log allows."""
    sources = _sources(held_out)
    learners = any(one.get("learners") for one in sources)
    if method in (DETECTION, RESIDUALS):
        changing = "The log says that its agents learned while it was made. " if learners else ""
        return [
            Assumption(
                "exchangeable episodes",
                f"{changing}The held-out episodes are a random split of the log's. Episodes of "
                "learners that changed over time are exchangeable only by a random split of "
                "episodes, never by a split in time.",
                False,
            )
        ]
    if learners:
        raise ValueError(
            f"method={method!r} is about one agent, but the log says that its agents learned while "
            "it was made: record episodes of the agent that is deployed, or use 'detection' on a "
            "random split"
        )
    agents = sorted({str(one["collected_by"]) for one in sources if one.get("collected_by")})
    if len(agents) > 1:
        raise ValueError(
            f"method={method!r} is about one agent, but the log was joined from logs of {agents}: "
            "pass the log of one of them"
        )
    marks = [one.get("behind_shield") for one in sources]
    for behind in marks:
        _check_behind(shield, behind, method)
    marked = sum(isinstance(one, dict) for one in marks)
    if method == TRIAL and 0 < marked < len(marks):
        raise ValueError(
            f"held_out must be recorded with this shield on throughout, but {len(marks) - marked} "
            f"of the {len(marks)} logs that it was joined from do not say so: pass the others alone"
        )
    checked = False
    if (
        method in (SHADOW, SPLICED)
        and deterministic
        and policy is not None
        and not isinstance(policy, str)
    ):
        checked = _compare_actions(held_out, policy, agent)
    drawn = [] if deterministic is None else [_acted(deterministic, checked)]
    return [
        _recorded(method, marked == len(marks)),
        _FIXED,
        Assumption(
            "same agent",
            f"{agent} is deployed as it made the log: the same `deterministic`, memory and "
            "processing of observations. It does not learn, and it does not read infos.",
            checked,
        ),
        *drawn,
    ]


def _about_simulator(splicer: Splicer) -> list[Assumption]:
    """Return the assumptions about the continuations."""
    return [
        Assumption(
            "simulator",
            f"The simulator {splicer.name} restores the full state of a step, and behaves from "
            "there as the plant does: the same dynamics, noise and ends of episodes. After each "
            "restoration its observation was the logged one; what no observation shows was not "
            "compared.",
            False,
        ),
        Assumption(
            "no memory",
            "The agent chooses its actions by the present observation alone, so that it can go on "
            "in the middle of an episode.",
            splicer.memoryless,
        ),
    ]


def _acted(deterministic: bool, checked: bool) -> Assumption:
    told = "" if checked else " The user says so, and the log does not show it."
    return Assumption(
        f"deterministic={deterministic}",
        f"The agent acted with deterministic={deterministic} while the log was made.{told}",
        checked,
    )


def _check_behind(shield: Shield, behind: object, method: Method) -> None:
    """Raise ValueError where the log says that it was recorded in another way."""
    if not isinstance(behind, dict):
        return
    mode = behind.get("mode")
    if method in (SHADOW, SPLICED) and mode != "shadow":
        raise ValueError(
            "held_out was recorded with a shield on, so it does not show the agent without one: "
            "use method='trial'"
        )
    if method == TRIAL:
        same = (behind.get("digest"), behind.get("delta")) == (shield.digest, shield.delta)
        if mode == "shadow" or not same:
            raise ValueError(
                f"held_out must be recorded with this shield on at delta {shield.delta:.4g}, but "
                f"the log says mode {mode!r}, delta {behind.get('delta')!r:.20}, shield "
                f"{behind.get('digest')!r:.20}; this one is {shield.digest!r}"
            )
        if behind.get("adaptive"):
            raise ValueError(
                f"held_out must be recorded with this shield on at delta {shield.delta:.4g}, but "
                "the log says that the threshold adapted while it was recorded: record the trial "
                "without adaptive thresholds and without a memory"
            )


def _compare_actions(held_out: OfflineDataset, policy: object, agent: str) -> bool:
    """Return whether a policy's deterministic actions were found to be the logged ones.

    Raises:
        ValueError: They differ.
    """
    if callable(getattr(policy, "act_batch", None)) or getattr(policy, "batched", False):
        return False  # Such a policy may draw noise, whatever is asked for.
    codec, actions = held_out.flat_actions, held_out.actions
    acts = as_batch_policy(policy, held_out.action_space, deterministic=True)
    found = []
    for first in range(0, len(held_out), _BLOCK):
        rows = held_out.observations[first : first + _BLOCK]
        batch = held_out.flat_observations.batch(rows)
        if isinstance(acts, PredictPolicy):
            starts = np.ones(len(rows), np.bool_)
            chosen, memory = acts.predict(batch, None, starts, deterministic=True)
            if memory is not None:
                return False  # A recurrent agent answers from its memory of the episode.
        else:
            chosen = acts(batch, np.random.default_rng(0))
        found.append(codec.flatten(chosen, "action")[0])
    answers = np.concatenate(found)
    wrong = _differ(held_out, answers, actions)
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(
            f"policy must be the agent that made the log, but {agent} chooses other actions in "
            f"{int(wrong.sum())} of {len(wrong)} logged states: {answers[at]} in row {at}, where "
            f"{actions[at]} is logged; pass that agent, or deterministic=False if it drew noise"
        )
    return True


def _recorded(method: Method, told: bool) -> Assumption:
    """Return the assumption about the recording.

    `told` is whether the log's provenance has it.
    """
    if method in (SHADOW, SPLICED):
        return Assumption(
            "proposals logged",
            "The logged actions are those that the agent proposed, and no shield changed them.",
            told,
        )
    return Assumption(
        "shield on",
        "Every episode was recorded with this shield on, at this delta."
        + (" The log says so." if told else ""),
        told,
    )


_FIXED = Assumption(
    "fixed before",
    "Delta, the replacement of actions and the support test were fixed without a look at these "
    "episodes.",
    False,
)


def _what_helps(found: LogRecord) -> str:
    share = found.events / found.episodes
    if found.epsilon is None or share >= found.epsilon:
        return (
            f"Their share is {share:.3g} already: more episodes will not help; a log recorded with "
            "the shield on (method 'trial') gives the tight bound"
            if found.method == SHADOW
            else f"Their share is {share:.3g} already: calibrate another delta or shield"
        )
    needed = episodes_needed(found.epsilon, found.confidence, found.events)
    return f"With as many among {needed} episodes it would be shown; collect fresh ones"
