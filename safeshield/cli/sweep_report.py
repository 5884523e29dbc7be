"""The results of ``safeshield sweep``: a CSV file, a printed table and a picture."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safeshield.cli.sweep_plan import SCORES, Plan, short
from safeshield.cli.sweep_runs import Outcome
from safeshield.evaluation.tables import aligned
from safeshield.files.atomic import written_whole


def write_csv(path: Path, plan: Plan, outcomes: Sequence[Outcome]) -> None:
    """Write one row for each training: what was varied, seed, log, figures, error and folder."""
    figures = list(dict.fromkeys(name for one in outcomes for name in one.figures))
    names = [*plan.vary, "seed", "log", "status", *figures, "error", "folder"]
    with written_whole(path) as part, part.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, names)
        table.writeheader()
        for one in outcomes:
            varied = {name: _exact(value) for name, value in one.job.point.items()}
            table.writerow(
                {
                    **varied,
                    "seed": one.job.seed,
                    "log": one.job.log,
                    "status": "failed" if one.error else "finished",
                    **one.figures,
                    "error": one.error,
                    "folder": one.job.folder.relative_to(path.parent),
                }
            )


def _exact(value: object) -> str:
    return repr(value) if isinstance(value, float) else short(value)


def reported(plan: Plan, figures: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the figures to report.

    Args:
        plan: The sweep.
        figures: Names of the figures of a finished training.

    Raises:
        ValueError: The sweep asks for a figure that there is not.
    """
    known = list(figures)
    unknown = [name for name in plan.report if name not in known]
    if unknown:
        raise ValueError(
            f"report must name figures of a training, {', '.join(known)}, got '{unknown[0]}'; "
            "correct the file and run it again, finished trainings are not repeated"
        )
    return plan.report or (SCORES if plan.env is not None else tuple(known))


def describe(plan: Plan, figures: Mapping[str, float]) -> str:
    """Return the figures to report of a finished training as a line of text.

    Raises:
        ValueError: The sweep reports an unknown figure.
    """
    names = reported(plan, figures)
    return ", ".join(f"{name} {figures[name]:.3g}" for name in names if _few(plan)) or "finished"


def _few(plan: Plan) -> bool:
    """Whether the reported figures are so few that they can be printed side by side."""
    return plan.env is not None or len(plan.report) > 0


def format_outcomes(plan: Plan, outcomes: Sequence[Outcome]) -> str:
    """Return a table of the means over seeds, with the least and the greatest value of several.

    It has one row for each setting and log. Where agents are evaluated, the highest normalised
    return of a log among the settings whose mean normalised cost is at most 1 has a star.

    Raises:
        ValueError: No training has finished, or the sweep reports an unknown figure.
    """
    done = [one for one in outcomes if not one.error]
    if not done:
        raise ValueError("outcomes must hold at least one finished training, got none")
    names = reported(plan, done[0].figures) if _few(plan) else ()
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for one in outcomes:
        varied = (short(one.job.point[name]) for name in plan.vary)
        groups.setdefault((*varied, one.job.log), []).append(one)
    best = _best(plan, groups)
    rows = [(*plan.vary, "log", "seeds", *names)]
    for key, ones in groups.items():
        seeds = sum(not one.error for one in ones)
        starred = key == best.get(key[-1])
        cells = [
            _cell(ones, name) + ("*" if starred and name == "normalised_return" else "")
            for name in names
        ]
        rows.append((*key, f"{seeds} of {len(ones)}", *cells))
    told = "Means over the seeds; in brackets the least and the greatest."
    if not names:
        told = "The metrics are in results.csv. To print some, name them in the file as report."
    if best and "normalised_return" in names:
        told += " *: the highest return of those whose normalised cost is at most 1."
    lines = [told]
    for log in plan.logs if plan.env is not None else ():
        ours = {key: ones for key, ones in groups.items() if key[-1] == log}
        costs = [cost for ones in ours.values() if (cost := _mean(ones, "normalised_cost")) >= 0]
        if log not in best and costs:
            lines.append(
                f"No setting met the cost limit {plan.cost_limit:g} on {log}: the least normalised "
                f"cost is {min(costs):.3g}, and it must be at most 1."
            )
        elif log in best and plan.vary:
            point = groups[best[log]][0].job.point
            values = ", ".join(f"{name} = {_exact(point[name])}" for name in plan.vary)
            lines.append(f"The best setting on {log}: {values}")
    return "\n".join([aligned(rows, len(plan.vary) + 1), "", *lines])


def _best(
    plan: Plan, groups: Mapping[tuple[str, ...], Sequence[Outcome]]
) -> dict[str, tuple[str, ...]]:
    """Return the best setting on each log, by log: its key in `groups`, which ends in the log.

    A log on which no setting has a mean normalised cost of at most 1 has no entry.
    """
    best: dict[str, tuple[str, ...]] = {}
    for key, ones in groups.items() if plan.env is not None else ():
        score, known = _mean(ones, "normalised_return"), best.get(key[-1])
        if _mean(ones, "normalised_cost") <= 1.0 and (
            known is None or score > _mean(groups[known], "normalised_return")
        ):
            best[key[-1]] = key
    return best


def _values(outcomes: Sequence[Outcome], name: str) -> list[float]:
    return [one.figures[name] for one in outcomes if not one.error]


def _mean(outcomes: Sequence[Outcome], name: str) -> float:
    values = _values(outcomes, name)
    return float(np.mean(values)) if values else float("nan")


def _cell(outcomes: Sequence[Outcome], name: str) -> str:
    values = _values(outcomes, name)
    if not values:
        return "-"
    reach = f" [{min(values):.3g}, {max(values):.3g}]" if len(values) > 1 else ""
    return f"{np.mean(values):.3g}{reach}"


def draw(path: Path, plan: Plan, outcomes: Sequence[Outcome]) -> None:
    """Draw each reported figure (rows) against each varied setting (columns), and save the picture.

    A dot is a training, its colour the log. A line shows the mean over the trainings with the same
    value of a listed setting. Where no setting varies, the horizontal axis shows the logs.

    Args:
        path: File to write.
        plan: The sweep.
        outcomes: Results, of which at least one is finished.
    """
    from safeshield.data.scatter import BLUE, GREEN, GREY, ORANGE, VERMILION, saved_figure

    done = [one for one in outcomes if not one.error]
    names = reported(plan, done[0].figures)
    columns = list(plan.vary) or ["log"]
    colours = [BLUE, ORANGE, GREEN, VERMILION]
    with saved_figure(path, 1.2 + 3.2 * len(columns), 0.6 + 2.2 * len(names)) as figure:
        grid = figure.subplots(len(names), len(columns), squeeze=False, sharey="row", sharex="col")
        for (row, name), (column, setting) in (
            (one, other) for one in enumerate(names) for other in enumerate(columns)
        ):
            axes = grid[row, column]
            axes.grid(color=GREY, linewidth=0.6)
            axes.set_axisbelow(True)
            places = _axis(axes, plan, setting)
            for at, log in enumerate(plan.logs):
                ones = [one for one in done if one.job.log == log]
                xs = [places(one) for one in ones]
                ys = _values(ones, name)
                colour = colours[at % len(colours)]
                axes.scatter(xs, ys, s=16, color=colour, label=Path(log).name)
                if not isinstance(plan.vary.get(setting), dict):
                    for x in sorted(set(xs)):
                        mean = np.mean([y for one, y in zip(xs, ys, strict=True) if one == x])
                        axes.hlines(mean, x - 0.2, x + 0.2, color=colour)
            if name == "normalised_cost":
                axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
            if column == 0:
                axes.set_ylabel(name.replace("_", " "))
            if row == len(names) - 1:
                axes.set_xlabel(setting)
        if len(plan.logs) > 1 and plan.vary:
            grid[0, -1].legend(fontsize="small")


def _axis(axes: Any, plan: Plan, setting: str) -> Any:  # noqa: ANN401 - matplotlib's
    """Set up a horizontal axis, and return the function from a result to its place on it."""
    values = plan.vary.get(setting)
    if isinstance(values, dict):
        if values.get("log"):
            axes.set_xscale("log")
        return lambda one: one.job.point[setting]
    items = list(plan.logs) if values is None else list(values)
    labels = [Path(item).stem if values is None else short(item) for item in items]
    axes.set_xticks(range(len(items)), labels)
    axes.set_xlim(-0.5, len(items) - 0.5)
    if values is None:
        return lambda one: items.index(one.job.log)
    return lambda one: items.index(one.job.point[setting])
