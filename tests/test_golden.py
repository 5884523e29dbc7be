"""Behavior is what it was: weights, actions, files and import paths, against `tests/golden`.

Figures agree to 1e-4 of a tensor's size, or 1e-3 of a value, because processors round differently.
Where a change is intended, `golden.make` writes the new figures.
"""

from __future__ import annotations

import importlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import make
from safetensors.numpy import load_file, save_file

from safeshield import OfflineDataset, Shield
from safeshield.algorithms.registry import load_agent

WEIGHTS, CHECKPOINTS = make.read("weights.json"), make.read("checkpoints.json")
AGENTS, SHIELDS = make.read("agents.json"), make.read("shields.json")
SPECS, IMPORTS = make.read("specs.json"), make.read("imports.json")


@pytest.fixture(scope="module")
def log() -> OfflineDataset:
    return make.golden_log()


def test_the_log_is_collected_again(log: OfflineDataset) -> None:
    again = make.collected_log()
    for name in ("observations", "actions", "rewards", "next_observations", "constraints"):
        np.testing.assert_allclose(getattr(again, name), getattr(log, name), rtol=1e-5, atol=1e-5)
    for name in ("terminated", "truncated", "costs"):
        np.testing.assert_array_equal(getattr(again, name), getattr(log, name))
    assert (again.observation_space, again.action_space) == (
        log.observation_space,
        log.action_space,
    )


def test_every_learner_has_stored_weights(log: OfflineDataset) -> None:
    assert set(WEIGHTS) == set(make.trained(log))


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_after_thirty_updates(name: str, log: OfflineDataset) -> None:
    make.check_fingerprint(make.weights_of(make.trained(log)[name]()), WEIGHTS[name])


def test_a_fingerprint_tells_a_change_of_one_part_in_a_thousand(tmp_path: Path) -> None:
    """Of one entry of the largest tensor, which is above the tolerance."""
    path, other = make.GOLDEN / "shield_nearest.safetensors", tmp_path / "other.safetensors"
    weights = load_file(path)
    name = max(weights, key=lambda key: weights[key].size)
    changed = weights[name].copy()
    changed.ravel()[np.abs(changed).argmax()] += 1e-3 * np.linalg.norm(changed)
    save_file({**weights, name: changed}, other)
    make.check_fingerprint(make.fingerprint(path), make.fingerprint(path))
    with pytest.raises(AssertionError, match=name):
        make.check_fingerprint(make.fingerprint(other), make.fingerprint(path))


@pytest.mark.parametrize("name", AGENTS)
def test_stored_agents_act_as_they_did(name: str) -> None:
    stored = AGENTS[name]
    found = make.agent_answers(make.GOLDEN / name, make.points_from(stored.pop("states")))
    make.close(make.plain(found), stored, name)


@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_that_is_written_again_keeps_its_weights(name: str, tmp_path: Path) -> None:
    load_agent(make.GOLDEN / name).save(tmp_path / name)
    assert make.fingerprint(tmp_path / name) == make.fingerprint(make.GOLDEN / name)


@pytest.mark.parametrize("name", SHIELDS)
def test_stored_shields_judge_and_replace_as_they_did(name: str, tmp_path: Path) -> None:
    stored = SHIELDS[name]
    states, actions = (make.points_from(stored.pop(key)) for key in ("states", "actions"))
    shield = Shield.load(make.GOLDEN / name)
    make.close(make.plain(make.shield_answers(shield, states, actions)), stored, name)
    # One by one, and from a file that this version has written, it does the same.
    shield.save(tmp_path / name)
    again = Shield.load(tmp_path / name)
    assert (again.delta, again.replacement) == (shield.delta, shield.replacement)
    assert again.record == shield.record
    for row in range(len(actions)):
        one = (
            {key: part[row] for key, part in states.items()}
            if isinstance(states, dict)
            else (states[row])
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            executed, report = again.filter(one, actions[row])
        make.close(make.plain(executed), stored["executed"][row], f"{name} {row}")
        for key, value in report._asdict().items():
            make.close(make.plain(value), stored[key][row], f"{name} {row} {key}")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_run_goes_on_from_a_stored_checkpoint(
    name: str, log: OfflineDataset, tmp_path: Path
) -> None:
    """And ends with the weights of one that was never stopped."""
    shutil.copy(make.GOLDEN / name, tmp_path)
    learner = make.OFFLINE[Path(name).stem.removeprefix("checkpoint_")]()
    half = make.fingerprint(tmp_path / name)
    learner.fit(log, steps=make.UPDATES, checkpoint=tmp_path / name)
    make.check_fingerprint(make.weights_of(learner), CHECKPOINTS[name])
    assert make.fingerprint(tmp_path / name) != half


def test_agents_of_earlier_releases_keep_the_label_of_their_logs() -> None:
    for name in ("safefql", "r2pac"):
        agent = load_agent(make.GOLDEN / f"agent_{name}.safetensors")
        assert agent.config.label_magnitude == 25.0


@pytest.mark.parametrize("name", SPECS)
def test_environments_of_stored_specs_do_as_they_did(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make.GOLDEN)
    env = make.from_spec(SPECS[name]["spec"])
    make.close(make.first_steps(env), SPECS[name]["steps"], name)


def test_wrapped_environments_have_the_specs_that_they_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make.GOLDEN)
    for name, env in make.wrapped().items():
        assert env.spec is not None
        found, stored = json.loads(env.spec.to_json()), json.loads(SPECS[name]["spec"])
        for key in ("id", "kwargs", "additional_wrappers"):
            assert found[key] == stored[key], (name, key)


def test_a_calibration_writes_the_record_that_it_wrote() -> None:
    found = make.record_of(Shield.load(make.GOLDEN / "shield_calibrated.safetensors"))
    make.close(found, make.read("record.json"), "record")


@pytest.mark.filterwarnings("ignore")
def test_the_ten_lines_at_a_tiny_size(capsys: pytest.CaptureFixture[str]) -> None:
    make.close(make.ten_lines(), make.read("ten_lines.json"), "ten lines", share=3e-3)


@pytest.mark.parametrize("module", IMPORTS)
def test_documented_imports_keep_working(module: str) -> None:
    home: Any = importlib.import_module(module)
    for name in IMPORTS[module]:
        if not hasattr(home, name):
            importlib.import_module(f"{module}.{name}")


def test_files_of_every_other_format_hold_what_they_held() -> None:
    """Logs in HDF5, flights, a monitor's file, and kinds of shields that are newer."""
    make.close(make.format_answers(), make.read("formats/answers.json"), "formats")


@pytest.mark.parametrize("name", make.VERSION_2)
def test_a_shield_in_version_2_acts_as_in_version_1(name: str) -> None:
    stored = make.read("shields.json")[f"shield_{name}.safetensors"]
    states, actions = (make.points_from(stored[key]) for key in ("states", "actions"))
    old, new = (
        make.plain(make.shield_answers(Shield.load(folder / f"shield_{name}.safetensors"),
                                       states, actions))
        for folder in (make.GOLDEN, make.FORMATS)
    )  # fmt: skip
    assert old == new


def test_all_files_are_compared_and_small() -> None:
    files = {path.name: path.stat().st_size for path in make.GOLDEN.glob("*.*")}
    held = {name for name in files if name.endswith(".safetensors")}
    assert held == {*AGENTS, *SHIELDS, *CHECKPOINTS}
    assert sum(files.values()) < 1.5e6
    formats = {path.name: path.stat().st_size for path in make.FORMATS.rglob("*.*")}
    shields = {f"shield_{name}.safetensors" for name in (*make.VERSION_2, "backup", "committed")}
    others = {"answers.json", "log.hdf5", "000001.flight", "promise.json"}
    assert set(formats) == shields | others
    assert sum(formats.values()) < 3e5
