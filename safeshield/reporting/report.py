"""`safety_report`: one page on what is promised of a shield, on what evidence, and what is not.

The page is ordered as a safety case is: a claim, the argument for it, and the evidence. It claims
conformity with no standard. It holds its style and its drawings, loads nothing, and runs no script.
"""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from safeshield.data.card import file_digest
from safeshield.data.dataset import OfflineDataset
from safeshield.files.atomic import written_whole
from safeshield.files.signing import UNSIGNED, VERIFIED
from safeshield.files.tensors import read_tensors
from safeshield.monitoring import IN_DOUBT, REVOKED, FlightLog, PromiseMonitor, PromiseWarning
from safeshield.reporting import evidence, operation
from safeshield.reporting.claims import (
    EVIDENCE,
    Check,
    Claim,
    claim_of_logs,
    claim_of_record,
    no_claim,
)
from safeshield.reporting.flight import check_flight, replaced, worst
from safeshield.reporting.page import (
    Html,
    boxes,
    bullets,
    checklist,
    document,
    facts,
    fill,
    joined,
    link,
    links,
    paragraph,
    quote,
    section,
)
from safeshield.rollouts.copies import Identity
from safeshield.shield.log_record import LogAttempt, LogRecord
from safeshield.shield.record import ActorRecord, Attempt, CalibrationRecord
from safeshield.shield.replacement import describe
from safeshield.shield.shield import HasShield, Shield, as_shield

if TYPE_CHECKING:
    from safeshield.files.signing import PublicKey

_Path = str | os.PathLike[str]
Assumed = tuple[str, str, object, object, object]
"""One row of `page.checklist`."""


@dataclass(frozen=True)
class _Subject:
    """What a report is about."""

    name: str
    noun: str
    """"shield" or "agent"."""
    record: CalibrationRecord | None
    log_records: tuple[LogRecord, ...]
    attempts: tuple[Attempt, ...]
    ledger: tuple[LogAttempt, ...]
    shield: Shield
    """The shield, or that of an agent which was calibrated alone, for its critics."""
    file: Path | None

    @property
    def claim(self) -> Claim:
        if self.record is not None:
            return claim_of_record(self.record, self.shield.constraint)
        if self.log_records:
            return claim_of_logs(self.log_records, self.attempts)
        return no_claim(self.attempts)


def signature_state(file: Path | None, verify: PublicKey | None) -> str:
    """Return "unsigned", "signed, not verified", or with a key "signature verified".

    Raises:
        ValueError: A key is given, and the file is not signed with its private key, or there is
            no file.
    """
    if file is None and verify is not None:
        raise ValueError("verify must be None for a shield in memory, which has no signature")
    if file is None:
        return UNSIGNED
    read = read_tensors(file)
    if verify is None:
        return read.signed
    read.verify(verify)
    return VERIFIED


def safety_report(
    source: Shield | HasShield | _Path,
    *,
    logs: Sequence[_Path] = (),
    monitors: Sequence[_Path] = (),
    flight: _Path | None = None,
    file: _Path | None = None,
    verify: PublicKey | None = None,
) -> str:
    """Return one self-contained HTML page on what is promised of a shield, and on what evidence.

    The page says what is promised and what is not, for whom, and under which assumptions. It has
    the cards of the logs, the curve and the tests of the calibration, all attempts, the statements
    from logs, and what a monitor has seen since the deployment. An agent that was calibrated alone
    is reported alone. A shield without a record is reported as one without a promise.

    Args:
        source: A shield, a path to its file, or an agent.
        logs: Files of logs, such as the one from which the shield was trained.
        monitors: Files of `PromiseMonitor`, of this shield. Those of a fleet are merged.
        flight: Folder of a `ShieldLog` behind this shield.
        file: File from which `source` was read, where `source` is no path. Its name and digest are
            shown.
        verify: Public key, or the path of its PEM file: the file must be signed with its private
            key. None: the page says whether the file is signed.

    Raises:
        TypeError: `source` is none of these, or `logs` or `monitors` is a single path.
        ValueError: A file is damaged or of another shield, or `monitors` or a `flight` are given
            although there is no promise of a shield to watch, or no shield.
        OSError: A file cannot be read.
    """
    for name, given in (("logs", logs), ("monitors", monitors)):
        if isinstance(given, str | os.PathLike):
            raise TypeError(f"{name} must be a list of files, got {given!r:.80}: write [path]")
    subject = _subject(source, file)
    signed = signature_state(subject.file, verify)
    monitor = _monitor(subject, [Path(one) for one in monitors])
    flown = _flight(subject, flight)
    read = [(Path(one), OfflineDataset.load(one)) for one in logs]
    for path, log in read:
        evidence.check_log(subject.shield, log, str(path))
    claim = _watched(subject.claim, subject.record, monitor, flown)
    seen: npt.NDArray[np.uint64] | None = subject.shield.training_episodes
    own = subject.shield if subject.noun == "shield" else None
    assumed = _assumed(claim, signed)
    pieces = [
        evidence.data(read, seen),
        evidence.search(subject.record),
        evidence.tests(subject.record),
        evidence.attempts(subject.attempts, subject.ledger, subject.record),
        evidence.statements(subject.log_records),
        operation.since(monitor, len(monitors), own is not None and own.record is not None),
        worst(flown),
        replaced(flown, own),
        operation.coverage(own, read),
    ]
    sections = {
        "summary": ("In short", _summary(claim)),
        "claim": ("Claim", _claim(claim)),
        "argument": ("Argument", _argument(claim, assumed)),
        "evidence": ("Evidence", joined([_index(), *pieces])),
        "assumptions": ("Assumptions, as a check list", checklist(assumed)),
        "identity": ("What this page is about", _identity(subject, signed)),
        "words": ("Words", facts(_WORDS)),
    }
    state, tone = _state(subject, monitor, flown)
    now = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="minutes")
    return document(
        title=f"Safety report: {subject.name}",
        kind=f"Safety report on a{'n' if subject.noun == 'agent' else ''} {subject.noun}",
        heading=subject.name,
        state=state,
        tone=tone,
        made=f"Made {now[:16]} UTC by safeshield {_version()}. File: {signed}.",
        contents=[(name, heading) for name, (heading, _) in sections.items()],
        sections=[section(name, heading, content) for name, (heading, content) in sections.items()],
        footer="This page orders what a file and its logs hold as claim, argument and evidence. It "
        "does not claim that a standard is met, and it is no assessment of the whole system.",
    )


def write_report(
    path: _Path,
    source: Shield | HasShield | _Path,
    *,
    logs: Sequence[_Path] = (),
    monitors: Sequence[_Path] = (),
    flight: _Path | None = None,
    file: _Path | None = None,
    verify: PublicKey | None = None,
) -> None:
    """Write `safety_report`, with the same arguments, into the file `path`, atomically."""
    page = safety_report(
        source, logs=logs, monitors=monitors, flight=flight, file=file, verify=verify
    )
    with written_whole(Path(path)) as part:
        part.write_text(page, "utf-8")


def _subject(source: Shield | HasShield | _Path, file: _Path | None) -> _Subject:
    if isinstance(source, str | os.PathLike):
        file = source
    path = None if file is None else Path(file)
    shield = as_shield(source)
    record = getattr(source, "record", None)
    alone = isinstance(record, ActorRecord)
    attempts = getattr(source, "attempts", ()) if alone else shield.attempts
    kind = type(source).__name__ if alone else "shield in memory"
    return _Subject(
        name=kind if path is None else path.name,
        noun="agent" if alone else "shield",
        record=record if alone else shield.record,
        log_records=() if alone else shield.log_records,
        attempts=tuple(attempts),
        ledger=() if alone else shield.ledger.attempts,
        shield=shield,
        file=path,
    )


def _monitor(subject: _Subject, paths: Sequence[Path]) -> PromiseMonitor | None:
    if not paths:
        return None
    if subject.noun == "agent":
        raise ValueError(
            f"monitors must be left out for an agent that was calibrated alone, got {len(paths)}: "
            "a PromiseMonitor watches the promise of a shield"
        )
    with warnings.catch_warnings():
        # The page says what the warning says.
        warnings.simplefilter("ignore", PromiseWarning)
        return PromiseMonitor.merged(subject.shield, paths)


def _flight(subject: _Subject, folder: _Path | None) -> FlightLog | None:
    if folder is None:
        return None
    if subject.noun == "agent":
        raise ValueError(
            f"flight must be left out for an agent that was calibrated alone, got {folder}: a "
            "ShieldLog records what a shield does"
        )
    flight = FlightLog.load(folder)
    check_flight(flight, subject.shield)
    return flight


def _watched(
    claim: Claim,
    record: CalibrationRecord | None,
    monitor: PromiseMonitor | None,
    flight: FlightLog | None,
) -> Claim:
    """Return a claim with what a monitor and a flight recorder have seen of it."""
    told, checks = claim.promised, list(claim.checks)
    since = []
    if flight is not None:
        card = flight.card()
        since.append(
            f"A flight recorder saw {card['certified']} episodes that began certified, "
            f"{card['certified_violating']} of them with a violation in a recorded state. Of all "
            f"{card['episodes']} episodes, {card['violating']} have one."
        )
        if record is not None and (other := _elsewhere(flight, record)):
            since.append(other)
    if monitor is not None:
        since.append(f"A monitor counted {monitor.report().episodes} episodes: {monitor.state}.")
        if monitor.state == REVOKED:
            told = f"Nothing any more: a monitor has revoked the promise. It was: {claim.promised}"
        if monitor.state == IN_DOUBT:
            told = f"{claim.promised} A monitor has raised doubts about the assumptions."
            doubt = f"A monitor doubts it: {monitor.reason}."
            checks = [
                replace(one, mark="doubt", who=doubt) if one.name in _DOUBTED else one
                for one in checks
            ]
    basis = " ".join(
        [
            claim.basis,
            *(
                ["Since then:", *since]
                if since
                else ["No evidence from after the calibration was given to this report."]
            ),
        ]
    )
    return replace(claim, promised=told, basis=basis, checks=tuple(checks))


def _elsewhere(flight: FlightLog, record: CalibrationRecord) -> str:
    """Return sentences on how environment and agent of a flight differ from the tested ones.

    The result is "" where they do not, or where the flight does not name them.
    """
    known = flight.environment_kwargs
    same = Identity(
        flight.environment, None if known is None else dict(known), [], record.horizon, {}
    )
    told = replace(record, wrappers=None).differences(same)
    parts = []
    if told:
        parts.append(f"The flight is not of the environment that was tested: {'; '.join(told)}.")
    tested = [one.policy for one in record.policies]
    if flight.agent and flight.agent not in tested:
        parts.append(
            f"The flight is of the agent {flight.agent}, and the promise is made for "
            f"{', '.join(tested)} only."
        )
    return " ".join(parts)


_DOUBTED = ("Same dynamics", "Same agent", "Same starts")


def _state(
    subject: _Subject, monitor: PromiseMonitor | None, flight: FlightLog | None
) -> tuple[str, str]:
    """Return the state of the promise in a sentence, and the tone of the sentence."""
    if subject.record is None and subject.log_records:
        many = len(subject.log_records)
        return f"No calibration by rollouts; {many} statement{'s' * (many > 1)} from logs.", "plain"
    if subject.record is None:
        return "No promise: nothing is known about the rate of violations.", "doubt"
    made = f"Calibrated on {subject.record.date[:10]}"
    if monitor is None:
        if flight is not None:
            return f"{made}. No monitor has watched the promise since then.", "plain"
        return f"{made}. What has happened since then is not part of this page.", "plain"
    seen = monitor.report()
    if monitor.state == REVOKED:
        return f"REVOKED. {made}, and contradicted since: {seen.reason}.", "bad"
    if monitor.state == IN_DOUBT:
        return f"ASSUMPTIONS IN DOUBT. {made}. {seen.reason}.", "doubt"
    if not seen.episodes:
        return f"{made}. A monitor has counted no episode yet.", "plain"
    return f"{made}, and not contradicted by {seen.episodes} watched episodes.", "good"


# -- the sections ----------------------------------------------------------------------------------


def _summary(claim: Claim) -> Html:
    return boxes(
        [
            ("What is promised?", claim.promised),
            ("For whom?", claim.whom),
            ("On what evidence?", claim.basis),
            ("What is not promised?", claim.excluded),
        ]
    )


def _claim(claim: Claim) -> Html:
    parts: list[object] = []
    if claim.words:
        parts.append(paragraph("In the exact words of the file:"))
        parts += [quote(one) for one in claim.words]
    if claim.scope:
        parts += [fill("<h3>To what it applies</h3>"), facts(claim.scope)]
    parts += [fill("<h3>What is not promised</h3>"), bullets(claim.limits)]
    return joined(parts, "\n")


def _index() -> Html:
    return bullets(link(name, f"{name} {heading}") for name, heading in EVIDENCE.items())


def _argument(claim: Claim, assumed: Sequence[Assumed]) -> Html:
    template = '{text} <span class="who">{links}</span>'
    steps: list[object] = [
        fill(template, text=one.text, links=joined(["Evidence: ", links(one.evidence)]))
        for one in claim.steps
    ]
    told = "The claim rests on the assumptions of the check list."
    named = joined(["Assumptions: ", links(one[0] for one in assumed)])
    return bullets([*steps, fill(template, text=told, links=named)], ordered=True)


def _assumed(claim: Claim, signed: str) -> list[Assumed]:
    """Return the assumptions of a claim, and that of the file, as rows of a check list."""
    verified = signed == VERIFIED
    checks = [
        *claim.checks,
        Check(
            "Unchanged file",
            "The file is the one that was calibrated, and its records were not edited.",
            "yes" if verified else "no",
            "The signature is that of the key that was given."
            if verified
            else f"To be confirmed by a person: the file is {signed}. Its digest, and the check "
            "that its records follow from their counts, find accidents and no forgery. Compare "
            "the digest with one that was kept elsewhere.",
        ),
    ]
    return [
        (f"A{i}", one.mark, one.name, one.statement, one.who) for i, one in enumerate(checks, 1)
    ]


def _identity(subject: _Subject, signed: str) -> Html:
    shield, record, file = subject.shield, subject.record, subject.file
    rows: list[tuple[str, object]] = []
    if file is not None:
        digest = fill("<code>{digest}</code>", digest=file_digest(file))
        rows += [("File", f"{file.name}, {file.stat().st_size} bytes"),
                 ("SHA-256 of the file", digest)]  # fmt: skip
    rows.append(("Signature", signed))
    if subject.noun == "shield":
        rows += [
            ("Digest of the shield", fill("<code>{digest}</code>", digest=shield.digest)),
            ("Trained by", shield.trained_by or "not known"),
            ("delta, in units of h", f"{shield.delta:.6g}"),
            ("Rejected actions are replaced by", describe(shield.replacement)
             or "NearestAcceptable()"),
            ("Support test", "none" if shield.support is None else shield.support.record.score),
        ]  # fmt: skip
    rows += [
        ("Observations", str(shield.observation_space)),
        ("Actions", str(shield.action_space)),
    ]
    if record is not None:
        used = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        rows += [("Calibrated", f"{record.date}, seed {record.seed}"),
                 ("Versions in the calibration", used)]  # fmt: skip
    return facts(rows)


_WORDS = (
    ("h, violation", "h is the constraint, a number for each state: h <= 0 is safe and h > 0 is a "
     "violation. An episode violates where h > 0 in any of its states."),
    ("V_h, Q_h", "Learned values in units of h: the largest h that is still to come from a state, "
     "or after an action in a state. Above 0 a violation is expected."),
    ("delta", "The margin of the shield, in units of h. It lets an action pass where "
     "Q_h <= -delta."),
    ("Certified start", "A start with V_h <= -delta, in an environment that does not differ "
     "visibly from that of the calibration. A promise is about these alone."),
    ("Replaced step", "A step in which the shield executed another action than the proposed one."),
    ("Confidence", "The share of calibrations, run in this way, that promise no more than is true, "
     "is at least this number. It says nothing about a single episode."),
    ("Upper bound", "The largest rate that agrees with the test episodes at the level of the "
     "test."),
    ("E_t, revoked", "A monitor's evidence against the promise after t watched episodes. Where it "
     "reaches 1/b, the promise is revoked for good; b is the probability with which a promise that "
     "holds is revoked by mistake."),
)  # fmt: skip


def _version() -> str:
    import safeshield

    return safeshield.__version__
