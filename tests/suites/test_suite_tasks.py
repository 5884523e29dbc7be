"""The table of tasks against DSRL's own source, and the doctor where everything is installed."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from safeshield.cli import app
from safeshield.suites import TASKS, Family
from safeshield.suites.doctor import Part, State, examine, healthy
from safeshield.suites.labels import log_label
from safeshield.suites.packages import STACK


def dsrls_tables() -> dict[str, dict[str, Any]]:
    """Read DSRL's infos.py without running it."""
    spec = find_spec("dsrl")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).with_name("infos.py").read_text())
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }


def test_the_table_is_dsrls() -> None:
    tables = dsrls_tables()
    assert len(TASKS) == 38
    assert set(TASKS) == set(tables["MAX_EPISODE_REWARD"])
    for name, task in TASKS.items():
        assert task.name == name
        assert task.horizon == tables["DEFAULT_MAX_EPISODE_STEPS"][name]
        assert task.min_return == tables["MIN_EPISODE_REWARD"][name]
        assert task.max_return == tables["MAX_EPISODE_REWARD"][name]
        assert task.max_cost == tables["MAX_EPISODE_COST"][name]
        # Its logs are called after the environments they were made in.
        if task.family is not Family.metadrive:
            assert f"/{task.env_id}-" in tables["DATASET_URLS"][name]


@pytest.mark.parametrize("name", TASKS)
def test_what_h_measures_is_told_where_logs_are_labelled_continuously(name: str) -> None:
    assert log_label(name) is not None
    assert TASKS[name].constraint.count("m") >= 1  # in metres, or metres a second


def test_the_stack_is_the_one_that_was_tried() -> None:
    assert [package.name for package in STACK if not package.as_tried] == []


def test_the_doctor_finds_everything_at_work() -> None:
    findings = examine()
    assert {one.part: one.state for one in findings} == dict.fromkeys(Part, State.works), findings
    assert healthy(findings, list(Part))
    assert not any(one.commands or one.untried for one in findings)
    (dsrl,) = [one for one in findings if one.part is Part.dsrl]
    assert "OfflinePointGoal1Gymnasium-v0 (" in dsrl.detail
    assert dsrl.versions["dsrl"] == "0.1.0"


def test_plain_ids_are_known_to_the_command_line(tmp_path: Path) -> None:
    log = tmp_path / "log.hdf5"
    result = CliRunner().invoke(app, ["collect", "SafetyBallRun-v0", str(log), "--episodes", "2"])
    assert result.exit_code == 0, result.output
    assert "200 transitions" in result.output
