"""The engine of the matrix: order, failures, interruptions, floors of logs, tables."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safeshield import OfflineDataset
from safeshield.algorithms.behaviour_cloning import BehaviourCloning, BehaviourCloningConfig
from safeshield.data.card import card_of
from safeshield.suites.tasks import TASKS, find_task

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
sys.path.insert(0, BENCHMARKS)

import matrix  # noqa: E402
import suites  # noqa: E402
from matrix import Cell, Floors, Work  # noqa: E402

NEEDS = {"bc-shield": ("bc", "safefql")}


def log(returns: list[float], costs: list[float]) -> OfflineDataset:
    """Episodes of one step with these returns and costs."""
    count = len(returns)
    states = np.arange(count, dtype=np.float32)[:, None]
    return OfflineDataset.from_arrays(
        observations=states,
        actions=np.zeros((count, 1)),
        rewards=returns,
        next_observations=states + 0.5,
        terminated=np.ones(count, bool),
        truncated=np.zeros(count, bool),
        costs=costs,
    )


def row(method: str, seed: int, shift: float = 0.0) -> dict[str, Any]:
    """What a cell stores."""
    run = {"seed": 100 + seed, "intervention_rate": None}
    return {
        "task": "BallRun",
        "method": method,
        "seed": seed,
        "updates": suites.updates_of(method, None),
        "references": {"least": -100.0, "greatest": 300.0},
        "deployed": {**run, "returns": [0.0, 200.0 + shift], "costs": [0.0, 12.0]},
        "deterministic": {**run, "returns": [300.0, 300.0], "costs": [30.0, 30.0]},
        "training_seconds": 3.0,
        "playing_seconds": 1.0,
        "peak_memory_mb": None,
        "processor": "a processor",
        "safeshield": "0.1.0",
    }


# -- order ----------------------------------------------------------------------------------------


def test_the_tasks_are_those_of_the_papers() -> None:
    """R2PAC's 17, six of Point, two runners, nine of MetaDrive."""
    assert len(matrix.MATRIX) == len(set(matrix.MATRIX)) == 34
    count = {family: 0 for family in {task.family for task in TASKS.values()}}
    for name in matrix.MATRIX:
        count[find_task(name).family] += 1
    assert sorted(count.values()) == [5, 8, 9, 12]


def test_a_cell_comes_after_those_whose_agents_it_uses_and_only_once() -> None:
    cells = matrix.plan(["A", "B"], ["bc-shield", "bc"], [0, 1], NEEDS)
    assert len(cells) == len(set(cells)) == 12
    for cell in cells:
        for name in NEEDS.get(cell.method, ()):
            assert cells.index(Cell(cell.task, name, cell.seed)) < cells.index(cell)
    assert [cell.seed for cell in cells] == [0] * 6 + [1] * 6


def test_a_failure_stops_only_what_needs_it() -> None:
    did = []

    def work(cell: Cell) -> None:
        did.append(str(cell))
        if cell.method == "safefql" and cell.task == "A":
            raise ValueError("no log")

    cells = matrix.plan(["A", "B"], ["bc-shield"], [0], NEEDS)
    failed = matrix.run(cells, work, NEEDS)
    assert {str(cell): error for cell, error in failed.items()} == {
        "A_safefql_0": "ValueError: no log",
        "A_bc-shield_0": "a cell that it needs has failed",
    }
    assert set(did) == {"A_bc_0", "A_safefql_0", "B_bc_0", "B_safefql_0", "B_bc-shield_0"}


# -- interruptions --------------------------------------------------------------------------------

DRIVER = """
import os, signal, sys
from pathlib import Path
import matrix, suites

folder = Path(sys.argv[1])
def cell(task, method, seed, *_):
    with (folder / "did").open("a") as stream:
        print(task, file=stream)
    if task == "CarRun" and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    run = {"returns": [1.0], "costs": [0.0], "seed": 0, "intervention_rate": None}
    return {"task": task, "method": method, "seed": seed, "updates": 5, "deployed": run,
            "deterministic": run, "references": {"least": 0.0, "greatest": 1.0},
            "training_seconds": 1.0, "playing_seconds": 1.0, "peak_memory_mb": 1}
suites.cell = cell
matrix.look_at_log = lambda data, task: {"task": task, "problem": "", "sha256": "0"}
sys.argv = ["matrix.py", "--data", str(folder), "--folder", str(folder / "cells"), "--out",
            str(folder / "out"), "--tasks", "BallRun", "CarRun", "AntRun", "--methods", "bc",
            "--seeds", "0", "--updates", "5", "--episodes", "1", *sys.argv[2:]]
matrix.main()
"""


def driver(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([BENCHMARKS, *sys.path])},
        capture_output=True,
        text=True,
    )


def test_a_killed_driver_goes_on_where_it_was(tmp_path: Path) -> None:
    first = driver(tmp_path)
    assert first.returncode == -9, first.stderr
    assert not (tmp_path / "out" / "matrix.csv").exists()
    second = driver(tmp_path)
    assert second.returncode == 0, second.stderr
    assert "1 of 3 cells have a result" in second.stdout
    assert (tmp_path / "did").read_text().split() == ["BallRun", "CarRun", "CarRun", "AntRun"]
    third = driver(tmp_path)
    assert "3 of 3 cells have a result" in third.stdout
    assert len((tmp_path / "did").read_text().split()) == 4
    rows = matrix.read_csv(tmp_path / "out" / "matrix.csv")
    assert [one["task"] for one in rows] == ["AntRun", "BallRun", "CarRun"]
    # A result of other settings is neither used nor replaced.
    other = driver(tmp_path, "--episodes", "2")
    assert "must hold a result of 5 updates and 2 episodes, got 5 and 1" in other.stderr
    assert len((tmp_path / "did").read_text().split()) == 4


def test_two_drivers_do_not_share_a_folder(tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / "cells").mkdir()
    with FileLock(tmp_path / "cells" / "matrix.lock"):
        told = driver(tmp_path)
    assert told.returncode == 1
    assert "another process runs the matrix in" in told.stderr
    assert not (tmp_path / "did").exists()


def test_a_result_of_one_way_to_play_is_made_again(tmp_path: Path) -> None:
    work = Work(tmp_path, tmp_path, None, 2, apart=False)
    cell = Cell("BallRun", "bc", 0)
    assert not work.stored(cell)
    full = row("bc", 0)
    former = {name: value for name, value in full.items() if name not in suites.WAYS}
    for stored, known in ((full, True), ({**former, "run": full["deterministic"]}, False)):
        (tmp_path / f"{cell}.json").write_text(json.dumps(stored))
        assert work.stored(cell) is known


# -- logs -----------------------------------------------------------------------------------------


def test_a_log_that_misses_a_floor_is_listed_with_the_reason(tmp_path: Path) -> None:
    task = find_task("BallRun")
    best = task.min_return + 0.5 * (task.max_return - task.min_return)
    floors = Floors(episodes=10)
    good = log([best] * 10, [0.0] * 5 + [11.0] * 5)
    for made, problem in (
        (good, ""),
        (good.select(range(9)), "episodes 9, below 10"),
        (log([best] * 10, [0.0] * 10), "share of unsafe episodes 0, below 0.05"),
        (log([best] * 10, [11.0] * 10), "share of safe episodes 0, below 0.05"),
        (log([0.0] * 10, [0.0, 11.0] * 5), "best return by DSRL's constants -0.0202, below 0.2"),
    ):
        made.save(tmp_path / "BallRun.hdf5")
        found = matrix.look_at_log(tmp_path, "BallRun", floors)
        assert found["problem"] == problem
        assert found["episodes"] == made.num_episodes
    assert floors.missed(card_of(good, limits=[10.0]), "BallRun") == []
    below = matrix.look_at_log(tmp_path, "BallRun", floors)
    assert not matrix.runs(below, None)
    assert matrix.runs(below, ["BallRun"])
    assert matrix.look_at_log(tmp_path, "CarRun")["problem"] == "there is no log"
    assert not matrix.runs(matrix.look_at_log(tmp_path, "CarRun"), ["CarRun"])
    (tmp_path / "AntRun.hdf5").write_bytes(b"no log")
    assert "AntRun.hdf5" in matrix.look_at_log(tmp_path, "AntRun")["problem"]


# -- tables ---------------------------------------------------------------------------------------


def test_both_ways_to_play_and_both_scales_have_columns_of_their_own(tmp_path: Path) -> None:
    task, tidy = find_task("BallRun"), matrix.tidy(row("bc", 0))
    assert (tidy["return_deployed"], tidy["return_deterministic"]) == (100.0, 300.0)
    assert (tidy["return_log_deployed"], tidy["return_log_deterministic"]) == (0.5, 1.0)
    scale = task.max_return - task.min_return
    assert tidy["return_dsrl_deterministic"] == pytest.approx((300.0 - task.min_return) / scale)
    assert (tidy["cost_deployed"], tidy["cost_deterministic"]) == (6.0, 30.0)
    assert (tidy["costly_deployed"], tidy["costly_deterministic"]) == (0.5, 1.0)


def test_the_tables_follow_from_the_csv_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, out = tmp_path / "cells", tmp_path / "out"
    cells.mkdir()
    for one in (row("bc", 0), row("bc", 1, 100.0), row("bc-shield", 0), row("bc-shield", 1)):
        (cells / f"{one['method']}_{one['seed']}.json").write_text(json.dumps(one))
    (cells / "other.json").write_text(json.dumps({"task": "BallRun"}))  # of another benchmark
    rows = matrix.results(cells)
    assert [(one["method"], one["seed"]) for one in rows] == [
        ("bc", 0), ("bc", 1), ("bc-shield", 0), ("bc-shield", 1)
    ]  # fmt: skip
    matrix.write_csv(out / "matrix.csv", rows)
    matrix.write_csv(out / "logs.csv", [{"task": "BallRun", "problem": "", "episodes": 600}])
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--report", "--out", str(out)])
    matrix.main()
    page = (out / "matrix.md").read_text()
    # Deployed: mean returns 100 and 150 of the scale -100 to 300, a cost of 6 of 10.
    assert "| BallRun | 10 | **0.56\\* / 0.60** | **0.50 / 0.60** |" in page
    assert "| BallRun | 10 | (1.00 / 3.00) | (1.00 / 3.00) |" in page
    assert page.count("BC + shield") == 4
    assert "| bc | 6000 | 3 | - |" in page
    assert "| BallRun | 600 | - | - | - | - |" in page
    assert (out / "matrix.png").read_bytes().startswith(b"\x89PNG")
    with (out / "matrix.csv").open(newline="") as stream:
        again = list(csv.DictReader(stream))
    assert [float(one["return_deployed"]) for one in again] == [100.0, 150.0, 100.0, 100.0]


def test_a_report_needs_results(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must have a row; run the matrix first"):
        matrix.report(tmp_path)


def test_an_agent_that_was_chosen_by_play_or_trained_otherwise_is_refused(tmp_path: Path) -> None:
    config = BehaviourCloningConfig(hidden=(4,), batch_size=8)
    agent = BehaviourCloning(config, device="cpu").fit(log([1.0, 2.0], [0.0, 1.0]), 3)
    path = suites.path_of("BallRun", "bc", 0, tmp_path)
    agent.save(path)
    assert suites.trained("BallRun", "bc", 0, tmp_path, tmp_path, 3).updates == 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="an agent of 4 updates, its last, got 3 updates"):
        suites.trained("BallRun", "bc", 0, tmp_path, tmp_path, 4)
    agent.chosen = "with a simulator"
    agent.save(path)
    with pytest.raises(ValueError, match="chosen with a simulator; pass"):
        suites.trained("BallRun", "bc", 0, tmp_path, tmp_path, 3)
