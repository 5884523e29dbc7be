"""Cells of the matrix on a task of Bullet-Safety-Gym: trained, played, in the table."""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium as gym
import pytest

import safeshield.suites  # noqa: F401 - registers the tasks
from safeshield import collect
from safeshield.suites.tasks import find_task

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import matrix
import suites


def test_cells_are_trained_and_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = gym.make(find_task("BallRun").env_id)
    collect(env, "random", episodes=20, seed=0).save(tmp_path / "BallRun.hdf5")
    monkeypatch.setattr(suites, "PPO_STEPS", 64)
    command = ["matrix.py", "--data", tmp_path, "--folder", tmp_path / "cells", "--out", tmp_path]
    command += ["--tasks", "BallRun", "--seeds", 3, "--updates", 9, "--episodes", 2]
    command += ["--methods", "bc", "ppo-shield"]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    for _ in range(2):  # The second call has nothing left to do.
        with pytest.raises(SystemExit) as ended:
            matrix.main()
        assert not ended.value.code
    rows = {row["method"]: row for row in matrix.read_csv(tmp_path / "matrix.csv")}
    assert list(rows) == ["bc", "ppo", "ppo-shield", "safefql"]
    for row in rows.values():
        assert (row["task"], row["seed"], row["episodes"]) == ("BallRun", "3", "2")
        assert row["peak_memory_mb"] == ""
        assert float(row["training_seconds"]) >= 0  # rounded to tenths; empty where interrupted
    # PPO draws its actions, unless it plays deterministically.
    assert rows["ppo"]["return_deployed"] != rows["ppo"]["return_deterministic"]
    assert rows["ppo"]["replaced_deployed"] == "" != rows["ppo-shield"]["replaced_deployed"]
    assert [row["problem"] for row in matrix.read_csv(tmp_path / "logs.csv")] != [""]
    assert "BallRun" in (tmp_path / "matrix.md").read_text()
