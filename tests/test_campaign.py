"""The campaign of docs/reliability.md finds nothing in its quick form, and finds planted faults."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs forked processes")


def test_the_quick_campaign_finds_nothing() -> None:
    run = subprocess.run(
        [sys.executable, BENCHMARKS / "campaign.py", "--quick"],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [line for line in run.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 13
    for row in rows:
        counts = [part.rpartition(" ")[2] for part in row.split(" | ")[2].split(", ")]
        assert set(counts) == {"0"}, row


def test_a_reader_that_fails_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import campaign

    def make(folder: Path) -> Path:
        (folder / "x").write_bytes(bytes(8))
        return folder / "x"

    def read(path: Path) -> str:
        raw = path.read_bytes()
        if len(raw) < 4:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(raw) > 8:
            raise ZeroDivisionError
        if raw[0]:
            os.system("true")
        return str(raw)

    counts = campaign.files_of(campaign.Format("planted", make, read))(60, tmp_path, 0)
    assert counts["crash"] > 2
    assert counts["silent change"] > 2
    assert counts["code run"] > 0


def test_an_action_that_was_not_judged_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import campaign

    shield = campaign.shield()
    seen, safe, unsafe = (np.array(x, np.float32) for x in ([1.3, 1.5], [-1.0], [1.0]))
    middle = np.zeros(2, np.float32)
    plain = np.ndarray
    assert not campaign.unjudged(shield, middle, (plain, safe), safe, False)
    assert not campaign.unjudged(shield, seen, (plain, safe), safe, True)
    assert campaign.unjudged(shield, seen, (plain, unsafe), unsafe, False)
    assert campaign.unjudged(shield, middle, (plain, safe), unsafe, False)
    assert campaign.unjudged(shield, middle, (plain, safe.astype("f8")), safe, False)
    assert campaign.unjudged(shield, middle, (np.ma.MaskedArray, safe), safe, False)
    assert campaign.unjudged(shield, middle, (plain, safe * np.nan), safe * np.nan, True)
