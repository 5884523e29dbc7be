"""The evidence from a flight recorder: the worst episodes, and what was replaced where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from safeshield.evaluation.intervals import binomial_interval
from safeshield.monitoring import FlightLog
from safeshield.reporting.claims import REPLACED, WORST, number, percent
from safeshield.reporting.drawings import Axis, Chart, swatch
from safeshield.reporting.evidence import not_given, piece
from safeshield.reporting.page import Html, facts, figure, figures, paragraph, table
from safeshield.shield.shield import Shield

_WORST = 10
"""Number of episodes in the list of the worst ones."""
_BEFORE, _AFTER = 120, 30
"""Steps around the largest h of the worst episode that are drawn."""
_CELLS = 24
_PAIRS = 8
_NONE = (
    "No flight log was given. Record a deployment with ShieldLog(folder), and make the report with "
    "--flight FOLDER."
)
Array = npt.NDArray[np.float64]


def check_flight(flight: FlightLog, shield: Shield) -> None:
    """Raise ValueError unless a flight was recorded behind this shield at this delta."""
    found = (flight.shield["digest"], flight.shield["delta"])
    if found != (shield.digest, shield.delta):
        raise ValueError(
            f"flight must be one behind the shield of the report, {shield.digest} at delta "
            f"{shield.delta:.6g}, got one behind {found[0]} at delta {found[1]:.6g}"
        )


def _done(flight: FlightLog) -> str:
    """Return what happened to rejected actions: in shadow mode nothing was replaced."""
    return "would have been replaced" if flight.shield["mode"] == "shadow" else "replaced"


@dataclass(frozen=True)
class _Episodes:
    """Numbers of the episodes of a flight, the worst first, each an array (E,)."""

    number: npt.NDArray[np.int64]
    seed: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    certified: npt.NDArray[np.bool_]
    violated: npt.NDArray[np.bool_]
    worst_h: Array
    """Largest h that was reported, -infinity where none was."""
    cost: Array
    worst_value: Array
    """Largest Q_h of an executed action; -infinity where none was recorded."""
    replaced: npt.NDArray[np.int64]
    ending: npt.NDArray[np.str_]
    """"ended", "cut" or "not finished"."""

    @classmethod
    def of(cls, flight: FlightLog) -> _Episodes:
        steps, ends = flight.columns, flight.ends
        both = {name: np.concatenate([steps[name], ends[name]]) for name in steps}
        numbers, at = np.unique(both["episode"], return_inverse=True)
        count, taken = len(numbers), np.arange(len(at)) < len(flight)

        def most(values: npt.NDArray[Any], least: float) -> Array:
            found = np.full(count, least)
            np.fmax.at(found, at, np.asarray(values, np.float64))
            return found

        seed = np.full(count, -1, np.int64)
        np.maximum.at(seed, at, both["seed"])
        cost = np.zeros(count)
        np.add.at(cost, at, np.nan_to_num(both["cost"], nan=0.0))
        replaced = np.zeros(count, np.int64)
        np.add.at(replaced, at, taken & (both["verdict"] != "accepted"))
        ending = np.full(count, "not finished", "U12")
        ended = at[len(flight) :]
        ending[ended] = np.where(ends["verdict"] == "end", "ended", "cut")
        h = most(both["h"], -math.inf)
        found = cls(
            number=numbers,
            seed=seed,
            steps=most(both["step"] + taken, 0.0).astype(np.int64),
            certified=most(both["certified"], 0.0) > 0.0,
            violated=(h > 0.0) | (most(both["cost"], 0.0) > 0.0),
            worst_h=h,
            cost=cost,
            worst_value=most(np.where(taken, both["value"], -math.inf), -math.inf),
            replaced=replaced,
            ending=ending,
        )
        keys = (found.worst_value, found.cost, found.worst_h, found.certified, found.violated)
        order = np.lexsort(keys)[::-1]
        return cls(**{name: values[order] for name, values in vars(found).items()})


# -- E7: the worst episodes -----------------------------------------------------------------------


def worst(flight: FlightLog | None) -> Html:
    """Return the worst episodes of a flight, and a drawing of the worst one."""
    if flight is None:
        return piece(WORST, not_given(_NONE))
    found = _Episodes.of(flight)
    certified, broken = found.certified, found.certified & found.violated
    pairs: list[tuple[str, object]] = [
        ("Episodes", f"{len(found.number)}, of which {int(certified.sum())} began certified"),
        ("With a violation", f"{int(found.violated.sum())}, of which {int(broken.sum())} began "
         "certified"),
    ]  # fmt: skip
    if certified.any():
        low, high = binomial_interval(int(broken.sum()), int(certified.sum()))
        pairs.append(
            ("Rate of violations, certified", f"{percent(float(broken.sum() / certified.sum()))} "
             f"[95% interval {percent(low)} to {percent(high)}]")
        )  # fmt: skip
    rows = [
        (
            found.number[i], "" if found.seed[i] < 0 else found.seed[i], found.steps[i],
            _yes(found.violated[i]), _yes(found.certified[i]), _told(found.worst_h[i]),
            number(float(found.cost[i])), _told(found.worst_value[i]), found.replaced[i],
            found.ending[i],
        )
        for i in range(min(_WORST, len(found.number)))
    ]  # fmt: skip
    head = (
        "episode", "seed", "steps", "violated", "began certified", "largest h", "cost",
        "largest Q_h", _done(flight), "ending",
    )  # fmt: skip
    note = "Costs that were not reported count as 0. "
    if flight.steps != "all":
        note += (
            "Only interventions, states that violate and the last state of each episode were "
            "recorded, so h and costs are those of these states. "
        )
    parts = [facts(pairs)]
    if len(found.number):
        # The worst episode may have begun in a violation, which no shield can undo.
        drawn = dict.fromkeys([int(found.number[0]), *found.number[certified][:1].tolist()])
        parts += [
            table(head, rows, caption="Violations first; among them the certified ones, then by "
                  "the largest h, by cost and by Q_h"),
            figures([_drawn(flight, one) for one in drawn]),
        ]  # fmt: skip
    return piece(WORST, *parts, paragraph(note, kind="note"))


def _yes(flag: object) -> str:
    return "yes" if flag else "no"


def _told(value: float) -> str:
    return "" if math.isinf(value) and value < 0 else f"{value:.4g}"


def _drawn(flight: FlightLog, episode: int) -> Html:
    """Return the drawing of h, Q_h, the threshold and the replaced steps of an episode."""
    steps, ends = flight.columns, flight.ends
    own, last = steps["episode"] == episode, ends["episode"] == episode
    at = np.concatenate([steps["step"][own], ends["step"][last]]).astype(float)
    h = np.concatenate([steps["h"][own], ends["h"][last]])
    value, threshold = steps["value"][own], steps["threshold"][own]
    replaced = steps["verdict"][own] != "accepted"
    peak = at[int(np.argmax(np.nan_to_num(h, nan=-np.inf)))]
    shown = (at >= peak - _BEFORE) & (at <= peak + _AFTER)
    inner = shown[: len(value)]
    finite = np.concatenate([h[shown], value[inner], threshold[inner], [0.0]])
    chart = Chart(
        f"episode-{episode}", f"Values of episode {episode} step by step",
        Axis("step", float(at[shown].min()), float(max(at[shown].max(), at[shown].min() + 1))),
        Axis.over("units of h", finite[np.isfinite(finite)].tolist()),
    )  # fmt: skip
    chart.floor(at[: len(value)][inner & replaced].tolist(), 1)
    chart.limit(0.0, "violation above 0")
    moments = at[: len(value)][inner].tolist()
    chart.line(at[shown].tolist(), h[shown].tolist(), 0)
    chart.line(moments, value[inner].tolist(), 2)
    chart.line(moments, threshold[inner].tolist(), 3)
    return figure(
        chart.drawing(),
        f"Episode {episode}, around its largest h.",
        [
            (swatch(0, line=True), "h, reported"),
            (swatch(2, line=True), "Q_h of the executed action"),
            (swatch(3, line=True), "threshold"),
            (swatch(1, line=True), f"{_done(flight)} (marks at the bottom)"),
        ],
    )


# -- E8: what was replaced where ------------------------------------------------------------------

_VERDICTS = {
    "accepted": "accepted: the agent's own action",
    "replaced": "replaced by an acceptable action",
    "fallback": "replaced, but no acceptable action was found",
    "unreadable": "the observation could not be read",
    "shadow": "would have been replaced (shadow mode)",
}


def replaced(flight: FlightLog | None, shield: Shield | None) -> Html:
    """Return how often the shield intervened in a flight, how, and where.

    Args:
        flight: The flight; None where none was given.
        shield: The shield, which knows the spread of observations in its log.
    """
    if flight is None or shield is None:
        return piece(REPLACED, not_given(_NONE))
    card, shadow = flight.card(), flight.shield["mode"] == "shadow"
    pairs: list[tuple[str, object]] = [
        ("Mode", "shadow: nothing was replaced" if shadow else flight.shield["mode"]),
        ("Environment", flight.environment or "not known to the recorder, so it was not compared "
         "with that of a record"),
        ("Agent", flight.agent or "not told to the recorder"),
        ("Recorded", f"{'all steps' if flight.steps == 'all' else 'interventions only'}, "
         + " to ".join(card["times"])),
        ("Steps", f"{card['steps']} in {card['episodes']} episodes"),
        ("Would have been replaced" if shadow else "Interventions",
         f"{card['replaced']} ({percent(card['replaced_share'])} of the steps)"),
        *((f"... {_VERDICTS[name]}", count) for name, count in card["verdicts"].items() if count),
        ("Not in the record", f"{card['lost']} rows lost, {card['removed']} removed with old "
         f"files, {card['torn']} damaged stretches skipped"),
        *([("Warning", card["missing"])] if card["missing"] else []),
    ]  # fmt: skip
    hits = flight.columns["verdict"] != "accepted"
    parts = [facts(pairs)]
    if hits.any():
        # In shadow mode the executed actions are the proposed ones.
        parts += [] if shadow else [_actions(flight, hits)]
        parts.append(figures(_map(flight, hits, shield)))
    return piece(REPLACED, *parts)


def _actions(flight: FlightLog, hits: npt.NDArray[np.bool_]) -> Html:
    """Return a table of how actions were changed."""
    before, after = flight.columns["proposed"][hits], flight.columns["executed"][hits]
    space = flight.action_space
    if isinstance(space, gym.spaces.Box):
        low, high = space.low.reshape(-1), space.high.reshape(-1)
        with np.errstate(invalid="ignore", over="ignore"):
            half = np.where(np.isfinite(high - low), (high - low) / 2.0, 1.0)
        moved = (after - before) / half
        moved = np.where(np.isfinite(moved), moved, np.nan)
        rows: list[tuple[object, ...]] = [
            (i, _mean(before[:, i]), _mean(after[:, i]), _mean(moved[:, i]),
             _mean(np.abs(moved[:, i])))
            for i in range(before.shape[1])
        ]  # fmt: skip
        head: tuple[str, ...] = (
            "entry", "mean proposed", "mean executed", "mean change", "mean size of the change",
        )  # fmt: skip
        told = "Actions of the steps with an intervention; changes in half widths of the box"
        return table(head, rows, caption=told)
    pairs, counts = np.unique(np.hstack([before, after]), axis=0, return_counts=True)
    width = before.shape[1]
    rows = [
        (_plain(pairs[i, :width]), _plain(pairs[i, width:]), counts[i])
        for i in np.argsort(-counts, kind="stable")[:_PAIRS]
    ]
    return table(("proposed", "executed", "steps"), rows, caption="Most frequent replacements")


def _mean(values: Array) -> str:
    finite = values[np.isfinite(values)]
    return f"{finite.mean():.3g}" if len(finite) else ""


def _plain(action: Array) -> str:
    return ", ".join(f"{one:g}" for one in action)


def _map(flight: FlightLog, hits: npt.NDArray[np.bool_], shield: Shield) -> list[Html]:
    """Return a drawing of the share of replaced steps over one or two entries of observations."""
    seen = np.asarray(flight.columns["observation"], np.float64)
    entries = _telling(seen, hits, flight.steps == "all", shield)
    if not entries:
        return []
    known = np.isfinite(seen[:, entries]).all(axis=1)
    seen, hits = seen[known][:, entries], hits[known]
    low, high = np.quantile(seen, 0.005, axis=0), np.quantile(seen, 0.995, axis=0)
    edges = [
        np.linspace(a, b if b > a else a + 1.0, _CELLS + 1) for a, b in zip(low, high, strict=True)
    ]
    inside = np.clip(seen, [one[0] for one in edges], [one[-1] for one in edges])
    total, _ = np.histogramdd(inside, edges)
    some, _ = np.histogramdd(inside[hits], edges)
    whole = flight.steps == "all"
    shares = some / np.maximum(total, 1.0) if whole else some / max(some.max(), 1.0)
    shadow = flight.shield["mode"] == "shadow"
    steps = f"steps that {_done(flight)}" if shadow else "replaced steps"
    kind = f"{'Share' if whole else 'Number'} of {steps}"
    axes = [
        Axis(f"entry {i} of the observation", float(one[0]), float(one[-1]))
        for i, one in zip(entries, edges, strict=True)
    ]
    if len(entries) == 1:
        top = float(shares.max()) or 1.0
        chart = Chart("replaced-map", kind, axes[0], Axis("share, %", 0.0, 106.0 * top))
        for i, share in enumerate(shares):
            chart.bar(float(edges[0][i]), float(edges[0][i + 1]), 100.0 * float(share), 4)
    else:
        chart = Chart("replaced-map", kind, axes[0], axes[1])
        for i, j in zip(*np.nonzero(total), strict=True):
            chart.cell(
                (float(edges[0][i]), float(edges[1][j])),
                (float(edges[0][i + 1]), float(edges[1][j + 1])),
                0.06 + 0.94 * float(shares[i, j]),
            )
    most = f"{percent(float(shares.max()))} of the steps" if whole else f"{int(some.max())} steps"
    return [
        figure(
            chart.drawing(),
            f"{kind}, where the agent was: the darker, the more, up to {most} in a cell. The "
            f"entries are those in which {steps} differ most from "
            f"{'the other steps' if whole else 'the log'}. States beyond the edge count at it.",
        )
    ]


def _telling(seen: Array, hits: npt.NDArray[np.bool_], whole: bool, shield: Shield) -> list[int]:
    """Return the one or two entries of observations in which replaced steps differ most.

    Where all steps were recorded, replaced steps are compared with all steps, by the largest
    difference of the two distribution functions. Otherwise they are compared with the log, by the
    distance of their mean in standard deviations of the log.
    """
    scores = np.zeros(seen.shape[1])
    scaling = shield.model.scaling
    for i, column in enumerate(seen.T):
        finite = np.isfinite(column)
        if not (hits & finite).any() or np.ptp(column[finite]) == 0.0:
            scores[i] = -1.0
        elif whole:
            places = np.quantile(column[finite], np.linspace(0.0, 1.0, 41))
            every = np.searchsorted(np.sort(column[finite]), places, side="right") / finite.sum()
            own = np.sort(column[hits & finite])
            scores[i] = np.abs(np.searchsorted(own, places, side="right") / len(own) - every).max()
        else:
            spread = float(scaling.observation_spread[i]) or 1.0
            scores[i] = abs(column[hits & finite].mean() - scaling.observation_mean[i]) / spread
    best = [int(i) for i in np.argsort(-scores, kind="stable")[:2] if scores[i] >= 0.0]
    return sorted(best)
