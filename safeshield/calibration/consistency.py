r"""Whether the records in a file follow from their own counts.

A file's digest finds accidents, but whoever edits a record can renew it. This module finds records
that no calibration can have written: a bound that the counts do not give, a test that does not end
at these counts, a threshold that the walk did not reach. A record that was forged consistently
passes; only a signature finds it (`files.signing`).

Bounds are not computed anew. A bound is right where the probability of a result at least as good is
b between rates that differ from the bound by the rounding `TOLERANCE`. That takes two evaluations
of the test's own probability and no SciPy.

Records of earlier releases come from a fixed number of episodes, and hold the Clopper-Pearson bound
also where a test failed early. They hold no attempts, by which they are recognised.
"""

from __future__ import annotations

import datetime
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from safeshield.calibration.betting import BettingTest
from safeshield.calibration.binomial import at_most, check_probability, masses
from safeshield.calibration.promises import MeanCost, Promise, promised
from safeshield.calibration.sequential import (
    TOLERANCE,
    BinomialPlan,
    Decision,
    sequential_plan,
)
from safeshield.calibration.walk import check_deltas, walks_in_turn
from safeshield.shield.log_record import (
    DETECTION,
    RESIDUALS,
    SPLICED,
    TRIAL,
    VALUES_ALONE,
)
from safeshield.shield.record import RESERVED_SEEDS, ActorRecord

if TYPE_CHECKING:
    from safeshield.shield.log_record import Hashes, LogAttempt, LogRecord
    from safeshield.shield.record import Attempt, CalibrationRecord, Rung
    from safeshield.shield.shield import Shield

_MOST_EPISODES = 10**8


class _Counts(Protocol):
    """Counts of episodes, of which some violate."""

    @property
    def policy(self) -> str: ...
    @property
    def episodes(self) -> int: ...
    @property
    def violations(self) -> int: ...


def check_records(shield: Shield, path: str | os.PathLike[str]) -> None:
    """Check that the records of the shield in the file `path` follow from their own counts.

    Raises:
        ValueError: A record is impossible; the message says which statement does not follow.
    """
    try:
        check_calibrations(shield.record, shield.attempts)
        for number, seen in enumerate(shield.ledger.hashes):
            _check_log_attempt(shield.ledger.attempts[number], seen)
        for record in shield.log_records:
            _check_log_record(record, shield)
    except ValueError as error:
        raise ValueError(
            f"{path} holds a record that no calibration can have written: {error}; get the file "
            "again from whoever calibrated it, or calibrate the shield again"
        ) from error


def check_calibrations(record: CalibrationRecord | None, attempts: Sequence[Attempt]) -> None:
    """Check that a record of rollouts follows from its own counts, and that its attempts are known.

    Args:
        record: The record; None for none.
        attempts: The attempts that the owner of the record remembers.

    Raises:
        ValueError: The record is impossible; the message says which statement does not follow.
    """
    _check_attempts(attempts)
    if record is None:
        return
    own = record.attempts
    _require(
        tuple(attempts[: len(own)]) == own,
        f"attempts must begin with the {len(own)} attempts of the record, got {len(attempts)} "
        "attempts that do not",
    )
    check_probability("confidence", record.confidence)
    promise = _promise_of(record)
    _check_description(record)
    confidence = _tested_confidence(record)
    _check_walk(record)
    if isinstance(promise, MeanCost):
        for rung in record.walk:
            _check_mean(rung, promise, confidence)
    else:
        _check_rates(record, confidence)


def _require(holds: bool, statement: str) -> None:
    if not holds:
        raise ValueError(statement)


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= TOLERANCE * abs(other)


# -- records of rollouts --------------------------------------------------------------------------


def _promise_of(record: CalibrationRecord) -> Promise:
    promise = promised(record)
    _require(
        (record.limit, record.cost_bound) == (promise.limit, promise.bound),
        f"limit and cost_bound must be {promise.limit} and {promise.bound} for a promise of the "
        f"kind '{record.kind}', got {record.limit} and {record.cost_bound}",
    )
    _require(
        _near(record.epsilon, promise.share),
        f"epsilon must be {promise.share:g}, which is limit / cost_bound, got {record.epsilon:g}",
    )
    return promise


def _check_description(record: CalibrationRecord) -> None:
    _require(record.delta >= 0.0, f"delta must be at least 0, got {record.delta:g}")
    _require(
        0.0 < record.start_share <= 1.0,
        "start_share, the certified share of the starts, must be above 0 and at most 1, got "
        f"{record.start_share:g}",
    )
    _require(record.seed >= 0, f"seed must be at least 0, got {record.seed}")
    _require(
        record.horizon is None or record.horizon >= 1,
        f"horizon must be at least 1 step, got {record.horizon}",
    )
    _check_date(record.date)
    names = [result.policy for result in record.policies]
    _require(len(names) > 0, "policies must hold at least one policy, got none")
    _require(len(set(names)) == len(names), f"policies must have different names, got {names}")
    for result in record.policies:
        _check_counts("policies", result, least=1)
        _check_share("intervention_rate", result.intervention_rate)
    for point in record.pilot:
        _check_counts("pilot", point, least=0)
        _check_share("intervention_rate", point.intervention_rate)
        _check_share("start_share", point.start_share)
        _require(point.delta >= 0.0, f"pilot: delta must be at least 0, got {point.delta:g}")
    for rung in record.walk:
        _check_counts("walk", rung, least=1)
    if isinstance(record, ActorRecord):
        rates = [result.intervention_rate for result in record.policies]
        _require(
            rates == [0.0],
            "policies must be one actor, of which no action is replaced, got intervention rates "
            f"{rates}",
        )


def _check_date(date: str) -> None:
    try:
        datetime.datetime.fromisoformat(date)
    except ValueError as error:
        raise ValueError(f"date must be a time in ISO 8601, got {date!r:.40}") from error


def _check_counts(what: str, one: _Counts, least: int) -> None:
    _require(
        least <= one.episodes <= _MOST_EPISODES and 0 <= one.violations <= one.episodes,
        f"{what}: '{one.policy}' must have {least} to {_MOST_EPISODES} episodes, of which 0 to all "
        f"violate, got {one.violations} of {one.episodes}",
    )


def _check_share(what: str, share: float) -> None:
    _require(0.0 <= share <= 1.0, f"{what} must be between 0 and 1, got {share:g}")


def _check_attempts(attempts: Sequence[Attempt]) -> None:
    """Check the levels and the seeds of attempts, which are in the order in which they were made.

    After m earlier attempts an attempt has the level b 2^-m, on seeds that no other one used.
    """
    for number, one in enumerate(attempts):
        earlier = attempts[:number]
        most = 2.0 ** -sum(other.counts_for(one.environment, one.policies) for other in earlier)
        _require(
            0.0 <= one.level < most,
            f"attempt {number + 1} must have a level of at least 0 and below {most:g}, because of "
            f"the earlier attempts, got {one.level:g}",
        )
        _require(
            one.first_seed >= -1,
            f"attempt {number + 1} must have a first_seed of at least -1, got {one.first_seed}",
        )
        seeds = [other.first_seed for other in (*earlier, one) if other.first_seed >= 0]
        _require(
            one.first_seed < 0
            or all(abs(one.first_seed - seed) >= RESERVED_SEEDS for seed in seeds[:-1]),
            f"attempt {number + 1} must use seeds that no earlier attempt used, got first_seed "
            f"{one.first_seed} after {seeds[:-1]}",
        )


def _tested_confidence(record: CalibrationRecord) -> float:
    """Return the confidence of the record's tests, after a check of the attempt that made them."""
    planned = record.walks_planned
    _require(
        planned == 1 or (planned == 2 and bool(record.pilot) and bool(record.attempts)),
        "walks_planned must be 1, or 2 where a pilot proposed the thresholds and attempts are "
        f"known, got {planned}",
    )
    if not record.attempts:
        return record.confidence
    names = tuple(result.policy for result in record.policies)
    *earlier, own = record.attempts
    _require(
        (own.environment, own.policies, own.passed) == (record.environment, names, True),
        f"the last of attempts must be the record's own, which passed in {record.environment} with "
        f"{list(names)}, got one that {'passed' if own.passed else 'failed'} in {own.environment} "
        f"with {list(own.policies)}",
    )
    tried = sum(one.counts_for(record.environment, names) for one in earlier)
    level = (1.0 - record.confidence) * 2.0**-tried
    _require(
        _near(own.level, level),
        f"attempt {tried + 1} at confidence {record.confidence:g} must be tested at the level "
        f"{level:.6g}, got {own.level:.6g}",
    )
    untouched = tried == 0 and planned == 1
    confidence = record.confidence if untouched else 1.0 - own.level / planned
    check_probability("the confidence of the tests", confidence)
    return confidence


def _check_walk(record: CalibrationRecord) -> None:
    """Check that each walk tests in order and stops at its first failure, and that delta follows.

    A second walk follows only where it was planned and the first one reached no threshold.
    """
    rungs = iter(record.walk)

    def next_rung(delta: float, policy: str) -> Rung:
        rung = next(rungs, None)
        found = "none" if rung is None else f"one of '{rung.policy}' at delta {rung.delta:g}"
        if rung is None or (rung.delta, rung.policy) != (delta, policy):
            raise ValueError(
                f"walk must have a test of '{policy}' at delta {delta:g} next, got {found}"
            )
        return rung

    end = len(record.walk)
    if record.walks_planned > 1:
        failed = (number for number, rung in enumerate(record.walk, 1) if not rung.passed)
        end = next(failed, end)
    walks = [
        list(dict.fromkeys(rung.delta for rung in part))
        for part in (record.walk[:end], *filter(None, [record.walk[end:]]))
    ]
    for deltas in walks:
        check_deltas(deltas)
    names = [result.policy for result in record.policies]
    reached, tested = walks_in_turn(lambda _, *test: next_rung(*test), walks, names)
    _require(
        len(tested) == len(record.walk),
        f"walk must end with its first failed test, number {len(tested)}, got {len(record.walk)} "
        "tests",
    )
    _require(reached == record.delta, f"delta must be {reached}, which the walk reached, got "
             f"{record.delta}")  # fmt: skip
    chosen = {rung.policy: rung for rung in tested if rung.delta == record.delta}
    for result in record.policies:
        rung = chosen[result.policy]
        stated, follows = ((one.episodes, one.violations, one.bound) for one in (result, rung))
        _require(
            stated == follows,
            f"policies: '{result.policy}' must have the (episodes, violations, bound) of its test "
            f"in the walk, {follows}, got {stated}",
        )


def _check_rates(record: CalibrationRecord, confidence: float) -> None:
    """Check the tests of a rate by each kind of test that a calibration can have used."""
    level = 1.0 - confidence
    for rung in record.walk:
        shown = at_most(rung.violations, rung.episodes, min(record.epsilon * (1 + TOLERANCE), 1.0))
        _require(
            not rung.passed or shown <= level * (1.0 + TOLERANCE),
            f"{_name(rung)}: {rung.violations} violations in {rung.episodes} episodes cannot show "
            f"a rate of at most {record.epsilon:g} at the level {level:.3g}",
        )
    wrong: list[tuple[int, str]] = []
    releases = (False,) if record.attempts else (False, True)
    for plan, earlier in itertools.product(_plans(record, confidence), releases):
        found = (_wrong(rung, plan, earlier) for rung in record.walk)
        first = next(((n, text) for n, text in enumerate(found) if text), None)
        if first is None:
            return
        wrong.append(first)
    raise ValueError(max(wrong, key=lambda one: one[0])[1])


def _plans(record: CalibrationRecord, confidence: float) -> Iterator[BinomialPlan]:
    """Yield the sequential test, and the tests of as many episodes as the chosen threshold had."""
    yield sequential_plan(record.epsilon, confidence)
    count = record.policies[0].episodes
    most = max(rung.violations for rung in record.walk)
    tails = np.cumsum(masses(count, most, record.epsilon))
    for slack in (1.0 + TOLERANCE, 1.0 - TOLERANCE):
        allowed = int(np.count_nonzero(tails <= (1.0 - confidence) * slack)) - 1
        if allowed >= 0:
            yield BinomialPlan(((count, allowed),), confidence)


def _wrong(rung: Rung, plan: BinomialPlan, earlier_release: bool) -> str | None:
    """Return what a plan's test of one threshold cannot have given; None where it can."""
    episodes, violations = rung.episodes, rung.violations
    if earlier_release and len(plan.looks) == 1 and not rung.passed:
        # Earlier releases played several episodes at a time, and stopped after the last of them.
        count, allowed = plan.looks[0]
        ended: bool | None = False if violations > allowed and episodes <= count else None
        plan = BinomialPlan(((episodes, violations),), plan.confidence)
    else:
        ended = plan.ended(episodes, violations)
    if ended is None:
        return (
            f"{_name(rung)}: no test of this rate ends with {violations} violations in {episodes} "
            f"episodes at confidence {plan.confidence:g}"
        )
    if ended is not rung.passed:
        told = ["failed", "passed"]
        return (
            f"{_name(rung)}: with {violations} violations in {episodes} episodes the test "
            f"{told[ended]}, and the record says that it {told[rung.passed]}"
        )
    if not plan.shows(episodes, violations, rung.bound):
        return (
            f"{_name(rung)}: the bound of {violations} violations in {episodes} episodes is "
            f"{plan.bound_of(episodes, violations):.6g}, not {rung.bound:.6g}"
        )
    return None


def _check_mean(rung: Rung, promise: MeanCost, confidence: float) -> None:
    """Check a test of a mean cost. Its bound depends on costs that the record does not hold."""
    level, share = 1.0 - confidence, rung.bound / promise.bound
    _require(
        0.0 < share <= 1.0 + TOLERANCE,
        f"{_name(rung)}: the bound of the mean must be above 0 and at most cost_bound "
        f"{promise.bound:g}, got {rung.bound:g}",
    )
    clean = at_most(0, rung.episodes, min(share * (1.0 + TOLERANCE), 1.0))
    _require(
        clean <= level * (1.0 + TOLERANCE),
        f"{_name(rung)}: {rung.episodes} episodes cannot show the bound {rung.bound:g}, even "
        "without any cost",
    )
    _require(
        not rung.passed or rung.bound <= promise.limit * (1.0 + TOLERANCE),
        f"{_name(rung)}: a bound of {rung.bound:g}, above the limit {promise.limit:g}, does not "
        "pass",
    )
    if rung.violations == 0:
        test = BettingTest(promise.share, confidence, rung.episodes)
        _require(
            rung.passed and test.decide(np.zeros(rung.episodes)) == Decision(True, rung.episodes),
            f"{_name(rung)}: no test of this mean ends after {rung.episodes} episodes without any "
            "cost, or it does not fail",
        )


def _name(rung: Rung) -> str:
    return f"test of '{rung.policy}' at delta {rung.delta:g}"


# -- records of logs ------------------------------------------------------------------------------


def _check_log_attempt(attempt: LogAttempt, seen: Hashes) -> None:
    ranked = attempt.method in VALUES_ALONE
    check_probability("log_attempts: level", attempt.level)
    if attempt.alpha is not None:
        check_probability("log_attempts: alpha", attempt.alpha)
    _require(
        _filled(attempt.alpha, attempt.delta, attempt.lead, attempt.agent or None)
        == (ranked, not ranked, attempt.method == DETECTION, not ranked)
        and (ranked or attempt.chosen is None)
        and _simulated(attempt),
        f"log_attempts: the fields of an attempt by '{attempt.method}' are alpha, chosen and lead "
        "(detection), alpha and chosen (residuals), or delta and agent, with simulator and seed "
        f"(spliced), got {attempt}",
    )
    _require(
        attempt.digest == _digest_of(seen),
        f"log_attempts: digest must be that of the {len(seen)} hashes, got {attempt.digest:.20}",
    )


def _simulated(one: LogAttempt | LogRecord) -> bool:
    """Return whether simulator and seed are there where they belong, and only there."""
    spliced = one.method == SPLICED
    return bool(one.simulator) == spliced == (one.seed is not None) and (one.seed or 0) >= 0


def _filled(*values: object) -> tuple[bool, ...]:
    return tuple(value is not None for value in values)


def _digest_of(seen: Hashes) -> str:
    return hashlib.sha256(np.sort(seen).tobytes()).hexdigest()


def _check_log_record(record: LogRecord, shield: Shield) -> None:
    name = f"log_records, '{record.method}'"
    ranked = record.method in VALUES_ALONE
    check_probability(f"{name}: confidence", record.confidence)
    for what in ("alpha", "epsilon"):
        share = getattr(record, what)
        if share is not None:
            check_probability(f"{name}: {what}", share)
    _require(
        _filled(record.alpha, record.threshold, record.lead, record.delta)
        == (ranked, ranked, record.method == DETECTION, record.method != RESIDUALS)
        and not (ranked and (record.epsilon, record.deterministic) != (None, None))
        and bool(record.curve) == (record.method == DETECTION)
        and _simulated(record),
        f"{name}: alpha, threshold, lead, curve, epsilon, deterministic, delta, simulator and seed "
        "are those of another method",
    )
    _check_date(record.date)
    _check_log_counts(name, record)
    _check_statement(name, record, shield)
    _check_tries(name, record, shield)
    told = {one.name: one.checked for one in record.assumptions}
    _require(
        told.get("independent episodes") is False and "held out" in told,
        f"{name}: assumptions must hold 'held out', and 'independent episodes' as not checked, got "
        f"{told}",
    )
    _require(
        not told["held out"] or shield.training_episodes is not None,
        f"{name}: 'held out' cannot have been checked, because the file holds no hashes of "
        "training episodes",
    )


def _check_log_counts(name: str, record: LogRecord) -> None:
    every = {
        what: getattr(record, what)
        for what in (
            "held_out", "episodes", "events", "violating", "cut", "repeats", "failed", "continued",
            "stepless",
        )
    }  # fmt: skip
    counted, events = record.episodes, record.events
    most = record.held_out + record.stepless
    held = (
        min(every.values()) >= 0
        and 1 <= counted <= most <= _MOST_EPISODES
        and record.violating <= record.held_out
        and record.stepless <= min(record.cut, events)
        and max(events, record.cut, record.continued) <= counted
        and (record.method == SPLICED or record.continued == 0)
    )
    _require(held, f"{name}: the counts {every} are negative, or a part is larger than the whole")
    _require(record.horizon >= 1, f"{name}: horizon must be at least 1, got {record.horizon}")
    if record.method == DETECTION:
        _require(
            counted <= record.violating + record.stepless,
            f"{name}: {counted} episodes cannot be among {record.violating} violating ones and "
            f"{record.stepless} without a step",
        )
    elif record.method == RESIDUALS:
        _require(
            counted == most,
            f"{name}: all {most} episodes count, not {counted}",
        )
    if record.method != DETECTION:
        _require(
            events >= record.cut,
            f"{name}: {record.cut} cut episodes count as events, of which there are {events}",
        )
    if record.method in (SPLICED, TRIAL):
        _require(
            events <= record.violating + record.cut + record.continued,
            f"{name}: {events} events are more than {record.violating} violating, {record.cut} "
            f"cut and {record.continued} continued episodes",
        )


def _check_statement(name: str, record: LogRecord, shield: Shield) -> None:
    """Check the bound, and for detection the threshold, delta and the curve."""
    counted, events = record.episodes, record.events
    if record.alpha is None:
        plan = BinomialPlan(((counted, events),), record.confidence)
        if not plan.shows(counted, events, record.bound):
            raise ValueError(
                f"{name}: the bound of {events} events in {counted} episodes is "
                f"{plan.bound_of(counted, events):.6g}, not {record.bound:.6g}"
            )
        _require(
            record.epsilon is None or record.bound <= record.epsilon,
            f"{name}: the bound {record.bound:g} exceeds epsilon {record.epsilon}",
        )
        return
    _require(record.bound == record.alpha, f"{name}: bound must be alpha {record.alpha:g}, got "
             f"{record.bound:g}")  # fmt: skip
    # The j-th score is the threshold, with j the largest for which this holds of j - 1 events.
    level = (1.0 - record.confidence) * (1.0 + TOLERANCE)
    _require(
        at_most(events, counted, record.alpha) <= level,
        f"{name}: no threshold has {events} events in {counted} episodes for alpha "
        f"{record.alpha:g} with confidence {record.confidence:g}",
    )
    threshold = record.threshold or 0.0
    if record.method == RESIDUALS:
        _require(threshold >= 0.0, f"{name}: threshold must be at least 0, got {threshold:g}")
        return
    rounding = shield.model.scale.rounding
    _require(
        abs((record.delta or 0.0) - max(rounding - threshold, 0.0)) <= rounding,
        f"{name}: delta must be {max(-threshold, 0.0):g}, the opposite of the threshold or 0, got "
        f"{record.delta}",
    )
    _require((record.lead or 0) >= 1, f"{name}: lead must be at least 1, got {record.lead}")
    missed = {point.threshold: point.missed for point in record.curve}
    _require(
        missed.get(threshold) == events,
        f"{name}: the curve must have {events} missed violations at the threshold {threshold:g}, "
        f"got {missed.get(threshold)}",
    )
    quiet = record.held_out - record.violating
    for one, other in itertools.pairwise(record.curve):
        _require(
            one.threshold < other.threshold
            and one.missed <= other.missed
            and one.false_alarms >= other.false_alarms,
            f"{name}: in the curve, thresholds and missed violations must rise and false alarms "
            f"fall, got {one} before {other}",
        )
    first, last = record.curve[0], record.curve[-1]
    _require(
        first.missed >= 0
        and last.missed <= counted
        and last.false_alarms >= 0
        and first.false_alarms <= quiet,
        f"{name}: the curve must have at most {counted} missed violations and {quiet} false alarms",
    )


def _check_tries(name: str, record: LogRecord, shield: Shield) -> None:
    """Check the number of statements, and their levels, against the ledger.

    The ledger is in the order in which the statements were made, and it may have grown since.
    """
    level, ledger = 1.0 - record.confidence, shield.ledger
    ranked = record.alpha is not None

    def same(one: LogAttempt) -> bool:
        what = (one.method, one.alpha, one.lead, one.digest, one.simulator, one.seed)
        about = (
            one.delta is None if ranked else (one.delta, one.agent) == (record.delta, record.agent)
        )
        return bool(
            (ranked or one.shield in ("", shield.digest))
            and what
            == (
                record.method,
                record.alpha,
                record.lead,
                record.digest,
                record.simulator,
                record.seed,
            )
            and about
            and _near(one.level, level)
        )

    number = next((n for n, one in enumerate(ledger.attempts) if same(one)), None)
    if number is None:
        raise ValueError(f"{name}: log_attempts must hold the attempt that made this statement")
    own = ledger.attempts[number]
    _require(
        record.held_out == len(ledger.hashes[number]),
        f"{name}: held_out must be {len(ledger.hashes[number])}, the number of hashes of its log, "
        f"got {record.held_out}",
    )
    related = [*ledger.about(ledger.hashes[number]), *filter(own.repeats, ledger.attempts)]
    others = [one for one in dict.fromkeys(related) if not own.same_question(one)]
    before = [one for one in others if one in ledger.attempts[:number]]
    least, most = len(before) + 1, len(others) + 1
    _require(
        least <= record.tries <= most,
        f"{name}: tries must be {least} to {most} by log_attempts, got {record.tries}",
    )
    low, high = (level + sum(one.level for one in part) for part in (before, others))
    _require(
        low * (1.0 - TOLERANCE) <= record.spent <= high * (1.0 + TOLERANCE) and record.spent < 1.0,
        f"{name}: spent must be {low:.6g} to {high:.6g}, the sum of the levels of log_attempts, "
        f"and below 1, got {record.spent:.6g}",
    )
    again = [sum(own.repeats(one) for one in part) for part in (before, others)]
    _require(
        again[0] <= record.repeats <= min(again[1], record.tries - 1)
        and record.failed <= record.repeats,
        f"{name}: repeats must be {again[0]} to {again[1]} by log_attempts and below tries, and "
        f"failed at most as many, got {record.repeats} and {record.failed}",
    )
