r"""`PromiseMonitor`: do the episodes of a deployment contradict the promise of a shield's record?

Every episode that begins certified has a score in [0, 1] by the promise: 1 where it violates, 1
where its summed cost exceeds the limit, or its cost as a share of the bound. The promise says that
the mean of the score, given all that happened before the episode, is at most m (epsilon, or limit /
bound). `calibration.eprocess` turns the scores into the evidence E_t, and the promise is revoked
for good where E_t >= 1/b. A promise that holds is revoked with probability at most b, however long
the monitor runs and whenever it is looked at.

Episodes count in the order in which they BEGIN. Those that violate often end early, so that the
first episodes to end are worse than the average. An episode counts from its first step on, with the
score that it has reached so far. This score is at most that of the whole episode, so E_t is at most
the evidence of whole episodes, and the probability above is not exceeded. The same holds of an
episode that is cut: it was closed or reset before it was terminated or truncated. Leaving cut
episodes out would not be valid, because a cut episode that has not violated would be missing where
one that has violated counts. Their number is reported apart.

A drift of the deployment can be seen before anything violates. `covariates` are compared with those
of reference episodes by `calibration.exchangeability`; also in the order in which episodes began,
each once all earlier ones have ended. A change puts the assumptions in doubt, at a level b2 of its
own, which the covariates share. It says nothing of the rate of violations.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from safeshield.calibration.binomial import check_probability
from safeshield.calibration.eprocess import against, evidence_path, log_evidence
from safeshield.calibration.exchangeability import ExchangeabilityTest
from safeshield.calibration.promises import Promise, Violation, promised
from safeshield.files.atomic import check_writable
from safeshield.files.schema import json_values
from safeshield.files.tensors import content_digest
from safeshield.monitoring.covariates import (
    certified_start,
    covariates_of,
    reference_values,
    rounded,
)
from safeshield.monitoring.ledger import (
    CUT,
    ENDED,
    RUNNING,
    Entry,
    checked_costs,
    finite,
    joined,
    read_ledger,
    row_text,
    stamp,
    uniform,
    write_ledger,
)
from safeshield.monitoring.tracker import EpisodeTracker
from safeshield.rollouts.policies import default_name
from safeshield.rollouts.recorded import Episode
from safeshield.shield.shield import HasShield, Shield, as_shield
from safeshield.spaces.shapes import Scalars

NOT_CONTRADICTED: Final = "not contradicted"
IN_DOUBT: Final = "assumptions in doubt"
REVOKED: Final = "revoked"
_STATES = (NOT_CONTRADICTED, IN_DOUBT, REVOKED)

_ShieldLike = Shield | HasShield | str | os.PathLike[str]
_Outcome = Episode | bool | float | None
_UNBOUNDED = sys.float_info.max
"""Score in the file of an episode whose cost cannot be used (`ledger.checked_costs`)."""
_MOST = 700.0
"""Logs above it are cut off, so that their exponential is finite."""


def _level(value: object) -> bool:
    return isinstance(value, float) and 0.0 < value < 1.0


_SETTINGS: dict[str, Callable[[object], bool]] = {
    "shield": lambda value: isinstance(value, str),
    "level": _level,
    "doubt_level": _level,
    "cut_as_violations": lambda value: isinstance(value, bool),
    "state": lambda value: value in _STATES,
    "reason": lambda value: isinstance(value, str),
}


class PromiseWarning(UserWarning):
    """The state of a watched promise has changed, or a monitor could not save its state."""


@dataclass(frozen=True)
class PromiseReport:
    """What a monitor has seen."""

    state: str
    """"not contradicted", "assumptions in doubt" or "revoked"."""
    reason: str
    """Why, in words; empty while nothing contradicts the promise."""
    evidence: float
    """E_t."""
    limit: float
    """1/b, at which the promise is revoked."""
    episodes: int
    """Number of episodes that count: they began certified and reported a label."""
    score: float
    """Sum of their scores: for a promise about a rate, the number of episodes that broke it."""
    running: int
    """Number of them that are under way."""
    cut: int
    """Number of them that were cut: closed or reset before they were terminated or truncated."""
    unlabelled: int
    """Number of certified episodes that ended or were cut without any label; they do not count."""
    covariates: dict[str, float]
    """Wealth of the test of each of m covariates, of which m / b2 raises doubts; empty without a
    reference."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return json_values(self)


class PromiseMonitor:
    """Watches whether the episodes of a deployment contradict the promise of a shield's record.

    Pass it to `SafetyShield`, `VectorSafetyShield` or `VecSafetyShield` as ``monitor=``, to several
    of them if they protect the same deployment. In a loop of your own call `episode` after each
    episode.

    There are three states. "not contradicted" means no more than that: a monitor cannot show that a
    promise holds. "assumptions in doubt": a covariate of the episodes has changed against the
    reference, so the promise may no longer apply, whatever the rate of violations is. "revoked":
    the episodes contradict the promised rate. A state is never taken back. Only a new calibration
    restores the promise, and a monitor of its own watches it.

    At each change a `PromiseWarning` is issued and `on_change` is called once.

    Args:
        shield: A calibrated shield, a path to its file, or an agent.
        path: JSON file that keeps the state. Where it exists, the monitor continues from it, and
            episodes that were under way are cut. It is written at the beginning and at the end of
            each episode and at each violation, atomically; to make a monitor only reads it. One
            process at a time should write it. What another one has written is merged.
        reference: Episodes of the calibrated deployment, against which covariates are compared:
            episodes behind the shield by the same agent from certified starts, or the values of
            each covariate by its name. None: that of the file, or no comparison.
        level: b, the probability that a promise which holds is revoked; by default 1 minus the
            confidence of the record.
        doubt_level: b2, the probability of "assumptions in doubt" where the episodes are
            exchangeable with those of the reference.
        cut_as_violations: Whether a cut episode counts as one that breaks the promise. By default
            it counts with the score that it had reached.
        on_change: Function of the monitor that is called after each change of the state, for
            example to stop the plant or to switch to a backup. Its errors are not caught.
        agent: The agent that is deployed, or its name, which must be that of one of the policies of
            the record (`rollouts.policies.default_name`).
            None: the user sees to it, because a monitor does not see who proposes the actions.

    Raises:
        TypeError: `shield` is none of the three, or `on_change` cannot be called.
        ValueError: The shield is not calibrated, the record promises nothing for `agent`, an
            argument is out of range, or the file is damaged, of another shield, or was made with
            other settings.
        OSError: The file cannot be written.
    """

    _highest: float
    _settled: Scalars
    _entries: dict[str, Entry]
    _rows: dict[str, str]
    _running: dict[str, Entry]
    _queue: deque[tuple[str, Entry]]

    def __init__(
        self,
        shield: _ShieldLike,
        path: str | os.PathLike[str] | None = None,
        *,
        reference: Sequence[Episode] | Mapping[str, Iterable[float]] | None = None,
        level: float | None = None,
        doubt_level: float = 0.01,
        cut_as_violations: bool = False,
        on_change: Callable[[PromiseMonitor], object] | None = None,
        agent: object = None,
    ) -> None:
        if on_change is not None and not callable(on_change):
            raise TypeError(
                "on_change must be a function that takes the monitor, such as "
                f"lambda monitor: print(monitor.state), or None, got {on_change!r:.60}"
            )
        self.shield = as_shield(shield)
        record = self.shield.record
        if record is None:
            raise ValueError(
                "the shield has no record, so there is no promise to watch: use "
                "shield.calibrate(...) first (with_delta, with_support and others drop the record)"
            )
        named = [one.policy for one in record.policies]
        name = None if agent is None else default_name(agent)
        if name is not None and name not in named:
            raise ValueError(
                f"agent must be one of {named}, for which the record of the shield was made, got "
                f"{name!r:.80}: calibrate the shield with this agent, policy_name={name!r:.80}"
            )
        self.promise: Promise = promised(record)
        # 1 - 0.9 is 0.1 but for rounding.
        self.level = round(1.0 - record.confidence, 12) if level is None else float(level)
        self.doubt_level = float(doubt_level)
        check_probability("level", self.level)
        check_probability("doubt_level", self.doubt_level)
        self.cut_as_violations = bool(cut_as_violations)
        self.on_change = on_change
        self._digest = _digest_of(self.shield)
        self._reference = None if reference is None else reference_values(self.shield, reference)
        self._state: str = NOT_CONTRADICTED
        self._reason = ""
        self._name_anew()
        self._path = None if path is None else Path(path)
        self._stamp: tuple[int, int] | None = None
        self._told_unsaved = False
        self._changed = False
        self._unsaved = False
        if self._path is not None:
            check_writable(self._path)
        if self._path is None or not self._path.exists():
            self._replay({})
            return
        self._stamp = stamp(self._path)
        data, entries = read_ledger(self._path, _SETTINGS)
        self._check_file(self._path, data, entries)
        if self._reference is None:
            self._reference = data["reference"]
        for entry in entries.values():
            if entry.status == RUNNING:
                entry.status = CUT
        self._replay(entries)
        # The file may say less than its episodes show, never less than it said.
        self._keep(data["state"], data["reason"])
        if self._state != NOT_CONTRADICTED:
            self._warn(f"as {self._path} says", 3)

    # -- what it says -----------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """The state: "not contradicted", "assumptions in doubt" or "revoked"."""
        return self._state

    @property
    def reason(self) -> str:
        """Why the state is not "not contradicted", in words; otherwise empty."""
        return self._reason

    @property
    def revoked(self) -> bool:
        """Whether the promise is revoked."""
        return self._state == REVOKED

    @property
    def evidence(self) -> float:
        """The evidence E_t against the promise, which is revoked at 1/b."""
        return _exp(self._log_evidence)

    def report(self) -> PromiseReport:
        """Return what the monitor has seen."""
        entries = self._entries.values()
        scores = self._scores(entries)
        counting = [one for one in entries if self._score(one) is not None]
        return PromiseReport(
            state=self._state,
            reason=self._reason,
            evidence=self.evidence,
            limit=1.0 / self.level,
            episodes=len(scores),
            score=math.fsum(scores),
            running=sum(one.status == RUNNING for one in counting),
            cut=sum(one.status == CUT for one in counting),
            unlabelled=sum(self._score(one) is None and one.status != RUNNING for one in entries),
            covariates={name: _exp(test.log_wealth) for name, test in self._tests.items()},
        )

    def counted(self) -> list[tuple[float, float]]:
        """Return the start time and the score of each episode that counts, the earliest first.

        Times are in seconds since 1970. A score is in [0, 1].
        """
        entries = [one for one in self._entries.values() if self._score(one) is not None]
        times = [one.started for one in entries]
        return list(zip(times, self._scores(entries), strict=True))

    # -- episodes ---------------------------------------------------------------------------------

    def episode(
        self,
        name: str,
        outcome: _Outcome,
        *,
        certified: bool | None = None,
        cut: bool = False,
        covariates: Mapping[str, float] | None = None,
        started: float | None = None,
    ) -> bool:
        """Count one episode after its end, and return whether it counts.

        Episodes of environments that step together must be given in the order in which they began,
        not in that of their ends.

        Args:
            name: Name of the episode, which no other episode of the shield has.
            outcome: A recorded episode; or whether it violated, for a promise about violations; or
                its summed cost, for a promise about costs; or None where no label was reported.
            certified: Whether it began certified; other episodes do not count. None: yes, or for a
                recorded episode whether it starts with V_h <= -delta.
            cut: Whether it was cut. A recorded episode says it by its last step.
            covariates: Values of the reference's covariates by name, where they are known. Those of
                a recorded episode are computed.
            started: Time at which it began, in seconds since 1970, by which `merged` orders the
                episodes; None: now.

        Raises:
            TypeError: `name` is no text, or `outcome` is of a wrong type for the promise.
            ValueError: An episode of that name was counted already, or a number is not finite.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"name must be a text that is not empty, got {name!r:.60}")
        if name in self._entries:
            raise ValueError(
                f"episode {name!r:.80} was counted already; give each episode a name of its own, "
                "and each episode once"
            )
        values = {} if covariates is None else dict(covariates)
        if isinstance(outcome, Episode):
            certified = certified_start(self.shield, outcome) if certified is None else certified
            cut = not bool(outcome.terminated[-1] or outcome.truncated[-1])
            values = {**covariates_of(self.shield, outcome), **values}
        elif covariates is not None and not set(values) <= set(self._reference or ()):
            raise ValueError(
                f"covariates must be among those of the reference, {sorted(self._reference or ())},"
                f" got {sorted(values)}"
            )
        if certified is False:
            return False
        score = self._score_of(outcome)
        values = {key: finite(f"covariates[{key!r}]", one) for key, one in values.items()}
        self.open(name, None if started is None else finite("started", started))
        if score is not None:
            self.reach(name, score)
        self.close(name, CUT if cut else ENDED, values)
        self.judge()
        return score is not None

    def attach(self, shield: Shield, count: int) -> EpisodeTracker:
        """Return what follows the episodes of `count` environments; the wrappers call this.

        Raises:
            ValueError: `shield` is not the shield of the monitor.
        """
        if shield is not self.shield and _digest_of(shield) != self._digest:
            raise ValueError(
                "monitor watches another shield than the one that filters the actions, or another "
                "record; make the monitor of this shield: PromiseMonitor(shield)"
            )
        return EpisodeTracker(self, count)

    @classmethod
    def merged(
        cls,
        shield: _ShieldLike,
        paths: Iterable[str | os.PathLike[str]],
        *,
        on_change: Callable[[PromiseMonitor], object] | None = None,
    ) -> PromiseMonitor:
        """Return a monitor of all episodes in the files of a fleet's monitors.

        An episode that is in several files counts once, and one that is under way with the score
        that it has reached. The evidence does not depend on the order
        of the files. The state is the one that a single monitor would have reached with all
        episodes in the order of their beginnings, or that of a file where it is worse, because a
        state is never taken back. So a fleet may be revoked where no member is. A promise that
        holds is revoked with probability at most b by the episodes of all files together, and
        with probability at most b more by each file.

        Args:
            shield: The shield of all of them.
            paths: The files, at least one, of monitors with the same settings. They are only read.
            on_change: See the class. It is not called for what the files show already.

        Raises:
            TypeError: `paths` is a single path.
            ValueError: There is no file, a file is damaged, of another shield or made with other
                settings, or two files tell different ends of an episode.
        """
        if isinstance(paths, str | os.PathLike):
            raise TypeError(f"paths must be a list of files, got {paths!r:.80}: write [path]")
        files = [(Path(one), *read_ledger(Path(one), _SETTINGS)) for one in paths]
        if not files:
            raise ValueError("paths must name one file or more, got none")
        first = files[0][1]
        monitor = cls(
            shield,
            reference=next((data["reference"] for _, data, _ in files if data["reference"]), None),
            level=first["level"],
            doubt_level=first["doubt_level"],
            cut_as_violations=first["cut_as_violations"],
            on_change=on_change,
        )
        found: dict[str, Entry] = {}
        for path, data, entries in files:
            monitor._check_file(path, data, entries)
            for name, entry in entries.items():
                known = found.setdefault(name, entry)
                if known.status == entry.status == ENDED and known.score != entry.score:
                    raise ValueError(
                        f"{path}: episode {name!r:.80} has the score {entry.score}, but in another "
                        f"file {known.score}; names of episodes must be unique within a fleet"
                    )
                found[name] = joined(known, entry)
        monitor._replay(found)
        for path, data, _ in files:
            if _STATES.index(data["state"]) > _STATES.index(monitor._state):
                monitor._keep(data["state"], f"{path} says so: {data['reason']}")
        if monitor._state != NOT_CONTRADICTED:
            monitor._warn("as the files show", 3)
        return monitor

    # -- the ledger: `EpisodeTracker` and `episode` call these ------------------------------------

    def open(self, name: str | None = None, started: float | None = None) -> str:
        """Enter an episode that begins, and return its name; call `judge` afterwards.

        Args:
            name: Its name; None for a new one.
            started: See `episode`.
        """
        if self._process != os.getpid():
            self._disown()  # A fork has copied the monitor.
        name = f"{self._run}-{next(self._counter):07d}" if name is None else name
        entry = Entry(time.time() if started is None else started)
        self._entries[name] = self._running[name] = entry
        self._queue.append((name, entry))
        self._rows[name] = ""  # The row keeps the order of the beginnings.
        self._changed = self._unsaved = True
        return name

    def reach(self, name: str, score: float) -> None:
        """Set the score that an episode under way has reached; call `judge` afterwards.

        Args:
            name: Its name.
            score: Its score by the promise so far, which never decreases. It may be infinite.
        """
        entry = self._running.get(name)
        if entry is None:
            return  # The episode belongs to the process from which this one was forked.
        score = min(score, _UNBOUNDED)
        entry.score = score
        self._highest = max(self._highest, score)
        self._changed = True
        self._unsaved |= score >= 1.0

    def close(self, name: str, status: str, covariates: Mapping[str, float]) -> None:
        """End an episode that is under way; call `judge` afterwards.

        Args:
            name: Its name.
            status: `ledger.ENDED` or `ledger.CUT`.
            covariates: Its covariates. Those that the reference lacks are ignored.
        """
        entry = self._running.get(name)
        if entry is None:
            return  # An interrupt, such as Ctrl-C, has ended an earlier call.
        entry.status = status
        entry.covariates = {
            key: rounded(value) for key, value in covariates.items() if key in self._tests
        }
        self._rows[name] = row_text(name, entry, self._tests)
        settled = self._settled + self._growth([entry])
        del self._running[name]
        self._settled = settled
        while self._queue and self._queue[0][0] not in self._running:
            self._compare(*self._queue.popleft())
        self._changed = self._unsaved = True

    def judge(self) -> None:
        """Judge the promise after changes, save the state, and tell about a new state once."""
        if not self._changed:
            return
        self._changed = False
        logs = self._settled + self._growth(self._running.values())
        self._log_evidence = float(log_evidence(logs))
        before, reason = self._state, self._doubt()
        if self._log_evidence >= -math.log(self.level):
            # Only a change needs the reason, whose numbers take time.
            if not self.revoked:
                self._state, self._reason = REVOKED, self._contradiction(self._entries.values())
        elif reason and before == NOT_CONTRADICTED:
            self._state, self._reason = IN_DOUBT, reason
        if self._path is not None and (self._unsaved or self._state != before):
            self._save(self._path)
        if self._state != before:
            try:
                self._warn("after an episode", 5)
            finally:
                if self.on_change is not None:
                    self.on_change(self)

    # -- parts ------------------------------------------------------------------------------------

    def _name_anew(self) -> None:
        """Begin names of episodes that no other monitor, and no copy of this one, gives."""
        self._process = os.getpid()
        self._run = uuid.uuid4().hex[:12]
        self._counter = itertools.count()

    def _disown(self) -> None:
        """Forget the episodes under way, which belong to the monitor from which this is a copy."""
        under_way = self._running
        self._entries = {key: one for key, one in self._entries.items() if key not in under_way}
        self._rows = {key: row for key, row in self._rows.items() if key not in under_way}
        self._queue = deque(one for one in self._queue if one[0] not in under_way)
        self._running = {}
        self._name_anew()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._disown()

    def _score_of(self, outcome: _Outcome) -> float | None:
        """Return the score of an outcome as `episode` takes it, None without a label."""
        if outcome is None:
            return None
        promise, violation = self.promise, isinstance(self.promise, Violation)
        if isinstance(outcome, Episode):
            labelled = outcome.costs is not None
            labelled |= violation and outcome.constraints is not None
            if outcome.costs is not None:
                outcome = replace(outcome, costs=checked_costs(outcome.costs))
            return promise.score(outcome) if labelled else None
        if isinstance(outcome, bool | np.bool_) != violation:
            needed = "whether the episode violated, a bool" if violation else "its cost, a number"
            raise TypeError(
                f"outcome must be {needed}, for a promise of the kind '{promise.kind}'; got "
                f"{outcome!r:.60}"
            )
        if violation:
            return promise.score_of(bool(outcome), 0.0)
        cost = finite("outcome", outcome)
        if cost < 0.0:
            raise ValueError(f"outcome must be a cost of at least 0, got {cost}")
        return promise.score_of(False, cost)

    def _scores(self, entries: Iterable[Entry]) -> list[float]:
        """Return the scores of the episodes that count."""
        return [score for one in entries if (score := self._score(one)) is not None]

    def _score(self, entry: Entry) -> float | None:
        """Return the score of an episode, or None if it is not part of the evidence."""
        if self.cut_as_violations and entry.status == CUT:
            return 1.0
        return None if entry.score is None else min(entry.score, 1.0)

    def _growth(self, entries: Iterable[Entry]) -> Scalars:
        """Return what episodes add to the logs of wealth (J,) of the e-process."""
        return np.asarray(against(self.promise.share, self._scores(entries)).sum(axis=1))

    def _compare(self, name: str, entry: Entry) -> None:
        """Add the covariates of an episode that has ended to the tests."""
        if entry.status != ENDED:
            return
        for key, value in entry.covariates.items():
            self._tests[key].add(value, uniform(f"{name} {key}"))

    def _doubt(self) -> str:
        """Return why the assumptions are in doubt, "" where they are not."""
        if self._highest == _UNBOUNDED:
            return "an episode reported a cost that is negative, infinite or not a number"
        if self._highest > 1.0:
            return (
                f"an episode had the cost {self._highest * (self.promise.bound or 1.0):g}, above "
                f"the declared bound {self.promise.bound:g}"
            )
        # Each covariate has an equal share of b2, whatever their dependence.
        limit = len(self._tests) / self.doubt_level
        over = [name for name, test in self._tests.items() if test.log_wealth >= math.log(limit)]
        if not over:
            return ""
        each = " and ".join(
            f"the {name.replace('_', ' ')} (wealth {_exp(self._tests[name].log_wealth):.4g})"
            for name in over
        )
        return (
            f"{each} of the episodes is not distributed as in the reference; the limit is {limit:g}"
        )

    def _contradiction(self, entries: Iterable[Entry]) -> str:
        """Return why the promise is revoked by episodes."""
        scores = self._scores(entries)
        return (
            f"the evidence against it has reached 1/b = {1.0 / self.level:g} after {len(scores)} "
            f"certified episodes with a total score of {math.fsum(scores):g}, where at most "
            f"{self.promise.share:g} an episode was promised"
        )

    def _keep(self, state: str, reason: str) -> None:
        """Take a state over that was reached before, unless the present one is worse."""
        if _STATES.index(state) >= _STATES.index(self._state):
            self._state, self._reason = state, reason

    def _replay(self, entries: Mapping[str, Entry], running: Collection[str] = ()) -> None:
        """Take over episodes, and the state that they show in the order of their beginnings.

        Args:
            entries: The episodes by name.
            running: Names of those that are under way in this process.
        """
        self._entries = dict(sorted(entries.items(), key=lambda one: (one[1].started, one[0])))
        self._running = {name: entry for name, entry in self._entries.items() if name in running}
        self._queue = deque()
        reference = self._reference or {}
        self._tests = {name: ExchangeabilityTest(each) for name, each in reference.items()}
        self._rows = {
            name: row_text(name, entry, self._tests) for name, entry in self._entries.items()
        }
        self._highest = max((one.score or 0.0 for one in entries.values()), default=0.0)
        self._state, self._reason = NOT_CONTRADICTED, ""
        for name, entry in self._entries.items():
            if self._queue or name in self._running:
                self._queue.append((name, entry))
                continue
            self._compare(name, entry)
            doubt = "" if self._reason else self._doubt()
            if doubt:
                self._state, self._reason = IN_DOUBT, doubt
        everything = list(self._entries.values())
        self._settled = self._growth(
            entry for name, entry in self._entries.items() if name not in self._running
        )
        self._log_evidence = float(log_evidence(self._growth(everything)))
        path = evidence_path(self.promise.share, self._scores(everything))
        over = path >= -math.log(self.level)
        if over.any():
            counted = [one for one in everything if self._score(one) is not None]
            self._state = REVOKED
            self._reason = self._contradiction(counted[: int(over.argmax()) + 1])

    def _warn(self, when: str, stacklevel: int) -> None:
        then = (
            "No episode is certified any more: calibrate the shield anew for what is deployed"
            if self.revoked
            else "The promise may not apply to what is deployed: find out what has changed, or "
            "calibrate anew"
        )
        warnings.warn(
            f"the promise of the shield: {self._state} ({when}). Reason: {self._reason}. {then}",
            PromiseWarning,
            stacklevel=stacklevel,
        )

    # -- the file ---------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {
            "shield": self._digest,
            "level": self.level,
            "doubt_level": self.doubt_level,
            "cut_as_violations": self.cut_as_violations,
            "state": self._state,
            "reason": self._reason,
            "reference": self._reference,
        }

    def _check_file(
        self, path: Path, data: Mapping[str, Any], entries: Mapping[str, Entry]
    ) -> None:
        """Raise ValueError unless a file is of this shield and has the settings of the monitor."""
        own = self._settings()
        if data["shield"] != self._digest:
            raise ValueError(
                f"{path} holds the episodes of another shield or record; give each calibrated "
                "shield a file of its own"
            )
        for name in ("level", "doubt_level", "cut_as_violations"):
            if data[name] != own[name]:
                raise ValueError(
                    f"{name} must be {data[name]} as in {path}, got {own[name]}: a setting may not "
                    "be changed after episodes were seen"
                )
        if self.promise.bound is None:
            for name, entry in entries.items():
                if entry.score not in (None, 0.0, 1.0):
                    raise ValueError(
                        f"{path} is damaged: episode {name!r:.60} has the score {entry.score:g}, "
                        "and where a rate is promised a score is 0 or 1; restore the file, or "
                        "remove it to begin anew without the episodes that it held"
                    )
        theirs = data["reference"]
        if None not in (theirs, self._reference) and theirs != self._reference:
            raise ValueError(
                f"reference must be that of {path} (or None, to use it), got another one: it may "
                "not be changed after episodes were seen"
            )

    def _write(self, path: Path) -> None:
        for name, entry in self._running.items():
            self._rows[name] = row_text(name, entry, self._tests)
        write_ledger(path, self._settings(), self._rows.values())
        self._stamp = stamp(path)
        self._unsaved = self._told_unsaved = False

    def _take_over(self, path: Path) -> None:
        """Merge the episodes and the state of a file that another process has written.

        Raises:
            ValueError: It is damaged, of another shield, or was made with other settings.
        """
        data, theirs = read_ledger(path, _SETTINGS)
        self._check_file(path, data, theirs)
        if self._reference is None:
            self._reference = data["reference"]
        found = dict(self._entries)
        for name, entry in theirs.items():
            # This process alone knows about the episodes that are under way in it.
            if name not in self._running:
                found[name] = joined(found[name], entry) if name in found else entry
        state, reason = self._state, self._reason
        self._replay(found, self._running.keys())
        self._keep(data["state"], data["reason"])
        self._keep(state, reason)

    def _save(self, path: Path) -> None:
        """Write the file, anew where it is missing. Where this fails, say so once.

        Where another process has written it, its episodes and its state are taken over first.
        """
        try:
            if stamp(path) not in (None, self._stamp):
                self._take_over(path)
            self._write(path)
        except (OSError, ValueError) as error:
            if self._told_unsaved:
                return
            self._told_unsaved = True
            warnings.warn(
                f"the state of the promise could not be saved: {error}. The monitor goes on in "
                "memory, and tries again at the next episode",
                PromiseWarning,
                stacklevel=6,
            )


def _exp(log: float) -> float:
    return math.exp(min(log, _MOST))


def _digest_of(shield: Shield) -> str:
    """Return a digest of what the promise is about: a shield, its threshold and its record.

    A field of the record that has its default is left out, so that the digest stays the same when a
    later release adds fields.
    """
    record = shield.record
    if record is None:
        return content_digest([shield.digest, shield.delta, None], {})
    default = {one.name for one in fields(record) if getattr(record, one.name) == one.default}
    kept = {name: value for name, value in record.to_json().items() if name not in default}
    return content_digest([shield.digest, shield.delta, kept], {})
