"""The campaign of docs/reliability.md in its quick form: every count is 0."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parents[1] / "benchmarks" / "campaign.py"


@pytest.mark.skipif(sys.platform == "win32", reason="needs forked processes and their limits")
def test_the_quick_campaign_finds_nothing() -> None:
    run = subprocess.run(
        [sys.executable, CAMPAIGN, "--quick"],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [line for line in run.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 12
    for row in rows:
        counts = [part.rpartition(" ")[2] for part in row.split(" | ")[2].split(", ")]
        assert set(counts) == {"0"}, row
