"""The evidence from before the deployment: logs, the search, the tests, attempts, statements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from safeshield.data.card import DatasetCard, Spread, card_of
from safeshield.data.dataset import OfflineDataset
from safeshield.reporting.claims import (
    ATTEMPTS,
    DATA,
    EVIDENCE,
    LOGS,
    SEARCH,
    TESTS,
    number,
    percent,
)
from safeshield.reporting.drawings import SERIES, Axis, Chart, swatch
from safeshield.reporting.page import (
    Html,
    checklist,
    facts,
    figure,
    figures,
    fill,
    item,
    paragraph,
    quote,
    table,
)
from safeshield.shield.log_record import LogAttempt, LogRecord
from safeshield.shield.record import MEAN_COST, Attempt, CalibrationRecord, PilotPoint, Rung
from safeshield.shield.shield import Shield
from safeshield.spaces.schema import check_same_space

_MOST_TEXT = 300
"""Number of characters of an entry of a log's provenance that are shown."""


def not_given(text: str) -> Html:
    """Return the note that a piece of evidence is missing, and how to give it."""
    return paragraph(text, kind="note")


def piece(name: str, *content: object) -> Html:
    """Return a piece of evidence; `name` is its id."""
    return item(name, EVIDENCE[name], *content)


# -- E1: logs --------------------------------------------------------------------------------------


def check_log(shield: Shield, log: OfflineDataset, name: str) -> None:
    """Raise unless a log has the spaces of a shield; `name` is its name in the message.

    Raises:
        ValueError: They differ.
    """
    repair = "pass a log of the environment that the shield protects"
    check_same_space(
        shield.observation_space, log.observation_space, f"the observation space of {name}",
        unbounded_matches_any=True, repair=repair,
    )  # fmt: skip
    check_same_space(
        shield.action_space, log.action_space, f"the action space of {name}", repair=repair
    )


def data(
    logs: Sequence[tuple[Path, OfflineDataset]], trained_on: npt.NDArray[np.uint64] | None
) -> Html:
    """Return the cards of the logs, and whether the shield was made from their episodes.

    Args:
        logs: The logs with their files.
        trained_on: (E,) hashes of the episodes from which the shield was made; None where they
            are not known.
    """
    kept = "not known, because the file holds no hashes of them"
    if trained_on is not None:
        kept = f"{len(trained_on)}; the file holds a hash of each"
    parts: list[Html] = [
        facts([("Training episodes", kept)])
    ]  # fmt: skip
    if not logs:
        parts.append(
            not_given(
                "No log was given, so the data are not described here. Make the report with "
                "--log LOG for each log."
            )
        )
    for path, log in logs:
        card = card_of(log, file=path)
        parts.append(fill("<h4>{name}</h4>", name=path.name))
        parts.append(facts([("Use", _use(log, trained_on)), *_card_rows(card), *_made(log)]))
    return piece(DATA, *parts)


def _use(log: OfflineDataset, trained_on: npt.NDArray[np.uint64] | None) -> str:
    if trained_on is None:
        return "The file does not say whether the shield was made from these episodes."
    common = int(np.isin(log.episode_hashes, trained_on).sum())
    told = {0: "None", log.num_episodes: "All"}.get(common, f"{common} of the {log.num_episodes}")
    return f"{told} of its episodes are among those from which the shield was made."


def _card_rows(card: DatasetCard) -> list[tuple[str, object]]:
    low, high = card.constraint_range
    return [
        ("Environment", card.env_id or "not known"),
        ("Size", f"{card.transitions} transitions in {card.episodes} episodes"),
        ("Steps of an episode", f"{_spread(card.lengths)}; {percent(card.terminated_share)} "
         "end by termination"),
        ("Episodes with a violation", f"{card.violating_episodes} "
         f"({percent(card.violating_episodes / card.episodes)})"),
        ("Labels", f"{card.constraint_kind} h, {low:.4g} to {high:.4g}, by "
         f"{card.constraint_source or 'a source that is not known'}"),
        ("Cost of an episode", _spread(card.costs)),
        ("Return of an episode", _spread(card.returns)),
        ("Observations", card.observation_space),
        ("Actions", card.action_space),
        ("SHA-256 of the file", fill("<code>{digest}</code>", digest=card.sha256)),
    ]  # fmt: skip


def _spread(spread: Spread) -> str:
    if spread.least == spread.greatest:
        return f"{spread.least:.4g} in each episode"
    return (
        f"{spread.least:.4g} to {spread.greatest:.4g}, quartiles {spread.lower:.4g}, "
        f"{spread.median:.4g}, {spread.upper:.4g}, mean {spread.mean:.4g}"
    )


def _made(log: OfflineDataset) -> list[tuple[str, object]]:
    if log.provenance is None:
        return [("How it was made", "not known")]
    rows: list[tuple[str, object]] = []
    for name, value in log.provenance.items():
        text = str(value)
        cut = text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]} ..."
        rows.append((f"Made: {name.replace('_', ' ')}", cut))
    return rows


# -- E2 and E3: the calibration --------------------------------------------------------------------


def search(record: CalibrationRecord | None) -> Html:
    """Return the curve of the calibration: what each threshold did in the search."""
    if record is None:
        return piece(SEARCH, not_given("There is no calibration by rollouts."))
    if not record.pilot:
        given = "There was no search: the thresholds that were tested had been given."
        return piece(SEARCH, paragraph(given))
    points = sorted(record.pilot, key=lambda one: (one.delta, one.policy))
    deltas, policies = _places(record, points)
    counted = [100.0 * one.violations / one.episodes for one in points]
    limit = [] if record.kind == MEAN_COST else [100.0 * record.epsilon]
    axis = Axis.of("delta, in units of h", [f"{one:.3g}" for one in deltas])
    first = Chart(
        "search-rate", "Share of episodes in the search that count against the claim", axis,
        Axis.over("episodes that count against it, %", [*counted, *limit], zero=True),
    )  # fmt: skip
    second = Chart(
        "search-price", "Certified starts and replaced steps in the search", axis,
        Axis("share, %", 0.0, 105.0),
    )  # fmt: skip
    for bound in limit:
        first.limit(bound, f"bound {percent(record.epsilon)}")
    for chart in (first, second):
        _choose(chart, deltas, record.delta)
    starts = {one.delta: 100.0 * one.start_share for one in points}
    second.line(list(range(len(deltas))), [starts[one] for one in deltas], 2)
    for one, rate in zip(points, counted, strict=True):
        place, series = _place(one, deltas, policies)
        first.points([place], [rate], series)
        second.points([place], [100.0 * one.intervention_rate], series)
    marks = [(swatch(_series(i)), f"'{policy}'") for i, policy in enumerate(policies)]
    chosen = f"The dotted line is the chosen delta, {record.delta:.4g}."
    drawn = [
        figure(first.drawing(), "The search: share of episodes that count against the claim. It "
               f"chose what to test and is not evidence for the bound. {chosen}", marks),
        figure(second.drawing(), "The price of a threshold: the share of the environment's own "
               f"starts that are certified, and the share of replaced steps. {chosen}",
               [(swatch(2, line=True), "certified starts"),
                *((mark, f"steps replaced, {name}") for mark, name in marks)]),
    ]  # fmt: skip
    rows = [
        (f"{one.delta:.4g}", one.policy, one.episodes, one.violations,
         percent(one.start_share), percent(one.intervention_rate))
        for one in points
    ]  # fmt: skip
    head = ("delta", "policy", "episodes", "count against it", "starts certified", "steps replaced")
    return piece(SEARCH, figures(drawn), table(head, rows, caption="Every threshold of the search"))


def tests(record: CalibrationRecord | None) -> Html:
    """Return the tests of a calibration, in the order in which they were run."""
    if record is None:
        return piece(TESTS, not_given("There is no calibration by rollouts."))
    mean = record.kind == MEAN_COST
    unit, limit = (1.0, record.limit or 0.0) if mean else (100.0, 100.0 * record.epsilon)
    told = number if mean else percent
    deltas, policies = _places(record, record.walk)
    bounds = [unit * one.bound for one in record.walk]
    chart = Chart(
        "tests-bounds", "Upper confidence bound of each test",
        Axis.of("delta, in units of h", [f"{one:.3g}" for one in deltas]),
        Axis.over("upper bound" if mean else "upper bound of the rate, %", [*bounds, limit],
                  zero=True),
    )  # fmt: skip
    chart.limit(limit, f"bound {told(limit / unit)}")
    _choose(chart, deltas, record.delta)
    for one, bound in zip(record.walk, bounds, strict=True):
        place, series = _place(one, deltas, policies)
        if not mean:
            chart.whisker(place, unit * one.violations / one.episodes, bound, series)
        chart.points([place], [bound], series, filled=one.passed)
    marks = [(swatch(_series(i), filled=True), f"'{policy}'") for i, policy in enumerate(policies)]
    lines = "" if mean else "A line leads up to it from the rate that was seen. "
    rows = [
        (i, f"{one.delta:.4g}", one.policy, one.episodes, one.violations, told(one.bound),
         "passed" if one.passed else "failed")
        for i, one in enumerate(record.walk, 1)
    ]  # fmt: skip
    results = [
        (one.policy, one.episodes, one.violations, told(one.bound), percent(one.intervention_rate))
        for one in record.policies
    ]
    counts = ("policy", "episodes", "count against it", "upper bound")
    return piece(TESTS, table((*counts, "steps replaced"), results,
              caption=f"At the chosen delta, {record.delta:.4g}"),
        figures([figure(chart.drawing(), "Each test: the upper confidence bound that its episodes "
                        f"show. {lines}Filled marks passed. The dotted line is the chosen delta.",
                        marks)]),
        table(("test", "delta", *counts, "result"), rows,
              caption="All tests, in the order in which they were run"),
    )  # fmt: skip


def _places(
    record: CalibrationRecord, points: Sequence[Rung | PilotPoint]
) -> tuple[list[float], list[str]]:
    """Return the deltas of tests, ascending, and the names of the policies of a record."""
    names = [one.policy for one in (*record.policies, *points)]
    return sorted({one.delta for one in points}), list(dict.fromkeys(names))


def _place(
    point: Rung | PilotPoint, deltas: Sequence[float], policies: Sequence[str]
) -> tuple[float, int]:
    """Return the place of a test on the axis of deltas, beside those of others, and its series."""
    i = policies.index(point.policy)
    aside = 0.3 * ((i + 0.5) / len(policies) - 0.5)
    return deltas.index(point.delta) + aside, _series(i)


def _choose(chart: Chart, deltas: Sequence[float], delta: float) -> None:
    if delta in deltas:
        chart.chosen(deltas.index(delta))


def _series(index: int) -> int:
    return min(index, SERIES)


# -- E4: attempts ----------------------------------------------------------------------------------


def attempts(
    known: Sequence[Attempt], ledger: Sequence[LogAttempt], record: CalibrationRecord | None
) -> Html:
    """Return all calibrations and statements that the file remembers, also those that failed.

    Args:
        known: The calibrations by rollouts.
        ledger: The statements about logs.
        record: The record that the page is about.
    """
    parts: list[Html] = []
    if known:
        rows = [
            (i, one.environment, ", ".join(one.policies), f"{one.level:.3g}", _passed(one.passed))
            for i, one in enumerate(known, 1)
        ]
        parts.append(
            table(("attempt", "environment", "policies", "level", "result"), rows,
                  caption="Calibrations of these weights. The level is the probability that an "
                  "attempt promises too much.")
        )  # fmt: skip
    if record is not None and record.attempts and len(known) > len(record.attempts):
        later = f"{len(known) - len(record.attempts)} of them came after the record of this page."
        parts.append(paragraph(later))
    if ledger:
        told = [
            (i, one.method, number(one.delta, "any"), one.agent or "any", f"{one.level:.3g}",
             _passed(one.passed))
            for i, one in enumerate(ledger, 1)
        ]  # fmt: skip
        parts.append(
            table(("statement", "method", "delta", "agent", "level", "result"), told,
                  caption="Statements about logs, also those that were refused.")
        )  # fmt: skip
    if not parts:
        parts.append(paragraph("The file remembers no calibration."))
    parts.append(paragraph("Attempts on other copies of the file are not known.", kind="note"))
    return piece(ATTEMPTS, *parts)


def _passed(passed: bool) -> str:
    return "passed" if passed else "did not pass"


# -- E5: statements from logs ----------------------------------------------------------------------


def statements(records: Sequence[LogRecord]) -> Html:
    """Return what logs alone show, with the curve and the assumptions of each statement."""
    if not records:
        return piece(
            LOGS,
            paragraph(
                "No statement was derived for this file from a log alone, that is without "
                "running the shield."
            ),
        )
    parts: list[Html] = []
    for i, one in enumerate(records, 1):
        rows: list[tuple[str, object]] = [
            ("Method", one.method),
            ("Episodes that count", f"{one.episodes}, of {one.held_out} in the log"),
            ("Of these count against it", one.events),
            ("Upper bound", percent(one.bound)),
            ("Confidence", f"{percent(one.confidence)}; of all statements about these episodes "
             f"together {percent(one.joint_confidence)}"),
            ("Agent of the log", one.agent),
            ("Made", one.date),
            ("Digest of the episodes", fill("<code>{digest}</code>", digest=one.digest)),
        ]  # fmt: skip
        if one.simulator:
            rows[2:2] = [("Continued in the simulator", f"{one.continued}, in {one.simulator}")]
        parts += [fill("<h4>Statement {i}</h4>", i=i), quote(one.statement), facts(rows)]
        if one.curve:
            parts.append(figures([_missed(f"log-{i}", one)]))
        parts.append(
            checklist(
                [
                    ("", "yes" if each.checked else "no", each.name, each.statement,
                     "The log was found to agree." if each.checked
                     else "To be confirmed by a person.")
                    for each in one.assumptions
                ]
            )
        )  # fmt: skip
    return piece(LOGS, *parts)


def _missed(name: str, record: LogRecord) -> Html:
    clean = max(record.held_out - record.violating, 1)
    false = [100.0 * one.false_alarms / clean for one in record.curve]
    missed = [100.0 * one.missed / max(record.episodes, 1) for one in record.curve]
    chart = Chart(
        name, "Missed violations against false alarms at other thresholds",
        Axis("false alarms, % of episodes without a violation", 0.0, 105.0),
        Axis("missed violations, %", 0.0, 105.0),
    )  # fmt: skip
    if record.alpha is not None:
        chart.limit(100.0 * record.alpha, f"allowed {percent(record.alpha)}")
    chart.line(false, missed, 0, steps=True)
    at = [i for i, one in enumerate(record.curve) if one.threshold == record.threshold]
    chart.points([false[i] for i in at], [missed[i] for i in at], 4, filled=True)
    return figure(
        chart.drawing(),
        "The curve describes this log and promises nothing: false alarms are not bounded. The mark "
        f"is the threshold {number(record.threshold)}.",
    )
