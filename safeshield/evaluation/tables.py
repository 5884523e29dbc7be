"""Scores as text: tables in the form of the papers, and a description of one score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from safeshield.evaluation.across_tasks import aggregate, interquartile_mean, stratified_interval
from safeshield.evaluation.episodes import Evaluation
from safeshield.evaluation.intervals import Interval
from safeshield.evaluation.scores import FieldScore

Markup = Literal["text", "markdown"]
LEGEND = (
    "normalised return / normalised cost; in parentheses: unsafe, a cost above 1; "
    "*: the highest return of the safe"
)


def format_table(evaluations: Sequence[Evaluation]) -> str:
    """Return the evaluations as a table of aligned text, with their intervals.

    Raises:
        ValueError: There are no evaluations.
    """
    if not evaluations:
        raise ValueError("evaluations must hold at least one Evaluation, got none")
    header = (
        "agent", "shield", "noise", "starts", "episodes", "violating", "rate in %, 95% interval",
        "return, 95% interval", "cost", "replaced",
    )  # fmt: skip
    return aligned([header, *map(_cells, evaluations)], 2)


def _cells(one: Evaluation) -> tuple[str, ...]:
    low, high = one.violation_interval
    return (
        one.policy,
        "yes" if one.shielded else "no",
        "-" if one.deterministic is None else "no" if one.deterministic else "yes",
        one.starts,
        str(one.episodes),
        str(one.violating),
        f"{100 * one.violation_rate:.2f} [{100 * low:.2f}, {100 * high:.2f}]",
        f"{one.mean_return:.1f}{_interval(one.return_interval, 1)}",
        f"{one.mean_cost:.2f}",
        "-" if one.intervention_rate is None else f"{one.intervention_rate:.1%}",
    )


def format_scores(scores: Sequence[FieldScore], *, markup: Markup = "text") -> str:
    """Return a table with one row for each task and one column for each agent.

    The scores of unsafe agents, which the papers print in grey, stand in parentheses. Those of safe
    agents are bold in Markdown. The safe agent with the highest return of a task has a star. A
    table of several tasks ends with three more rows for the agents that have a score on every task:
    the mean, the interquartile mean with its interval, and the number of tasks on which the agent
    is safe.

    Args:
        scores: At most one score of each agent on each task. The scores of a task must share cost
            limit and reference returns.
        markup: "text" or "markdown".

    Raises:
        ValueError: There are no scores, or they do not belong in one table.
    """
    if markup not in ("text", "markdown"):
        raise ValueError(f"markup must be 'text' or 'markdown', got {markup!r}")
    grid = _grid(scores)
    agents = list(dict.fromkeys(score.agent for score in scores))
    rows = [["task", "limit", *agents]]
    for task, cells in grid.items():
        limit = next(iter(cells.values())).cost_limit
        safe = [score.normalised_return for score in cells.values() if score.safe]
        rows.append(
            [
                task,
                f"{limit:g}",
                *(_cell(cells.get(agent), max(safe, default=None), markup) for agent in agents),
            ]
        )
    if len(grid) > 1:
        rows += _totals(grid, agents, markup)
    return _lines(rows, markup) + f"\n\n{LEGEND.replace('*', _star(markup))}"


def describe_score(score: FieldScore) -> str:
    """Return a few lines that describe a score: task, runs, return, cost and verdict."""
    returns, costs = score.run_returns[:, None], score.run_costs[:, None]
    raw = [np.mean([run.returns for run in score.runs]), np.mean([run.costs for run in score.runs])]
    seeds = ", ".join(str(run.seed) for run in score.runs)
    seeds = f"seeds {seeds}" if len(score.runs) > 1 else f"seed {seeds}"
    spread = "trained with these seeds" if score.trained_apart else "of one agent"
    runs = "1 run" if len(score.runs) == 1 else f"{len(score.runs)} runs"
    lines = [
        f"task      {score.task}, cost limit {score.cost_limit:g}, reference returns "
        f"{score.references.least:.6g} and {score.references.greatest:.6g}",
        f"agent     {score.agent}, {runs} {spread} ({seeds}) of "
        f"{len(score.runs[0].returns)} episodes",
        f"return    {raw[0]:.6g}; normalised {score.normalised_return:.3f}{_middle(returns)}",
        f"cost      {raw[1]:.6g}; normalised {score.normalised_cost:.3f}{_middle(costs)}",
    ]
    if score.intervention_rate is not None:
        lines.append(f"replaced  {score.intervention_rate:.1%} of the actions")
    verdict = "safe: at most 1" if score.safe else "unsafe: above 1"
    lines.append(f"verdict   normalised cost {score.normalised_cost:.3f}, {verdict}")
    return "\n".join(lines)


def _grid(scores: Sequence[FieldScore]) -> dict[str, dict[str, FieldScore]]:
    if not scores:
        raise ValueError("scores must hold at least one FieldScore, got none")
    grid: dict[str, dict[str, FieldScore]] = {}
    for score in scores:
        cells = grid.setdefault(score.task, {})
        if score.agent in cells:
            raise ValueError(
                f"{score.agent} has two scores on {score.task}; give the agents different names"
            )
        other = next(iter(cells.values()), score)
        if (other.cost_limit, other.references) != (score.cost_limit, score.references):
            raise ValueError(
                f"scores on {score.task} must share cost limit and reference returns, got "
                f"{other.cost_limit:g}, {other.references} and {score.cost_limit:g}, "
                f"{score.references}"
            )
        cells[score.agent] = score
    return grid


def _totals(
    grid: Mapping[str, Mapping[str, FieldScore]], agents: Sequence[str], markup: Markup
) -> list[list[str]]:
    means, middles, safes = ["mean", ""], ["interquartile mean", ""], ["safe on", ""]
    for agent in agents:
        found = [cells[agent] for cells in grid.values() if agent in cells]
        if len(found) < len(grid) or len({len(score.runs) for score in found}) > 1:
            for row in (means, middles, safes):
                row.append("-")
            continue
        total = aggregate(found)
        means.append(_marked(total.mean_return, total.mean_cost, total.safe, "", markup))
        middles.append(
            f"{total.iqm_return:.2f}{_interval(total.return_interval, 2)} / "
            f"{total.iqm_cost:.2f}{_interval(total.cost_interval, 2)}"
        )
        safes.append(f"{total.safe_tasks} of {len(grid)}")
    return [means, middles, safes]


def _cell(score: FieldScore | None, best: float | None, markup: Markup) -> str:
    if score is None:
        return "-"
    star = _star(markup) if score.safe and score.normalised_return == best else ""
    return _marked(score.normalised_return, score.normalised_cost, score.safe, star, markup)


def _marked(reward: float, cost: float, safe: bool, star: str, markup: Markup) -> str:
    text = f"{reward:.2f}{star} / {cost:.2f}"
    if not safe:
        return f"({text})"
    return f"**{text}**" if markup == "markdown" else text


def _star(markup: Markup) -> str:
    return r"\*" if markup == "markdown" else "*"


def _lines(rows: Sequence[Sequence[str]], markup: Markup) -> str:
    if markup == "markdown":
        ruled = [rows[0], ["---", *["---:"] * (len(rows[0]) - 1)], *rows[1:]]
        return "\n".join("| " + " | ".join(row) + " |" for row in ruled)
    return aligned(rows, 1)


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Return rows as aligned columns of text, with a line below the first row, the header.

    Args:
        rows: Rows of cells, all of one length.
        left: Number of columns, counted from the first, that are left-aligned.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust if i < left else str.rjust for i in range(len(widths))]
    lines = [
        "  ".join(
            put(cell, width) for put, cell, width in zip(sides, row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _middle(scores: npt.NDArray[np.float64]) -> str:
    """Return the interquartile mean of several runs, and its interval, as text."""
    if len(scores) == 1:
        return ""
    interval = _interval(stratified_interval(scores), 3)
    return f"; interquartile mean of the runs {interquartile_mean(scores):.3f}{interval}"


def _interval(interval: Interval | None, digits: int) -> str:
    if interval is None:
        return ""
    return f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
