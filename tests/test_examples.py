"""Every example runs as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import pytest

from safeshield import collect

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
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
