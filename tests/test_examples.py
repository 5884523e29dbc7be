"""Every example runs as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
    if path.stem == "cliff_walking_maskable_ppo":
        table = dict(line.split()[:2] for line in done.stdout.splitlines() if "shielded" in line)
        assert table["shielded"] == "0"  # falls in the whole of training
        assert int(table["unshielded"]) > 10
        assert "\n0 of 148 moves misjudged, 11 deadly\n" in done.stdout
