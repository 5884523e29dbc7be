"""Scores, worker processes and learners on environments of the field's, each family once."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest

from safeshield.collection import LearnerConfig, collect_while_learning
from safeshield.data.dataset import OfflineDataset
from safeshield.evaluation import ReferenceReturns, field_score


def found(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


pytestmark = [
    pytest.mark.skipif(
        not (found("bullet_safety_gym") and found("safety_gymnasium")),
        reason="needs the benchmark stack",
    ),
    pytest.mark.filterwarnings("ignore"),
]
TASKS = (
    "SafetyBallRun-v0",
    "SafetyHopperVelocityGymnasium-v1",
    "SafetyPointCircle1Gymnasium-v0",
)
CONFIG = LearnerConfig(
    num_envs=2, rollout_steps=100, batch_size=50, epochs=1, hidden=(8,), segment_steps=200
)


@pytest.mark.parametrize("task", TASKS)
def test_workers_score_as_this_process_does(task: str) -> None:
    env = gym.make(f"safeshield.suites:{task}")
    references = ReferenceReturns(-1000.0, 1600.0)
    scores = [
        field_score(env, "random", references=references, seeds=(0, 1), episodes=3, workers=workers)
        for workers in (0, 2)
    ]
    assert scores[0] == scores[1]
    assert scores[0].task == task
    assert all(cost >= 0.0 for run in scores[0].runs for cost in run.costs)


@pytest.mark.parametrize("task", TASKS)
def test_learners_log_in_dsrls_form_and_go_on_exactly(task: str, tmp_path: Path) -> None:
    def learners(folder: str, steps: int) -> OfflineDataset:
        env = gym.make(f"safeshield.suites:{task}")
        return collect_while_learning(
            env, tmp_path / folder, limits=(0.0,), steps=steps, config=CONFIG
        )

    log = learners("straight", 400)
    learners("interrupted", 200)
    again = learners("interrupted", 400)
    for field in dataclasses.fields(log):
        mine, theirs = getattr(log, field.name), getattr(again, field.name)
        if isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, theirs, field.name)
    assert len(log) >= 400
    assert set(np.unique(log.costs)) <= {0.0, 1.0}
    log.save(tmp_path / "log.hdf5")
    with h5py.File(tmp_path / "log.hdf5") as file:
        assert {"observations", "next_observations", "actions", "rewards", "costs", "terminals",
                "timeouts"} <= set(file)  # fmt: skip
        ends = file["timeouts"][()].sum() + file["terminals"][()].sum()
    assert ends == log.num_episodes
