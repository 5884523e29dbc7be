"""The benchmark that puts statements from a log beside fresh episodes, on a tiny task."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")
sys.path.insert(0, BENCHMARKS)

import from_log_field  # noqa: E402
from from_log_field import Field, Judged, field, judged_rates  # noqa: E402

TASK = "double integrator"
pytestmark = pytest.mark.filterwarnings(
    "ignore::safeshield.shield.shield.UncalibratedShieldWarning"
)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command of one cell, with few updates and episodes."""
    task = from_log_field.TASKS[TASK]._replace(updates=40)
    monkeypatch.setitem(from_log_field.TASKS, TASK, task)
    for name, value in {"OWN_EPISODES": 300, "EVIDENCE": 60, "PART": 50, "FRESH": 100}.items():
        monkeypatch.setattr(from_log_field, name, value)
    options = ["--tasks", TASK, "--agents", "random", "--fresh", "100"]
    return ["--data", str(tmp_path), "--folder", str(tmp_path), *options]


def test_a_cell_resumes_and_a_bound_that_is_too_low_is_called_contradicted(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    field(words)
    first = capsys.readouterr().out
    assert f"| {TASK} | random | 0 |" in first
    assert "contradicted: none" in first
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "double_integrator_random_0_behind_1.json").unlink()
    field(words)
    assert capsys.readouterr().out == first, "the same seeds give the same episodes"
    changed = {p.name for p in tmp_path.iterdir() if p.stat().st_mtime_ns != times[p]}
    assert changed == {"double_integrator_random_0_behind_1.json"}

    path = tmp_path / "double_integrator_random_0_trial.json"
    trial = json.loads(path.read_text())
    path.write_text(json.dumps({**trial, "bound": 0.01}))
    behind = tmp_path / "double_integrator_random_0_behind_0.json"
    behind.write_text(json.dumps({**json.loads(behind.read_text()), "violating": 20}))
    field([*words, "--table"])
    assert f"'{TASK}, random, trial'" in capsys.readouterr().out
    cell = Field(TASK, "random", 0, tmp_path, tmp_path)
    assert judged_rates(cell)["trial"].events >= 20


@pytest.mark.parametrize(("events", "contradicted"), [(5, False), (11, False), (12, True)])
def test_a_statement_is_contradicted_by_the_99_percent_lower_limit(
    events: int, contradicted: bool
) -> None:
    """P(Bin(100, .05) >= 11) = .0115 and P(Bin(100, .05) >= 12) = .0043."""
    assert Judged(0.05, events, 100).contradicted is contradicted
    assert not Judged(None, events, 100).contradicted
    assert not Judged(0.05, 0, 0).contradicted
