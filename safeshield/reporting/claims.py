"""What a report claims, for whom, what it does not claim, and on which assumptions, in words.

A record words its own promise (`CalibrationRecord.promise`, `LogRecord.statement`). The functions
here take the same record apart for the page. They add nothing to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from safeshield.calibration.proposers import ADVERSARY, RANDOM
from safeshield.shield.log_record import (
    DETECTION,
    RESIDUALS,
    SHADOW,
    SPLICED,
    TRIAL,
    LogRecord,
)
from safeshield.shield.record import (
    COST_ABOVE,
    MEAN_COST,
    VIOLATION,
    ActorRecord,
    Attempt,
    CalibrationRecord,
)

Mark = Literal["yes", "no", "doubt"]
DATA, SEARCH, TESTS, ATTEMPTS, LOGS = "E1", "E2", "E3", "E4", "E5"
SINCE, WORST, REPLACED, COVERAGE = "E6", "E7", "E8", "E9"
"""Ids of the pieces of evidence on the page."""
EVIDENCE = {
    DATA: "The logs given to this report",
    SEARCH: "The search for a threshold",
    TESTS: "The tests",
    ATTEMPTS: "All attempts",
    LOGS: "What logs alone show",
    SINCE: "The rate since deployment",
    WORST: "Worst episodes",
    REPLACED: "What was replaced, and where",
    COVERAGE: "Coverage of the support",
}
"""Headings of the pieces of evidence."""


@dataclass(frozen=True)
class Check:
    """One assumption of the claim."""

    name: str
    statement: str
    mark: Mark
    """"yes": the software looks at it; "no": a person has to; "doubt": a monitor doubts it."""
    who: str
    """Who looks at it, and how."""


@dataclass(frozen=True)
class Step:
    """One step of the argument, with the evidence on which it rests."""

    text: str
    evidence: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """What is claimed, taken apart."""

    promised: str
    """What is promised, in short."""
    whom: str
    """For whom, in short."""
    basis: str
    """On what evidence, in short."""
    excluded: str
    """The most important things that are not promised, in short."""
    words: tuple[str, ...]
    """The exact words of the records."""
    scope: tuple[tuple[str, str], ...]
    """To what the claim applies, by name."""
    limits: tuple[str, ...]
    """What is not promised."""
    steps: tuple[Step, ...]
    """The argument from the evidence to the claim."""
    checks: tuple[Check, ...]
    """The assumptions."""


def percent(share: float) -> str:
    """Return a share as a percentage with three digits.

    >>> percent(0.01), percent(0.9128), percent(1.0)
    ('1%', '91.3%', '100%')
    """
    return f"{100.0 * share:.3g}%"


def rate(share: float) -> str:
    """Return a rate of episodes as a percentage and as one in N.

    >>> rate(0.01), rate(0.03), rate(0.5)
    ('1% (1 episode in 100)', '3%', '50% (1 episode in 2)')
    """
    many = round(1.0 / share, 6) if share > 0.0 else 0.0
    return percent(share) + (f" (1 episode in {many:.0f})" if many and many % 1 == 0 else "")


def number(value: float | None, unknown: str = "not known") -> str:
    """Return a number with four digits; `unknown` for None."""
    return unknown if value is None else f"{value:.4g}"


def called(deterministic: bool | None) -> str:
    """Return how an agent was called, in words; "" where it is not known."""
    return "" if deterministic is None else f" (called with deterministic={deterministic})"


# -- a calibration by rollouts ---------------------------------------------------------------------


def claim_of_record(record: CalibrationRecord, constraint: str | None) -> Claim:
    """Return the claim of a calibration, with a shield or of an actor alone.

    Args:
        record: The record.
        constraint: Name of the source of h; None where a network estimates h.
    """
    alone = isinstance(record, ActorRecord)
    names = [one.policy for one in record.policies]
    listed = ", ".join(f"'{one}'" for one in names)
    battery = not alone and set(names) <= {RANDOM, ADVERSARY}
    length = "of any length" if record.horizon is None else f"of at most {record.horizon} steps"
    agents = (
        "two artificial agents, 'random' (random actions) and 'adversary' (the most dangerous "
        "action that the shield still accepts)"
        if battery
        else f"the agent{'s' * (len(names) > 1)} {listed}"
    )
    through = (
        "acting alone, without a shield"
        if alone
        else f"with this shield, at delta {record.delta:.4g}, between agent and environment"
    )
    seen = "; ".join(
        f"{one.violations} of {one.episodes} with '{one.policy}'" for one in record.policies
    )
    return Claim(
        promised=f"{_promised(record)}, at confidence {percent(record.confidence)}.",
        whom=(
            f"Episodes of {record.environment} {length}, from starts that the "
            f"{'critics certify' if alone else 'shield certifies'} "
            f"({percent(record.start_share)} of the starts that were drawn), for {agents}"
            f"{called(record.deterministic)}, {through}."
        ),
        basis=(
            f"Fresh test episodes at this delta in this environment. {_against(record)}: {seen}."
        ),
        excluded=_excluded(record, battery=battery, listed=listed),
        words=(record.promise,),
        scope=_scope(record, constraint, alone=alone, listed=listed, through=through),
        limits=_limits(record, battery=battery, listed=listed, alone=alone),
        steps=_steps(record, alone=alone),
        checks=_checks(record, constraint, alone=alone, battery=battery, listed=listed),
    )


def _promised(record: CalibrationRecord) -> str:
    if record.kind == COST_ABOVE:
        return (
            "The summed cost of an episode as described under 'For whom?' exceeds "
            f"{number(record.limit)} with probability at most {rate(record.epsilon)}"
        )
    if record.kind == MEAN_COST:
        return (
            "The mean summed cost of episodes as described under 'For whom?' is at most "
            f"{number(record.limit)}, if no episode can cost more than {number(record.cost_bound)}"
        )
    return (
        "An episode as described under 'For whom?' violates the constraint with probability at "
        f"most {rate(record.epsilon)}"
    )


def _against(record: CalibrationRecord) -> str:
    return {
        VIOLATION: "Violating episodes",
        COST_ABOVE: "Episodes above the limit",
        MEAN_COST: "Episodes with any cost",
    }[record.kind]


def _excluded(record: CalibrationRecord, *, battery: bool, listed: str) -> str:
    if record.kind == VIOLATION:
        first = "That no episode violates."
    else:
        first = "That no single episode costs more."
    agent = (
        "Anything about the agent that will be deployed: only random proposals and an adversary "
        "were tested, in place of an agent that was not known."
        if battery
        else f"Anything about an agent other than {listed}."
    )
    return (
        f"{first} {agent} Anything for other starts, longer episodes, or an environment that "
        "behaves otherwise."
    )


def _scope(
    record: CalibrationRecord, constraint: str | None, *, alone: bool, listed: str, through: str
) -> tuple[tuple[str, str], ...]:
    counted = {
        VIOLATION: "Episodes with a violation: h > 0 in any state. In an environment that reports "
        "a cost and no h, a cost above 0 counts as a violation",
        COST_ABOVE: f"Episodes whose summed cost is above {number(record.limit)}",
        MEAN_COST: "The summed cost of an episode, as a share of its declared bound "
        f"{number(record.cost_bound)}",
    }[record.kind]
    kwargs = record.environment_kwargs
    wrappers = record.wrappers
    rows = [
        ("What is counted", counted),
        ("Upper bound", f"{rate(record.epsilon)} per episode, not per step"
         if record.kind != MEAN_COST else f"{number(record.limit)} on average over episodes"),
        ("Confidence", f"{percent(record.confidence)}, over the draw of the test episodes"),
        ("Agent", f"{listed}{called(record.deterministic)}, {through}"),
    ]  # fmt: skip
    if not alone:
        rows.append(("Rejected actions are replaced by", record.replacement or "the default, "
                     "the nearest acceptable candidate"))  # fmt: skip
    rows += [
        ("Start distribution", f"Episodes start as {record.start_distribution}. "
         f"{percent(record.start_share)} of the starts drawn had V_h <= -delta"),
        ("Horizon", "no limit, or not known" if record.horizon is None
         else f"at most {record.horizon} steps"),
        ("Environment", record.environment),
        ("Keyword arguments", "not known" if kwargs is None else
         ", ".join(f"{name}={value!r}" for name, value in kwargs.items()) or "none"),
        ("Wrappers", "not known" if wrappers is None else
         ", ".join(one.name for one in wrappers) or "none"),
        ("Source of h in the " + ("critics" if alone else "shield"), _source(constraint)),
    ]  # fmt: skip
    return tuple(rows)


def _source(constraint: str | None) -> str:
    if constraint is None:
        return "estimated from the observation by a network"
    return f"computed from the observation by the registered function '{constraint}'"


def _limits(
    record: CalibrationRecord, *, battery: bool, listed: str, alone: bool
) -> tuple[str, ...]:
    named = [one.policy for one in record.policies]
    counting = [one for one in record.attempts if one.counts_for(record.environment, named)]
    wrong = min(sum(one.level for one in counting), 1.0) or 1.0 - record.confidence
    if record.kind == VIOLATION:
        first = (
            f"That no episode violates. Up to {rate(record.epsilon)} of the covered episodes may "
            "violate. How severe a violation is, and what follows it, is not covered."
        )
    else:
        first = "That no step violates the constraint, and that no episode costs more."
    agent = (
        "The agent that will be deployed. The tested policies 'random' and 'adversary' stood in "
        "for an agent that was not known. The adversary looks one step ahead with the shield's own "
        "critics and is no worst case. For a promise about another agent, the shield must be "
        "calibrated with that agent."
        if battery
        else f"Any agent other than {listed}, and the same agent after further training or with "
        "another value of `deterministic`."
    )
    uncovered = 1.0 - record.start_share
    share = (
        f"{percent(uncovered)} of the starts drawn in the calibration, and " if uncovered else ""
    )
    bypass = () if alone else ("Actions that reach the actuators without passing the shield.",)
    return (
        first,
        agent,
        f"Episodes that start uncertified (V_h > -delta). These are {share}all starts that are "
        "drawn in another way." if share else
        "Episodes that start uncertified (V_h > -delta), or that are drawn in another way.",
        "A single start, state or step. The probability is an average over the covered starts, and "
        "it may be larger from some of them.",
        "Longer episodes." if record.horizon is None else
        f"Episodes of more than {record.horizon} steps.",
        "Another environment, or one that behaves otherwise than in the calibration. A calibration "
        "in a simulator says as much about a plant as the simulator resembles the plant.",
        *bypass,
        "Hazards that the constraint h, or the cost, does not measure.",
        f"Certainty. Of all calibrations that are run in this way, a share of up to {wrong:.2g} "
        "promises too much.",
    )  # fmt: skip


def _steps(record: CalibrationRecord, *, alone: bool) -> tuple[Step, ...]:
    level = record.attempts[-1].level if record.attempts else 1.0 - record.confidence
    level /= record.walks_planned
    if alone:
        first = (
            "The agent was trained on a log, and its actions may be wrong. The claim does not rest "
            "on their being right: the acting agent itself was tested."
        )
    else:
        first = (
            "The shield executes an action where its learned value satisfies Q_h <= -delta, and "
            "replaces any other action. The value is learned from a log and has errors. The claim "
            "does not rest on the value being right: agent and shield were tested together."
        )
    chosen = (
        "The thresholds to be tested were given."
        if not record.pilot
        else "A search (the pilot) proposed the thresholds. Its episodes are not used as evidence, "
        "because they chose what was tested."
    )
    corrected = (
        "The order was fixed before, so the choice needs no further correction."
        if record.walks_planned == 1
        else "This is half of the level. If the first threshold fails, a second list is tested in "
        "this way on other episodes, at the other half."
    )
    return (
        Step(first, (DATA,)),
        Step(chosen, (SEARCH,)),
        Step(
            "The thresholds were then tested one after the other on fresh episodes. The tests end "
            "with the first threshold that fails, or with the last of the list; the last threshold "
            "that passed was chosen. If the true rate or mean at a threshold is above the bound, "
            f"its test passes by chance with probability at most {level:.3g}. {corrected}",
            (TESTS,),
        ),
        Step(
            "This was the first attempt to calibrate this file."
            if len(record.attempts) <= 1
            else f"{len(record.attempts)} attempts to calibrate this file are counted, and later "
            "ones are tested more strictly.",
            (ATTEMPTS,),
        ),
        Step(
            "The claim holds for a deployment only where the assumptions below hold. What has been "
            "seen since the calibration can contradict the claim. It cannot prove it. Evidence of "
            "which nothing was given to this report is marked so.",
            (SINCE, WORST, REPLACED, COVERAGE),
        ),
    )  # fmt: skip


def _checks(
    record: CalibrationRecord,
    constraint: str | None,
    *,
    alone: bool,
    battery: bool,
    listed: str,
) -> tuple[Check, ...]:
    person = "To be confirmed by a person."
    if alone:
        compared = "To be confirmed by a person: no wrapper stands between agent and environment."
    else:
        compared = (
            "The wrapper compares id, arguments, wrappers and horizon at the start, where the "
            "environment tells them, and certifies no episode where they differ."
        )
    agent = (
        "Only random proposals and the adversary were tested, which stand for an unknown agent. "
        "The agent that is deployed is not covered until the shield is calibrated with it."
        if battery
        else f"The deployed agent is {listed}{called(record.deterministic)}, unchanged."
    )
    checks = [
        Check("Same environment", f"The deployment is {record.environment} with the arguments, "
              "wrappers and horizon above.", "no" if alone else "yes", compared),
        Check("Same dynamics", "The plant moves as it did in the calibration. If that was a "
              "simulator, the simulator resembles the plant.", "no",
              f"{person} A monitor with a reference can raise doubts."),
        Check("Same agent", agent, "no", f"{person} The software does not compare agents."),
        Check("Same starts", "Episodes start as in the calibration, and only those that begin "
              "certified are relied on.", "no",
              f"{person} "
              + ("" if alone else 'info["shield/certified"] tells which episodes are covered.')),
        Check("Right measurement", "What is reported as h or cost measures the hazard. The source "
              f"of h: {_source(constraint)}.", "no",
              f"{person} " + (
                  "" if constraint is None else
                  "Functions are compared by name, not by what they compute. ")
              + ("" if alone else "Where a report differs from the h in use, the wrapper "
                 "warns and certifies no episode any more.")),
    ]  # fmt: skip
    if not alone:
        checks += [
            Check("Same observations", "The shield sees the observations that it was trained on: "
                  "wrappers that change them are outside it.", "no", person),
            Check("No bypass", "Every action passes the shield before it is executed.", "no",
                  f"{person} Nested shields, and calls of reset and step past a vector wrapper, "
                  "are refused; code that steps the inner environment is not noticed."),
        ]  # fmt: skip
    checks += [
        Check("All attempts known", "No other calibration was made on a copy of the file, and the "
              f"{'agent' if alone else 'shield'} was not picked from several by their "
              "calibrations.", "no", f"{person} Attempts in this file are counted."),
        Check("Fresh episodes", "The test episodes were not used before.", "yes",
              "The calibration draws seeds that neither its search nor earlier attempts used."),
    ]  # fmt: skip
    if record.kind == MEAN_COST:
        checks.append(
            Check("Bound of the cost", f"No episode can cost more than {number(record.cost_bound)}."
                  , "no", f"{person} The bound is declared, not estimated. A larger cost makes the "
                  "claim void, and a monitor notices it.")
        )  # fmt: skip
    return tuple(checks)


# -- statements from logs, and no record at all ----------------------------------------------------


def claim_of_logs(records: Sequence[LogRecord], attempts: Sequence[Attempt]) -> Claim:
    """Return the claim of a shield that was not calibrated by rollouts, but judged by logs."""
    agents = sorted({one.agent for one in records if one.method not in (DETECTION, RESIDUALS)})
    whom = [f"For {_whose(one)}." for one in records]
    return Claim(
        promised=" ".join(_stated(one, _together(one, records)) for one in records),
        whom=" ".join(dict.fromkeys(whom)),
        basis=" ".join(
            f"{_METHODS[one.method]}: {one.episodes} episodes, {one.events} of which count "
            "against it." for one in records
        ) + " No test by rollouts.",
        excluded=(
            "Anything more than the statements say. The shield has no record of a calibration by "
            "rollouts, so no episode is reported as certified."
        ),
        words=tuple(one.statement for one in records),
        scope=tuple(
            (f"{_METHODS[one.method]}, {one.date[:10]}", f"{_whose(one)}; episodes of at most "
             f"{one.horizon} steps, drawn like those of the log; delta "
             f"{number(one.delta, 'of any size')}; {_together(one, records)}")
            for one in records
        ),
        limits=(
            "That no episode violates.",
            "Any rate of violations in rollouts. Only the statements above are supported, each for "
            "the episodes of its own log.",
            "An agent, a start distribution, a horizon or dynamics other than those of the log"
            + (f" (the agent: {', '.join(agents)})." if agents else "."),
            *(_not_said(one.method) for one in records),
            "Hazards that the constraint h, or the cost, does not measure.",
            *_earlier(attempts),
        ),
        steps=(
            Step("The shield was trained on a log; its values are learned and have errors.",
                 (DATA,)),
            Step("Held-out episodes were judged. Each statement has its own theorem, and says what "
                 "it does not cover.", (LOGS,)),
            Step("Statements about the same episodes, and repeated attempts, share the allowed "
                 "error; each statement names how many there were.", (LOGS, ATTEMPTS)),
            Step("What has been seen since then can contradict a statement. It cannot prove it.",
                 (WORST, REPLACED, COVERAGE)),
        ),
        checks=(
            Check("As in the log", "Agent, starts, horizon and dynamics of the deployment are "
                  "those of the log that made the statement.", "no",
                  "To be confirmed by a person."),
            Check("Right measurement", "What is reported as h or cost measures the hazard.", "no",
                  "To be confirmed by a person."),
            Check("Assumptions of each statement", f"They are listed with the statement in {LOGS}, "
                  "with a mark at each that the log was found to agree with.", "no",
                  "To be confirmed by a person where there is no mark."),
        ),
    )  # fmt: skip


_METHODS = {
    DETECTION: "Alarm in time (detection)",
    SHADOW: "Shadow mode",
    SPLICED: "Logged episodes, continued in a simulator (spliced)",
    TRIAL: "Trial with the shield on",
    RESIDUALS: "Rise of the value (residuals)",
}


def _whose(record: LogRecord) -> str:
    if record.method in (DETECTION, RESIDUALS):
        return "the policies that made the log"
    return f"the agent {record.agent}{called(record.deterministic)}"


def _together(record: LogRecord, records: Sequence[LogRecord]) -> str:
    """Return the confidence of a statement, and of all that share its episodes or its question."""
    # A record does not know of the statements that were made about its log after it.
    same = [one for one in records if one.digest == record.digest]
    joint = min(one.joint_confidence for one in same)
    if joint >= record.confidence:
        return f"confidence {percent(record.confidence)}"
    return (
        f"confidence {percent(joint)} together with the other statements that share its allowed "
        f"error ({percent(record.confidence)} alone)"
    )


def _stated(record: LogRecord, confidence: str) -> str:
    at = f"at {confidence}"
    if record.method == DETECTION:
        return (
            f"Of violating episodes that start in a safe state, at least "
            f"{percent(1.0 - (record.alpha or 0.0))} raise an alarm {record.lead} or more steps "
            f"before the violation, {at}."
        )
    if record.method == RESIDUALS:
        return (
            f"In at least {percent(1.0 - (record.alpha or 0.0))} of episodes no step raises the "
            f"value by more than {number(record.threshold)} beyond what it was said to be, {at}."
        )
    given = f", if the simulator {record.simulator} is right" if record.method == SPLICED else ""
    return (
        f"An episode behind this shield violates with probability at most {percent(record.bound)}, "
        f"{at}{given}."
    )


def _not_said(method: str) -> str:
    return {
        DETECTION: "Whether an alarm comes early enough to prevent the violation.",
        RESIDUALS: "Whether an acceptable action exists in each state.",
        SHADOW: "That the shield makes the agent safer: the statement holds for agent and shield "
        "together, and its bound cannot be below the agent's own rate.",
        SPLICED: "How the plant behaves while the shield acts: this was seen in a simulator alone.",
        TRIAL: "Another delta than that of the trial.",
    }[method]


def _earlier(attempts: Sequence[Attempt]) -> tuple[str, ...]:
    if not attempts:
        return ()
    return (
        f"What an earlier calibration promised. {_remembered(attempts)} None of them gives this "
        "shield, as it is now, a record.",
    )


def _remembered(attempts: Sequence[Attempt]) -> str:
    failed = sum(not one.passed for one in attempts)
    return f"Calibrations that the file remembers: {len(attempts)}; did not pass: {failed}."


def no_claim(attempts: Sequence[Attempt]) -> Claim:
    """Return the claim of a shield about which nothing was shown."""
    return Claim(
        promised="Nothing. The file holds no promise.",
        whom="Nobody.",
        basis=f"None. {_remembered(attempts)}",
        excluded="Everything: how often an episode violates behind this shield is not known.",
        words=(),
        scope=(),
        limits=(
            "Any rate of violations, for any agent, in any environment.",
            "That actions which the shield lets pass are acceptable. Its values are learned and "
            "have errors, and nobody has tested how far they can be trusted.",
            "That an earlier promise still holds. A record is dropped when delta, the way to "
            "replace actions, the support test or the source of h is changed.",
            *_earlier(attempts),
        ),
        steps=(
            Step("There is no claim, so there is no argument. Calibrate the shield with the agent "
                 "that will be deployed (safeshield calibrate), or judge it by held-out episodes "
                 "of a log (Shield.calibrate_from_log).", (DATA, ATTEMPTS)),
        ),
        checks=(),
    )  # fmt: skip
