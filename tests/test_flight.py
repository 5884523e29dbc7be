"""The flight recorder: rows against infos, files, kills, full disks, and logs made of flights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

from safeshield import FlightLog, OfflineDataset, ShieldLog
from safeshield.envs.vector import autoreset_modes
from safeshield.monitoring import FlightWarning
from safeshield.shield import Shield
from safeshield.wrappers import SafetyShield, VectorSafetyShield
from safeshield.wrappers.sb3 import VecSafetyShield

pytestmark = [
    pytest.mark.filterwarnings("ignore::safeshield.shield.shield.UncalibratedShieldWarning"),
]
Array = npt.NDArray[Any]
STEPS = 30


def boat(steps: int = STEPS) -> gym.Env[Any, Any]:
    return gym.make("safeshield/Boat-v0", max_episode_steps=steps)


def fly(env: gym.Env[Any, Any], episodes: int, seed: int = 0) -> list[dict[str, Any]]:
    """Play whole episodes and return what the environment returned at each step."""
    rng = np.random.default_rng(seed)
    told = []
    for episode in range(episodes):
        state, info = env.reset(seed=seed + episode)
        for step in itertools.count():
            action = rng.uniform(-1, 1, 2).astype(np.float32)
            after, reward, terminated, truncated, found = env.step(action)
            told.append(
                {
                    "seed": seed + episode, "episode": episode, "step": step,
                    "observation": state, "proposed": action, "executed": found["action_executed"],
                    "value": found["shield/value"], "threshold": found["shield/threshold"],
                    "h": info["constraint"], "reward": reward, "terminated": terminated,
                    "truncated": truncated, "replaced": found["shield/intervened"],
                }
            )  # fmt: skip
            state, info = after, found
            if terminated or truncated:
                break
    return told


def test_rows_are_what_the_wrapper_reports(shield: Shield, tmp_path: Path) -> None:
    with ShieldLog(tmp_path / "flight") as log:
        told = fly(SafetyShield(boat(), shield.with_delta(0.6), log=log), 6)
    flight = FlightLog.load(tmp_path / "flight")
    assert len(flight) == len(told) > 0
    for name in told[0].keys() - {"replaced"}:
        expected = np.array([one[name] for one in told])
        np.testing.assert_array_equal(flight.columns[name], expected, err_msg=name)
    replaced = np.array([one["replaced"] for one in told])
    assert replaced.any()
    np.testing.assert_array_equal(flight.columns["verdict"] != "accepted", replaced)
    assert set(flight.ends["verdict"]) == {"end"}
    assert flight.ends["step"].sum() == len(told)
    card = flight.card()
    assert (card["steps"], card["episodes"], card["unfinished"]) == (len(told), 6, 0)
    assert card["replaced_share"] == replaced.mean()
    assert (card["lost"], card["removed"], card["torn"]) == (0, 0, 0)
    assert card["shield"] == shield.digest
