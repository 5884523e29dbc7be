"""Run the matrix, which is every method on every task, and make its tables and plots.

    pip install -e ".[suites,ray]" && pip install --no-deps -r requirements-suites.txt
    python benchmarks/logs.py --data FOLDER                    # the logs, FOLDER/TASK.hdf5
    python benchmarks/matrix.py --data FOLDER                  # in this process
    python benchmarks/matrix.py --data FOLDER --ray local      # on all cores of this machine
    python benchmarks/matrix.py --data FOLDER --ray HOST:PORT  # on a Ray cluster
    python benchmarks/matrix.py --report                       # tables and plots from the CSV files

A cell is one method on one task with one seed (benchmarks/suites.py). Its result is one JSON file
under --folder, beside the agent. A cell with a result is not run again, and a training that was
interrupted continues from its checkpoint: after a worker was killed in the same run, after this
process was killed in the next one. On Ray each cell is a task on one core, in a process of its own.
On a cluster, every machine must see the folders --data and --folder under the same paths and have
the same packages installed.

The tasks are 34 of DSRL's: the 17 of R2PAC's table, PointButton, PointGoal and PointPush, Hopper
and Walker2d, and MetaDrive's nine, and any other task of DSRL that has a log in the folder. A log
that is missing or misses a floor (`FLOORS`) is listed, and its task is left out, unless --tasks
names it and the log exists. All results of the folder go into OUT/matrix.csv, one row for each
cell, and what is known of the logs into OUT/logs.csv. --report makes OUT/matrix.md and
OUT/matrix.png of them.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, once
from filelock import FileLock, Timeout

from safeshield.data.card import DatasetCard, card_of
from safeshield.files.atomic import written_whole
from safeshield.suites.tasks import COST_LIMIT, TASKS, find_task

OUT = Path(__file__).parents[1] / "docs" / "results"
LEFT_OUT = ("PointCircle1", "PointCircle2", "CarCircle1", "CarCircle2")
MATRIX = tuple(name for name in TASKS if name not in LEFT_OUT)
"""The 34 tasks."""
ATTEMPTS = 4
"""Number of times that Ray starts a cell whose worker is killed."""
_NEEDED = "a cell that it needs has failed"


@dataclass(frozen=True)
class Cell:
    """One method on one task with one seed."""

    task: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}_{self.method}_{self.seed}"


# -- logs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floors:
    """What a log must hold so that methods can be compared on it."""

    episodes: int = 100
    """Number of episodes."""
    safe_share: float = 0.05
    """Share of the episodes whose cost is at most the limit."""
    unsafe_share: float = 0.05
    """Share of the episodes whose cost is above the limit."""
    best_return: float = 0.2
    """Greatest return of the log, normalised by DSRL's constants."""

    def missed(self, card: DatasetCard, task: str) -> list[str]:
        """Return the floors that the log with this card misses, in words."""
        (safe,), known = card.safe, find_task(task)
        best = (card.returns.greatest - known.min_return) / (known.max_return - known.min_return)
        found = {
            "episodes": (card.episodes, self.episodes),
            "share of safe episodes": (safe.share, self.safe_share),
            "share of unsafe episodes": (1.0 - safe.share, self.unsafe_share),
            "best return by DSRL's constants": (best, self.best_return),
        }
        return [
            f"{name} {value:.3g}, below {least:g}"
            for name, (value, least) in found.items()
            if value < least
        ]


FLOORS = Floors()


def look_at_log(data: Path, task: str, floors: Floors = FLOORS) -> dict[str, Any]:
    """Return a row of logs.csv. Its entry "problem" is empty where the task can be run."""
    path = data / f"{task}.hdf5"
    if not path.exists():
        return {"task": task, "problem": "there is no log"}
    try:
        card = card_of(path, limits=[COST_LIMIT])
    except (OSError, ValueError) as error:
        return {"task": task, "problem": " ".join(str(error).split())}
    (safe,) = card.safe
    return {
        "task": task,
        "problem": "; ".join(floors.missed(card, task)),
        "sha256": str(card.sha256)[:12],
        "episodes": card.episodes,
        "transitions": card.transitions,
        "least_return": card.returns.least,
        "greatest_return": card.returns.greatest,
        "safe_share": safe.share,
        "best_safe_return": safe.best_return,
        "mean_cost": card.costs.mean,
    }


# -- running --------------------------------------------------------------------------------------


def plan(
    tasks: Iterable[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    needs: Mapping[str, Sequence[str]],
) -> list[Cell]:
    """Return the cells in an order in which each comes after those whose agents it uses.

    A cell that another one needs is added where it was not asked for.
    """
    cells: dict[Cell, None] = {}
    for seed, method, task in itertools.product(seeds, methods, list(tasks)):
        for name in (*needs.get(method, ()), method):
            cells.setdefault(Cell(task, name, seed))
    return list(cells)


def run(
    cells: Sequence[Cell],
    work: Callable[[Cell], None],
    needs: Mapping[str, Sequence[str]],
    ray: str | None = None,
) -> dict[Cell, str]:
    """Do the work of all cells and return the errors of those that failed.

    A cell does not run where one that it needs has failed.

    Args:
        cells: Cells, each after those that it needs.
        work: Function that does the work of a cell. A second call after an interruption goes on.
        needs: Methods that a method needs, with the same task and seed.
        ray: Address of a Ray cluster as in `Shield.calibrate`; None runs in this process.
    """
    failed: dict[Cell, str] = {}
    found: dict[Cell, Any] = {}

    def before(cell: Cell) -> list[Cell]:
        needed = (Cell(cell.task, name, cell.seed) for name in needs.get(cell.method, ()))
        return [one for one in needed if one in found]

    def ended(cell: Cell, error: str) -> None:
        print(f"{cell}: {error or 'done'}", flush=True)
        if error:
            failed[cell] = error

    if ray is None:
        for cell in cells:
            found[cell] = attempt(work, cell, *(found[one] for one in before(cell)))
            ended(cell, found[cell])
        return failed
    from safeshield.rollouts.ray_workers import Cluster

    cluster = Cluster(ray)
    import ray as engine

    try:
        # A process ends after one cell, so that memory is that of the cell.
        start = engine.remote(num_cpus=1, max_retries=ATTEMPTS - 1, max_calls=1)(attempt)
        for cell in cells:
            found[cell] = start.remote(work, cell, *(found[one] for one in before(cell)))
        waiting = {reference: cell for cell, reference in found.items()}
        while waiting:
            # Of several that have ended, it returns the first: what a cell needs comes before it.
            (reference,), _ = engine.wait(list(waiting), num_returns=1)
            cell = waiting.pop(reference)
            try:
                error = engine.get(reference)
            except engine.exceptions.RayError as crash:
                error = f"its process was killed {ATTEMPTS} times ({' '.join(str(crash).split())})"
                error = _NEEDED if any(one in failed for one in before(cell)) else error
            ended(cell, error)
    finally:
        cluster.close()
    return failed


def attempt(work: Callable[[Cell], None], cell: Cell, *needed: str) -> str:
    """Do the work of a cell; return its error as text, empty where there is none.

    Args:
        work: Function that does the work.
        cell: The cell.
        needed: Errors of the cells that it needs.
    """
    if any(needed):
        return _NEEDED
    try:
        work(cell)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return ""


@dataclass(frozen=True)
class Work:
    """The work of a cell: its training, its episodes and its JSON file."""

    data: Path
    folder: Path
    updates: int | None
    episodes: int
    apart: bool
    """Whether each cell has a process of its own, so that its peak memory is known."""

    def __call__(self, cell: Cell) -> None:
        """Run the cell unless its result is stored."""
        once(
            str(cell),
            lambda: self._result(cell),
            folder=self.folder,
            redo=not self.stored(cell),
        )

    def _result(self, cell: Cell) -> dict[str, Any]:
        from suites import cell as result

        row = result(
            cell.task,
            cell.method,
            cell.seed,
            self.data,
            self.folder,
            self.updates,
            self.episodes,
        )
        return row if self.apart else {**row, "peak_memory_mb": None}

    def stored(self, cell: Cell) -> bool:
        """Return whether the cell has a result of these settings.

        Raises:
            ValueError: Its result is of another number of updates or episodes.
        """
        from suites import WAYS, trained_as, updates_of

        path = self.folder / f"{cell}.json"
        if not path.exists():
            return False
        row = json.loads(path.read_text())
        if not set(WAYS) <= set(row):  # Written before agents played in both ways.
            return False
        wanted = updates_of(trained_as(cell.method), self.updates), self.episodes
        there = row["updates"], len(row["deployed"]["returns"])
        if there != wanted:
            raise ValueError(
                f"{path} must hold a result of {wanted[0]} updates and {wanted[1]} episodes, got "
                f"{there[0]} and {there[1]}; pass the same --updates and --episodes, or another "
                "--folder"
            )
        return True


# -- the table ------------------------------------------------------------------------------------


def tidy(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of matrix.csv from the JSON of a cell.

    Returns and costs are means over the episodes. "return_log" is normalised by the least and the
    greatest return of the log, and "return_dsrl" by those of DSRL's log.
    """
    task, log = find_task(row["task"]), row["references"]
    cells: dict[str, Any] = {
        "task": task.name,
        "family": task.family.value,
        "method": row["method"],
        "seed": row["seed"],
        "updates": row["updates"],
        "episodes": len(row["deployed"]["returns"]),
        "least_return": log["least"],
        "greatest_return": log["greatest"],
        "cost_limit": COST_LIMIT,
    }
    for way in ("deployed", "deterministic"):
        run = row[way]
        mean = float(np.mean(run["returns"]))
        cells |= {
            f"return_{way}": mean,
            f"return_log_{way}": (mean - log["least"]) / (log["greatest"] - log["least"]),
            f"return_dsrl_{way}": (mean - task.min_return) / (task.max_return - task.min_return),
            f"cost_{way}": float(np.mean(run["costs"])),
            f"costly_{way}": float(np.mean(np.asarray(run["costs"]) > 0)),
            f"replaced_{way}": run["intervention_rate"],
        }
    costs = ("training_seconds", "playing_seconds", "peak_memory_mb")
    for name in (*costs, "processor", "safeshield"):
        cells[name] = row[name]
    return cells


def results(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of matrix.csv for all results in a folder, sorted by task and method."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        row = json.loads(path.read_text())
        if {"deployed", "deterministic", "references"} <= set(row):
            rows.append(tidy(row))
    return sorted(rows, key=lambda row: (row["task"], row["method"], row["seed"]))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a CSV file, with the columns of all rows; None is an empty entry."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part, part.open("w", newline="") as stream:
        table = csv.DictWriter(stream, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as text; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


# -- tables and plots -----------------------------------------------------------------------------


def scores_of(rows: Iterable[Mapping[str, str]], way: str, by: str) -> dict[str, list[Any]]:
    """Return the scores of each task and method, by the seeds of the task.

    Args:
        rows: Rows of matrix.csv.
        way: "deployed" or "deterministic".
        by: "log" or "dsrl", the returns that are 0 and 1.
    """
    from suites import ABLATIONS, NAMES

    from safeshield.evaluation import FieldScore, ReferenceReturns, Run

    cells: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        cells.setdefault((row["task"], row["method"]), []).append(row)
    groups: dict[str, list[Any]] = {}
    for (task, method), found in cells.items():
        first, known = found[0], find_task(task)
        references = (known.min_return, known.max_return)
        if by == "log":
            references = (float(first["least_return"]), float(first["greatest_return"]))
        # The table holds means, and a score needs no more than the mean of each run.
        runs = [
            Run(int(row["seed"]), (float(row[f"return_{way}"]),), (float(row[f"cost_{way}"]),))
            for row in found
        ]
        score = FieldScore(
            policy={**NAMES, **ABLATIONS}.get(method, method),
            task=task,
            references=ReferenceReturns(*references),
            cost_limit=float(first["cost_limit"]),
            runs=tuple(runs),
            shielded=method.endswith("-shield"),
            trained_apart=True,
        )
        seeds = ", ".join(sorted((row["seed"] for row in found), key=int))
        groups.setdefault(seeds, []).append(score)
    return groups


def report(out: Path) -> None:
    """Write matrix.md and matrix.png from the CSV files of a folder.

    Raises:
        FileNotFoundError: There is no matrix.csv, or it has no row.
    """
    from safeshield.evaluation import format_scores

    rows, logs = read_csv(out / "matrix.csv"), read_csv(out / "logs.csv")
    if not rows:
        raise FileNotFoundError(f"{out / 'matrix.csv'} must have a row; run the matrix first")
    lines = [
        "# The matrix",
        "",
        "`python benchmarks/matrix.py --report` writes this page from matrix.csv and logs.csv. An "
        "entry is the normalised return / the normalised cost, in bold where the cost is within "
        "the limit and in brackets where it is not.",
    ]
    for way, words in (
        ("deployed", "As deployed, with the agents' own noise"),
        ("deterministic", "Deterministic"),
    ):
        for by, of in (("log", "the log"), ("dsrl", "DSRL's constants")):
            lines += ["", f"## {words}; returns normalised by {of}"]
            for seeds, scores in sorted(scores_of(rows, way, by).items()):
                table = format_scores(scores, markup="markdown")
                lines += ["", f"Seeds {seeds}:", "", table]
    lines += ["", "## What a method takes", "", *costs(rows)]
    lines += ["", "## Logs", "", "| task | episodes | safe | best safe return | sha256 | problem |"]
    lines += ["|---|---:|---:|---:|---|---|"]
    for log in logs:
        share = log.get("safe_share") and f"{float(log['safe_share']):.0%}"
        best = log.get("best_safe_return") and f"{float(log['best_safe_return']):.4g}"
        entries = (log["task"], log.get("episodes"), share, best, log.get("sha256"), log["problem"])
        lines.append("| " + " | ".join(entry or "-" for entry in entries) + " |")
    draw(out / "matrix.png", rows)
    lines += ["", "A point is a task, filled where the mean cost is within the limit:"]
    lines += ["", "![Returns of all tasks, safe and unsafe](matrix.png)"]
    with written_whole(out / "matrix.md") as part:
        part.write_text("\n".join(lines) + "\n")
    print(f"the tables are in {out / 'matrix.md'}", flush=True)


def costs(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the lines of a table: processor seconds of training and memory of each method.

    The seconds are the median over the cells that were not interrupted, the memory is the largest
    peak of a cell that had a process of its own.
    """
    lines = ["| method | updates | training, s | peak memory, MB |", "|---|---:|---:|---:|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        updates = ", ".join(sorted({row["updates"] for row in mine}, key=int))
        seconds, memory = (
            [float(row[name]) for row in mine if row[name]]
            for name in ("training_seconds", "peak_memory_mb")
        )
        entries = [f"{np.median(seconds):.0f}" if seconds else "-"]
        entries.append(f"{max(memory):.0f}" if memory else "-")
        lines.append(f"| {method} | {updates} | {' | '.join(entries)} |")
    return lines


def draw(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Draw a line of points for each method: the returns of its tasks, filled where it is safe."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        way: list(itertools.chain(*scores_of(rows, way, "dsrl").values()))
        for way in ("deployed", "deterministic")
    }
    agents = list(dict.fromkeys(score.agent for scores in panels.values() for score in scores))
    figure = Figure(figsize=(11.0, 1.2 + 0.4 * len(agents)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharex=True, sharey=True, squeeze=False)[0]
    for panel, (way, scores) in zip(axes, panels.items(), strict=True):
        for at, agent in enumerate(agents):
            mine = [score for score in scores if score.agent == agent]
            returns = [score.normalised_return for score in mine]
            colours = ["tab:blue" if score.safe else "none" for score in mine]
            panel.scatter(returns, [at] * len(mine), c=colours, edgecolors="tab:blue")
            safe = sum(score.safe for score in mine)
            panel.annotate(
                f"{safe} of {len(mine)} safe",
                (1.0, at),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        panel.set_title(way)
        panel.set_xlabel("return normalised by DSRL's constants")
    axes[0].set_yticks(range(len(agents)), agents)
    axes[0].invert_yaxis()
    with written_whole(path) as part:
        figure.savefig(part, format="png", dpi=130)


# -- the command ----------------------------------------------------------------------------------


def main() -> None:
    """Run the cells without a result, and write the CSV files, the tables and the plot."""
    from suites import ABLATIONS, NAMES, NEEDS

    from safeshield.algorithms.registry import ALGORITHMS

    # In a dict each name occurs once, although most algorithms also have a name in NAMES.
    known = {**NAMES, **ABLATIONS, **{one.name: "" for one in ALGORITHMS.values() if one.offline}}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder of TASK.hdf5, logs in DSRL's format")
    add(
        "--tasks",
        nargs="+",
        metavar="TASK",
        choices=list(TASKS),
        help="default: the 34, and those with a log",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--methods", nargs="+", metavar="METHOD", default=list(NAMES), choices=list(known))
    add("--folder", type=Path, default=RESULTS / "suites", help="agents and results of the cells")
    add("--out", type=Path, default=OUT, help="folder of matrix.csv, logs.csv and the tables")
    add("--updates", type=int, help="updates of every offline method; default: suites.UPDATES")
    add("--episodes", type=int, default=20, help="episodes of a cell, in each way to act")
    add("--ray", metavar="ADDRESS", help="'local', 'auto' or host:port; default: this process")
    add("--table", action="store_true", help="write the CSV files of what is there; run nothing")
    add("--report", action="store_true", help="make tables and plots of the CSV files; no more")
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments.out)
        return
    if arguments.data is None:
        parser.error("--data is needed unless --report is given")
    sys.exit(bool(fill(arguments, NEEDS)))


def runs(log: Mapping[str, Any], named: Sequence[str] | None) -> bool:
    """Return whether a task is run: its log misses no floor, or it is named and its log is read."""
    return not log["problem"] or ("sha256" in log and log["task"] in (named or ()))


def fill(arguments: argparse.Namespace, needs: Mapping[str, Sequence[str]]) -> dict[Cell, str]:
    """Run the cells without a result, write the files, and return the errors of those that failed.

    Args:
        arguments: Arguments of the command line.
        needs: Methods that a method needs.

    Raises:
        RuntimeError: Another process runs the matrix in this folder.
        ValueError: A stored result is of other settings.
    """
    data, folder, out = (getattr(arguments, name).resolve() for name in ("data", "folder", "out"))
    there = sorted(path.stem for path in data.glob("*.hdf5") if path.stem in TASKS)
    tasks = arguments.tasks or list(dict.fromkeys([*MATRIX, *there]))
    logs = [look_at_log(data, task) for task in tasks]
    for row in logs:
        if row["problem"]:
            fate = "is run although" if runs(row, arguments.tasks) else "is left out:"
            print(f"{row['task']} {fate} {row['problem']}", flush=True)
    usable = [row["task"] for row in logs if runs(row, arguments.tasks)]
    work = Work(
        data, folder, arguments.updates, arguments.episodes, apart=arguments.ray is not None
    )
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[Cell, str] = {}
    try:
        with FileLock(folder / "matrix.lock", timeout=0):
            cells = plan(usable, arguments.methods, arguments.seeds, needs)
            missing = [cell for cell in cells if not work.stored(cell)]
            print(f"{len(cells) - len(missing)} of {len(cells)} cells have a result", flush=True)
            if missing and not arguments.table:
                failed = run(missing, work, needs, arguments.ray)
    except Timeout as error:
        raise RuntimeError(
            f"another process runs the matrix in {folder}; wait for it, or pass another --folder"
        ) from error
    earlier = {row["task"]: row for row in read_csv(out / "logs.csv")}
    earlier |= {row["task"]: row for row in logs}
    write_csv(out / "logs.csv", [earlier[task] for task in sorted(earlier)])
    rows = results(folder)
    if rows:
        write_csv(out / "matrix.csv", rows)
        report(out)
    for cell, error in failed.items():
        print(f"{cell} failed: {error}")
    return failed


if __name__ == "__main__":
    main()
