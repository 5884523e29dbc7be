"""Every example runs as it stands."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import pytest

from safeshield import collect

NEEDED = {
    "torchrl_rollout": "torchrl",
    "track_with_mlflow": "mlflow",
    "track_with_wandb": "wandb",
    "two_boats_pettingzoo": "pettingzoo",
}
"""Packages that an example needs and that not every environment of the tests has."""
EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    if path.stem in NEEDED and find_spec(NEEDED[path.stem]) is None:
        pytest.skip(f"needs {NEEDED[path.stem]}")
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if path.stem == "own_loop":
        furthest = float(done.stdout.split("came to ")[1].split(" m")[0])
        assert 0.5 < furthest <= 1.0  # it drove up to the wall, and stopped before it
    if path.stem == "safest_of_n":
        now, before = done.stdout.split("it acts: ")[1].split(" as before: ")
        assert now == before.strip()
    if path.stem == "two_boats_pettingzoo":
        hits = done.stdout.split("hit ")[1].split(" rocks, the tug ")
        assert int(hits[0]) == 0 < int(hits[1].split()[0])
    if path.stem == "torchrl_rollout":
        assert "executed bit for bit: True" in done.stdout
        assert " 0 actions replaced" not in done.stdout
        assert "cost of all trips: 0" in done.stdout
    if path.stem == "track_with_mlflow":
        assert "400 updates, 8 metrics" in done.stdout
        assert list(tmp_path.glob("mlartifacts/*/artifacts/shield.safetensors"))
    if path.stem == "track_with_wandb":
        assert "400 updates, run" in done.stdout
        assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    if path.stem == "cliff_walking_maskable_ppo":
        table = dict(line.split()[:2] for line in done.stdout.splitlines() if "shielded" in line)
        assert table["shielded"] == "0"  # falls in the whole of training
        assert int(table["unshielded"]) > 10
        assert "\n0 of 148 moves misjudged, 11 deadly\n" in done.stdout


def test_an_algorithm_of_ones_own_is_trained_by_the_command_line(tmp_path: Path) -> None:
    """One file, no other: with it the algorithm trains and is read again, without it not."""
    log, plugin = tmp_path / "log.npz", EXAMPLES[0].parent / "safest_of_n.py"
    collect(gym.make("safeshield/Boat-v0"), "random", episodes=20, seed=0).save(log)

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "safeshield.cli", *map(str, command)],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip

    train = ("train", log, "agent.safetensors", "--algorithm", "safest-of-n", "--steps", 30,
             "--set", "critic_hidden=8", "--set", "flow_hidden=8")  # fmt: skip
    assert "must be one of" in run(*train).stderr
    done = run(*train, "--plugin", plugin)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "safest-of-n, 30 updates" in done.stdout
    told = run("inspect", "agent.safetensors", "--plugin", plugin)
    assert told.returncode == 0, told.stderr[-2000:]
    assert "candidates" in told.stdout
    assert "which this release does not know" in run("inspect", "agent.safetensors").stderr
