"""The evidence from a deployment, and whether logs look like those that the shield knows."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from safeshield.calibration.eprocess import evidence_path
from safeshield.data.dataset import OfflineDataset
from safeshield.evaluation.intervals import binomial_interval
from safeshield.monitoring import PromiseMonitor
from safeshield.reporting.claims import COVERAGE, SINCE, number, percent
from safeshield.reporting.drawings import Axis, Chart
from safeshield.reporting.evidence import not_given, piece
from safeshield.reporting.page import Html, facts, figure, figures, fill, paragraph, quote
from safeshield.shield.record import MEAN_COST
from safeshield.shield.shield import Shield
from safeshield.support import SupportTest

_MOST_POINTS = 600
"""Number of points of a line in a drawing."""
_MOST_STEPS = 100_000
"""Number of transitions of a log that are scored by a support test, in whole episodes."""
_BINS = 40
_REACHED = "with the score that they had reached"

# -- E6: the watched promise -----------------------------------------------------------------------


def since(monitor: PromiseMonitor | None, files: int, watchable: bool) -> Html:
    """Return what a monitor has seen since the deployment.

    Args:
        monitor: The monitor; None where no file of one was given.
        files: Number of files from which it was merged.
        watchable: Whether there is a promise of a shield that a monitor can watch.
    """
    if not watchable:
        told = "There is no promise of a calibrated shield that a monitor could watch."
        return piece(SINCE, not_given(told))
    if monitor is None:
        return piece(SINCE, not_given(
                "No monitor's file was given, so this page does not show whether the promise still "
                "holds. Watch a deployment with PromiseMonitor(shield, \"promise.json\"), and make "
                "the report with --monitor promise.json."
            ),
        )  # fmt: skip
    seen, record = monitor.report(), monitor.shield.record
    assert record is not None
    counted = monitor.counted()
    share = monitor.promise.share
    rows: list[tuple[str, object]] = [
        ("State", seen.state),
        ("Reason", seen.reason or "none"),
        ("Evidence against the promise, E_t", f"{seen.evidence:.4g}; the promise is revoked at "
         f"1/b = {seen.limit:.4g}"),
        ("Episodes that count", f"{seen.episodes} that began certified and reported a label"),
    ]  # fmt: skip
    if record.kind == MEAN_COST:
        mean = math.fsum(score for _, score in counted) / max(len(counted), 1)
        rows.append(("Mean cost of them", f"{number(mean * (record.cost_bound or 0.0))}; promised "
                     f"is at most {number(record.limit)}"))  # fmt: skip
    elif counted:
        broken = round(math.fsum(score for _, score in counted))
        low, high = binomial_interval(broken, len(counted))
        rows.append(("Of these broke the promise", f"{broken}, which is "
                     f"{percent(broken / len(counted))} [95% interval {percent(low)} to "
                     f"{percent(high)}]; promised is at most {percent(share)}"))  # fmt: skip
    rows += [
        ("Cut", f"{seen.cut}; they count "
         f"{'as violations of the promise' if monitor.cut_as_violations else _REACHED}"),
        ("Under way", f"{seen.running}; they count {_REACHED}"),
        ("Certified, without any label", f"{seen.unlabelled}; they do not count"),
    ]  # fmt: skip
    if counted:
        rows.append(("First and last beginning", f"{_day(counted[0][0])} and "
                     f"{_day(counted[-1][0])}"))  # fmt: skip
    if seen.covariates:
        told = ", ".join(
            f"{name.replace('_', ' ')} {wealth:.3g}" for name, wealth in seen.covariates.items()
        )
        doubts = len(seen.covariates) / monitor.doubt_level
        rows.append(("Covariates, wealth of each test", f"{told}; doubts are raised at "
                     f"{doubts:.4g}"))  # fmt: skip
    else:
        rows.append(("Covariates", "not compared: the monitor has no reference"))
    drawn = [] if not counted else [_piece([score for _, score in counted], share, seen.limit)]
    return piece(SINCE, facts(rows), figures(drawn) if drawn else None,
        paragraph(
            "Not contradicted means no more than that: a monitor cannot show that a promise holds. "
            f"A promise that holds is revoked with probability at most {_wrongly(files)}, however "
            "long it is watched. The interval assumes independent episodes; E_t does not. Episodes "
            "that began uncertified are not counted at all. The file of a monitor has no digest "
            "and no signature: whoever can write it can change what it says, so this is as "
            "reliable as those who have kept the file.", kind="note",
        ),
    )  # fmt: skip


def _wrongly(files: int) -> str:
    """Return the bound on the probability that a promise that holds is revoked."""
    if files == 1:
        return "b"
    return (
        f"{files + 1} b (b for the episodes of all {files} files together, and b more for each "
        "file, because a state in a file is never taken back)"
    )


def _piece(scores: Sequence[float], share: float, limit: float) -> Html:
    path = np.concatenate([[0.0], evidence_path(share, scores)]) / math.log(10.0)
    xs = np.unique(np.linspace(0, len(path) - 1, _MOST_POINTS).astype(int))
    # A maximum between two points of the line would not be seen.
    top = [float(np.max(path[low : high + 1])) for low, high in zip([0, *xs], xs, strict=False)]
    reach = math.log10(limit)
    chart = Chart(
        "since-evidence", "Evidence against the promise after each episode",
        Axis("episodes that count", 0.0, max(float(len(scores)), 1.0)),
        Axis("evidence E_t", min(min(top), -1.0) - 0.2, max(max(top), reach) + 0.3, True),
    )  # fmt: skip
    chart.limit(reach, f"revoked at {limit:.4g}")
    chart.line([float(one) for one in xs], top, 0)
    hits = [i + 1 for i, score in enumerate(scores) if score >= 1.0][:200]
    chart.points([float(one) for one in hits], [float(path[one]) for one in hits], 4)
    return figure(
        chart.drawing(),
        "Evidence against the promise, on a logarithmic scale. It falls with each clean episode "
        "and rises with each that breaks the promise (crosses).",
    )


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


# -- E9: the support -------------------------------------------------------------------------------


def coverage(shield: Shield | None, logs: Sequence[tuple[Path, OfflineDataset]]) -> Html:
    """Return how the shield's support test judges the actions of logs."""
    if shield is None or shield.support is None:
        return piece(COVERAGE, paragraph(
                "There is no support test. Nothing at run time checks whether an action resembles "
                "those of the log. For an action that no log shows, the learned value is an "
                "extrapolation."
            ),
        )  # fmt: skip
    parts: list[Html] = [quote(shield.support.record.promise)]
    if not logs:
        parts.append(
            not_given("No log was given. Make the report with --log LOG to compare one with the "
                      "level.")
        )  # fmt: skip
    for i, (path, log) in enumerate(logs, 1):
        parts.append(_judged(f"support-{i}", path.name, shield, shield.support, log))
    return piece(COVERAGE, *parts)


def _judged(
    name: str, title: str, shield: Shield, support: SupportTest, log: OfflineDataset
) -> Html:
    chosen = _some_episodes(log)
    rows = np.concatenate(
        [np.arange(start, start + length) for start, length in
         zip(log.episode_starts[chosen], log.episode_lengths[chosen], strict=True)]
    )  # fmt: skip
    record = support.record
    states = shield.model.unjudged(log.observations[rows])
    scores = np.asarray(support.scores(shield.model, states, log.actions[rows]), np.float64)
    seen = scores >= record.level
    ends = np.cumsum(log.episode_lengths[chosen])
    unseen = np.add.reduceat(~seen, np.concatenate([[0], ends[:-1]])) / np.diff([0, *ends])
    over = int((unseen > record.share).sum())
    pairs: list[tuple[str, object]] = [
        ("Steps scored", f"{len(rows)} of {len(log.actions)}, in {len(chosen)} of "
         f"{log.num_episodes} episodes"),
        ("Steps below the level", f"{int((~seen).sum())} ({percent(float((~seen).mean()))})"),
        (f"Episodes with more than {percent(record.share)} of such steps",
         f"{over} ({percent(over / len(chosen))}); for new episodes of the log's own policy at "
         f"most {percent(record.alpha)} are promised, over the draw of the held-out episodes too"),
    ]  # fmt: skip
    drawn = _histogram(name, scores[np.isfinite(scores)], record.level)
    return fill(
        "<h4>{title}</h4>{pairs}{drawn}", title=title, pairs=facts(pairs), drawn=figures(drawn)
    )


def _some_episodes(log: OfflineDataset) -> npt.NDArray[np.int64]:
    """Return evenly spaced episodes of a log with at most `_MOST_STEPS` transitions or so."""
    share = min(_MOST_STEPS / len(log.actions), 1.0)
    count = max(int(share * log.num_episodes), 1)
    return np.unique(np.linspace(0, log.num_episodes - 1, count).astype(np.int64))


def _histogram(name: str, scores: npt.NDArray[np.float64], level: float) -> list[Html]:
    if not len(scores):
        return []
    low, high = (float(one) for one in np.quantile(scores, [0.001, 0.999]))
    low, high = min(low, level), max(high, level)
    edges = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    counts, _ = np.histogram(np.clip(scores, low, high), edges)
    shares = 100.0 * counts / len(scores)
    chart = Chart(
        name, "Scores of the log's actions, and the level of the support test",
        Axis("score of an action", float(edges[0]), float(edges[-1])),
        Axis("steps of the log, %", 0.0, 1.06 * float(shares.max())),
    )  # fmt: skip
    for left, right, share in zip(edges[:-1], edges[1:], shares, strict=True):
        chart.bar(float(left), float(right), float(share), 0)
    chart.chosen(level)
    return [
        figure(
            chart.drawing(),
            f"Scores of the log's actions. The dotted line is the level {number(level)}: the "
            "shield rejects actions below it.",
        )
    ]
