"""Records of what a log alone shows of a shield, as the shield's file keeps them.

`calibration.from_log` makes them. They are another kind of evidence than the `CalibrationRecord`
of rollouts: no such record makes ``info["shield/certified"]`` True.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import numpy as np
import numpy.typing as npt

from safeshield.files.schema import json_values, record_from_json

if TYPE_CHECKING:
    from safeshield.shield.shield import Shield

DETECTION: Final = "detection"
SHADOW: Final = "shadow"
SPLICED: Final = "spliced"
TRIAL: Final = "trial"
RESIDUALS: Final = "residuals"
Method = Literal["detection", "shadow", "spliced", "trial", "residuals"]
METHODS: tuple[Method, ...] = (DETECTION, SHADOW, SPLICED, TRIAL, RESIDUALS)
"""The methods of `Shield.calibrate_from_log`."""
VALUES_ALONE = (DETECTION, RESIDUALS)
"""Methods whose statements are about Q_h, and not about how actions are replaced."""
STEPLESS: Final = "stepless"
"""Key under "flight" of a log's provenance: number of the flight's episodes without a step that the
log can hold, because the state after the first action is missing or not finite."""
ABORTED: Final = "aborted"
"""The same for the number of episodes in the log that were cut by a reset, by `close` or by a
failure, and neither terminated nor truncated by the environment."""
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Assumption:
    """One assumption under which a statement holds."""

    name: str
    """Short name, such as "held out"."""
    statement: str
    """The assumption in words."""
    checked: bool
    """Whether the log was found to agree. Where it is False, the user vouches for it."""


@dataclass(frozen=True)
class CurvePoint:
    """What an alarm at one threshold would have missed, and how often it would have been false."""

    threshold: float
    """The alarm is raised where Q_h is at least this number, in units of h."""
    missed: int
    """Violating episodes without an alarm at least the lead before the entry."""
    false_alarms: int
    """Episodes without a violation in which the alarm is raised in any step."""


@dataclass(frozen=True)
class LogRecord:
    """What the episodes of a held-out log show of a shield, in words that claim no more."""

    method: Method
    """How the episodes were judged, one of `METHODS`."""
    delta: float | None
    """The delta that the statement is about, in units of h; None for residuals, which are about
    values alone."""
    confidence: float
    """1 - b, the confidence that was asked for."""
    spent: float
    """Sum of the levels b of all known statements about some of these episodes, of the `repeats`
    and of this one. All of them hold with confidence 1 - `spent`."""
    tries: int
    """Number of these statements, and of the `repeats`."""
    episodes: int
    """Number n of episodes that count: for detection, those that violate after a safe start; for
    shadow, spliced and trial, those that start with V_h <= -delta."""
    events: int
    """Number of them that count against the statement: without an alarm in time at the threshold
    (detection); with a violation or a would-be intervention (shadow); with a violation (spliced and
    trial); with a larger residual (residuals)."""
    bound: float
    """Upper confidence bound on the probability of such an event in a new episode. For detection
    and residuals it is `alpha`."""
    held_out: int
    """Number of all episodes of the log, without the `stepless`."""
    violating: int
    """Number of the log's episodes with a violation."""
    cut: int
    """Number of the n episodes that end early without termination. In shadow, spliced and trial
    they count as events; a cut episode's residual counts as infinite."""
    horizon: int
    """Number of steps of a whole episode that does not terminate."""
    agent: str
    """Name of the agent that made the log."""
    deterministic: bool | None
    """The `deterministic` with which that agent acted, as the user states; None where not told."""
    replacement: str
    """How the shield replaces actions, "" for the default."""
    digest: str
    """SHA-256 digest of the hashes of all episodes of the log."""
    date: str
    """ISO 8601, UTC."""
    versions: dict[str, str]
    """Versions of the packages that were used, by name."""
    assumptions: tuple[Assumption, ...]
    """What must be true besides, and whether the log was found to agree."""
    alpha: float | None = None
    """Share of new episodes for which the threshold may fail; for detection and residuals only."""
    lead: int | None = None
    """Number k of steps before the entry at which the alarm must have been raised; for detection
    only."""
    threshold: float | None = None
    """Detection: the alarm is raised where Q_h is at least this number. Residuals: the quantile q.
    Both in units of h."""
    epsilon: float | None = None
    """Rate that `bound` was asked not to exceed; None where any bound was accepted."""
    curve: tuple[CurvePoint, ...] = ()
    """Missed violations and false alarms at other thresholds, the lowest first; for detection
    only. The curve describes this log and promises nothing."""
    repeats: int = 0
    """Shadow, spliced and trial: number of earlier attempts by this method at this delta, with an
    agent of this name, on these or other episodes."""
    failed: int = 0
    """Number of the `repeats` that did not show the rate that was asked for."""
    continued: int = 0
    """Spliced: number of the n episodes that were continued in the simulator, once each."""
    simulator: str = ""
    """Spliced: id of the simulator, or the name of its class where it has no id."""
    seed: int | None = None
    """Spliced: seed of the continuations."""
    environment: str = ""
    """Id of the environment, or name of the plant, that the log names; "" where it names none."""
    stepless: int = 0
    """Number of the n episodes that a flight recorder saw begin, and whose first step led to no
    state that can be read. They are not in the log, count as cut, and always count as events."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {list(METHODS)}, got {self.method!r}")

    @property
    def joint_confidence(self) -> float:
        """Confidence with which all known statements about these episodes hold, at least 0."""
        return max(1.0 - self.spent, 0.0)

    @property
    def statement(self) -> str:
        """The statement in words; it claims no more than the episodes show."""
        parts = self._limits(), self._about_cut(), self._about_tries(), self._doubts()
        return " ".join([self._claim(), *(one for part in parts for one in part)])

    def _claim(self) -> str:
        given = f"With confidence {self.confidence:g} over the held-out episodes, "
        plant = f" of {self.environment}" if self.environment else ""
        if self.method == DETECTION:
            unsafe = self.violating + self.stepless - self.episodes
            return (
                f"{given}of violating episodes{plant} that start in a safe state, drawn like this "
                f"log's (its policies, starts, horizon), at least {1.0 - (self.alpha or 0.0):g} "
                f"raise the alarm {self.lead} or more steps before entry. Whether the alarm comes "
                "in time to be saved, and how other agents fail, is not covered. The alarm is "
                f"raised where Q_h is at least {self.threshold:.4g}; "
                f"{self.episodes - self.events} of {self.episodes} such episodes raised it in "
                f"time. {unsafe} violating episodes of the log started in the violation (h > 0), "
                "and are not counted."
            )
        if self.method == RESIDUALS:
            return (
                f"{given}in at least {1.0 - (self.alpha or 0.0):g} of episodes{plant} drawn like "
                "this log's, for the logging policy's actions, no step's value rises by more than "
                f"{self.threshold:.4g} beyond Q_h. That an acceptable action exists does not "
                f"follow. {self.events} of {self.episodes} episodes had a larger rise."
            )
        acting = "" if self.deterministic is None else f" (deterministic={self.deterministic})"
        how = self.replacement and f", which replaces actions by {self.replacement},"
        where = ""
        if self.method == SPLICED:
            given = f"{given.removesuffix(', ')} and their continuations, "
            where = f", if the simulator {self.simulator} behaves as the plant does"
        return (
            f"{given}an episode{plant} of at most {self.horizon} steps that starts like this "
            f"log's, kept where V_h <= -delta, in which {self.agent}{acting} proposes the actions "
            f"and this shield at delta {self.delta:.4g}{how} executes them, violates the "
            f"constraint with probability at most {self.bound:.4g}{where}."
        )

    def _limits(self) -> list[str]:
        if self.method in VALUES_ALONE:
            return []
        share = self.episodes / (self.held_out + self.stepless)
        kept = f"Of the log's starts, {share:.0%} had V_h <= -delta."
        if self.method == SHADOW:
            return [
                kept,
                f"In {self.events} of {self.episodes} episodes without the shield, the agent "
                "violated or the shield would have stepped in. This bound cannot be below the "
                "agent's own rate without the shield: it shows that agent and shield together "
                "violate at most at this rate, not that the shield is the reason.",
            ]
        if self.method == SPLICED:
            return [
                kept,
                f"{self.continued} of {self.episodes} episodes were continued in the simulator "
                "with the shield on, once each, from the first step in which it steps in. "
                f"{self.events} violated before that step or after it. How the plant behaves while "
                "the shield acts was not seen.",
            ]
        return [
            kept,
            f"Violating episodes seen with the shield on: {self.events} of {self.episodes}.",
        ]

    def _about_cut(self) -> list[str]:
        if self.stepless and self.method == DETECTION:
            return [
                f"{self.stepless} of the {self.episodes} episodes led to no readable state in "
                "their first step, and count as violations without an alarm."
            ]
        if not self.cut or self.method == DETECTION:
            return []
        counted = "an infinite rise" if self.method == RESIDUALS else "a violation"
        return [f"{self.cut} of the {self.episodes} episodes were cut, and count as {counted}."]

    def _about_tries(self) -> list[str]:
        if self.tries < 2:
            return []
        if self.repeats:
            return [
                f"{self.repeats} earlier attempts by {self.method} were made for this shield at "
                f"this delta with this agent, of which {self.failed} did not pass. The probability "
                f"that one of all {self.tries} statements promises too much is at most "
                f"{min(self.spent, 1.0):.3g}. Those made elsewhere are not known."
            ]
        return [
            f"{self.tries} statements were made about some of these episodes; all of them hold "
            f"with confidence {self.joint_confidence:.3g}. Those made elsewhere are not known."
        ]

    def _doubts(self) -> list[str]:
        named = ", ".join(one.name for one in self.assumptions if not one.checked)
        return [f"Assumed, not checked: {named}."] if named else []

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return json_values(self)

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Return the record that `to_json` wrote as `data`, after a check of every field.

        Raises:
            ValueError: A field is missing, unknown or of a wrong type.
        """
        return record_from_json(cls, data, "log_records")

    def picture(self, path: str) -> None:
        """Draw the curve of missed violations against false alarms into the file `path`.

        Raises:
            ValueError: The record has no curve, or the suffix is unknown.
        """
        from safeshield.shield.log_picture import draw_curve

        draw_curve(path, self)


@dataclass(frozen=True)
class LogAttempt:
    """One statement about a log's episodes that a shield remembers, also where it was refused."""

    method: Method
    delta: float | None
    """The shield's delta before; None where the method does not depend on it."""
    alpha: float | None
    lead: int | None
    level: float
    """b, the level at which the statement was tested."""
    chosen: float | None
    """The delta, or the quantile of residuals, that the episodes chose; None where they chose
    none."""
    digest: str
    """SHA-256 digest of the hashes of the episodes."""
    agent: str = ""
    """Name of the agent; "" for detection and residuals."""
    passed: bool = True
    """Whether the rate that was asked for was shown, or none was asked for."""
    simulator: str = ""
    """Spliced: name of the simulator."""
    seed: int | None = None
    """Spliced: seed of the continuations. Another seed asks anew, and costs its level."""
    shield: str = ""
    """Digest of the shield that was asked; "" in files of earlier releases. Another replacement,
    support test or source of h asks anew, and costs its level."""
    outcomes: str = ""
    """SHA-256 digest of the labels, the ends of the episodes and the horizon; "" in files of
    earlier releases. Other labels, ends or horizons ask anew."""

    def repeats(self, other: LogAttempt) -> bool:
        """Whether both are about the rate of one agent at one delta, on any episodes."""
        asked = (self.method, self.delta, self.agent)
        return self.method not in VALUES_ALONE and asked == (other.method, other.delta, other.agent)

    def same_question(self, other: LogAttempt) -> bool:
        """Whether both ask the same of the same episodes, so that the second one costs nothing."""
        bare = [replace(one, chosen=None, passed=True) for one in (self, other)]
        return bare[0] == bare[1]


@dataclass(frozen=True, eq=False)
class Ledger:
    """The statements about logs that a shield remembers, with the hashes of their episodes."""

    attempts: tuple[LogAttempt, ...] = ()
    hashes: tuple[Hashes, ...] = ()
    """For each attempt the hashes (n,) of all episodes of its log."""

    def __post_init__(self) -> None:
        if len(self.attempts) != len(self.hashes):
            raise ValueError(
                f"hashes must be one array for each attempt, got {len(self.hashes)} for "
                f"{len(self.attempts)}"
            )

    def about(self, hashes: Hashes) -> list[LogAttempt]:
        """Return the attempts that looked at one of the episodes with these `hashes` (n,)."""
        pairs = zip(self.attempts, self.hashes, strict=True)
        return [one for one, seen in pairs if np.isin(hashes, seen).any()]

    def with_attempt(self, attempt: LogAttempt, hashes: Hashes) -> Ledger:
        """Return the ledger with one more `attempt` on episodes with these `hashes` (n,).

        An attempt that asks what an earlier one asked of the same episodes is not added.
        """
        if any(attempt.same_question(one) for one in self.attempts):
            return self
        return Ledger((*self.attempts, attempt), (*self.hashes, hashes))


def about_delta(records: Sequence[LogRecord], delta: float) -> tuple[LogRecord, ...]:
    """Return the `records` that still hold for a shield at `delta`."""
    return tuple(one for one in records if one.delta in (None, delta))


def about_values(records: Sequence[LogRecord]) -> tuple[LogRecord, ...]:
    """Return the `records` that still hold where actions are replaced or tested in another way."""
    return tuple(one for one in records if one.method in VALUES_ALONE)


def remembered(shield: Shield) -> dict[str, Any]:
    """Return the fields of a shield's header that hold its records and its ledger."""
    return {
        "log_records": [one.to_json() for one in shield.log_records],
        "log_attempts": [
            {**json_values(one), "episodes": len(seen)}
            for one, seen in zip(shield.ledger.attempts, shield.ledger.hashes, strict=True)
        ],
    }


def ledger_tensor(number: int) -> str:
    """Return the name of the tensor with the hashes of an attempt, counted from 0 by `number`."""
    return f"episodes/log_{number}"


def read_attempts(header: dict[str, Any]) -> tuple[tuple[LogAttempt, ...], dict[str, int]]:
    """Return the attempts of a shield's header, and the length of each tensor of hashes by name.

    `header` is the header; files of earlier releases have none.

    Raises:
        ValueError: A field is missing, unknown or of a wrong type.
    """
    attempts, counts = [], {}
    for number, entry in enumerate(header.get("log_attempts", ())):
        if not isinstance(entry, dict):
            raise ValueError(f"log_attempts must hold objects, got {type(entry).__name__}")
        count = entry.get("episodes")
        if type(count) is not int or count < 1:
            raise ValueError(f"log_attempts: episodes must be at least 1, got {count!r:.40}")
        rest = {name: value for name, value in entry.items() if name != "episodes"}
        attempts.append(record_from_json(LogAttempt, rest, "log_attempts"))
        counts[ledger_tensor(number)] = count
    return tuple(attempts), counts
